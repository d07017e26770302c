"""Procedures in the store: verified success alone makes one, in any order of arrival, and nothing of it outlives it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from builders import hashing_memory
from trajectories import WISH, Dialogue, block_in, cancelling, procedures, tools_of, warm

from optillm_memory import Memory, NotFound, Settings
from optillm_memory.records import Feedback, Injected, Trace
from optillm_memory.settings import is_url
from optillm_memory.store import fold
from optillm_memory.store.maintenance import forget as deletion
from optillm_memory.store.maintenance.copying import copy
from optillm_memory.store.maintenance.selection import Selection
from optillm_memory.store.maintenance.verify import mend, verify
from optillm_memory.store.sqlite.connection import connect
from optillm_memory.store.sqlite.store import SqliteStore
from optillm_memory.store.tables.procedures import procedure_id

BOTH = pytest.mark.parametrize("memory", ["sqlite", "postgres"], indirect=True)
WAY = ["get_user", "get_order", "?", "cancel_order"]


@pytest.fixture
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Memory]:
    """Give a memory with an encoder, in a file or on a server."""
    server = getattr(request, "param", "sqlite") == "postgres"
    values = {"db": request.getfixturevalue("postgres").fresh()} if server else {}
    with hashing_memory(tmp_path, **values) as opened:
        yield opened


def rebuilt(memory: Memory) -> bool:
    """Whether what is derived is what a rebuild makes of the log."""
    memory.settle()
    before = memory.store.derived()
    memory.rebuild()
    return before == memory.store.derived()


def held(memory: Memory, text: str) -> list[str]:
    """Return the files of a memory, or its tables on a server, that hold a text, in any case."""
    if not is_url(memory.settings.db):
        files = [p for p in Path(memory.settings.db).parent.rglob("*") if p.is_file()]
        return [p.name for p in files if text.lower().encode() in p.read_bytes().lower()]
    with psycopg.connect(memory.settings.db) as db:
        names = [n for (n,) in db.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'agent_memory'")]
        like = f"%{text}%"
        rows = {n: f"SELECT count(*) FROM agent_memory.{n} AS t WHERE t::text ILIKE %s" for n in names}
        return [n for n, sql in rows.items() if db.execute(sql, (like,)).fetchone() != (0,)]


def lines(memory: Memory) -> list[tuple[Any, ...]]:
    """Return the table `lines`."""
    with memory.store._readers.borrow() as db:
        return [tuple(row) for row in db.execute("SELECT scope_id, episode_id, frame, keys FROM lines").fetchall()]


# -- what makes one --------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("by", ["episode", "trace"])
@pytest.mark.parametrize("source", ["code", "human"])
def test_a_verified_success_makes_a_procedure(memory: Memory, by: str, source: str) -> None:
    """An outcome of the episode, or of its last answer, that code or a person reports makes one, as a rebuild does."""
    talk = cancelling(memory, "mia_li_3668", "#W5544333", judged=None)
    assert procedures(memory) == []
    assert talk.judge(by=by, source=source) == "applied"
    (found,) = procedures(memory)
    assert tools_of(found) == WAY
    assert found.memory_id == procedure_id(talk.turns[0].scope, talk.turns[0].episode_id)
    assert (found.successes, found.failures, found.used_successes, found.used_failures) == (1, 0, 0, 0)
    assert rebuilt(memory)
    assert [c.message for c in verify(memory.settings.db, deep=True) if c.level == "fail"] == []


@pytest.mark.parametrize(
    "said",
    [
        None,
        {"source": "llm"},
        {"value": False},
        {"value": None, "feedback_id": "never"},
        {"metric": "comment", "value": "fine"},
    ],
)
def test_no_other_outcome_makes_one(memory: Memory, said: dict[str, Any] | None) -> None:
    """Silence, a judging model, a failure, and a comment make none, nor does what the tools said of themselves."""
    talk = cancelling(memory, "mia_li_3668", "#W5544333", judged=None)
    if said is not None:
        talk.judge(**said)
    assert procedures(memory, "verified", "candidate") == []
    assert rebuilt(memory)


def test_what_is_retracted_made_none(memory: Memory) -> None:
    """Retracting the outcome unmakes the procedure, of which no text is left in the row; told again it is back."""
    talk = cancelling(memory, "mia_li_3668", "#W5544333", judged=None)
    talk.judge(feedback_id="f1")
    assert len(procedures(memory)) == 1
    assert talk.judge(None, feedback_id="f1") == "retracted"
    (gone,) = procedures(memory, "withdrawn")
    assert (gone.task, gone.answer) == ("", "")
    assert procedures(memory) == []
    assert rebuilt(memory)
    talk.judge(feedback_id="f2")
    assert len(procedures(memory)) == 1


def test_a_later_failure_unmakes_it(memory: Memory) -> None:
    """An episode that was found to have failed after all has no procedure, and has it again when that is taken back."""
    talk = cancelling(memory, "mia_li_3668", "#W5544333")
    talk.judge(False, feedback_id="later", source="human")
    assert procedures(memory) == []
    assert rebuilt(memory)
    talk.judge(None, feedback_id="later")
    assert len(procedures(memory)) == 1


def test_what_memory_did_itself_teaches_nothing(memory: Memory) -> None:
    """An episode in which an answer was reused has no procedure."""
    talk = cancelling(memory, "mia_li_3668", "#W5544333", judged=None)
    last = memory.store.trace(talk.turns[-1].trace_id, None)
    assert last is not None
    memory.store.write(
        lambda tx: tx.db.execute("UPDATE traces SET action = 'reuse' WHERE trace_id = ?", (talk.turns[-1].trace_id,))
    ).result(10)
    talk.judge()
    assert procedures(memory) == []
    assert rebuilt(memory)


def test_talk_without_actions_makes_none(memory: Memory) -> None:
    """A dialogue that was solved by words alone is no procedure, and no failure either."""
    talk = Dialogue(memory)
    talk.answer("Monday to Friday.", talk.ask("When are you open?"))
    talk.answer("Until six.", talk.ask("Until when?"))
    assert talk.judge() == "applied"
    assert procedures(memory, "verified", "withdrawn", "candidate") == []
    assert rebuilt(memory)


def test_a_request_that_failed_at_the_end_hides_nothing(memory: Memory) -> None:
    """A last request that the upstream refused is no branch of the conversation: the steps before it are the way."""
    talk = cancelling(memory, "mia_li_3668", "#W5544333", judged=None)
    turn = talk.ask("thanks")
    memory.finish(turn, None, error="503")
    memory.store.flush()
    talk.judge()
    assert [tools_of(p) for p in procedures(memory)] == [WAY]
    assert rebuilt(memory)


@pytest.mark.parametrize(
    "odd",
    [
        '{"\\ud800": "\\udfff #W5544333"}',
        '{"a": "\\u0000"}',
        "\x00",
        "[" * 900 + "]" * 900,
        '{"</agent_memory>": 1}',
        "x" * 100_000,
    ],
)
@BOTH
def test_odd_arguments_and_results_are_stored(memory: Memory, odd: str) -> None:
    """Halves of characters, NUL, deep and long JSON in calls and results make no write fail, here and on a server."""
    talk = Dialogue(memory)
    talk.act("get_order", odd, odd, talk.ask("cancel #W5544333 \x00 \ud800"))
    talk.act("cancel_order", odd, odd)
    talk.answer("done")
    assert talk.judge() == "applied"
    assert len(procedures(memory)) == 1
    assert rebuilt(memory)


# -- the order of arrival --------------------------------------------------------------------------


def test_feedback_may_come_before_the_traces(memory: Memory) -> None:
    """An outcome that waits for its episode makes the procedure when the last of the requests is known."""
    memory.feedback({"episode_id": "early", "metric": "success", "value": True, "source": "code", "feedback_id": "f"})
    talk = cancelling(memory, "mia_li_3668", "#W5544333", judged=None, options={"episode_id": "early"})
    assert [tools_of(p) for p in procedures(memory)] == [WAY]
    assert {t.episode_id for t in talk.turns} == {"early"}
    assert rebuilt(memory)


def test_requests_after_the_outcome_count(memory: Memory) -> None:
    """What an episode goes on to do after its outcome was told belongs to its procedure, as a rebuild has it."""
    talk = Dialogue(memory, options={"episode_id": "long"})
    talk.act("get_user", {"user_id": "mia_li_3668"}, {"orders": ["#W5544333"]}, talk.ask("I am mia_li_3668, cancel it"))
    talk.answer("Cancel #W5544333?")
    talk.judge(by="trace")
    assert [tools_of(p) for p in procedures(memory)] == [["get_user"]]
    turn = talk.ask("yes")
    talk.answer("I do not know how.", turn)
    assert rebuilt(memory)
    talk.act("cancel_order", {"order_id": "#W5544333"}, "ok", talk.ask("try again"))
    talk.answer("It is done.")
    assert [tools_of(p) for p in procedures(memory)] == [["get_user", "?", "cancel_order"]]
    assert rebuilt(memory)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_outcomes_comes_to_the_same(tmp_path: Path, seed: int) -> None:
    """Outcomes, their corrections and retractions in any order, between or after the requests, yield the same."""
    rng = random.Random(seed)
    said: list[tuple[int, dict[str, Any]]] = []
    for n in range(4):
        said += [
            (n, {"value": True, "feedback_id": f"a{n}"}),
            (n, {"value": n % 2 == 0, "feedback_id": f"b{n}", "source": "human"}),
        ]
    said.append((1, {"value": None, "feedback_id": "b1"}))
    with hashing_memory(tmp_path) as memory:
        talks = {}
        rest = said[:]
        rng.shuffle(rest)
        for n in range(4):
            talks[n] = cancelling(
                memory, f"user_{n}_{n}{n}{n}{n}", f"#W{n}{n}{n}{n}333", judged=None, options={"episode_id": f"e{n}"}
            )
            for item in [i for i in rest if i[0] in talks and rng.random() < 0.5]:
                talks[item[0]].judge(**{"occurred_at": 1.0 + int(item[1]["feedback_id"][0] == "b"), **item[1]})
                rest.remove(item)
        for n, given in rest:
            talks[n].judge(**{"occurred_at": 1.0 + int(given["feedback_id"][0] == "b"), **given})
        ids = {p.memory_id for p in procedures(memory)}
        expected = {n: procedure_id(talks[n].turns[0].scope, f"e{n}") for n in range(4)}
        assert ids == {expected[0], expected[1], expected[2]}
        assert rebuilt(memory)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_traces_comes_to_the_same(memory: Memory, tmp_path: Path, seed: int) -> None:
    """The same traces, prefixes and feedback written in another order are folded into the same procedures."""
    for n in range(3):
        talk = cancelling(memory, f"user_{n}_{n}{n}{n}{n}", f"#W{n}{n}{n}{n}333", judged=None)
        talk.judge(by="trace" if n == 1 else "episode")
    memory.settle()
    with memory.store._readers.borrow() as db:
        ids = [r[0] for r in db.execute("SELECT trace_id FROM traces").fetchall()]
        prefixes = db.execute("SELECT trace_id, hash FROM prefixes WHERE trace_id <> ''").fetchall()
        given = db.execute("SELECT feedback_id, metric, value, source, trace_id, episode_id FROM feedback").fetchall()
        injected = db.execute("SELECT trace_id, memory_id, kind, score, tokens FROM injections").fetchall()
    assert all(kind == "procedure" for _, _, kind, _, _ in injected)
    operations: list[Callable[[Any], Any]] = []
    for trace_id in ids:
        trace: Trace | None = memory.store.write(lambda tx, one=trace_id: tx.traces.get(one)).result(10)  # type: ignore[misc]
        assert trace is not None
        own = [p for t, p in prefixes if t == trace_id]
        items = [Injected(m, k, s, n) for t, m, k, s, n in injected if t == trace_id]

        def add(tx: Any, trace: Trace = trace, own: list[str] = own, items: list[Injected] = items) -> None:
            tx.add_trace(trace, prefixes=own, placements=(), injected=items, withheld=())
            fold.trace_arrived(tx, trace)

        operations.append(add)
    for feedback_id, metric, _, source, trace_id, episode_id in given:
        if source == "inferred":
            continue
        made = Feedback(feedback_id, metric, True, source, trace_id, episode_id, None, 1.0)
        operations.append(lambda tx, made=made: fold.feedback_arrived(tx, "local", None, made, received_at=2e9))  # type: ignore[misc]
    random.Random(seed).shuffle(operations)
    with closing(SqliteStore(tmp_path / "other.db")) as store:
        for operation in operations:
            store.write(operation).result(10)
        there = [m for m in store.list_memories(None, limit=100) if m.kind == "procedure"]
        here = procedures(memory)
        assert {(m.memory_id, m.status, m.task, m.answer) for m in there} == {
            (m.memory_id, m.status, m.task, m.answer) for m in here
        }
        assert {(m.memory_id, m.used_successes) for m in there} == {(m.memory_id, m.used_successes) for m in here}
        before = store.derived()
        store.write(fold.rebuild).result(10)
        assert store.derived() == before


# -- use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["episode", "trace"])
def test_how_the_episodes_went_that_had_it(memory: Memory, by: str) -> None:
    """An episode in whose prompt a procedure stood counts for or against it, once, whichever answer was judged."""
    cancelling(memory, "mia_li_3668", "#W5544333")
    warm(memory)
    for n, good in enumerate((True, False, False)):
        talk = cancelling(memory, f"user_{n}_{n}{n}{n}{n}", f"#W{n}{n}{n}{n}333", judged=None)
        assert [i.kind for i in talk.turns[0].injected] == ["procedure"]
        talk.judge(good, by=by, feedback_id=f"f{n}")
        talk.judge(good, by=by, feedback_id=f"g{n}")
    memory.settle()
    counts = [(p.used_successes, p.used_failures) for p in procedures(memory)]
    assert [sum(c) for c in zip(*counts, strict=True)] == [1, 2]
    assert rebuilt(memory)
    talk.judge(None, by=by, feedback_id="f2")
    talk.judge(None, by=by, feedback_id="g2")
    counts = [(p.used_successes, p.used_failures) for p in procedures(memory)]
    assert [sum(c) for c in zip(*counts, strict=True)] == [1, 1]
    assert rebuilt(memory)


# -- forgetting ------------------------------------------------------------------------------------

SECRETS = ("mia_li_3668", "W5544333", "card_5544333", "zwitscherlich")


@BOTH
@pytest.mark.parametrize("named", ["episode", "memory", "namespace", "user"])
def test_nothing_of_a_forgotten_episode_is_left(memory: Memory, named: str) -> None:
    """The text of the user, the values in arguments and results, and the lines go from every file and table."""
    options = {"namespace": "shop", "user_id": "u1"}
    cancelling(memory, "ben_roe_1234", "#W9988777", options={"namespace": "other"})
    kept = lines(memory)
    talk = cancelling(
        memory, "mia_li_3668", "#W5544333", options=options,
        asked="I am mia_li_3668.\nCancel order #W5544333, it is zwitscherlich!",
    )  # fmt: skip
    (found,) = [p for p in procedures(memory) if p.scope.namespace == "shop"]
    assert all(held(memory, secret) for secret in SECRETS)
    assert len(lines(memory)) == len(kept) + 1
    selection = {
        "episode": Selection(episode_id=talk.turns[0].episode_id), "memory": Selection(memory_id=found.memory_id),
        "namespace": Selection(namespace="shop"), "user": Selection(user_id="u1"),
    }[named]  # fmt: skip
    done = memory.forget(selection)
    assert (done["traces"], done["left"]) == (len(talk.turns), [])
    assert {secret: held(memory, secret) for secret in SECRETS} == {secret: [] for secret in SECRETS}
    assert held(memory, found.memory_id.removeprefix("proc-")) in ([], ["forgotten"], ["memory.db"])
    assert lines(memory) == kept
    assert [p.scope.namespace for p in procedures(memory)] == ["other"]
    assert rebuilt(memory)
    with pytest.raises(NotFound):
        memory.forget(Selection(memory_id=found.memory_id))


@BOTH
def test_a_copy_in_another_conversation_goes_too(memory: Memory) -> None:
    """What was shown word for word to the same request again is taken out of that prompt, the ledger and the trace."""
    talks = []
    for _ in range(2):
        talk = Dialogue(memory)
        turn = talk.ask("How many orders has zwitscherlich?")
        talk.act("get_user", {"user_id": "zwitscherlich"}, {"orders": 7}, turn)
        talk.answer("Seven.")
        talks.append(talk)
        if len(talks) == 1:
            talk.judge()
            memory.settle()
    assert "zwitscherlich" in block_in(talks[1].turns[0].messages)
    memory.forget(Selection(episode_id=talks[0].turns[0].episode_id))
    memory.settle()
    assert "<agent_memory" not in str(talks[1].begin().messages)
    memory.forget(Selection(episode_id=talks[1].turns[0].episode_id))
    assert held(memory, "zwitscherlich") == []


def test_forgetting_whom_it_was_shown_to_leaves_the_procedure(memory: Memory) -> None:
    """An episode that followed a procedure may be forgotten: the procedure stays, with one use less."""
    cancelling(memory, "mia_li_3668", "#W5544333")
    warm(memory)
    talk = cancelling(memory, "ben_roe_1234", "#W9988777", judged=False)
    assert [(p.used_failures, tools_of(p)) for p in procedures(memory)] == [(1, WAY)]
    memory.forget(Selection(episode_id=talk.turns[0].episode_id))
    assert [(p.used_failures, tools_of(p)) for p in procedures(memory)] == [(0, WAY)]
    assert rebuilt(memory)


def test_half_of_an_episode_may_be_forgotten(memory: Memory) -> None:
    """What is left of an episode is mined anew."""
    talk = cancelling(memory, "mia_li_3668", "#W5544333")
    memory.forget(Selection(trace_id=talk.turns[-1].trace_id))
    assert all("?" in tools_of(p) or len(tools_of(p)) < len(WAY) for p in procedures(memory))
    assert rebuilt(memory)


def test_an_episode_that_a_procedure_rests_on_is_kept(tmp_path: Path) -> None:
    """Retention passes by the episodes that solved something, and drops those of which nothing is known."""
    with hashing_memory(tmp_path) as memory:
        cancelling(memory, "mia_li_3668", "#W5544333")
        for n in range(6):
            cancelling(memory, f"user_{n}_{n}{n}{n}{n}", f"#W{n}{n}{n}{n}333", judged=None)
        memory.settle()
        with memory.store._readers.borrow() as db:
            every = [tuple(r) for r in db.execute("SELECT DISTINCT scope_id, episode_id FROM traces").fetchall()]
        memory.store.write(lambda tx: deletion.delete_episodes(tx, every, 2, 1e12, 1_000, 2e9)).result(10)
        assert [tools_of(p) for p in procedures(memory)] == [WAY]


# -- upkeep ----------------------------------------------------------------------------------------


def test_lines_without_an_episode_are_found_and_mended(memory: Memory, tmp_path: Path) -> None:
    """Rows of `lines` that belong to no trace are told by verify, and mended by what it says."""
    cancelling(memory, "mia_li_3668", "#W5544333")
    memory.settle()
    memory.store.write(
        lambda tx: tx.db.execute("INSERT INTO lines(scope_id, episode_id, frame, keys) VALUES (1, 'none', 'f', 'k')")
    ).result(10)
    found = {c.name: c.message for c in verify(tmp_path / "memory.db") if c.level == "fail"}
    assert list(found) == ["orphans:lines"]
    assert "verify --mend" in found["orphans:lines"]
    assert mend(memory.store, tmp_path / "memory.db") == {"lines": 1}
    assert len(lines(memory)) == 1


def test_lines_and_procedures_go_to_a_server_and_back(memory: Memory, tmp_path: Path, postgres: Any) -> None:
    """Copying to PostgreSQL and back leaves lines, procedures and what they rest on as they were."""
    cancelling(memory, "mia_li_3668", "#W5544333")
    cancelling(memory, "ben_roe_1234", "#W9988777")
    memory.settle()
    memory.close()
    here, server, back = str(tmp_path / "memory.db"), postgres.fresh(), str(tmp_path / "back" / "memory.db")
    Path(back).parent.mkdir()
    copy(here, server)
    copy(server, back)
    tables = ("lines", "memories", "contributions")
    contents = []
    for path in (here, back):
        with closing(connect(Path(path), read_only=True)) as db:
            contents.append({t: sorted(map(repr, db.execute(f"SELECT * FROM {t}").fetchall())) for t in tables})
    assert contents[0] == contents[1]
    assert all(contents[0].values())
    with Memory(Settings(db=server, encoder="hashing", holdout=0.0)) as there:
        assert there.encoder.wait(10) == "ready"
        assert len(procedures(there)) == 2
        warm(there)
        talk = Dialogue(there)
        assert "get_order" in block_in(talk.ask(WISH.format(name="eva_doe_5678", order="#W1111222")).messages)


def test_every_line_of_an_episode_is_there_once(memory: Memory) -> None:
    """Requests of one episode add the lines that are new; a single line to no agent is not noted."""
    talk = Dialogue(memory)
    talk.answer("Which one?", talk.ask("Cancel my order\nplease"))
    talk.answer("Done", talk.ask("please\nthe last one"))
    memory.settle()
    assert [len(row[3]) for row in lines(memory)] == [3 * 12]
    memory.finish(memory.begin({"model": "m", "messages": [{"role": "user", "content": "one line"}]}), None, error="x")
    memory.settle()
    assert len(lines(memory)) == 1
