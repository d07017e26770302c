"""The tasks of the scripted agent: small, real, each with a check for success."""

from __future__ import annotations

from benchmarks.agent_tasks_files import FILES
from benchmarks.agent_tasks_git import GIT
from benchmarks.agent_tasks_python import PYTHON

TASKS = (*FILES, *GIT, *PYTHON)
