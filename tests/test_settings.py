"""Settings: one table for code and environment; a wrong value is refused by name, an unknown name is a warning."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from optillm_memory import InvalidField, Settings
from optillm_memory.cli import main
from optillm_memory.settings import CLIENT_VARIABLES, ENV_PREFIX, read_variables, table, unknown_variables


def test_every_setting_is_read_from_its_variable() -> None:
    """Each variable of the table sets its field with its own type, and a keyword outranks it."""
    given = {"HOLDOUT": "0.2", "MAX_ITEMS": "3", "REDACT": "off", "DB": "/x.db"}
    settings = Settings.from_env({ENV_PREFIX + name: value for name, value in given.items()}, db="/y.db")
    assert (settings.holdout, settings.max_items, settings.redact, settings.db) == (0.2, 3, "off", "/y.db")
    assert Settings.from_env({"OTHER": "x", **dict.fromkeys(CLIENT_VARIABLES, "x")}) == Settings()
    assert [name for name, _, _ in table()] == [ENV_PREFIX + item.name.upper() for item in fields(Settings)]
    assert all(text for _, _, text in table())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOLDOUT", "1.1"), ("HOLDOUT", "-0.1"), ("HOLDOUT", "nan"), ("HOLDOUT", "much"), ("MAX_ITEMS", "2.5"),
        ("MAX_ITEMS", "51"), ("QUEUE_SIZE", "0"), ("REDACT", "perhaps"), ("GUARD", "maybe"), ("DB", "nonsense://x"),
        ("DB", "sqlite:///x.db"), ("DB", "postgresql:/host/one-slash"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(name: str, value: str) -> None:
    """A value out of range or of the wrong type is refused under the variable's name, unless a keyword replaces it."""
    variables = {ENV_PREFIX + name: value, ENV_PREFIX + "MAX_TEXT": "1000"}
    with pytest.raises(InvalidField) as caught:
        Settings.from_env(variables)
    assert caught.value.param == ENV_PREFIX + name
    default = {name.lower(): getattr(Settings(), name.lower())}
    assert Settings.from_env(variables, **default) == Settings(max_text=1000)


def test_all_wrong_values_are_found_at_once() -> None:
    """Reading the variables yields the valid values and one error for each of the others."""
    variables = {"HOLDOUT": "2", "MAX_ITEMS": "3", "REDACT": "perhaps", "DB": "/x.db", "NO_SUCH": "1"}
    values, wrong = read_variables({ENV_PREFIX + name: value for name, value in variables.items()})
    assert values == {"max_items": 3, "db": "/x.db"}
    assert [error.param for error in wrong] == [ENV_PREFIX + "HOLDOUT", ENV_PREFIX + "REDACT"]


def test_an_unknown_variable_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A misspelled name is logged once with the nearest setting, and everything else is read as it is."""
    variables = {"HOLDUOT": "0.1", "XYZZY": "1", "warmup_sahre": "1", "MAX_ITEMS": "3", "KEY": "k"}
    environ = {ENV_PREFIX + name: value for name, value in variables.items()}
    for _ in range(2):
        assert Settings.from_env(environ) == Settings(max_items=3)
    assert [record.getMessage() for record in caplog.records] == unknown_variables(environ)
    nonsense, holdout, warmup = sorted(unknown_variables(environ), key=lambda text: "mean" in text)
    assert nonsense.startswith("OPTILLM_AGENT_MEMORY_XYZZY is not a setting and is ignored; `optillm-memory settings`")
    assert holdout.endswith("did you mean OPTILLM_AGENT_MEMORY_HOLDOUT?")
    assert warmup.endswith("did you mean OPTILLM_AGENT_MEMORY_WARMUP_SHARE?")
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_an_unknown_kind_of_database_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like the URL of another database is refused with what is allowed; files and PostgreSQL are taken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ENV_PREFIX + "DB", "nonsense://user:password@x/y")
    done = CliRunner().invoke(main, ["feedback", "t1", "--success"])
    assert done.exit_code == 1
    assert "OPTILLM_AGENT_MEMORY_DB" in done.output
    assert "postgresql://" in done.output
    assert "password" not in done.output
    assert list(tmp_path.iterdir()) == []
    files = ("x.db", "~/x.db", "/tmp/a:b.db", "C:/x.db", "./x://y")
    for place in (*files, "postgresql://h/d", "postgres://h/d"):
        assert Settings(db=place).db == place
