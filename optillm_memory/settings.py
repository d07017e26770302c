"""Settings: one table of names, defaults and help that feeds the environment, `--help` and the README."""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

from optillm_memory.errors import InvalidField
from optillm_memory.records import Arm, Level, Trust

logger = logging.getLogger(__name__)
ENV_PREFIX = "OPTILLM_AGENT_MEMORY_"
_SERVER = re.compile(r"postgres(ql)?://", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # a single letter is a drive
_LEVELS = {**dict.fromkeys(("true", "yes", "on", "1"), "default"), **dict.fromkeys(("false", "no", "0"), "off")}
_ARM = re.compile(r"([A-Za-z0-9_.-]+)@([^\s,=]+)(?:=([0-9.eE+-]+))?")


def is_url(db: str) -> bool:
    """Whether a database setting names a PostgreSQL server."""
    return bool(_SERVER.match(db))


def refuse_unknown_scheme(db: str, param: str) -> None:
    """Raise InvalidField for the URL of anything but PostgreSQL: used as a path, it would create a folder `scheme:`."""
    if (found := _SCHEME.match(db)) and not is_url(db):
        raise InvalidField(
            param, f"{found[0]}… is not a supported kind of database; use a file, or a postgresql:// URL"
        )


def expanded(db: str | Path) -> Path:
    """Return a database file's path with `~` expanded. Raises InvalidField where the user has no home directory."""
    try:
        return Path(db).expanduser()
    except RuntimeError:
        raise InvalidField(
            env_name("db"), f"{str(db)!r} is in a home directory, and this user has none; use a full path"
        ) from None


def without_password(url: str) -> str:
    """Return a URL that is safe to print: without password and options."""
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
    """All settings, from environment variables or keywords.

    Raises InvalidField, with the variable's name, for a value that is not valid.
    """

    db: str = _setting("~/.optillm/agent_memory.db", "the database: a file, or a `postgresql://` URL")
    encoder: str = _setting(
        "auto",
        "encoder for recall: `auto` (the package with the weights if installed, otherwise all-MiniLM-L6-v2 from the "
        "hub), a sentence-transformers name or directory, or `none` (lexical recall only)",
    )
    holdout: float = _setting(
        0.05, "share of episodes answered without memory, so that the uplift can be measured", low=0, high=1
    )
    max_items: int = _setting(5, "largest number of exemplars inserted into one prompt as turns", low=0, high=50)
    max_block_items: int = _setting(3, "largest number of items in one inserted block", low=0, high=50)
    token_budget: int = _setting(800, "largest number of tokens (estimated) injected into one request", low=0)
    reuse_audit: float = _setting(
        0.05,
        "share of the reusable answers that are requested from the model anyway, as a check (less where the gate is "
        "far from its limit)",
        low=0,
        high=1,
    )
    read_only_tools: str = _setting(
        "", "names of tools, separated by commas, that only look: with `reuse.actions` memory may call them"
    )
    allowed_tools: str = _setting(
        "", "names of tools, separated by commas, that memory may call with `reuse.actions` although they change things"
    )
    never_tools: str = _setting("", "names of tools, separated by commas, that memory never calls")
    answer_form: str = _setting(
        "text",
        "how answers are compared: `text` (ignoring case, white space and a final full stop), `number` (the last "
        "number), `json`, or your own function from an answer to what is compared, as `module:function`",
    )
    arms: str = _setting(
        "",
        "the arms that `approach: auto` chooses from, as `approach@model=price, ...`: the first is the default, the "
        "model `default` is the one in the request, and the price is for a thousand tokens (default 1)",
    )
    cost_price: float = _setting(
        0.01, "reward that one unit of cost must bring for a costlier arm to be preferred", low=0
    )
    second_price: float = _setting(
        0.0, "reward that one second of waiting must bring for a slower arm to be preferred", low=0
    )
    exploration_budget: float = _setting(
        0.003, "reward per request (estimated) that trying other arms may cost on average", low=0, high=1
    )
    warmup_share: float = _setting(
        0.0,
        "share of the first 400 requests that is spread evenly over the arms; above 0 the default arm is not preferred",
        low=0,
        high=1,
    )
    guard: str = _setting(
        "retry",
        "what happens when the model is about to repeat an action that is known to fail: `retry` asks it once more, "
        "`advise` adds a warning to the next request, `off` does nothing",
        choices=("off", "advise", "retry"),
    )
    guard_expiry_days: float = _setting(
        7.0, "days after which a failed action may be repeated without a warning", low=0
    )
    fix_confidence: float = _setting(0.4, "confidence that a fix needs to be suggested", low=0, high=1)
    deadline_ms: int = _setting(300, "milliseconds after which a request continues without memory", low=1)
    max_request_bytes: int = _setting(
        4_000_000, "requests larger than this are answered without recall and stored shortened", low=1_000
    )
    max_text: int = _setting(
        20_000, "largest number of characters stored of one text; the middle of a longer one is dropped", low=200
    )
    queue_size: int = _setting(10_000, "largest number of records waiting to be written", low=1)
    retention_days: float = _setting(
        0.0, "days after which an episode is deleted unless a memory is based on it; 0 keeps everything", low=0
    )
    max_traces: int = _setting(
        0, "largest number of requests kept: the oldest and least valuable are deleted first; 0 is no limit", low=0
    )
    max_bytes: int = _setting(
        0, "largest number of bytes in use in the database, enforced in the same way; 0 is no limit", low=0
    )
    allowed_hosts: str = _setting(
        "",
        "names, separated by commas, by which this server is reached, as behind a reverse proxy; the machine's own "
        "need not be listed, nor addresses and names without a dot where it listens on the network",
    )
    operator_key_file: str = _setting(
        "",
        "the file with the operator's secret, made at the first start; empty is the database's name with the ending "
        "`.operator-key`, beside it (for a server in `~/.optillm`)",
    )
    tenants_file: str = _setting(
        "", "a JSON file of tenants' names with their keys, or digests of these: keys of one tenant share its memory"
    )
    trust: str = _setting(
        "open",
        "whose word verifies: `open` takes the source `code` or `human` from whoever says so; `strict` takes it from "
        "reporters alone, never from who asked, and counts others as `llm`",
        choices=("open", "strict"),
    )
    reporters_file: str = _setting(
        "", "a JSON file of reporters' names with their keys, or digests of these, for `X-Agent-Memory-Reporter-Key`"
    )
    identify_users: bool = _setting(
        True,
        "if a request has no `user_id`, use the end user named in OpenAI's `user` or `safety_identifier`, or in a "
        "gateway's header (such as `X-OpenWebUI-User-Id`)",
    )
    guard_timeout_s: float = _setting(
        30.0,
        "longest time in seconds for the guard's second call (and at most twice the first call's time, or 5 seconds if "
        "that is more); after it the first answer is returned",
        low=0,
    )
    direct: bool = _setting(
        True,
        "send plain requests to an OpenAI-compatible upstream over connections of our own, and relay the answer as it "
        "comes; `off` leaves them to optillm",
    )
    feedback_rate: float = _setting(
        200.0,
        "items of feedback that one tenant may post a second on average, and ten times as many at once; beyond, it is "
        "asked to wait (429); 0 is no limit",
        low=0,
    )
    pending_feedback: int = _setting(
        10_000,
        "items of feedback of one tenant that may wait for traces that are not there yet (about, and in each process); "
        "beyond, only feedback on known traces is taken; 0 is no limit",
        low=0,
    )
    redact: str = _setting(
        "default",
        "what is replaced before anything is stored: `default` replaces credentials (passwords, tokens, keys, cookies),"
        " `strict` also personal data (e-mail, telephone and IP addresses, card and account numbers), `off` nothing",
        choices=("off", "default", "strict"),
    )
    seal: bool = _setting(
        False,
        "keep a keyed digest of every row of a database file, so that changes from outside are seen; a file that was "
        "sealed once stays so",
    )
    seal_folder: str = _setting(
        "",
        "folder of the seal's key and of the latest commit that is noted outside of the database; "
        "empty is ~/.config/optillm-memory/seals",
    )

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        # In release 0.1 it was true or false.
        object.__setattr__(self, "redact", _LEVELS.get(str(self.redact).strip().lower(), self.redact))
        for item in fields(self):
            if item.metadata["choices"] and getattr(self, item.name) not in item.metadata["choices"]:
                known = ", ".join(item.metadata["choices"])
                raise InvalidField(env_name(item.name), f"{getattr(self, item.name)!r} is not one of {known}")
            value, low, high = getattr(self, item.name), item.metadata["low"], item.metadata["high"]
            if (low is not None and not value >= low) or (high is not None and not value <= high):  # NaN is neither
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise InvalidField(env_name(item.name), f"{value!r} is out of range; use {bounds}")
        refuse_unknown_scheme(self.db, env_name("db"))
        _arms(self.arms, env_name("arms"))

    @property
    def level(self) -> Level:
        """What is redacted."""
        return cast("Level", self.redact)

    @property
    def path(self) -> Path:
        """The database file with `~` expanded."""
        return expanded(self.db)

    @property
    def place(self) -> str:
        """Where the database is, safe to print: a server's URL without its password."""
        return without_password(self.db) if is_url(self.db) else str(self.path)

    @property
    def parsed_trust(self) -> Trust:
        """Whose word verifies."""
        return "strict" if self.trust == "strict" else "open"

    @property
    def parsed_arms(self) -> tuple[Arm, ...]:
        """The arms, the default first."""
        return _arms(self.arms, env_name("arms"))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Read `OPTILLM_AGENT_MEMORY_*`; keywords outrank variables, and an unknown variable is only a warning.

        Raises InvalidField for a value that is not valid.
        """
        environ = os.environ if environ is None else environ
        for warning in unknown_variables(environ):
            _warn_once(warning)
        values, wrong = read_variables({k: v for k, v in environ.items() if k not in map(env_name, overrides)})
        if wrong:
            raise wrong[0]
        return cls(**{**values, **overrides})


# Variables with our prefix that clients of the server read, not the server.
CLIENT_VARIABLES = frozenset(
    ENV_PREFIX + name for name in ("URL", "KEY", "REPORTER_KEY", "TRACE", "EPISODE", "NAMESPACE")
)


def env_name(name: str) -> str:
    """Return the environment variable of a setting."""
    return ENV_PREFIX + name.upper()


def table() -> list[tuple[str, str, str]]:
    """Return (environment variable, default, help) of every setting, for the README and `--help`."""
    return [(env_name(item.name), str(item.default), item.metadata["help"]) for item in fields(Settings)]


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a warning for each variable with our prefix that is no setting, with the nearest setting's name."""
    known = {item.name.upper() for item in fields(Settings)}
    warnings = []
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in CLIENT_VARIABLES and name[len(ENV_PREFIX) :] not in known:
            near = difflib.get_close_matches(name[len(ENV_PREFIX) :].upper(), known, n=1)
            hint = f"did you mean {env_name(near[0])}?" if near else "`optillm-memory settings` lists the known ones"
            warnings.append(f"{name} is not a setting and is ignored; {hint}")
    return warnings


def read_variables(environ: Mapping[str, str]) -> tuple[dict[str, Any], list[InvalidField]]:
    """Return the settings' values that are valid, by name, and an error for each value that is not."""
    values: dict[str, Any] = {}
    wrong = []
    for item in fields(Settings):
        if (text := environ.get(env_name(item.name))) is not None:
            try:
                value = _parse(env_name(item.name), text, type(item.default))
                Settings(**{item.name: value})
            except InvalidField as error:
                wrong.append(error)
            else:
                values[item.name] = value
    return values, wrong


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning once in this process, however often the environment is read."""
    logger.warning(message)


def _parse(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        lowered = text.strip().lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
        raise InvalidField(name, f"{text!r} is neither true nor false")
    try:
        return kind(text)
    except ValueError:
        raise InvalidField(name, f"{text!r} is not a valid {kind.__name__}") from None


def _arms(text: str, param: str) -> tuple[Arm, ...]:
    """Read `approach@model=price, ...`; the price defaults to 1, and the first arm is the default.

    Raises InvalidField.
    """
    arms: dict[str, Arm] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        found = _ARM.fullmatch(item)
        if found is None:
            raise InvalidField(param, f"{item!r} is not an arm; write approach@model or approach@model=price")
        approach, model, price = found.groups()
        name = f"{approach}@{model}"
        if approach in ("agent_memory", "auto"):
            raise InvalidField(param, f"{name!r}: an arm's approach is `none` or one of optillm's own")
        if name in arms:
            raise InvalidField(param, f"{name!r} is listed twice")
        try:
            arms[name] = Arm(name, approach, model, 1.0 if price is None else float(price))
        except ValueError:
            raise InvalidField(param, f"{item!r}: {price!r} is not a number") from None
        if arms[name].price < 0:
            raise InvalidField(param, f"{item!r}: a price is 0 or more")
    return tuple(arms.values())
