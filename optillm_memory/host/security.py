"""The open doors of this installation: what others than the operator could use, and how to close it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from optillm_memory.errors import InvalidField
from optillm_memory.host.caller import SECRET_LENGTH
from optillm_memory.host.credentials import NamedKeys, operator_key_path, reporters_of, tenants_of
from optillm_memory.host.doctor import Finding
from optillm_memory.host.origin import is_loopback
from optillm_memory.settings import Settings, env_name, is_url, read_variables

_OTHERS, _WRITE = 0o077, 0o022


def doors(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Yield a finding for each door: `ok` where it is closed, `warn` or `fail` where it is open.

    optillm's own options are known by their variables alone; those on its command line are not seen.
    """
    values, wrong = read_variables(environ)
    settings = Settings(**values)
    for error in wrong:
        yield Finding("settings", "fail", f"{error}; the default was examined in its place")
    yield from _network(environ, settings)
    yield from _trust(settings)
    yield from _keys("reporters", settings, reporters_of)
    yield from _keys("tenants", settings, tenants_of)
    yield _operator(settings)
    yield from _database(settings)
    if settings.level != "off":
        yield Finding("redaction", "ok", "secrets that are known by their form are replaced before anything is stored")
    else:
        yield Finding("redaction", "warn", f"secrets in prompts and results are stored; unset {env_name('redact')}")


def _network(environ: Mapping[str, str], settings: Settings) -> Iterator[Finding]:
    address, key = environ.get("OPTILLM_HOST", "127.0.0.1"), environ.get("OPTILLM_API_KEY", "")
    here = is_loopback(address)
    seen = "(as OPTILLM_HOST and OPTILLM_API_KEY say; options on the command line are not seen here)"
    if key and len(key) < SECRET_LENGTH:
        yield Finding("server key", "warn", f"the server's key can be guessed: use {SECRET_LENGTH} characters or more")
    elif key:
        yield Finding("server key", "ok", f"every route asks for a key {seen}")
    elif here:
        yield Finding(
            "server key", "warn",
            "no key: every program and user of this machine is the tenant `local`, and reads and judges what that has; "
            f"set OPTILLM_API_KEY {seen}",
        )  # fmt: skip
    else:
        yield Finding("server key", "fail", f"no key, and the server listens on {address}; set OPTILLM_API_KEY {seen}")
    if not here:
        yield Finding(
            "address", "warn", f"the server listens on {address}, in plain HTTP: put a proxy with TLS before it"
        )
    else:
        yield Finding("address", "ok", f"the server listens on {address}, this machine alone {seen}")
    if key and not settings.tenants_file:
        yield Finding(
            "one tenant", "warn",
            "all callers of the server's key are one tenant, and share its memory; give them keys of their own in "
            f"{env_name('tenants_file')}",
        )  # fmt: skip
    if settings.allowed_hosts:
        yield Finding(
            "names", "ok", f"further names of this server: {settings.allowed_hosts}; make sure they are yours"
        )


def _trust(settings: Settings) -> Iterator[Finding]:
    if settings.trust == "open":
        yield Finding(
            "trust", "warn",
            "open: whoever may call says what is verified; that fits where caller and judge are one person. Otherwise "
            f"set {env_name('trust')}=strict",
        )  # fmt: skip
    elif settings.reporters_file:
        yield Finding("trust", "ok", "strict: only reporters verify, and nobody their own work")
    else:
        yield Finding(
            "trust", "warn",
            "strict, without reporters: nothing is verified but by the operator, the command line and this machine's "
            f"own code; name reporters in {env_name('reporters_file')}",
        )  # fmt: skip


def _keys(what: str, settings: Settings, read: Callable[[Settings], NamedKeys]) -> Iterator[Finding]:
    name = f"{what} file"
    try:
        keys = read(settings)
    except InvalidField as error:
        yield Finding(name, "fail", str(error))
        return
    if keys.path is None:
        return
    listed = json.loads(keys.path.read_text(encoding="utf-8"))
    plain = [key for each in listed.values() for key in (each if isinstance(each, list) else [each])]
    plain = [key for key in plain if not key.startswith("sha256:")]
    if fault := _open_to_others(keys.path, secret=bool(plain)):
        yield Finding(name, "fail", fault)
    elif any(len(key) < SECRET_LENGTH for key in plain):
        yield Finding(
            name, "warn", f"{keys.path} has keys of fewer than {SECRET_LENGTH} characters, which can be guessed"
        )
    elif plain:
        yield Finding(name, "warn", f"{keys.path} has keys as they are; write sha256: and their digest instead")
    else:
        yield Finding(name, "ok", f"{keys.path} names {', '.join(keys.names) or 'nobody'}")


def _operator(settings: Settings) -> Finding:
    path = operator_key_path(settings)
    if not path.exists():
        return Finding(
            "operator key",
            "warn",
            f"there is no {path}: the next start makes it, and nobody is the operator until then",
        )
    if fault := _open_to_others(path, secret=True):
        return Finding("operator key", "fail", fault)
    if not path.read_text(encoding="utf-8").strip():
        return Finding("operator key", "fail", f"{path} is empty: delete it, and the next start makes another")
    return Finding("operator key", "ok", f"{path} can be read by its owner alone")


def _database(settings: Settings) -> Iterator[Finding]:
    if is_url(settings.db):
        parts = urlsplit(settings.db)
        tls = parse_qs(parts.query).get("sslmode", [""])[0]
        if is_loopback(parts.hostname or "localhost") or tls in ("require", "verify-ca", "verify-full"):
            yield Finding("database", "ok", f"{settings.place} is reached on this machine, or with TLS")
        else:
            yield Finding("database", "warn", f"{settings.place} may be reached without TLS; add ?sslmode=verify-full")
        return
    path = settings.path
    files = [p for p in sorted(path.parent.glob(f"{path.name}*")) if p.exists()]
    faults = [fault for file in files if (fault := _open_to_others(file, secret=True))]
    for fault in faults:
        yield Finding("database", "fail", fault)
    if files and not faults:
        yield Finding("database", "ok", f"{path}, its journal and its indexes can be read by their owner alone")
    folder = path.parent
    if folder.is_dir() and os.name == "posix":
        mode = folder.stat().st_mode
        if stat.S_IMODE(mode) & _WRITE and not mode & stat.S_ISVTX:
            yield Finding("folder", "fail", f"others may replace files in {folder}; run: chmod go-w {folder}")
    aside = [p.name for p in files if ".corrupt-" in p.name]
    if aside:
        yield Finding("copies", "warn", f"earlier databases are kept, with all that was in them: {', '.join(aside)}")


def _open_to_others(path: Path, *, secret: bool) -> str:
    """Return what others may do with a file or folder that they should not; empty on systems without modes."""
    if os.name != "posix":
        return ""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _WRITE:
        return f"{path} can be written by other users; run: chmod go-rwx {path}"
    return f"{path} can be read by other users; run: chmod go-rwx {path}" if secret and mode & _OTHERS else ""
