"""Persistent agent memory for the optillm proxy that proves that it helps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optillm_memory.errors import (
        AgentMemoryError,
        EncoderUnavailable,
        HostError,
        InvalidField,
        NotAllowed,
        NotFound,
        StoreError,
        StoreTooNew,
        StoreTooOld,
        StoreUnavailable,
        TooLarge,
        TooMany,
    )
    from optillm_memory.memory import Memory
    from optillm_memory.records import Feedback, FeedbackReceipt, Hit, MemoryRecord, Scope, View
    from optillm_memory.request.turn import Turn
    from optillm_memory.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "AgentMemoryError",
    "EncoderUnavailable",
    "Feedback",
    "FeedbackReceipt",
    "Hit",
    "HostError",
    "InvalidField",
    "Memory",
    "MemoryRecord",
    "NotAllowed",
    "NotFound",
    "Scope",
    "Settings",
    "StoreError",
    "StoreTooNew",
    "StoreTooOld",
    "StoreUnavailable",
    "TooLarge",
    "TooMany",
    "Turn",
    "View",
    "__version__",
]

_HOMES = {
    "Memory": "memory",
    "Settings": "settings",
    "Turn": "request.turn",
    **dict.fromkeys(("Feedback", "FeedbackReceipt", "Hit", "MemoryRecord", "Scope", "View"), "records"),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: pytest imports this package in every session, used or not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"optillm_memory.{_HOMES.get(name, 'errors')}"), name)
    return globals().setdefault(name, found)
