"""The schema, as numbered migrations that never change once released."""

from __future__ import annotations

import os
import re

from sqlite_utils import Database, Migrations

from optillm_memory.store.tables.words import scoped_words

migrations = Migrations("optillm_memory")


def newer_than_us(db: Database) -> list[str]:
    """Return the migrations that a database has had and this release does not know."""
    return sorted({m.name for m in migrations.applied(db)} - {name for name in globals() if _NUMBERED.match(name)})


@migrations()
def m001_log_and_memories(db: Database) -> None:
    """Create the log (traces, steps, feedback), what is derived from it, and the ledger."""
    for statement in _M001:
        db.execute(statement)
    db.execute("INSERT INTO meta(key, value) VALUES ('salt', ?), ('revision', 0), ('generation', 0)", [os.urandom(16)])


@migrations()
def m002_steps_attempts_and_fixes(db: Database) -> None:
    """Give steps an id of their own and a branch, and make room for what is learned from them."""
    for statement in _M002:
        db.execute(statement)
    found = db.execute("SELECT number, scope_id, task FROM memories WHERE status = 'verified'").fetchall()
    for number, scope_id, task in found:
        db.execute("INSERT INTO memories_fts(rowid, words) VALUES (?, ?)", [number, scoped_words(scope_id, task)])


@migrations()
def m003_calls_proposals_and_decisions(db: Database) -> None:
    """Make room for a request's inner model calls, for what the gate would have said, and for the arms chosen."""
    for statement in _M003:
        db.execute(statement)


@migrations()
def m004_rewards(db: Database) -> None:
    """Note what the policy saw of a request, and make room for what came of its choices."""
    for statement in _M004:
        db.execute(statement)


@migrations()
def m005_vectors_in_order(db: Database) -> None:
    """Lay vectors down in the order in which they come: in a tree ordered by hash each took pages of its own."""
    for statement in _M005:
        db.execute(statement)


@migrations()
def m006_forgotten(db: Database) -> None:
    """Note which memories were forgotten, so that no copy of them is used; what is withdrawn keeps no text."""
    for statement in _M006:
        db.execute(statement)


@migrations()
def m007_contributions_by_number(db: Database) -> None:
    """Order contributions by their memory's number: in a tree ordered by hash each took a page of its own."""
    for statement in _M007:
        db.execute(statement)


@migrations()
def m008_prefixes_by_trace(db: Database) -> None:
    """Let several episodes have one prefix; note how each request goes on from one, and where a step was asked for."""
    for statement in _M008:
        db.execute(statement)


@migrations()
def m009_fewer_indexes(db: Database) -> None:
    """Drop indexes of random keys: each made every request write pages of its own. Find a trace's prefixes by it."""
    for statement in FEWER_INDEXES:
        db.execute(statement)


@migrations()
def m010_lines_and_procedures(db: Database) -> None:
    """Make room for what the users of an agent wrote, by line; note the end user and the goal that a caller named."""
    for statement in _M010:
        db.execute(statement)


@migrations()
def m011_provenance_validity_and_seal(db: Database) -> None:
    """Note who gave feedback, under which trust and until when it holds; make room for revocations and the seal."""
    for statement in _M011:
        db.execute(statement)


FEWER_INDEXES = (
    *(f"DROP INDEX {name}" for name in ("steps_step_id", "steps_made_by", "injections_memory")),
    "CREATE INDEX prefixes_trace ON prefixes(trace_id)",
)
# What was recorded before procedures were learned is folded in the background, up to here.
FOLD_OLDER = "INSERT INTO meta SELECT 'fold_upto', max(seq) FROM traces HAVING max(seq) > 0"
_NUMBERED = re.compile(r"m\d{3}_")
_M001 = (
    "CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    """CREATE TABLE scopes(
        id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, namespace TEXT NOT NULL, user_id TEXT NOT NULL,
        agent_id TEXT NOT NULL, UNIQUE(tenant, namespace, user_id, agent_id))""",
    # The log: rows are only appended.
    """CREATE TABLE traces(
        seq INTEGER PRIMARY KEY, trace_id TEXT NOT NULL UNIQUE, scope_id INTEGER NOT NULL REFERENCES scopes(id),
        episode_id TEXT NOT NULL, created_at REAL NOT NULL, model TEXT NOT NULL, approach TEXT NOT NULL,
        action TEXT NOT NULL, held_out INTEGER NOT NULL, propensity REAL NOT NULL, task TEXT NOT NULL,
        key_hash TEXT NOT NULL, frame TEXT NOT NULL, messages TEXT NOT NULL, answer TEXT, finish_reason TEXT,
        error TEXT, skipped TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
        latency_ms REAL NOT NULL, recall_ms REAL NOT NULL, tags TEXT NOT NULL)""",
    "CREATE INDEX traces_episode ON traces(scope_id, episode_id, created_at)",
    "CREATE INDEX traces_episode_id ON traces(episode_id)",
    """CREATE TABLE injections(
        trace_id TEXT NOT NULL, memory_id TEXT NOT NULL, kind TEXT NOT NULL, score REAL NOT NULL,
        tokens INTEGER NOT NULL, PRIMARY KEY(trace_id, memory_id)) WITHOUT ROWID""",
    """CREATE TABLE steps(
        scope_id INTEGER NOT NULL, episode_id TEXT NOT NULL, call_id TEXT NOT NULL, ordinal INTEGER NOT NULL,
        tool TEXT NOT NULL, arguments TEXT NOT NULL, observation TEXT, trace_id TEXT NOT NULL,
        PRIMARY KEY(scope_id, episode_id, call_id)) WITHOUT ROWID""",
    """CREATE TABLE feedback(
        seq INTEGER PRIMARY KEY, tenant TEXT NOT NULL, feedback_id TEXT NOT NULL, retracts INTEGER NOT NULL,
        scope_id INTEGER, trace_id TEXT, episode_id TEXT, metric TEXT NOT NULL, value TEXT NOT NULL,
        source TEXT NOT NULL, evidence TEXT, occurred_at REAL NOT NULL, received_at REAL NOT NULL,
        UNIQUE(tenant, feedback_id, retracts))""",
    "CREATE INDEX feedback_trace ON feedback(trace_id)",
    "CREATE INDEX feedback_episode ON feedback(episode_id)",
    # How a later request finds its episode and the same insertions again.
    """CREATE TABLE prefixes(
        scope_id INTEGER NOT NULL, hash TEXT NOT NULL, episode_id TEXT NOT NULL,
        PRIMARY KEY(scope_id, hash)) WITHOUT ROWID""",
    """CREATE TABLE ledger(
        scope_id INTEGER NOT NULL, episode_id TEXT NOT NULL, anchor TEXT NOT NULL, position INTEGER NOT NULL,
        form TEXT NOT NULL, payload TEXT NOT NULL, items TEXT NOT NULL,
        PRIMARY KEY(scope_id, episode_id, anchor, form)) WITHOUT ROWID""",
    # Derived: a fold over the log. `rebuild` empties and refills these.
    """CREATE TABLE memories(
        number INTEGER PRIMARY KEY, memory_id TEXT NOT NULL UNIQUE, scope_id INTEGER NOT NULL, kind TEXT NOT NULL,
        status TEXT NOT NULL, task TEXT NOT NULL, answer TEXT NOT NULL, frame TEXT NOT NULL, key_hash TEXT NOT NULL,
        successes INTEGER NOT NULL, failures INTEGER NOT NULL, used_successes INTEGER NOT NULL,
        used_failures INTEGER NOT NULL, created_at REAL NOT NULL, revision INTEGER NOT NULL)""",
    "CREATE INDEX memories_scope ON memories(scope_id, revision)",
    """CREATE TABLE outcomes(
        trace_id TEXT PRIMARY KEY, verdict TEXT NOT NULL, verified INTEGER NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE contributions(
        memory_id TEXT NOT NULL, trace_id TEXT NOT NULL, role TEXT NOT NULL, success INTEGER NOT NULL,
        verified INTEGER NOT NULL, answer TEXT, PRIMARY KEY(memory_id, trace_id, role)) WITHOUT ROWID""",
    "CREATE INDEX contributions_trace ON contributions(trace_id)",
    # Caches: made again from the text where they are missing.
    """CREATE TABLE vectors(
        key_hash TEXT NOT NULL, fingerprint TEXT NOT NULL, vector BLOB NOT NULL,
        PRIMARY KEY(key_hash, fingerprint)) WITHOUT ROWID""",
    "CREATE VIRTUAL TABLE memories_fts USING fts5(scope, task, tokenize = 'unicode61 remove_diacritics 0')",
    "CREATE VIRTUAL TABLE memories_vocab USING fts5vocab(memories_fts, 'col')",
)
_M002 = (
    """CREATE TABLE steps_by_id(
        scope_id INTEGER NOT NULL, episode_id TEXT NOT NULL, step_id TEXT NOT NULL, parent_id TEXT NOT NULL,
        call_id TEXT NOT NULL, ordinal INTEGER NOT NULL, tool TEXT NOT NULL, arguments TEXT NOT NULL,
        observation TEXT, trace_id TEXT NOT NULL, made_by TEXT, PRIMARY KEY(scope_id, episode_id, step_id))
        WITHOUT ROWID""",
    """INSERT INTO steps_by_id SELECT scope_id, episode_id, call_id,
        coalesce(lag(call_id) OVER (PARTITION BY scope_id, episode_id ORDER BY ordinal, call_id), ''), call_id, ordinal,
        tool, arguments, observation, trace_id, NULL FROM steps""",
    "DROP TABLE steps",
    "ALTER TABLE steps_by_id RENAME TO steps",
    "CREATE INDEX steps_made_by ON steps(made_by)",
    "CREATE INDEX steps_step_id ON steps(step_id)",
    "ALTER TABLE prefixes ADD COLUMN trace_id TEXT",
    "ALTER TABLE injections ADD COLUMN suggestion TEXT",
    "ALTER TABLE traces ADD COLUMN extra_calls INTEGER NOT NULL DEFAULT 0",
    # A scope's words are terms of its own: a query reads its own postings, and learns nothing of how others speak.
    "DROP TABLE memories_vocab",
    "DROP TABLE memories_fts",
    "CREATE VIRTUAL TABLE memories_fts USING fts5(words, tokenize = 'unicode61 remove_diacritics 0')",
    # Derived: what each observation says, and the fixes that follow from it.
    """CREATE TABLE attempts(
        scope_id INTEGER NOT NULL, episode_id TEXT NOT NULL, step_id TEXT NOT NULL, action_key TEXT NOT NULL,
        verdict TEXT NOT NULL, basis TEXT NOT NULL, signature TEXT NOT NULL, message TEXT NOT NULL,
        output TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY(scope_id, episode_id, step_id)) WITHOUT ROWID""",
    "CREATE INDEX attempts_action ON attempts(scope_id, action_key, at)",
    """CREATE TABLE fixes(
        memory_id TEXT PRIMARY KEY, scope_id INTEGER NOT NULL, tool TEXT NOT NULL, field TEXT NOT NULL,
        action TEXT NOT NULL, output TEXT NOT NULL, signature TEXT NOT NULL, relation TEXT NOT NULL, text TEXT NOT NULL)
        WITHOUT ROWID""",
    "CREATE INDEX fixes_signature ON fixes(scope_id, signature)",
    """CREATE TABLE fix_evidence(
        memory_id TEXT NOT NULL, scope_id INTEGER NOT NULL, episode_id TEXT NOT NULL, step_id TEXT NOT NULL,
        role TEXT NOT NULL, success INTEGER NOT NULL, verified INTEGER NOT NULL, trace_id TEXT NOT NULL,
        environment TEXT NOT NULL, PRIMARY KEY(memory_id, scope_id, episode_id, step_id, role)) WITHOUT ROWID""",
    "CREATE INDEX fix_evidence_episode ON fix_evidence(scope_id, episode_id)",
)
_M003 = (
    # What else must be equal for an answer to be reused; empty where reuse is out of the question.
    "ALTER TABLE traces ADD COLUMN partition TEXT NOT NULL DEFAULT ''",
    # What a held-out request would have had in its prompt: the other half of every comparison.
    "ALTER TABLE injections ADD COLUMN withheld INTEGER NOT NULL DEFAULT 0",
    # The log goes on: the model calls that an approach made for one trace.
    """CREATE TABLE calls(
        trace_id TEXT NOT NULL, ordinal INTEGER NOT NULL, model TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL, latency_ms REAL NOT NULL, messages TEXT NOT NULL, answer TEXT, error TEXT,
        PRIMARY KEY(trace_id, ordinal)) WITHOUT ROWID""",
    # What memory would have answered (or did): the gate is a fold over these and their labels.
    """CREATE TABLE proposals(
        trace_id TEXT PRIMARY KEY, scope_id INTEGER NOT NULL, partition TEXT NOT NULL, answer TEXT NOT NULL,
        memory_ids TEXT NOT NULL, memory_id TEXT NOT NULL, score REAL NOT NULL, exact INTEGER NOT NULL,
        vetoes TEXT NOT NULL, served INTEGER NOT NULL, audit INTEGER NOT NULL, reason TEXT NOT NULL,
        parts TEXT NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX proposals_memory ON proposals(memory_id)",
    """CREATE TABLE decisions(
        trace_id TEXT PRIMARY KEY, scope_id INTEGER NOT NULL, arm TEXT NOT NULL, propensity REAL NOT NULL,
        reason TEXT NOT NULL, cluster INTEGER NOT NULL, probabilities TEXT NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX decisions_scope ON decisions(scope_id, trace_id)",
    # Derived: whether a proposal was right; NULL where feedback does not tell (any more).
    """CREATE TABLE labels(
        trace_id TEXT PRIMARY KEY, scope_id INTEGER NOT NULL, correct INTEGER, revision INTEGER NOT NULL)
        WITHOUT ROWID""",
    "CREATE INDEX labels_scope ON labels(scope_id, revision)",
    # Derived: the reported episodes that a memory was first recalled in, with it and held out.
    """CREATE TABLE exposures(
        memory_id TEXT NOT NULL, scope_id INTEGER NOT NULL, episode_id TEXT NOT NULL, created_at REAL NOT NULL,
        held_out INTEGER NOT NULL, share REAL NOT NULL, success INTEGER NOT NULL,
        PRIMARY KEY(memory_id, scope_id, episode_id)) WITHOUT ROWID""",
    "CREATE INDEX exposures_episode ON exposures(scope_id, episode_id)",
)
_M004 = (
    "ALTER TABLE decisions ADD COLUMN stake REAL NOT NULL DEFAULT 0",
    "ALTER TABLE decisions ADD COLUMN length INTEGER NOT NULL DEFAULT 0",
    # Derived: what the arm that an episode was given earned (NULL until a verified outcome tells) and took.
    """CREATE TABLE rewards(
        trace_id TEXT PRIMARY KEY, scope_id INTEGER NOT NULL, reward REAL, tokens INTEGER NOT NULL,
        latency_ms REAL NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX rewards_scope ON rewards(scope_id, revision)",
)
_M005 = (
    """CREATE TABLE vectors_in_order(
        id INTEGER PRIMARY KEY, key_hash TEXT NOT NULL, fingerprint TEXT NOT NULL, vector BLOB NOT NULL,
        UNIQUE(key_hash, fingerprint))""",
    "INSERT INTO vectors_in_order(key_hash, fingerprint, vector) SELECT key_hash, fingerprint, vector FROM vectors",
    "DROP TABLE vectors",
    "ALTER TABLE vectors_in_order RENAME TO vectors",
)
_M006 = (
    "CREATE TABLE forgotten(memory_id TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",
    "CREATE INDEX injections_memory ON injections(memory_id)",
    "UPDATE memories SET task = '', answer = '', frame = '', key_hash = '' WHERE status = 'withdrawn'",
)
# What is said of a memory that was never right, or not any more, needs a number, too.
NUMBER_ALL = """
    INSERT INTO memories(memory_id, scope_id, kind, status, task, answer, frame, key_hash, successes, failures,
    used_successes, used_failures, created_at, revision)
    SELECT memory_id, min(scope_id), 'exemplar', 'unfounded', '', '', '', '', 0, 0, 0, 0, 0, 0
    FROM contributions JOIN traces USING (trace_id)
    WHERE memory_id NOT IN (SELECT memory_id FROM memories) GROUP BY memory_id"""
BY_NUMBER = (
    """INSERT INTO contributions_by_number(number, trace_id, role, success, verified, answer)
        SELECT number, trace_id, role, success, verified, contributions.answer
        FROM contributions JOIN memories USING (memory_id) ORDER BY number, trace_id, role""",
    "DROP TABLE contributions",
    "ALTER TABLE contributions_by_number RENAME TO contributions",
    "CREATE INDEX contributions_trace ON contributions(trace_id)",
)
_M007 = (
    NUMBER_ALL,
    """CREATE TABLE contributions_by_number(
        number INTEGER NOT NULL, trace_id TEXT NOT NULL, role TEXT NOT NULL, success INTEGER NOT NULL,
        verified INTEGER NOT NULL, answer TEXT, PRIMARY KEY(number, trace_id, role)) WITHOUT ROWID""",
    *BY_NUMBER,
)
_M008 = (
    # Ordered by trace within a prefix: the latest of thousands that begin alike are found at once.
    """CREATE TABLE prefixes_of_traces(
        scope_id INTEGER NOT NULL, hash TEXT NOT NULL, trace_id TEXT NOT NULL, episode_id TEXT NOT NULL,
        PRIMARY KEY(scope_id, hash, trace_id)) WITHOUT ROWID""",
    """INSERT INTO prefixes_of_traces(scope_id, hash, trace_id, episode_id)
        SELECT scope_id, hash, coalesce(trace_id, ''), episode_id FROM prefixes""",
    "DROP TABLE prefixes",
    "ALTER TABLE prefixes_of_traces RENAME TO prefixes",
    "ALTER TABLE traces ADD COLUMN continued TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE traces ADD COLUMN continuation TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE traces ADD COLUMN one_shot INTEGER NOT NULL DEFAULT 1",
    "ALTER TABLE steps ADD COLUMN made TEXT NOT NULL DEFAULT ''",
)
_M010 = (
    """CREATE TABLE lines(
        seq INTEGER PRIMARY KEY, scope_id INTEGER NOT NULL, episode_id TEXT NOT NULL, frame TEXT NOT NULL,
        keys TEXT NOT NULL)""",
    "CREATE INDEX lines_episode ON lines(scope_id, episode_id)",
    "CREATE INDEX lines_frame ON lines(scope_id, frame, seq)",
    "CREATE INDEX memories_key ON memories(key_hash, scope_id) WHERE key_hash <> ''",  # those of the same task
    "ALTER TABLE traces ADD COLUMN end_user TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE traces ADD COLUMN goal TEXT NOT NULL DEFAULT ''",
    FOLD_OLDER,
)
HAVE_VALID_UNTIL = ("feedback", "outcomes", "memories")
_M011 = (
    "ALTER TABLE feedback ADD COLUMN reporter TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE feedback ADD COLUMN trust TEXT NOT NULL DEFAULT 'open'",
    # What the call that gave it was narrowed to: it counts on no other trace. NULL is any.
    *(f"ALTER TABLE feedback ADD COLUMN within_{name} TEXT" for name in ("namespace", "user_id", "agent_id")),
    "ALTER TABLE traces ADD COLUMN asker TEXT NOT NULL DEFAULT ''",
    # The log goes on: what these reporters said counts no more.
    "CREATE TABLE revoked(reporter TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",
    *(f"ALTER TABLE {name} ADD COLUMN valid_until REAL" for name in HAVE_VALID_UNTIL),
    """CREATE TABLE seal(
        id INTEGER PRIMARY KEY CHECK (id = 1), number INTEGER NOT NULL, link_before BLOB NOT NULL, sums BLOB NOT NULL,
        notes TEXT NOT NULL, columns TEXT NOT NULL, link BLOB NOT NULL)""",
    "CREATE TABLE seals(place INTEGER PRIMARY KEY, tag BLOB NOT NULL)",
)
