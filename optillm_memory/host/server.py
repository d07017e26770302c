"""Finds optillm's server module, however optillm was started, and lists what we use of it."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from optillm_memory.errors import HostError

# Each is checked by `doctor` on the installed optillm.
NAMES = (
    "app",
    "server_config",
    "known_approaches",
    "plugin_approaches",
    "load_plugins",
    "main",
    "execute_single_approach",
    "parse_combined_approach",
    "parse_conversation",
    "strip_optillm_approach_tags",
    "tagged_conversation_to_messages",
    "generate_streaming_completion",
    "count_reasoning_tokens",
)


def host() -> Any:
    """Return the serving module; `python -m optillm.server` runs a second copy of it, as `__main__`.

    Raises HostError if it lacks something that the plugin needs.
    """
    module: Any = sys.modules.get("__main__")
    if not all(hasattr(module, name) for name in ("app", "plugin_approaches", "execute_single_approach")):
        module = importlib.import_module("optillm.server")
    if missing := [name for name in NAMES if not hasattr(module, name)]:
        raise HostError(f"this optillm has no {', '.join(missing)} in its server module; run optillm-memory doctor")
    return module
