"""The tasks of `bench agent`: small, real, each with a check that tells whether it was solved."""

from __future__ import annotations

from benchmarks.agent_tasks_files import FILES
from benchmarks.agent_tasks_git import GIT
from benchmarks.agent_tasks_python import PYTHON

TASKS = (*FILES, *GIT, *PYTHON)
