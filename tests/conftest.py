"""Fixtures that the tests share: an upstream, and a real optillm in front of it for each module."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosting import LEAN_PATH, Host, on_lane, served
from hypothesis import settings
from postgres import Server, running

from optillm_memory.testing.upstream import RecordingUpstream, echo

settings.register_profile("long", max_examples=2_000, deadline=None)  # `.ci/full`
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Modules that take more than about ten seconds each: they get the mark `slow`, so that the fast tier leaves them out.
# What is slow in other modules carries the mark itself.
SLOW = (
    "test_actions_changed.py",
    "test_ann.py",
    "test_bench_ann.py",
    "test_bench_encoder.py",
    "test_bench_peers.py",
    "test_bench_reuse.py",
    "test_bench_route.py",
    "test_bench_store.py",
    "test_copying.py",
    "test_durability.py",
    "test_durability_faults.py",
    "test_durability_files.py",
    "test_migrations.py",
    "test_postgres.py",
    "test_postgres_server.py",
    "test_power.py",
    "test_progress.py",
    "test_pytest_plugin.py",
    "test_report_languages.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in a slow module."""
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of a module that names `LANES` on each of these: on the direct lane, or through the host."""
    lanes = getattr(metafunc.module, "LANES", None)
    if lanes is not None and "lane" in metafunc.fixturenames:
        metafunc.parametrize("lane", lanes, scope="module")


@pytest.fixture(scope="module")
def lane() -> str:
    """Give the way that plain requests take in this module."""
    return "direct"


@pytest.fixture(scope="module")
def upstream() -> Iterator[RecordingUpstream]:
    """Give an upstream that echoes and records."""
    with RecordingUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def module_host(lane: str, upstream: RecordingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Start `optillm-memory serve` once for a module, or once for each lane."""
    with served(upstream, tmp_path_factory.mktemp("host") / "memory.db", env=on_lane(lane)) as host:
        yield host


@pytest.fixture(scope="module")
def lean_hosts() -> Iterator[None]:
    """Have whatever starts a host in this module start one that loads no torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", LEAN_PATH)
        yield


@pytest.fixture
def host(module_host: Host) -> Host:
    """Give the module's host with an upstream that echoes and has received nothing."""
    module_host.upstream.reply = echo
    module_host.upstream.clear()
    return module_host


@pytest.fixture
def namespace() -> dict[str, str]:
    """Give an `agent_memory` field with a namespace of the test's own: nothing is in memory there."""
    return {"namespace": f"ns-{uuid.uuid4().hex}"}


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Give the path of a database that is not there yet."""
    return tmp_path / "memory.db"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """Run a PostgreSQL for all tests that want one."""
    with running() as server:
        yield server
