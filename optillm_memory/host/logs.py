"""The server's access log: what callers put into a URL of ours (a text to search for, a name) does not stay in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from optillm_memory.conversation.redact import redact
from optillm_memory.records import Level

_SERVER = "werkzeug"  # which serves optillm, and names its logger so
_QUERY = re.compile(r"(/v1/agent_memory/[^\s?\"]*)\?[^\s\"]*")


class AccessLogFilter(logging.Filter):
    """Takes the queries of our routes out of the server's access log, and secrets out of the rest of its lines."""

    def __init__(self, level: Callable[[], Level]) -> None:
        """Ask `level` for the level of redaction with each line."""
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the line; it is always logged."""
        if self._level() != "off":
            # Not the callers' addresses: they are what the log is for.
            record.msg, record.args = redact(_QUERY.sub(r"\1?…", record.getMessage())), ()
        return True


def attach(level: Callable[[], Level]) -> None:
    """Add the filter to the server's logger, once."""
    logger = logging.getLogger(_SERVER)
    if not any(isinstance(known, AccessLogFilter) for known in logger.filters):
        logger.addFilter(AccessLogFilter(level))
