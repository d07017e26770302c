"""Forgetting: nothing of it is left in any file, what else is known stays, and nobody goes on using a copy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psycopg
import pytest
from agents import Agent, call, calling, results
from builders import SCOPE, ask, assistant, body, hashing_memory, response, teach, tell
from click.testing import CliRunner

from optillm_memory import InvalidField, Memory, NotFound, Scope
from optillm_memory.cli import main
from optillm_memory.conversation.options import Options
from optillm_memory.settings import is_url
from optillm_memory.store.maintenance.erase import erase, forget, forget_copies, forget_rows
from optillm_memory.store.maintenance.selection import Selection
from optillm_memory.store.sqlite.library import sqlite3

BOTH = pytest.mark.parametrize("memory", ["sqlite", "postgres"], indirect=True)
SECRET = "zwitscherlich"  # no word of any other text


def holding(folder: Path, text: str = SECRET) -> list[str]:
    """Return the files below a folder that hold a text, in any case."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if text.lower().encode() in path.read_bytes().lower()]


def held(memory: Memory, text: str = SECRET) -> list[str]:
    """Return the files of a memory, or its tables on a server, that hold a text, in any case."""
    if not is_url(memory.settings.db):
        return holding(Path(memory.settings.db).parent, text)
    with psycopg.connect(memory.settings.db) as connection:
        tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'agent_memory'"
        names = [name for (name,) in connection.execute(tables)]
        assert "traces" in names
        like = f"%{text}%"
        rows = {name: f"SELECT count(*) FROM agent_memory.{name} AS t WHERE t::text ILIKE %s" for name in names}
        return [name for name, sql in rows.items() if connection.execute(sql, (like,)).fetchone() != (0,)]


def same_as_rebuilt(memory: Memory) -> bool:
    """Whether what is derived is what a rebuild makes of the log."""
    memory.settle()
    before = memory.store.derived()
    memory.rebuild()
    return before == memory.store.derived()


@pytest.fixture
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Memory]:
    """Give a memory that knows something else, too."""
    server = getattr(request, "param", "sqlite") == "postgres"
    values = {"db": request.getfixturevalue("postgres").fresh()} if server else {}
    with hashing_memory(tmp_path, **values) as opened:
        teach(opened, "restart the nginx server", "systemctl restart nginx")
        yield opened


# An episode that finds a fix by itself: what memory suggested to it would go with its origin.
UNTOLD = {"agent_memory": {"mode": "write"}}


def agent_episode(memory: Memory, secret: str = SECRET, **fields: Any) -> str:
    """Let an agent fail, mend it and be praised; return the episode."""
    note = fields.get("note", "")
    call = {"id": "c1", "function": {"name": "bash", "arguments": json.dumps({"command": f"pip3 instal {secret}"})}}
    again = {"id": "c2", "function": {"name": "bash", "arguments": json.dumps({"command": f"pip3 install {secret}"})}}
    said: list[Any] = [{"role": "user", "content": f"install it {fields.get('ask', '')}"}]
    turn = None
    for message, output in (
        (
            call,
            f'ERROR: unknown command "instal" - maybe you meant "install" ({secret})\nexit code: 1{note}',
        ),
        (again, f"Successfully installed {secret}\nexit code: 0"),
    ):
        made = {"role": "assistant", "content": None, "tool_calls": [{**message, "type": "function"}]}
        turn = memory.begin(body(*said, **fields.get("body", {})))
        memory.finish(turn, response(made))
        said += [made, {"role": "tool", "tool_call_id": message["id"], "content": output}]
        memory.settle()
    turn = memory.begin(body(*said, **fields.get("body", {})))
    memory.finish(turn, response("done"))
    memory.settle()
    tell(memory, turn)
    return turn.episode_id


# -- nothing is left -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["task", "answer", "tags", "comment", "demonstration", "evidence", "error", "retracted"]
)
@BOTH
def test_no_file_holds_a_forgotten_text(memory: Memory, place: str) -> None:
    """Wherever in a request or its feedback a text stood, after `forget` no file holds it; the rest is as rebuilt."""
    fields: dict[str, Any] = {"tags": {"project": SECRET}} if place == "tags" else {}
    turn = ask(
        memory,
        body(f"deploy {SECRET} now" if place == "task" else "deploy it now", agent_memory=fields),
        f"run {SECRET}" if place == "answer" else "run make",
    )
    if place in ("comment", "demonstration", "error", "retracted"):
        metric = "demonstration" if place == "retracted" else place
        tell(memory, turn, SECRET, metric=metric, feedback_id="f")
        if place == "retracted":
            memory.feedback({"feedback_id": "f", "value": None})
    evidence = {"evidence": {"command": "pytest", "output": SECRET}} if place == "evidence" else {}
    tell(memory, turn, place != "error", **evidence)
    memory.settle()
    assert held(memory)
    done = forget(memory.store, Selection(trace_id=turn.trace_id))
    assert (done["traces"], done["left"]) == (1, [])
    assert held(memory) == []
    assert memory.store.stats()["traces"] == 1
    assert same_as_rebuilt(memory)
    assert [h.memory.answer for h in memory.recall("restart the nginx server")] == ["systemctl restart nginx"]


@BOTH
def test_steps_and_fixes_of_a_forgotten_episode_are_gone(memory: Memory) -> None:
    """Tool calls, their results, the fix that was mined and the feedback that was inferred go with their episode."""
    episode = agent_episode(memory)
    assert memory.store.stats()["memories_by_kind"]["fix"] == 1
    forget(memory.store, Selection(episode_id=episode))
    assert held(memory) == []
    assert held(memory, "instal") == []
    assert "fix" not in memory.store.stats()["memories_by_kind"]
    assert same_as_rebuilt(memory)


@BOTH
def test_a_name_is_forgotten_with_its_namespace(memory: Memory) -> None:
    """A namespace, a user and what waits for an episode there go, with their names; the same words elsewhere stay."""
    fields = {"user": "x"}
    for number in range(3):
        turn = memory.begin(
            body(f"question {number}", **fields), options=Options(namespace=SECRET, user_id=f"u-{SECRET}")
        )
        memory.finish(turn, response("an answer"))
        memory.settle()
        tell(memory, turn)
    memory.feedback(
        {"episode_id": "later", "metric": "comment", "value": SECRET, "source": "human"},
        scope=Scope("local", SECRET, f"u-{SECRET}"),
    )
    done = forget(memory.store, Selection(namespace=SECRET, tenant="local"))
    assert (done["traces"], done["pending_feedback"], done["scopes"], done["left"]) == (3, 1, 1, [])
    assert done["vectors"] == 3
    assert held(memory) == []
    assert memory.store.stats()["scopes"] == 1
    assert same_as_rebuilt(memory)


@BOTH
def test_feedback_that_waits_is_forgotten(memory: Memory) -> None:
    """Feedback on a trace that never came is deleted by the trace's id, though there is no trace to forget."""
    memory.feedback({"trace_id": "chatcmpl-x", "metric": "comment", "value": SECRET, "source": "human"})
    assert held(memory)
    assert forget(memory.store, Selection(trace_id="chatcmpl-x"))["pending_feedback"] == 1
    assert held(memory) == []


def test_earlier_versions_in_free_pages_are_gone(memory: Memory, tmp_path: Path) -> None:
    """What earlier updates and deletions left in free pages, in the index of words and in the WAL goes, too."""
    turns = [ask(memory, f"{SECRET}{n} " + "padding " * 200, f"{SECRET} {n}") for n in range(40)]
    for turn in turns:
        tell(memory, turn, feedback_id=turn.trace_id)
        memory.feedback({"feedback_id": turn.trace_id, "value": None})
        tell(memory, turn, False)
        tell(memory, turn, metric="demonstration", value=f"{SECRET} better")
    memory.rebuild()
    done = forget(memory.store, Selection(before=time.time() + 1))
    assert done["traces"] == 41
    assert holding(tmp_path) == []
    assert memory.store.derived() == []
    before = memory.store.size_bytes()
    assert memory.compact() == []
    assert memory.store.size_bytes() < before
    assert memory.store.stats()["bytes"] < 500_000
    assert holding(tmp_path) == []


# -- copies ----------------------------------------------------------------------------------------


@BOTH
def test_copies_in_other_requests_are_gone(memory: Memory) -> None:
    """An injected example, a proposal and a reused answer leave the requests that got them; the requests stay."""
    first = teach(memory, "what is the codename?", SECRET)
    others = []
    for _ in range(4):
        turn = memory.begin(body("what is the codename?"))
        assert turn.action == "inject"
        memory.finish(turn, response("I do not know"))
        memory.settle()
        others.append(turn)
    reused = memory.begin(body("what is the codename?", agent_memory={"reuse": {"max_error": 0.05}}))
    assert reused.action == "reuse"
    memory.finish(reused, reused.reused())
    memory.settle()
    tell(memory, reused)
    memory_id = reused.proposal.memory_ids[0] if reused.proposal else ""
    forget(memory.store, Selection(memory_id=memory_id))
    assert held(memory) == []
    assert memory.store.trace(first.trace_id, None) is None
    shown = memory.trace(reused.trace_id)
    assert (shown["answer"], shown["action"], shown["proposal"]) == ("(forgotten)", "reuse", None)
    assert shown["outcome"]["verdict"] == "success"
    assert memory.trace(others[0].trace_id)["injected"] == []
    assert same_as_rebuilt(memory)


@BOTH
def test_a_procedure_goes_with_its_episode_also_where_it_was_given(memory: Memory) -> None:
    """An action that was shown word for word leaves the requests that got it, and the next one goes without it."""
    agents = []
    for number in range(2):
        agent = Agent(memory, "which orders are late?", options={"episode_id": f"e{number}"})
        message = calling(call({"command": f"grep {SECRET} orders.txt"}, tool="bash"))
        turn = agent.answered(message)
        agent.messages += results(message, '[["4711"]]')
        memory.settle()
        agent.close()
        memory.feedback({"episode_id": f"e{number}", "metric": "success", "value": number == 0, "source": "code"})
        memory.settle()
        agents.append((agent, turn))
    assert SECRET in json.dumps(agents[1][1].messages)
    forget(memory.store, Selection(episode_id="e0"))
    assert not any(SECRET in json.dumps(asdict(p)) for p in memory.store.episodes.ledger(SCOPE, "e1"))
    assert agents[1][0].begin().injected == ()
    forget(memory.store, Selection(episode_id="e1"))
    assert held(memory) == []
    assert same_as_rebuilt(memory)


@BOTH
def test_a_forgotten_example_is_not_put_in_its_episodes_again(memory: Memory) -> None:
    """The next request of an episode that had the example goes without it, also in the process that remembers it."""
    taught = teach(memory, "what is the codename?", SECRET)
    turn = memory.begin(body("what is the codename?"))
    memory.finish(turn, response("I do not know"))
    memory.settle()
    again = memory.begin(body("what is the codename?", assistant("I do not know"), "please"))
    assert again.episode_id == turn.episode_id
    assert SECRET in json.dumps(again.messages)
    forget(memory.store, Selection(trace_id=taught.trace_id))
    after = memory.begin(body("what is the codename?", assistant("I do not know"), "please"))
    assert after.episode_id == turn.episode_id
    assert SECRET not in json.dumps(after.messages)


@BOTH
def test_a_memory_that_rests_on_other_traces_stays(memory: Memory) -> None:
    """Of two requests with the same answer one is forgotten: the memory stays, with the other's words and vector."""
    teach(memory, "What is the CAPITAL of Peru?", "Lima")
    kept = teach(memory, "what is the capital of peru?", "lima")
    (before,) = [m for m in memory.store.list_memories(None) if m.answer.lower() == "lima"]
    assert (before.answer, before.successes) == ("Lima", 2)
    forgotten = [t["trace_id"] for t in memory.store.traces(None) if t["answer"] == "Lima"]
    forget(memory.store, Selection(trace_id=forgotten[0]))
    (after,) = [m for m in memory.store.list_memories(None) if m.answer.lower() == "lima"]
    assert (after.memory_id, after.answer, after.successes) == (before.memory_id, "lima", 1)
    assert held(memory, "CAPITAL of Peru")  # the words of the one that was kept
    assert not any("CAPITAL" in json.dumps(t, default=str) for t in memory.store.traces(None))
    assert [h.memory.memory_id for h in memory.recall("what is the capital of peru?")] == [after.memory_id]
    assert memory.store.trace(kept.trace_id, None)
    assert same_as_rebuilt(memory)


@BOTH
def test_what_others_said_of_a_forgotten_memory_counts_when_it_is_learned_again(memory: Memory) -> None:
    """The last success goes, a failure stays: it is no memory then, and no new one once another trace is right."""
    taught = teach(memory, "what is the codename?", SECRET)
    (known,) = [m for m in memory.store.list_memories(None) if m.answer == SECRET]
    failed = ask(memory, "what is the codename?", SECRET)
    assert tell(memory, failed, value=False).status == "applied"
    forget(memory.store, Selection(trace_id=taught.trace_id))
    assert known.memory_id not in {m.memory_id for m in memory.store.list_memories(None)}
    assert memory.store.episodes.unusable(SCOPE, [known.memory_id]) == {known.memory_id}
    assert same_as_rebuilt(memory)
    for _ in range(2):
        teach(memory, "what is the codename?", SECRET)
    (again,) = [m for m in memory.store.list_memories(None) if m.answer == SECRET]
    assert (again.memory_id, again.successes, again.failures) == (known.memory_id, 2, 1)
    assert memory.store.episodes.unusable(SCOPE, [known.memory_id]) == set()
    assert same_as_rebuilt(memory)


@BOTH
def test_a_fix_that_two_episodes_show_keeps_the_words_of_the_other(memory: Memory) -> None:
    """One of two episodes with the same fix is forgotten: what is left of the fix is what the other one shows."""
    one, two = (agent_episode(memory, "requests", ask=ask, body=UNTOLD) for ask in ("first", "second"))
    assert one != two
    (fix,) = [m for m in memory.store.list_memories(None) if m.kind == "fix"]
    forget(memory.store, Selection(episode_id=one))
    (after,) = [m for m in memory.store.list_memories(None) if m.kind == "fix"]
    assert (after.memory_id, after.status, after.successes) == (fix.memory_id, "verified", fix.successes - 1)
    assert same_as_rebuilt(memory)
    forget(memory.store, Selection(memory_id=fix.memory_id))
    assert [m for m in memory.store.list_memories(None) if m.kind == "fix"] == []
    assert held(memory, "pip3") == []
    assert same_as_rebuilt(memory)


@BOTH
def test_the_words_of_a_shared_fix_are_not_those_of_the_forgotten(memory: Memory) -> None:
    """Two episodes with the same fix had other output around it: that of the forgotten one is nowhere any more."""
    one = agent_episode(memory, "requests", ask="first", note=f"\nin folder {SECRET}")
    agent_episode(memory, "requests", ask="second", note="\nin folder ~another", body=UNTOLD)
    (fix,) = [m for m in memory.store.list_memories(None) if m.kind == "fix"]
    assert SECRET in memory.described(fix.memory_id)["fix"]["output"]
    forget(memory.store, Selection(episode_id=one))
    assert "~another" in memory.described(fix.memory_id)["fix"]["output"]
    assert held(memory) == []
    assert same_as_rebuilt(memory)


@BOTH
def test_what_was_said_of_a_whole_does_not_pass_to_another_trace(memory: Memory) -> None:
    """The trace that closed an episode is forgotten: the right answer for it teaches nothing about an earlier one."""
    one = ask(memory, body("add two and two", agent_memory={"episode_id": "sums"}), "4")
    two = ask(memory, body("name a colour", agent_memory={"episode_id": "sums"}), "seven")
    said = {"episode_id": one.episode_id, "metric": "demonstration", "value": "blue", "source": "human"}
    memory.feedback(said)
    forget(memory.store, Selection(trace_id=two.trace_id))
    assert not any(m.answer == "blue" for m in memory.store.list_memories(None))
    assert memory.trace(one.trace_id)["feedback"] == []
    assert same_as_rebuilt(memory)


def test_nothing_named_is_refused() -> None:
    """A selection that names nothing but a tenant is refused: it would be everything."""
    with pytest.raises(InvalidField, match="name a trace"):
        Selection(tenant="local")


# -- while others use the file ---------------------------------------------------------------------

SERVING = """
import json, sys
from pathlib import Path
from builders import assistant, body, hashing_memory
from click.testing import CliRunner
memory = hashing_memory(Path(sys.argv[1]))
first = memory.begin(body("what is the codename?"))
from builders import response
from click.testing import CliRunner
memory.finish(first, response("hm"))
memory.settle()
print(first.action, flush=True)
for line in sys.stdin:
    turns = [memory.begin(body("what is the codename?", *more)) for more in ((), (assistant("hm"), "and?"))]
    print(json.dumps([t.messages for t in turns]), flush=True)
memory.close()
"""


def test_another_process_stops_using_it_at_once(memory: Memory, tmp_path: Path) -> None:
    """A server that has the file open, the vectors loaded and an episode under way injects nothing forgotten."""
    taught = teach(memory, "what is the codename?", SECRET)
    with subprocess.Popen(
        [sys.executable, "-c", SERVING, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
    ) as server:  # fmt: skip
        assert server.stdin is not None
        assert server.stdout is not None

        def asked() -> str:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write("\n")
            server.stdin.flush()
            return server.stdout.readline()

        assert server.stdout.readline() == "inject\n"
        assert asked().count(SECRET) == 2
        done = forget(memory.store, Selection(trace_id=taught.trace_id))
        assert SECRET not in asked()
        assert done["left"] == []
        assert holding(tmp_path) == []
        server.stdin.close()


@pytest.mark.slow
def test_a_reader_that_holds_the_journal_back_is_named(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody reads an earlier state the journal cannot be emptied: that is said; done again, it is."""
    turn = ask(memory, f"say {SECRET}")
    memory.settle()
    reader = sqlite3.connect(tmp_path / "memory.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM traces").fetchone()
    forget_rows(memory.store, Selection(trace_id=turn.trace_id))
    monkeypatch.setattr("optillm_memory.store.sqlite.erase._PATIENCE_S", 0.2)
    (left,) = erase(memory.store)["left"]
    assert "journal" in left
    assert holding(tmp_path)
    reader.execute("COMMIT")
    assert erase(memory.store)["left"] == []
    assert holding(tmp_path) == []
    reader.close()


def test_files_set_aside_are_named_and_deleted_on_request(memory: Memory, tmp_path: Path) -> None:
    """A corrupt database that was kept may hold the text: it is named, and deleted only when asked for."""
    aside = tmp_path / "memory.db.corrupt-20260101-000000-1"
    aside.write_text(SECRET)
    turn = ask(memory, f"say {SECRET}")
    (left,) = forget(memory.store, Selection(trace_id=turn.trace_id))["left"]
    assert aside.name in left
    turn = ask(memory, f"say {SECRET} again")
    assert forget(memory.store, Selection(trace_id=turn.trace_id), with_set_aside=True)["left"] == []
    assert holding(tmp_path) == []


def test_an_interrupted_one_is_finished_by_the_next(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the rows are gone but the file is not yet written anew: asked again, it is; after that it is done."""
    turn = ask(memory, f"say {SECRET}")
    memory.settle()
    chosen = Selection(trace_id=turn.trace_id)
    with monkeypatch.context() as patch:
        patch.setattr("optillm_memory.store.sqlite.store.Eraser.erase", lambda _: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            forget(memory.store, chosen)
    assert holding(tmp_path)
    files = memory.store.index_files()
    assert files is not None
    with files.draft(files.name(Scope("whoever"), "f")) as draft:  # it may hold vectors of what is gone
        assert draft is not None
        draft.file.write(b"vectors")
        draft.commit()
    done = CliRunner().invoke(main, ["forget", "--trace", turn.trace_id, "--yes", "--db", str(tmp_path / "memory.db")])
    assert done.exit_code == 0, done.output
    assert holding(tmp_path) == []
    assert not files.exists(files.name(Scope("whoever"), "f"))
    with pytest.raises(NotFound):
        forget(memory.store, chosen)


@BOTH
def test_a_scope_that_was_forgotten_is_let_go_of_by_all_that_search_it(memory: Memory) -> None:
    """Who has its vectors at hand finds none of them in what takes the scope's name later."""
    scope, options = Scope("local", "project"), Options(namespace="project")
    for number in range(60):
        memory.finish(turn := memory.begin(body(f"start the old server {number}"), options=options), response("old"))
        tell(memory, turn)
    teach(memory, "something else", "in a scope that came later", options=Options(namespace="later"))
    assert memory.recall("start the old server 7", scope=scope)
    forget(memory.store, Selection(namespace="project"))
    assert memory.recall("start the old server 7", scope=scope) == []
    for number in range(3):
        teach(memory, f"start the old server again {number}", "new", options=options)
    with Memory(memory.settings) as another:
        assert another.encoder.wait(10) == "ready"
        for one in (memory, another):
            assert [hit.memory.answer for hit in one.recall("start the old server", scope=scope)] == ["new"] * 3
            vector, encoder = one.encoder.vector("start the old server", 5), one.encoder
            assert vector is not None
            found = one._retriever.near(
                scope, vector, one.store.recall.revision(scope), fingerprint=encoder.fingerprint,
                unrelated=encoder.unrelated, count=50,
            )  # fmt: skip
            assert len(found) == 3


@BOTH
def test_what_was_under_way_leaves_no_copy(memory: Memory) -> None:
    """A request that had the example when it was forgotten is recorded without it by the next upkeep."""
    taught = teach(memory, "what is the codename?", SECRET)
    turn = memory.begin(body("what is the codename?"))
    forget(memory.store, Selection(trace_id=taught.trace_id))
    memory.finish(turn, response("hm"))
    memory.settle()
    assert memory.store.forgetting.has_copies()
    forget_copies(memory.store)
    assert memory.trace(turn.trace_id)["injected"] == []
    assert SECRET not in json.dumps([asdict(p) for p in memory.store.episodes.ledger(turn.scope, turn.episode_id)])
    assert same_as_rebuilt(memory)


@BOTH
def test_a_tenant_forgets_only_its_own(memory: Memory) -> None:
    """Named by another tenant, a trace, a memory and a namespace are not found, and stay."""
    taught = teach(memory, "what is the codename?", SECRET, tenant="alice")
    (known,) = memory.store.list_memories("alice")
    for named in ({"trace_id": taught.trace_id}, {"memory_id": known.memory_id}, {"namespace": "default"}):
        with pytest.raises(NotFound):
            forget(memory.store, Selection(tenant="bob", **named))  # type: ignore[arg-type]
    assert memory.store.list_memories("alice") == [known]
    assert forget(memory.store, Selection(tenant="alice", namespace="default"))["traces"] == 1
    assert memory.store.stats()["traces"] == 1


def test_the_command_asks_and_counts_first(memory: Memory, tmp_path: Path) -> None:
    """`forget` shows what it would be, does nothing without a yes, and says when there is nothing of the kind."""
    teach(memory, f"say {SECRET}", "no")
    memory.settle()
    where = ("--db", str(tmp_path / "memory.db"), "--json")
    shown = CliRunner().invoke(main, ["forget", "--namespace", "default", "--dry-run", *where])
    assert json.loads(shown.stdout) == {"traces": 2, "episodes": 2, "scopes": 1, "pending_feedback": 0}
    assert CliRunner().invoke(main, ["forget", "--namespace", "default", *where], input="n\n").exit_code == 1
    assert holding(tmp_path)
    done = CliRunner().invoke(main, ["forget", "--older-than", "0", "--yes", *where])
    assert (done.exit_code, json.loads(done.stdout)["traces"]) == (0, 2)
    assert holding(tmp_path) == []
    assert "nothing of that kind" in CliRunner().invoke(main, ["forget", "--trace", "x", "--yes", *where]).output
    assert "name a trace" in CliRunner().invoke(main, ["forget", "--yes", *where]).output


def test_files_of_vectors_go_with_their_scope(memory: Memory, tmp_path: Path) -> None:
    """The vectors that lie beside the database are taken away for the scopes concerned, and for no other."""
    files = memory.store.index_files()
    assert files is not None
    for scope in (Scope("local"), Scope("other")):
        with files.draft(files.name(scope, "f")) as draft:
            assert draft is not None
            draft.file.write(b"vectors")
            draft.commit()
    forget(memory.store, Selection(namespace="default", tenant="local"))
    assert not files.exists(files.name(Scope("local"), "f"))
    assert files.exists(files.name(Scope("other"), "f"))
    assert (tmp_path / "memory.db.index").is_dir()
