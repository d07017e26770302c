"""Runs the command line as `python -m optillm_memory.cli`."""

from optillm_memory.cli.commands import main

main()
