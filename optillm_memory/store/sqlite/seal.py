"""The seal of a database file: edits that did not go through us are seen, by whoever has the key.

For each table there is the sum of the keyed digests of its rows (MSet-Add-Hash, Clarke et al., "Incremental Multiset
Hash Functions and Their Application to Memory Integrity Checking", 2003): a row that is written is added, one that is
deleted is taken away, so forgetting needs no record of what is gone. Each commit ends in a link: a keyed hash of the
link before, its number and the sums. The latest link is also noted outside the file, so that an older copy of the file
is seen, too. Rows that a request may use have a tag of their own, by which they are checked when they are read.

`seal_commit` keeps it, `seal_reads` looks at it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from optillm_memory.store.sqlite.connection import Connection, DatabaseError
from optillm_memory.store.sqlite.seal_files import Head

LOG = (
    *("scopes", "traces", "injections", "steps", "feedback", "calls", "proposals", "decisions", "ledger"),
    "forgotten",
)
DERIVED = (
    *("memories", "contributions", "outcomes", "attempts", "fixes", "fix_evidence", "labels", "exposures"),
    "rewards",
)
# Tables whose rows have a tag, with what numbers them, or tells them apart.
NUMBERED = {"traces": (1, "seq"), "feedback": (2, "seq"), "memories": (3, "number"), "scopes": (4, "id")}
NAMED = {"fixes": ("memory_id",), "ledger": ("scope_id", "episode_id", "anchor", "form")}
_SUM, _COUNT, _TAG = 32, 8, 16  # bytes
TAG_AT = _SUM  # of a digest: from here on it is the tag
_MODULUS = 1 << (8 * _SUM)
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=lambda blob: {"": blob.hex()}).encode
_STATE = "SELECT number, link_before, sums, notes, columns, link FROM seal"
NO_KEY = "the database is sealed and its key is not there"
REMOVED = "the seal was removed from the database, or the database replaced"
OLDER = "the database is older than the latest commit that was noted outside of it"
FORKED = "the database has another latest commit than the one that was noted outside of it"
CHANGED = "the seal itself was changed from outside"


class State(NamedTuple):
    """The row of the table `seal`: a commit's number, the link before, the sums (masked), notes, columns, the link."""

    number: int
    link_before: bytes
    sums: bytes
    notes: str
    columns: str
    link: bytes


@dataclass
class Sums:
    """The sum of the digests of each table's rows, and how many rows there are."""

    total: dict[str, int] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Sums:
        """Return another one with the same values."""
        return Sums(dict(self.total), dict(self.count))

    def add(self, table: str, digest: bytes, times: int = 1) -> None:
        """Add a row, or take one away (`times` -1)."""
        value = int.from_bytes(digest[:_SUM], "big")
        self.total[table] = (self.total.get(table, 0) + times * value) % _MODULUS
        self.count[table] = self.count.get(table, 0) + times

    def masked(self, key: bytes, columns: Mapping[str, Sequence[str]]) -> bytes:
        """Return the sums as they may lie in the file: one who knew them could look for other rows of the same sum."""
        plain = b"".join(
            total.to_bytes(_SUM, "big") + count.to_bytes(_COUNT, "big", signed=True)
            for total, count in ((self.total.get(table, 0), self.count.get(table, 0)) for table in columns)
        )
        nonce = os.urandom(16)
        return nonce + _mask(key, nonce, plain)

    @classmethod
    def unmasked(cls, key: bytes, masked: bytes, columns: Mapping[str, Sequence[str]]) -> Sums:
        """Return the sums from what lies in the file."""
        plain = _mask(key, masked[:16], masked[16:])
        found = cls()
        for place, table in enumerate(columns):
            part = plain[place * (_SUM + _COUNT) : (place + 1) * (_SUM + _COUNT)]
            found.total[table] = int.from_bytes(part[:_SUM], "big")
            found.count[table] = int.from_bytes(part[_SUM:], "big", signed=True)
        return found


def _mask(key: bytes, nonce: bytes, text: bytes) -> bytes:
    stream = hashlib.shake_256(key + b"seal mask" + nonce).digest(len(text))
    return (int.from_bytes(text, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(text), "big")


def digest(key: bytes, table: str, values: Sequence[Any]) -> bytes:
    """Return the keyed digest of a row: what is summed, and after it the tag, which may be known."""
    text = encode((table, *values)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, key=key, digest_size=_SUM + _TAG, person=b"seal row").digest()


def link_of(key: bytes, state: State) -> bytes:
    """Return the link that a commit must end with."""
    text = encode((*state[:-1],)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, key=key, digest_size=32, person=b"seal link").digest()


@functools.lru_cache(8)
def columns_in(text: str) -> dict[str, list[str]]:
    """Return the columns of each table that are sealed."""
    found: dict[str, list[str]] = json.loads(text)
    return found


def state_of(db: Connection) -> State | None:
    """Return the state of the seal; None where the database is not sealed."""
    row = db.execute(_STATE).fetchone()
    return State(*row) if row else None


def tables_there(db: Connection) -> bool:
    """Whether a database has the tables of the seal: those of an earlier release have not."""
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'seal'").fetchone() is not None


def primary_key(table: str) -> tuple[str, ...]:
    """Return the columns that tell a table's rows with tags apart."""
    return (NUMBERED[table][1],) if table in NUMBERED else NAMED[table]


def place_of(table: str, key: Sequence[Any]) -> int:
    """Return where the tag of the row with this primary key lies."""
    return int(key[0]) * 8 + NUMBERED[table][0] if table in NUMBERED else named_place(table, key)


def named_place(table: str, values: Sequence[Any]) -> int:
    """Return where the tag of a row lies that has a name instead of a number."""
    hashed = hashlib.blake2b(encode((table, *values)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return -1 - (int.from_bytes(hashed, "big") >> 1)


def place_in_sql(table: str, row: str) -> str:
    """Return the SQL expression for where a row's tag lies; empty for a table without tags. `row` is its alias."""
    if table in NUMBERED:
        code, number = NUMBERED[table]
        return f"{row}.{number} * 8 + {code}"
    if table in NAMED:
        return f"seal_place('{table}', {', '.join(f'{row}.{name}' for name in NAMED[table])})"
    return ""


def fault_of(key: bytes | None, state: State | None, head: Head | None) -> str:
    """Return what is wrong with the seal as such, without a look at the rows; empty where nothing is."""
    if key is None:
        return NO_KEY
    if state is None:
        return REMOVED if head is not None else ""
    if link_of(key, state) != state.link:
        return CHANGED
    if head is not None and head.number > state.number:
        return OLDER
    if head is not None and head.number == state.number and head.link != state.link:
        return FORKED
    return str(json.loads(state.notes)["broken"])


def differences(
    db: Connection,
    key: bytes,
    state: State,
    tables: Sequence[str] = (*LOG, *DERIVED),
    rest: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return for each table that is not what was written in what it differs; `rest` is called now and then.

    It reads every row: the state must be of the same transaction.
    """
    columns = columns_in(state.columns)
    sums = Sums.unmasked(key, state.sums, columns)
    found = []
    for table in tables:
        if table not in columns:
            continue
        seen, wrong = Sums(), []
        try:
            for values, named, tag in _rows(db, table, columns[table]):
                made = digest(key, table, values)
                seen.add(table, made)
                if tag is not None and tag != made[_SUM:]:
                    wrong.append(named)
                if seen.count[table] % 256 == 0:
                    rest()
        except (DatabaseError, UnicodeError, TypeError, ValueError) as error:  # it is not what was written
            found.append(f"{table} cannot be read ({error})")
            continue
        if seen.total.get(table, 0) != sums.total.get(table, 0):
            found.append(_told_of(table, wrong, seen.count.get(table, 0) - sums.count.get(table, 0)))
    return found


def _told_of(table: str, wrong: Sequence[str], more: int) -> str:
    parts = [f"{abs(more)} rows {'too many' if more > 0 else 'missing'}"] if more else []
    if wrong:
        parts.append(f"{len(wrong)} rows changed or forged, such as {wrong[0]}")
    return f"{table}: {', '.join(parts) or 'rows changed, or put back to what they were earlier'}"


def _rows(db: Connection, table: str, columns: Sequence[str]) -> Iterator[tuple[Sequence[Any], str, bytes | None]]:
    """Yield (values, name, tag) of each row; None where rows of the table have no tag, empty where it is gone."""
    chosen = ", ".join(f"t.{name}" for name in columns)
    if table in NUMBERED:
        code, number = NUMBERED[table]
        found = db.execute(
            f"SELECT {chosen}, t.{number}, coalesce(tag, x'') FROM {table} AS t "
            f"LEFT JOIN seals ON place = t.{number} * 8 + {code}"
        )
        for row in found:
            yield row[:-2], f"{number} {row[-2]}", bytes(row[-1])
        return
    own = NAMED.get(table)
    for row in db.execute(f"SELECT {chosen} FROM {table} AS t"):
        if own is None:
            yield row, "", None
            continue
        name = [row[list(columns).index(each)] for each in own]
        tag = db.execute("SELECT tag FROM seals WHERE place = ?", (named_place(table, name),)).fetchone()
        yield row, " ".join(map(str, name)), bytes(tag[0]) if tag else b""
