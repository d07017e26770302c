"""Secrets that this server knows: the operator's, in a file of its own, and keys that files give names."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from optillm_memory.errors import InvalidField
from optillm_memory.records import TRUSTED
from optillm_memory.settings import Settings, env_name, expanded, is_url

logger = logging.getLogger(__name__)

_NAME_LIMIT = 200
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_OF_A_SERVER = "~/.optillm/agent_memory.db"  # beside it is the secret where the database is no file


def operator_key_path(settings: Settings) -> Path:
    """Return the file of the operator's secret."""
    if settings.operator_key_file:
        return expanded(settings.operator_key_file)
    path = expanded(_OF_A_SERVER if is_url(settings.db) else settings.db)
    return path.with_name(f"{path.stem}.operator-key")


def read_operator_key(settings: Settings) -> str:
    """Return the operator's secret; empty where there is none, and then nobody is the operator over HTTP."""
    try:
        return operator_key_path(settings).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def make_operator_key(settings: Settings) -> str:
    """Return the operator's secret, made (with mode 0600) where there is none yet. Raises OSError."""
    if key := read_operator_key(settings):
        return key
    path = operator_key_path(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own first: several processes that start at once take the one that was there first, whole.
    made = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    try:
        with contextlib.suppress(FileExistsError):
            os.link(made, path)
    finally:
        made.unlink()
    return read_operator_key(settings)


def is_same(secret: str, shown: str) -> bool:
    """Whether a secret was shown; how long this takes tells nothing about it."""
    return bool(secret) and hmac.compare_digest(secret.encode(), shown.encode("utf-8", "surrogateescape"))


class NamedKeys:
    """A JSON file of names, each with its key, or a list of keys: `{"ci": "sha256:…", "alice": ["…", "…"]}`.

    A key stands there as it is, or as `sha256:` with the hex digest of it. The file is read again when it has changed;
    while it cannot be read, what was read last counts.
    """

    def __init__(self, path: str, param: str, *, reserved: Collection[str] = ()) -> None:
        """Read the file, if one is named; it may use no `reserved` name. Raises InvalidField, with `param`."""
        self.path = expanded(path) if path else None
        self._param, self._reserved = param, reserved
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._names: Mapping[str, str] = {}
        if self.path is not None:
            self._stamp = _stamp_of(self.path)
            self._names = _read(self.path, param, reserved)

    def __bool__(self) -> bool:
        return self.path is not None

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(set(self._current().values()))

    def name_of(self, key: str) -> str:
        """Return whose key this is; empty where it is nobody's."""
        return self._current().get(digest_of(key), "") if key and self.path is not None else ""

    def _current(self) -> Mapping[str, str]:
        if self.path is None:
            return self._names
        with self._lock:
            if (stamp := _stamp_of(self.path)) != self._stamp:
                self._stamp = stamp
                try:
                    self._names = _read(self.path, self._param, self._reserved)
                except InvalidField as error:
                    logger.error("agent_memory: %s; the keys read before still count", error)
            return self._names


def digest_of(key: str) -> str:
    """Return the digest by which a file may name a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _stamp_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _read(path: Path, param: str, reserved: Collection[str]) -> dict[str, str]:
    """Return the name of each key by the key's digest. Raises InvalidField."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidField(param, f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise InvalidField(param, f"{path} is no JSON") from None
    if not isinstance(listed, dict):
        raise InvalidField(param, f"{path} must hold an object of names and keys")
    names: dict[str, str] = {}
    for name, keys in listed.items():
        if not name.strip() or len(name) > _NAME_LIMIT:
            raise InvalidField(param, f"{path}: a name is a text of 1 to {_NAME_LIMIT} characters")
        if name in reserved:
            raise InvalidField(param, f"{path}: {name!r} is the name of a reporter without a key; choose another")
        for key in keys if isinstance(keys, list) else [keys]:
            digest = _listed_digest(key)
            if digest is None:
                raise InvalidField(param, f"{path}: the key of {name!r} must be a text, or sha256: and 64 hex digits")
            if names.setdefault(digest, name) != name:
                raise InvalidField(param, f"{path}: {names[digest]!r} and {name!r} have the same key")
    return names


def _listed_digest(key: Any) -> str | None:
    if not isinstance(key, str) or not key.strip():
        return None
    if key.startswith("sha256:"):
        found = _DIGEST.fullmatch(key.lower())
        return found[1] if found else None
    return digest_of(key)


def reporters_of(settings: Settings) -> NamedKeys:
    """Return the keys of reporters. Raises InvalidField."""
    return NamedKeys(settings.reporters_file, env_name("reporters_file"), reserved=TRUSTED)


def tenants_of(settings: Settings) -> NamedKeys:
    """Return the keys of tenants. Raises InvalidField."""
    return NamedKeys(settings.tenants_file, env_name("tenants_file"))
