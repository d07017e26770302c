"""The wheel: what is in it, how large it is, and that it works without the rest of the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_BYTES = 800_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the back end alone, which needs no network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Every file of the package is in it, data and `py.typed` too, and none of the research, tests or examples."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "optillm_memory"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert names == {name for name in listed if (ROOT / name).exists()}
    assert "optillm_memory/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"optillm_memory"}


def test_it_is_small(wheel: Path) -> None:
    """It downloads in a moment: at most 700 kB."""
    assert wheel.stat().st_size <= MOST_BYTES


@pytest.mark.slow
def test_a_bench_runs_from_it(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, a bench finds its built-in data and needs no file of the repository."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = (
        "import sys, optillm_memory; sys.modules['benchmarks'] = None\n"
        "print(optillm_memory.__file__, file=sys.stderr)\n"
        "from optillm_memory.cli import main; main(['bench', 'fixes', '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr.startswith(str(tmp_path))
    assert json.loads(done.stdout)["rows"] > 30
