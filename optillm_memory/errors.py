"""Errors of optillm-memory.

- AgentMemoryError: whatever this package raises on purpose.
  - InvalidField: a field of a request or of feedback is wrong; names the field and the fix.
  - NotFound: no such trace, episode or memory in the caller's scope.
  - TooLarge: a body is larger than the limit it is held to.
  - StoreError: the database cannot do what was asked.
    - StoreUnavailable: it cannot be written now; nothing was acknowledged.
    - StoreTooNew: it was written by a newer release than this one.
  - EncoderUnavailable: the encoder's package or weights are missing; says what to install.
  - HostError: optillm is not as the plugin needs it.
"""

from __future__ import annotations


class AgentMemoryError(Exception):
    """Whatever this package raises on purpose."""


class InvalidField(AgentMemoryError, ValueError):
    """A field of a request or of feedback is wrong; `param` names it, the message says the fix."""

    def __init__(self, param: str, message: str) -> None:
        """Keep the field's name beside the message."""
        super().__init__(f"{param}: {message}")
        self.param = param


class NotFound(AgentMemoryError, LookupError):
    """No such trace, episode or memory in the caller's scope."""


class TooLarge(AgentMemoryError, ValueError):
    """A body is larger than the limit it is held to."""


class StoreError(AgentMemoryError):
    """The database cannot do what was asked."""


class StoreUnavailable(StoreError):
    """It cannot be written now; nothing was acknowledged."""


class StoreTooNew(StoreError):
    """It was written by a newer release than this one."""


class EncoderUnavailable(AgentMemoryError):
    """The encoder's package or weights are missing; the message says what to install."""


class HostError(AgentMemoryError):
    """Optillm is not as the plugin needs it."""
