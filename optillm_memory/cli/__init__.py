"""The command line: `optillm-memory`."""

from optillm_memory.cli.commands import main

__all__ = ["main"]
