"""Verifying that what is in the database fits together; where it does not, a line says what is wrong and mends it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sqlite_utils import Database

from optillm_memory.errors import NotFound
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.recall.vectors.ivf import IvfIndex
from optillm_memory.records import Scope
from optillm_memory.settings import is_url, without_password
from optillm_memory.store import fold
from optillm_memory.store.base import Store
from optillm_memory.store.maintenance import forget as deletion
from optillm_memory.store.maintenance.backup import backup
from optillm_memory.store.maintenance.copying import copy
from optillm_memory.store.maintenance.erase import BATCH, WAIT_S
from optillm_memory.store.postgres.connection import SCHEMA, PostgresReaders
from optillm_memory.store.postgres.schema import _MIGRATIONS
from optillm_memory.store.sqlite.connection import Connection
from optillm_memory.store.sqlite.index_files import IndexFiles, folder_of
from optillm_memory.store.sqlite.migrations import migrations, newer_than_us
from optillm_memory.store.sqlite.reading import UntouchedReaders
from optillm_memory.store.sqlite.seal_files import SealFiles
from optillm_memory.store.sqlite.seal_reads import SETTLE, SealReads
from optillm_memory.store.sqlite.store import SqliteStore
from optillm_memory.store.tables.memories import NO_MEMORY
from optillm_memory.store.tables.vectors import SEARCHED, coverage_of
from optillm_memory.store.tables.words import scoped_words

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


def verify(
    place: Path | str, *, deep: bool = False, normal: Callable[[str], str] = normal_answer, seal_folder: str = ""
) -> Iterator[Check]:
    """Yield a check of everything that must hold in a database file or on a server, while others use it.

    `deep` compares all words of the index of words, and what is derived with a fold of a copy of the log.
    Raises StoreError where it cannot be read.
    """
    looked_at = _looked_at(place)
    with looked_at.reading() as db:
        for check in looked_at.first(db):
            yield check
            if check.level == "fail":  # whatever else would be found means nothing
                return
        db.execute(looked_at.begin)  # one state for all that follows
        yield _counts(db)
        for table, (condition, how) in ORPHANS.items():
            yield _orphans(db, table, condition, how)
        yield from _derived_rows(db)
        yield _words(db, looked_at, None if deep else _WORDS_READ)
        yield from _vectors(db, looked_at)
        yield from looked_at.indexes(db)
        db.execute("COMMIT")
    yield from looked_at.seal(seal_folder)
    if deep:
        yield _fold(looked_at, normal)


def mend(store: Store, place: Path | str) -> dict[str, int]:
    """Delete rows that belong to nothing, and vectors of a wrong length; return how many there were by table."""
    looked_at = _looked_at(place)
    with looked_at.reading() as db:
        unlike = _unlike(db, looked_at)
    conditions = {table: [condition] for table, (condition, how) in ORPHANS.items() if how == _MEND}
    batches = (unlike[start : start + BATCH] for start in range(0, len(unlike), BATCH))
    conditions["vectors"] = [f"id IN ({', '.join(map(str, batch))})" for batch in batches]
    gone = {
        table: sum(
            store.write(lambda tx, table=table, which=which: deletion.delete_rows(tx, table, which)).result(WAIT_S)  # type: ignore[misc]
            for which in several
        )
        for table, several in conditions.items()
    }
    return {table: count for table, count in gone.items() if count}


class _File:
    """What is looked at where the database is a file."""

    begin = "BEGIN"
    length = "length(vector)"  # in bytes

    def __init__(self, path: Path) -> None:
        self._path = path
        self.room: Path | None = path.parent  # for a copy

    @contextlib.contextmanager
    def reading(self) -> Iterator[Any]:
        with contextlib.closing(UntouchedReaders(self._path)) as readers, readers.borrow() as db:
            yield db

    def first(self, db: Any) -> Iterator[Check]:
        found = [str(row[0]) for row in db.execute("PRAGMA integrity_check(5)").fetchall()]
        if found == ["ok"]:
            yield Check("integrity", "ok", "SQLite finds the file whole")
        else:
            said = "; ".join(found)[:300]
            how = "stop optillm and take the last backup, or export what can be read"
            yield Check("integrity", "fail", f"{said}; {how}")
        tables = Database(db)
        yield _schema(newer_than_us(tables), [m.name for m in migrations.pending(tables)])

    def rows(self, db: Any, sql: str) -> Iterator[Any]:
        yield from db.execute(sql)

    def indexes(self, db: Any) -> Iterator[Check]:
        yield from _index_files(db, self._path)

    def seal(self, folder: str) -> Iterator[Check]:
        with contextlib.closing(UntouchedReaders(self._path)) as readers:
            found = SealReads(SealFiles.of(self._path, folder)).examine(readers)
        if found:
            yield Check("seal", "fail", f"changed from outside: {'; '.join(found)[:500]}; {SETTLE}")
        elif found is not None:
            yield Check("seal", "ok", "every row is as it was written")

    def copied(self, folder: Path) -> Path:
        return backup(self._path, folder / "copy.db")


class _Server(_File):
    """What is looked at on PostgreSQL: its pages are the business of `pg_amcheck`."""

    begin = "BEGIN ISOLATION LEVEL REPEATABLE READ"
    length = "4 * vector_dims(vector)"

    def __init__(self, url: str) -> None:
        self._url = url
        self.room = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[Any]:
        with contextlib.closing(PostgresReaders(self._url, 1)) as readers, readers.borrow() as db:
            db.execute("SET statement_timeout = 0")
            if not db.execute("SELECT to_regclass(?) IS NOT NULL", (f"{SCHEMA}.migrations",)).fetchone()[0]:
                raise NotFound(f"there is no memory on {without_password(self._url)}; optillm makes it when it serves")
            yield db

    def first(self, db: Any) -> Iterator[Check]:
        done = {str(row[0]) for row in db.execute("SELECT name FROM migrations").fetchall()}
        yield _schema(sorted(done - set(_MIGRATIONS)), sorted(set(_MIGRATIONS) - done))

    def rows(self, db: Any, sql: str) -> Iterator[Any]:
        yield from db.stream(sql)

    def indexes(self, db: Any) -> Iterator[Check]:
        found = db.execute(_SERVER_INDEXES, (SCHEMA,)).fetchall()
        building = db.execute(_BUILDING).fetchone()[0]
        for name, method, valid in found:
            if not valid and method == "hnsw":
                level: Level = "warn" if building else "fail"
                how = "it is being built" if building else "the first request that recalls has it built again"
                yield Check("index", level, f"{name} is not valid, so recall goes by words; {how}")
            elif not valid:
                yield Check("index", "fail", f"{name} is not valid; run in psql: REINDEX INDEX {SCHEMA}.{name}")
        of_vectors = sum(method == "hnsw" for _, method, _ in found)
        yield Check("index", "ok", f"{len(found)} indexes looked at, {of_vectors} of them of vectors")

    def seal(self, folder: str) -> Iterator[Check]:  # noqa: ARG002 - only a file is sealed
        yield from ()

    def copied(self, folder: Path) -> Path:
        copy(self._url, str(folder / "copy.db"))
        return folder / "copy.db"


def _looked_at(place: Path | str) -> _File:
    return _Server(str(place)) if is_url(str(place)) else _File(Path(place))


def _schema(newer: Sequence[str], pending: Sequence[str]) -> Check:
    if newer:
        said = f"a newer optillm-memory wrote it (it knows {newer[-1]}), which this one can neither check nor mend"
        return Check("schema", "fail", f"{said}; upgrade the package")
    if pending:
        said = f"an earlier optillm-memory wrote it, and {pending[0]} is still to be done"
        return Check("schema", "fail", f"{said}; run: optillm-memory migrate")
    return Check("schema", "ok", "it is this release's")


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


def _words(db: Connection, looked_at: _File, limit: int | None) -> Check:
    missing, extra = (int(db.execute(sql).fetchone()[0]) for sql in (_WORDLESS, _WORDS_OF_OTHERS))
    cut = "" if limit is None else f" ORDER BY number DESC LIMIT {limit}"
    compared = wrong = 0
    for scope_id, task, words in looked_at.rows(db, f"{_WORDS} {cut}"):
        compared += 1
        wrong += words != scoped_words(scope_id, task)
    if missing or extra or wrong:
        return Check(
            "words", "fail",
            f"{missing} verified memories are not in the index of words, {extra} others are, {wrong} with other "
            f"words; {REBUILD}",
        )  # fmt: skip
    return Check("words", "ok", f"every verified memory is found by its words ({compared} compared)")


def _lengths(db: Connection, looked_at: _File) -> dict[str, int]:
    """Return how long the vectors of each encoder are: as most of them."""
    found = db.execute(
        f"SELECT fingerprint, {looked_at.length} FROM vectors GROUP BY 1, 2 ORDER BY count(*)"
    ).fetchall()
    return {str(fingerprint): int(length) for fingerprint, length in found}  # the most frequent comes last


def _unlike(db: Connection, looked_at: _File) -> list[int]:
    """Return the number of each vector that is not as long as the others of its encoder."""
    sql = f"SELECT id FROM vectors WHERE fingerprint = ? AND {looked_at.length} <> ?"
    return [int(row[0]) for of in _lengths(db, looked_at).items() for row in db.execute(sql, of).fetchall()]


def _vectors(db: Connection, looked_at: _File) -> Iterator[Check]:
    usual = _lengths(db, looked_at)
    if wrong := len(_unlike(db, looked_at)):
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


def _index_files(db: Connection, path: Path) -> Iterator[Check]:
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
        index = IvfIndex(content) if content is not None else None
    except ValueError as error:
        return str(error)
    if index is None or not index.is_intact(files.blocks(name)):
        return "it is damaged"
    if index.header.fingerprint != fingerprint:
        return "it holds vectors of another encoder"
    # One of another generation is not opened any more.
    return _index_difference(db, index, scope_id) if index.header.generation == generation else ""


def _index_difference(db: Connection, index: IvfIndex, scope_id: int) -> str:
    """Return in what an index file differs from the table."""
    head = index.header
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
    held = set(np.asarray(index.numbers).tolist()) - later
    if held != wanted:
        return f"{len(wanted - held)} memories are missing in it and {len(held - wanted)} are there that must not be"
    return ""


def _fold(looked_at: _File, normal: Callable[[str], str]) -> Check:
    with (
        tempfile.TemporaryDirectory(prefix=".memory-verify-", dir=looked_at.room) as folder,
        contextlib.closing(SqliteStore(looked_at.copied(Path(folder)), normal=normal)) as store,
    ):
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
    "prefixes": (f"trace_id <> '' AND {_NO_TRACE.format('prefixes')}", _MEND),
    "ledger": (_NO_EPISODE.format("ledger"), _MEND),
    "lines": (_NO_EPISODE.format("lines"), _MEND),
    "feedback": (f"scope_id IS NOT NULL AND {_NO_SCOPE.format('feedback')}", _MEND),
    "memories": (f"status NOT IN {NO_MEMORY} AND {_NO_SCOPE.format('memories')}", REBUILD),
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
            f"SELECT count(*) FROM memories WHERE status NOT IN {NO_MEMORY} "
            "AND NOT EXISTS (SELECT 1 FROM contributions WHERE contributions.number = memories.number "
            "AND role IN ('evidence', 'solved') AND success) "
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
# EXCEPT and not NOT IN: for that PostgreSQL reads one table anew for each row of the other where they are large.
_WORDLESS = f"""
    SELECT count(*) FROM (
        SELECT number FROM memories WHERE {SEARCHED} EXCEPT SELECT rowid FROM memories_fts) AS missing"""
_WORDS_OF_OTHERS = f"""
    SELECT count(*) FROM (
        SELECT rowid FROM memories_fts EXCEPT SELECT number FROM memories WHERE {SEARCHED}) AS extra"""
_WORDS = f"""
    SELECT scope_id, task, words FROM memories JOIN memories_fts ON memories_fts.rowid = number WHERE {SEARCHED}"""
_SERVER_INDEXES = """
    SELECT pg_class.relname, amname, indisvalid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    JOIN pg_am ON pg_am.oid = relam JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = ? ORDER BY pg_class.relname"""
_BUILDING = "SELECT count(*) FROM pg_stat_progress_create_index WHERE datname = current_database()"
