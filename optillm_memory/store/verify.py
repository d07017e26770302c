"""Verifying that what is in the database fits together; where it does not, a line says what is wrong and mends it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from optillm_memory.learn import fold
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.recall.ann import Base
from optillm_memory.records import Scope
from optillm_memory.store import rows
from optillm_memory.store.backup import backup
from optillm_memory.store.base import Store
from optillm_memory.store.connection import Connection, Readers
from optillm_memory.store.erase import WAIT_S
from optillm_memory.store.index_files import IndexFiles, folder_of
from optillm_memory.store.sqlite import SqliteStore
from optillm_memory.store.vectors import SEARCHED, coverage_of

Level = Literal["ok", "warn", "fail"]
REBUILD = "run: optillm-memory rebuild"
_MEND = "run: optillm-memory verify --mend"
_WORDS_READ = 2_000  # memories whose words are compared unless all are asked for


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, how it stands, and how to mend it."""

    name: str
    level: Level
    message: str

    def as_dict(self) -> dict[str, str]:
        """Return the check as a JSON object."""
        return {"name": self.name, "level": self.level, "message": self.message}


def verify(path: Path, *, deep: bool = False, normal: Callable[[str], str] = normal_answer) -> Iterator[Check]:
    """Yield a check of everything that must hold in a database file, while others use it.

    `deep` compares all words of the index of words, and what is derived with a fold of a copy of the log.
    """
    with contextlib.closing(Readers(path, 1)) as readers, readers.borrow() as db:
        whole = _integrity(db)
        yield whole
        if whole.level == "fail":
            return
        db.execute("BEGIN")  # one state for all that follows
        yield _counts(db)
        for table, (condition, mend) in ORPHANS.items():
            yield _orphans(db, table, condition, mend)
        yield from _derived_rows(db)
        yield _words(db, None if deep else _WORDS_READ)
        yield from _vectors(db)
        yield from _indexes(db, path)
        db.execute("COMMIT")
    if deep:
        yield _fold(path, normal)


def mend(store: Store, path: Path) -> dict[str, int]:
    """Delete rows that belong to nothing, and vectors of a wrong length; return how many there were by table."""
    with contextlib.closing(Readers(path, 1)) as readers, readers.borrow() as db:
        usual = _lengths(db)
    gone = {
        table: store.write(lambda tx, table=table: tx.drop_rows(table, ORPHANS[table][0])).result(WAIT_S)  # type: ignore[misc]
        for table, (_, how) in ORPHANS.items()
        if how == _MEND
    }
    gone["vectors"] = sum(
        store.write(lambda tx, of=of: tx.drop_vectors_unlike(*of)).result(WAIT_S)  # type: ignore[misc]
        for of in usual.items()
    )
    return {table: count for table, count in gone.items() if count}


def _integrity(db: Connection) -> Check:
    found = [str(row[0]) for row in db.execute("PRAGMA integrity_check(5)").fetchall()]
    if found == ["ok"]:
        return Check("integrity", "ok", "SQLite finds the file whole")
    said = "; ".join(found)[:300]
    return Check("integrity", "fail", f"{said}; stop optillm and take the last backup, or export what can be read")


def _counts(db: Connection) -> Check:
    counts = [f"{db.execute(f'SELECT count(*) FROM {name}').fetchone()[0]} {name}" for name in _COUNTED]
    return Check("counts", "ok", ", ".join(counts))


def _orphans(db: Connection, table: str, condition: str, mend: str) -> Check:
    count = int(db.execute(f"SELECT count(*) FROM {table} WHERE {condition}").fetchone()[0])
    if count:
        return Check(f"orphans:{table}", "fail", f"{count} rows of {table} belong to nothing that is there; {mend}")
    return Check(f"orphans:{table}", "ok", "every row belongs to something")


def _derived_rows(db: Connection) -> Iterator[Check]:
    for name, (sql, wrong) in _DERIVED.items():
        count = int(db.execute(sql).fetchone()[0])
        yield Check(name, "fail", f"{count} {wrong}; {REBUILD}") if count else Check(name, "ok", "as it must be")


def _words(db: Connection, limit: int | None) -> Check:
    missing, extra = (int(db.execute(sql).fetchone()[0]) for sql in (_WORDLESS, _WORDS_OF_OTHERS))
    cut = "" if limit is None else f" ORDER BY number DESC LIMIT {limit}"
    found = db.execute(f"{_WORDS} {cut}")
    compared = wrong = 0
    for scope_id, task, words in found:
        compared += 1
        wrong += words != rows.scoped_words(scope_id, task)
    if missing or extra or wrong:
        return Check(
            "words", "fail",
            f"{missing} verified memories are not in the index of words, {extra} others are, {wrong} with other "
            f"words; {REBUILD}",
        )  # fmt: skip
    return Check("words", "ok", f"every verified memory is found by its words ({compared} compared)")


def _lengths(db: Connection) -> dict[str, int]:
    """Return how long the vectors of each encoder are: as most of them."""
    found = db.execute("SELECT fingerprint, length(vector) FROM vectors GROUP BY 1, 2 ORDER BY count(*)").fetchall()
    return {str(fingerprint): int(length) for fingerprint, length in found}  # the most frequent comes last


def _vectors(db: Connection) -> Iterator[Check]:
    usual = _lengths(db)
    wrong = sum(
        int(db.execute("SELECT count(*) FROM vectors WHERE fingerprint = ? AND length(vector) <> ?", of).fetchone()[0])
        for of in usual.items()
    )
    if wrong:
        yield Check("vectors", "fail", f"{wrong} vectors are not as long as the others of their encoder; {_MEND}")
    else:
        yield Check("vectors", "ok", ", ".join(f"{length // 4} numbers by {name}" for name, length in usual.items()))
    total, embedded = coverage_of(db)
    if len(embedded) > 1:
        yield Check("encoders", "warn", f"{_shares(total, embedded)}; run: optillm-memory reembed --prune")
    elif embedded and min(embedded.values()) < total:
        yield Check("encoders", "warn", f"{_shares(total, embedded)}; run: optillm-memory reembed")
    else:
        yield Check("encoders", "ok", _shares(total, embedded))


def _shares(total: int, embedded: dict[str, int]) -> str:
    shown = ", ".join(f"{count} by {fingerprint}" for fingerprint, count in embedded.items()) or "none"
    return f"of {total} memories embedded: {shown}"


def _indexes(db: Connection, path: Path) -> Iterator[Check]:
    files = IndexFiles(folder_of(path))
    generation = int(db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()[0])
    fingerprints = [row[0] for row in db.execute("SELECT DISTINCT fingerprint FROM vectors").fetchall()]
    scopes = db.execute("SELECT id, tenant, namespace, user_id, agent_id FROM scopes").fetchall()
    looked_at, named = 0, set()
    for scope_id, *scope in scopes:
        for fingerprint in fingerprints:
            name = files.name(Scope(*scope), fingerprint)
            named.add(name)
            if files.exists(name):
                looked_at += 1
                if wrong := _index_fault(db, files, name, (scope_id, fingerprint, generation)):
                    yield Check("index", "fail", f"{name}: {wrong}; delete the file: it is made again")
    folder = folder_of(path)
    stray = [f.name for f in folder.glob("*") if f.suffix != ".lock" and f.stem not in named]
    if stray:
        yield Check("index", "warn", f"{len(stray)} files in {folder} belong to no scope; delete them")
    yield Check("index", "ok", f"{looked_at} files of vectors looked at")


def _index_fault(db: Connection, files: IndexFiles, name: str, of: tuple[int, str, int]) -> str:
    """Return what is wrong with an index file; empty where nothing is, or where it is older than a rebuild."""
    scope_id, fingerprint, generation = of
    try:
        content = files.mapped(name)
        base = Base(content) if content is not None else None
    except ValueError as error:
        return str(error)
    if base is None or not base.is_whole(files.blocks(name)):
        return "it is damaged"
    if base.header.fingerprint != fingerprint:
        return "it holds vectors of another encoder"
    # One of another generation is not opened any more.
    return _index_difference(db, base, scope_id) if base.header.generation == generation else ""


def _index_difference(db: Connection, base: Base, scope_id: int) -> str:
    """Return in what an index file differs from the table."""
    head = base.header
    last = int(db.execute("SELECT value FROM meta WHERE key = 'revision'").fetchone()[0])
    if head.revision > last:
        return f"it is of revision {head.revision}, the table of {last}"
    # What changed since is told to whoever opens the file; all the rest must be the same in both.
    later = {r[0] for r in db.execute("SELECT number FROM memories WHERE revision > ?", (head.revision,)).fetchall()}
    searched = db.execute(
        "SELECT number FROM memories JOIN vectors USING (key_hash) WHERE scope_id = ? AND fingerprint = ? "
        f"AND revision <= ? AND {SEARCHED}",
        (scope_id, head.fingerprint, head.revision),
    )
    wanted = {row[0] for row in searched.fetchall()}
    held = set(np.asarray(base.numbers).tolist()) - later
    if held != wanted:
        return f"{len(wanted - held)} memories are missing in it and {len(held - wanted)} are there that must not be"
    return ""


def _fold(path: Path, normal: Callable[[str], str]) -> Check:
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-verify-", dir=path.parent) as folder:
        copy = backup(path, Path(folder) / "copy.db")
        with contextlib.closing(SqliteStore(copy, normal=normal)) as store:
            before = store.derived()
            traces = store.write(fold.rebuild).result()
            different = _different(before, store.derived())
    if different:
        return Check("fold", "fail", f"{different} derived rows differ from a fold of the log; {REBUILD}")
    return Check("fold", "ok", f"a fold of {traces} traces yields the {len(before)} derived rows that are there")


def _different(one: Sequence[tuple[Any, ...]], other: Sequence[tuple[Any, ...]]) -> int:
    return len(set(one) ^ set(other))


_COUNTED = ("traces", "steps", "feedback", "memories", "scopes", "proposals", "decisions", "vectors")
_NO_TRACE = "NOT EXISTS (SELECT 1 FROM traces WHERE traces.trace_id = {0}.trace_id)"
_NO_SCOPE = "NOT EXISTS (SELECT 1 FROM scopes WHERE scopes.id = {0}.scope_id)"
_NO_EPISODE = """NOT EXISTS (SELECT 1 FROM traces WHERE traces.scope_id = {0}.scope_id
    AND traces.episode_id = {0}.episode_id)"""
# By table: the rows that belong to nothing, and what mends that. Feedback may wait for a trace that never comes.
ORPHANS: dict[str, tuple[str, str]] = {
    **{name: (_NO_TRACE.format(name), _MEND) for name in ("injections", "calls", "proposals", "decisions")},
    "traces": (_NO_SCOPE.format("traces"), _MEND),
    "steps": (f"{_NO_TRACE.format('steps')} OR {_NO_EPISODE.format('steps')}", _MEND),
    "prefixes": (f"trace_id IS NOT NULL AND {_NO_TRACE.format('prefixes')}", _MEND),
    "ledger": (_NO_EPISODE.format("ledger"), _MEND),
    "feedback": (f"scope_id IS NOT NULL AND {_NO_SCOPE.format('feedback')}", _MEND),
    "memories": (f"status NOT IN {rows.NO_MEMORY} AND {_NO_SCOPE.format('memories')}", REBUILD),
    **{name: (_NO_TRACE.format(name), REBUILD) for name in ("outcomes", "contributions", "fix_evidence")},
    "labels": ("NOT EXISTS (SELECT 1 FROM proposals WHERE proposals.trace_id = labels.trace_id)", _MEND),
    "rewards": ("NOT EXISTS (SELECT 1 FROM decisions WHERE decisions.trace_id = rewards.trace_id)", REBUILD),
    "attempts": (
        (
            "NOT EXISTS (SELECT 1 FROM steps WHERE steps.scope_id = attempts.scope_id "
            "AND steps.episode_id = attempts.episode_id AND steps.step_id = attempts.step_id)"
        ),
        REBUILD,
    ),
    "exposures": (_NO_EPISODE.format("exposures"), REBUILD),
    "fixes": ("NOT EXISTS (SELECT 1 FROM memories WHERE memories.memory_id = fixes.memory_id)", REBUILD),
}
_DERIVED = {
    "evidence": (
        (
            f"SELECT count(*) FROM memories WHERE status NOT IN {rows.NO_MEMORY} "
            "AND NOT EXISTS (SELECT 1 FROM contributions WHERE contributions.number = memories.number "
            "AND role = 'evidence' AND success) "
            "AND NOT EXISTS (SELECT 1 FROM fixes WHERE fixes.memory_id = memories.memory_id)"
        ),
        "memories rest on nothing",
    ),
    "labels": (
        (
            "SELECT count(*) FROM proposals WHERE NOT EXISTS (SELECT 1 FROM labels "
            "WHERE labels.trace_id = proposals.trace_id)"
        ),
        "proposals have no label",
    ),
    "revision": (
        "SELECT count(*) FROM memories WHERE revision > (SELECT value FROM meta WHERE key = 'revision')",
        "memories are newer than the store's revision",
    ),
}
_WORDLESS = f"SELECT count(*) FROM memories WHERE {SEARCHED} AND number NOT IN (SELECT rowid FROM memories_fts)"
_WORDS_OF_OTHERS = f"""
    SELECT count(*) FROM memories_fts WHERE rowid NOT IN (SELECT number FROM memories WHERE {SEARCHED})"""
_WORDS = f"""
    SELECT scope_id, task, words FROM memories JOIN memories_fts ON memories_fts.rowid = number WHERE {SEARCHED}"""
