"""Settings: one table of names, defaults and help that feeds the environment, `--help` and the README."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from optillm_memory.errors import InvalidField
from optillm_memory.records import Arm

ENV_PREFIX = "OPTILLM_AGENT_MEMORY_"
_SERVER = re.compile(r"postgres(ql)?://", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # a single letter is a drive
_ARM = re.compile(r"([A-Za-z0-9_.-]+)@([^\s,=]+)(?:=([0-9.eE+-]+))?")


def is_url(db: str) -> bool:
    """Whether a database setting names a PostgreSQL server."""
    return bool(_SERVER.match(db))


def refuse_unknown_scheme(db: str, param: str) -> None:
    """Raise InvalidField for the URL of anything but PostgreSQL: taken for a file, it would make a folder `scheme:`."""
    if (found := _SCHEME.match(db)) and not is_url(db):
        raise InvalidField(
            param, f"{found[0]}… names no kind of database that is known; use a file, or a postgresql:// URL"
        )


def expanded(db: str | Path) -> Path:
    """Return a database file's path with `~` expanded. Raises InvalidField where nobody knows the home directory."""
    try:
        return Path(db).expanduser()
    except RuntimeError:
        raise InvalidField(
            env_name("db"), f"{str(db)!r} lies in a home directory, and this user has none; give a file's full path"
        ) from None


def shown(url: str) -> str:
    """Return a URL as it may be seen: without password and options."""
    parts = urlsplit(url)
    place = parts.hostname or ""
    place = f"{parts.username}@{place}" if parts.username else place
    return urlunsplit((parts.scheme, f"{place}:{parts.port}" if parts.port else place, parts.path, "", ""))


def _setting(
    default: Any, help_: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    return field(default=default, metadata={"help": help_, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be set, by environment variable or in code.

    Raises InvalidField, with the variable's name, where a value does not fit.
    """

    db: str = _setting("~/.optillm/agent_memory.db", "the database: a file, or a `postgresql://` URL")
    encoder: str = _setting(
        "auto",
        "encoder for recall: `auto` (the weights' package where installed, else the hub's all-MiniLM-L6-v2), "
        "a sentence-transformers name or directory, or `none` (lexical recall only)",
    )
    holdout: float = _setting(
        0.05, "share of episodes that go without memory, so that the uplift can be measured", low=0, high=1
    )
    max_items: int = _setting(5, "exemplars put in one prompt as turns at most", low=0, high=50)
    max_block_items: int = _setting(3, "items put in one block at most", low=0, high=50)
    token_budget: int = _setting(800, "tokens (estimated) injected into one request at most", low=0)
    reuse_audit: float = _setting(
        0.05,
        "share of the answers that could be reused which go to the model all the same, as a check (less where the "
        "gate is far from its limit)",
        low=0,
        high=1,
    )
    answer_form: str = _setting(
        "text",
        "how answers are compared: `text` (case, white space and a full stop at the end do not count), `number` (the "
        "last number), `json`, or a function of one's own that gives the form to compare, as `module:function`",
    )
    arms: str = _setting(
        "",
        "the ways of answering that `approach: auto` chooses from, as `approach@model=price, ...`: the first is the "
        "default, the model `default` is the one that the request names, the price that of a thousand tokens "
        "(1 where left out)",
    )
    cost_price: float = _setting(0.01, "reward that must come of a unit of an arm's cost for it to pay", low=0)
    second_price: float = _setting(0.0, "reward that must come of a second of waiting for it to pay", low=0)
    exploration: float = _setting(
        0.003, "reward a request that finding out about other arms may cost, as far as one can tell", low=0, high=1
    )
    audition: float = _setting(
        0.0,
        "share of the first 400 requests that is spread evenly over the arms; with one, the default has no claim",
        low=0,
        high=1,
    )
    guard: str = _setting(
        "retry",
        "what happens when the model is about to repeat an action that is known to fail: `retry` asks it once more, "
        "`advise` says so in the next request, `off`",
        choices=("off", "advise", "retry"),
    )
    guard_expiry_days: float = _setting(7.0, "days after which a failed action may be tried again unwarned", low=0)
    fix_confidence: float = _setting(0.4, "confidence that a fix needs to be suggested", low=0, high=1)
    deadline_ms: int = _setting(300, "milliseconds after which a request goes on without memory", low=1)
    max_request_bytes: int = _setting(
        4_000_000, "requests larger than this are served without recall and stored shortened", low=1_000
    )
    max_text: int = _setting(20_000, "characters stored of any one text; the middle is left out", low=200)
    queue_size: int = _setting(10_000, "records waiting to be written at most", low=1)
    retention_days: float = _setting(
        0.0, "days after which an episode is deleted unless a memory rests on it; 0 keeps everything", low=0
    )
    max_traces: int = _setting(
        0, "requests kept at most: beyond it the oldest and least valuable are deleted; 0 is no limit", low=0
    )
    max_bytes: int = _setting(0, "bytes of the database in use at most, in the same way; 0 is no limit", low=0)
    identify_users: bool = _setting(
        True,
        "take the end user that a request names in OpenAI's `user` or `safety_identifier`, or in a gateway's header "
        "(`X-OpenWebUI-User-Id` and its like), for the `user_id` where none is given",
    )
    guard_timeout_s: float = _setting(
        30.0,
        "seconds that the guard's second call may take at most (and no more than twice the first call's time, or 5 "
        "seconds where that is more); then the first answer goes out",
        low=0,
    )
    redact: bool = _setting(True, "replace API keys, tokens and private keys before anything is stored")

    def __post_init__(self) -> None:
        """Check the ranges."""
        for item in fields(self):
            if item.metadata["choices"] and getattr(self, item.name) not in item.metadata["choices"]:
                known = ", ".join(item.metadata["choices"])
                raise InvalidField(env_name(item.name), f"{getattr(self, item.name)!r} is none of {known}")
            value, low, high = getattr(self, item.name), item.metadata["low"], item.metadata["high"]
            if (low is not None and not value >= low) or (high is not None and not value <= high):  # NaN is neither
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise InvalidField(env_name(item.name), f"{value!r} is out of range; use {bounds}")
        refuse_unknown_scheme(self.db, env_name("db"))
        _arms(self.arms, env_name("arms"))

    @property
    def path(self) -> Path:
        """The database file with `~` expanded."""
        return expanded(self.db)

    @property
    def place(self) -> str:
        """Where the database is, as it may be shown: a server's URL has no password here."""
        return shown(self.db) if is_url(self.db) else str(self.path)

    @property
    def parsed_arms(self) -> tuple[Arm, ...]:
        """The arms, the default first."""
        return _arms(self.arms, env_name("arms"))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Read `OPTILLM_AGENT_MEMORY_*`; an unknown name with the prefix is refused, so that a typo is seen."""
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        known = {env_name(item.name): item for item in fields(cls)}
        for name, text in environ.items():
            if not name.startswith(ENV_PREFIX) or name in CLIENT_VARIABLES:
                continue
            if name not in known:
                raise InvalidField(name, f"unknown setting; known are {', '.join(sorted(known))}")
            values[known[name].name] = _parse(name, text, type(known[name].default))
        return cls(**{**values, **overrides})


# Variables with our prefix that are read by clients of the server, not by the server.
CLIENT_VARIABLES = frozenset(ENV_PREFIX + name for name in ("URL", "KEY", "TRACE", "EPISODE", "NAMESPACE"))


def env_name(name: str) -> str:
    """Return the environment variable of a setting."""
    return ENV_PREFIX + name.upper()


def table() -> list[tuple[str, str, str]]:
    """Return (environment variable, default, help) of every setting, for the README and `--help`."""
    return [(env_name(item.name), str(item.default), item.metadata["help"]) for item in fields(Settings)]


def _parse(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        lowered = text.strip().lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
        raise InvalidField(name, f"{text!r} is not a yes or no; use true or false")
    try:
        return kind(text)
    except ValueError:
        raise InvalidField(name, f"{text!r} is not a number of type {kind.__name__}") from None


def _arms(text: str, param: str) -> tuple[Arm, ...]:
    """Read `approach@model=price, ...`; the price is 1 where it is left out, and the first arm is the default.

    Raises InvalidField.
    """
    arms: dict[str, Arm] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        found = _ARM.fullmatch(item)
        if found is None:
            raise InvalidField(param, f"{item!r} is no arm; write approach@model or approach@model=price")
        approach, model, price = found.groups()
        name = f"{approach}@{model}"
        if approach in ("agent_memory", "auto"):
            raise InvalidField(param, f"{name!r}: an arm's approach is `none` or one of optillm's own")
        if name in arms:
            raise InvalidField(param, f"{name!r} is there twice")
        try:
            arms[name] = Arm(name, approach, model, 1.0 if price is None else float(price))
        except ValueError:
            raise InvalidField(param, f"{item!r}: {price!r} is no number") from None
        if arms[name].price < 0:
            raise InvalidField(param, f"{item!r}: a price is 0 or more")
    return tuple(arms.values())
