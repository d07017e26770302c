"""`doctor --security` names each open door of an installation, and says nothing of one that is closed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import lexical_memory
from click.testing import CliRunner

from optillm_memory.cli import main
from optillm_memory.host.credentials import make_operator_key, operator_key_path
from optillm_memory.host.security import doors
from optillm_memory.settings import ENV_PREFIX, Settings

DIGEST = f"sha256:{'ab' * 32}"
LONG = "a-key-that-nobody-guesses"


@pytest.fixture
def closed(tmp_path: Path) -> dict[str, str]:
    """Give the variables of an installation without an open door; its files are there."""
    with lexical_memory(tmp_path):
        pass
    found = {"OPTILLM_API_KEY": LONG, ENV_PREFIX + "DB": str(tmp_path / "memory.db"), ENV_PREFIX + "TRUST": "strict"}
    for name in ("reporters", "tenants"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"ci": DIGEST}))
        path.chmod(0o600)
        found[f"{ENV_PREFIX}{name.upper()}_FILE"] = str(path)
    make_operator_key(Settings(db=str(tmp_path / "memory.db")))
    tmp_path.chmod(0o700)
    return found


def open_doors(environ: dict[str, str]) -> dict[str, str]:
    """Return the level of each open door, by its name."""
    return {finding.name: finding.level for finding in doors(environ) if finding.level != "ok"}


def test_an_installation_without_open_doors(closed: dict[str, str]) -> None:
    """Where all is closed, nothing is said but what was looked at."""
    assert open_doors(closed) == {}
    assert {f.name for f in doors(closed)} >= {"server key", "address", "trust", "operator key", "database"}


VARIABLES = [
    ({"OPTILLM_API_KEY": ""}, {"server key": "warn"}),
    ({"OPTILLM_API_KEY": "optillm"}, {"server key": "warn"}),
    ({"OPTILLM_API_KEY": "", "OPTILLM_HOST": "0.0.0.0"}, {"server key": "fail", "address": "warn"}),
    ({"OPTILLM_HOST": "192.0.2.7"}, {"address": "warn"}),
    ({ENV_PREFIX + "TENANTS_FILE": ""}, {"one tenant": "warn"}),
    ({ENV_PREFIX + "TRUST": "open"}, {"trust": "warn"}),
    ({ENV_PREFIX + "REPORTERS_FILE": ""}, {"trust": "warn"}),
    ({ENV_PREFIX + "REPORTERS_FILE": "/no/such/file"}, {"reporters file": "fail"}),
    ({ENV_PREFIX + "REDACT": "off"}, {"redaction": "warn"}),
    ({ENV_PREFIX + "TRUST": "none"}, {"settings": "fail", "trust": "warn"}),
    ({ENV_PREFIX + "DB": "postgresql://db.example/m", ENV_PREFIX + "OPERATOR_KEY_FILE": "x"}, {"database": "warn"}),
]


@pytest.mark.parametrize(("changed", "found"), VARIABLES, ids=" ".join)
def test_a_setting_that_opens_a_door(closed: dict[str, str], changed: dict[str, str], found: dict[str, str]) -> None:
    """Each is named by itself, with the level that fits it."""
    if changed.get(ENV_PREFIX + "OPERATOR_KEY_FILE"):
        changed = {
            **changed,
            ENV_PREFIX + "OPERATOR_KEY_FILE": str(operator_key_path(Settings(db=closed[ENV_PREFIX + "DB"]))),
        }
    assert open_doors({**closed, **changed}) == found


FILES = [
    ("memory.db", 0o644, "database"), ("memory.db", 0o660, "database"), ("memory.operator-key", 0o640, "operator key"),
    ("reporters.json", 0o620, "reporters file"), ("tenants.json", 0o666, "tenants file"), (".", 0o777, "folder"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mode", "door"), FILES)
def test_a_file_that_others_may_use(closed: dict[str, str], tmp_path: Path, name: str, mode: int, door: str) -> None:
    """What other users could read, change or replace is a failure."""
    (tmp_path / name).chmod(mode)
    assert open_doors(closed) == {door: "fail"}


KEYS = [
    ({"ci": LONG}, 0o600, "warn"),
    ({"ci": LONG}, 0o644, "fail"),
    ({"ci": [DIGEST, "short"]}, 0o600, "warn"),
    ({"ci": 1}, 0o600, "fail"),
    ({"ci": "sha256:1"}, 0o600, "fail"),
    ({"ci": DIGEST, "other": DIGEST}, 0o600, "fail"),
    ({" ": DIGEST}, 0o600, "fail"),
    ([DIGEST], 0o600, "fail"),
    ({"cli": DIGEST}, 0o600, "fail"),
]


@pytest.mark.parametrize(("listed", "mode", "level"), KEYS)
def test_a_file_of_keys(closed: dict[str, str], tmp_path: Path, listed: object, mode: int, level: str) -> None:
    """Keys as they are, guessable ones, shared ones, and what is no file of keys."""
    path = tmp_path / "reporters.json"
    path.write_text(json.dumps(listed))
    path.chmod(mode)
    assert open_doors(closed) == {"reporters file": level}


def test_what_is_missing_or_left_over(closed: dict[str, str], tmp_path: Path) -> None:
    """No secret of the operator, an empty one, and a database that was set aside."""
    secret = tmp_path / "memory.operator-key"
    secret.write_text("\n")
    assert open_doors(closed) == {"operator key": "fail"}
    secret.unlink()
    assert open_doors(closed) == {"operator key": "warn"}
    aside = tmp_path / "memory.db.corrupt-20300101-000000-1"
    aside.touch(0o600)
    assert open_doors(closed) == {"operator key": "warn", "copies": "warn"}


def test_the_command(closed: dict[str, str], tmp_path: Path) -> None:
    """`doctor --security` prints these findings, exits with 1 for a failure alone, and changes nothing."""
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir())
    for extra, code in (({}, 0), ({"OPTILLM_API_KEY": "", "OPTILLM_HOST": "0.0.0.0"}, 1)):
        done = CliRunner(env={**closed, **extra}).invoke(main, ["doctor", "--security", "--json"])
        assert done.exit_code == code, done.output
        assert {f["name"] for f in json.loads(done.stdout)} == {f.name for f in doors({**closed, **extra})}
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir()) == before
