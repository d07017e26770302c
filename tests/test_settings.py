"""Settings: one table for code and environment; what does not fit is refused by name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from optillm_memory import InvalidField, Settings
from optillm_memory.cli import main
from optillm_memory.settings import CLIENT_VARIABLES, ENV_PREFIX, table


def test_every_setting_is_read_from_its_variable() -> None:
    """Each variable of the table sets its field with its own type, and a keyword outranks it."""
    given = {"HOLDOUT": "0.2", "MAX_ITEMS": "3", "REDACT": "off", "DB": "/x.db"}
    settings = Settings.from_env({ENV_PREFIX + name: value for name, value in given.items()}, db="/y.db")
    assert (settings.holdout, settings.max_items, settings.redact, settings.db) == (0.2, 3, False, "/y.db")
    assert Settings.from_env({"OTHER": "x", **dict.fromkeys(CLIENT_VARIABLES, "x")}) == Settings()
    assert [name for name, _, _ in table()] == [ENV_PREFIX + item.name.upper() for item in fields(Settings)]
    assert all(text for _, _, text in table())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOLDOUT", "1.1"), ("HOLDOUT", "-0.1"), ("HOLDOUT", "nan"), ("HOLDOUT", "much"), ("MAX_ITEMS", "2.5"),
        ("MAX_ITEMS", "51"), ("QUEUE_SIZE", "0"), ("REDACT", "perhaps"), ("HOLDUOT", "0.1"), ("DB", "nonsense://x"),
        ("DB", "sqlite:///x.db"), ("DB", "postgresql:/host/one-slash"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    """A value out of range or of the wrong type, and a name with a typo, are refused under the variable's name."""
    with pytest.raises(InvalidField) as caught:
        Settings.from_env({ENV_PREFIX + name: value})
    assert caught.value.param == ENV_PREFIX + name


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
