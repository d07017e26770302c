"""Errors of optillm-memory.

- AgentMemoryError: the base of all errors that this package raises.
  - InvalidField: a field of a request or of feedback is wrong; names the field and how to fix it.
  - NotFound: no such trace, episode or memory in the caller's scope.
  - TooLarge: a body is larger than its limit.
  - TooMany: more came than one tenant may send; says when to try again.
  - NotAllowed: a credential is wrong, or the caller may not do this; `code` says what was refused.
  - StoreError: the database cannot do what was asked.
    - StoreUnavailable: it cannot be written now; nothing was acknowledged.
    - StoreTooNew: it was written by a newer release than this one.
    - StoreTooOld: it has the schema of an earlier release, and may not be migrated because it is opened read-only.
  - EncoderUnavailable: the encoder's package or weights are missing; says what to install.
  - HostError: optillm lacks something that the plugin needs.
"""

from __future__ import annotations


class AgentMemoryError(Exception):
    """The base of all errors that this package raises."""


class InvalidField(AgentMemoryError, ValueError):
    """A field of a request or of feedback is wrong; `param` names it, the message says how to fix it."""

    def __init__(self, param: str, message: str) -> None:
        """Keep the field's name with the message."""
        super().__init__(f"{param}: {message}")
        self.param = param


class NotFound(AgentMemoryError, LookupError):
    """No such trace, episode or memory in the caller's scope."""


class TooLarge(AgentMemoryError, ValueError):
    """A body is larger than its limit."""


class TooMany(AgentMemoryError):
    """More came than one tenant may send; it will be taken after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        """Keep the time in seconds with the message."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotAllowed(AgentMemoryError, PermissionError):
    """A credential is wrong, or the caller may not do this; `code` says what was refused, in one word."""

    def __init__(self, code: str, message: str) -> None:
        """Keep the code with the message."""
        super().__init__(message)
        self.code = code


class StoreError(AgentMemoryError):
    """The database cannot do what was asked."""


class StoreUnavailable(StoreError):
    """It cannot be written now; nothing was acknowledged."""


class StoreTooNew(StoreError):
    """It was written by a newer release than this one."""


class StoreTooOld(StoreError):
    """It has the schema of an earlier release, and may not be migrated because it is opened read-only."""


class EncoderUnavailable(AgentMemoryError):
    """The encoder's package or weights are missing; the message says what to install."""


class HostError(AgentMemoryError):
    """Optillm lacks something that the plugin needs."""
