"""Persistent agent memory for the optillm proxy that proves that it helps."""

from optillm_memory.errors import (
    AgentMemoryError,
    EncoderUnavailable,
    HostError,
    InvalidField,
    NotFound,
    StoreError,
    StoreTooNew,
    StoreUnavailable,
    TooLarge,
)
from optillm_memory.memory import Memory
from optillm_memory.records import Feedback, FeedbackReceipt, Hit, MemoryRecord, Scope
from optillm_memory.settings import Settings
from optillm_memory.turn import Turn

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
    "NotFound",
    "Scope",
    "Settings",
    "StoreError",
    "StoreTooNew",
    "StoreUnavailable",
    "TooLarge",
    "Turn",
    "__version__",
]
