"""Memory as its callers use it: begin, finish, feedback, and what the very next request gets of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import ask, assistant, body, hashing_memory, lexical_memory, response, settings, teach, tell

from optillm_memory import Feedback, InvalidField, Memory, NotFound, Scope, StoreUnavailable, Turn
from optillm_memory.conversation.options import Options
from optillm_memory.decide.holdout import assign
from optillm_memory.recall.encoder import Encoder, HashingEncoder
from optillm_memory.store.maintenance import forget as deletion
from optillm_memory.store.maintenance.selection import Selection

TASK, ANSWER = "restart the nginx server", "systemctl restart nginx"
READ = Options(mode="read")


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def texts(turn: Turn) -> list[Any]:
    """Return what goes upstream."""
    return [message["content"] for message in turn.messages]


def reasons(turn: Turn) -> list[str]:
    """Return why things were left out."""
    return [item["reason"] for item in turn.skipped]


# -- the loop --------------------------------------------------------------------------------------


def test_what_was_verified_helps_the_very_next_request(tmp_path: Path) -> None:
    """An answer acts as soon as its feedback is acknowledged, in this process, and after a restart in the next."""
    with hashing_memory(tmp_path) as memory:
        turn = ask(memory, TASK, ANSWER)
        assert (turn.action, turn.messages) == ("plain", body(TASK)["messages"])
        assert tell(memory, turn).as_dict()["status"] == "applied"
        helped = memory.begin(body(TASK))
        assert texts(helped) == [TASK, ANSWER, TASK]
        assert (helped.action, len(helped.injected)) == ("inject", 1)
        shown = helped.metadata()
        assert shown["trace_id"].startswith("chatcmpl-")
        assert shown["injected"][0]["memory_id"] == memory.store.list_memories(None)[0].memory_id
        assert 0 < shown["recall_ms"] < 5_000
    with lexical_memory(tmp_path) as memory:
        assert texts(memory.begin(body(TASK))) == [TASK, ANSWER, TASK]


def test_a_trace_is_recorded_with_all_that_happened(tmp_path: Path) -> None:
    """The record holds the request, its answer, tokens, times, tags, steps and what was injected."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        turn = ask(memory, body(TASK, agent_memory={"tags": {"run": "7"}, "episode_id": "e"}), "done", tenant="t")
        shown = memory.trace(turn.trace_id, view="t")
        assert (shown["task"], shown["answer"], shown["episode_id"], shown["model"]) == (TASK, "done", "e", "m")
        assert (shown["prompt_tokens"], shown["completion_tokens"], shown["tags"]) == (7, 3, {"run": "7"})
        assert [m["role"] for m in shown["messages"]] == ["user", "assistant"]
        assert shown["latency_ms"] > 0
        assert shown["recall_ms"] > 0
        with pytest.raises(NotFound):
            memory.trace(turn.trace_id, view="another")
        with pytest.raises(NotFound):
            memory.memory("mem-none")
        assert memory.memory(memory.recall(TASK)[0].memory.memory_id).answer == ANSWER


def test_secrets_bad_unicode_and_nul_are_stored_clean(tmp_path: Path) -> None:
    """Lone surrogates, NUL and keys anywhere in a request, its answer or its feedback neither fail nor stay."""
    secret = "sk-abcdefghijklmnopqrstuvwx"
    call = {"id": "c\ud800", "type": "function", "function": {"name": "f\ud800", "arguments": secret}}
    said = body(
        f"deploy \ud800\x00 with {secret}",
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c\ud800", "content": f"\udfff {secret}"},
        model="m\ud800",
    )
    with hashing_memory(tmp_path) as memory:
        turn = ask(memory, said, f"done \ud800 {secret}")
        tell(memory, turn, value=f"right \ud800 {secret}", metric="demonstration", evidence={"output": secret})
        shown = memory.trace(turn.trace_id)
        assert shown["steps"][0]["observation"].startswith("\ufffd")
        assert "\x00" in shown["task"]
        assert memory.store.lost == 0
        assert memory.store.list_memories(None) == []  # nothing here may be given as an answer any more
    kept = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert secret.encode() not in kept
    assert b"REDACTED:api-key" in kept


@pytest.mark.parametrize(
    ("mode", "reads", "writes"), [("readwrite", 1, 1), ("read", 1, 0), ("write", 0, 1), ("off", 0, 0)]
)
def test_mode_is_kept(tmp_path: Path, mode: str, reads: int, writes: int) -> None:
    """`read` records nothing, `write` injects nothing, `off` does neither and hands on the very same messages."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        request = body(TASK, agent_memory={"mode": mode})
        turn = ask(memory, request)
        assert len(turn.injected) == reads
        assert memory.store.stats()["traces"] == 1 + writes
        if not reads:
            assert all(sent is given for sent, given in zip(turn.messages, request["messages"], strict=True))
            assert reasons(turn) == [f"mode_{mode}"]


def test_scopes_do_not_share(tmp_path: Path) -> None:
    """What one tenant, namespace, user or agent taught, no other is given."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        for options in (Options(namespace="n"), Options(user_id="u"), Options(agent_id="a")):
            assert memory.begin(body(TASK), options=options).action == "plain"
        assert memory.begin(body(TASK), tenant="t").action == "plain"
        assert memory.recall(TASK, scope=Scope("t")) == []
        assert memory.begin(body(TASK)).action == "inject"


# -- what can go wrong -----------------------------------------------------------------------------


def test_bad_requests_and_feedback_are_named(tmp_path: Path) -> None:
    """A bad field is refused by name; one bad feedback of a list refuses all of it."""
    with lexical_memory(tmp_path) as memory:
        with pytest.raises(InvalidField, match=r"agent_memory\.colour"):
            memory.begin(body(TASK, agent_memory={"colour": "red"}))
        turn = ask(memory, TASK)
        good = {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}
        for bad in (3, "x", [], [3], [good, {**good, "value": "yes"}]):
            with pytest.raises(InvalidField, match="feedback"):
                memory.feedback(bad)  # type: ignore[arg-type]
        assert memory.store.stats()["feedback"] == 0
        record = Feedback("f", "success", True, "inferred", turn.trace_id, None, None, 1.0)
        assert [r.status for r in memory.feedback(f for f in [record, record])] == ["applied", "duplicate"]


def test_failed_and_odd_responses_are_recorded(tmp_path: Path) -> None:
    """An upstream error, no choices, tool calls and choices that differ are traces without an answer to learn."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": ""}}]}
    with lexical_memory(tmp_path) as memory:
        found: list[Any] = [None, {}, {"choices": []}, response("one", "two"), response(call), {"choices": [{}]}]
        turns = []
        for said in found:
            turns.append(memory.begin(body(TASK)))
            memory.finish(turns[-1], said, error="upstream failed" if said is None else None)
        memory.store.flush()
        shown = [memory.trace(t.trace_id) for t in turns]
        assert [s["answer"] for s in shown] == [None] * len(found)
        assert [s["error"] for s in shown] == ["upstream failed"] + [None] * (len(found) - 1)
        tell(memory, turns[0], value="ask someone", metric="demonstration", source="human")
        assert texts(memory.begin(body(TASK)))[1] == "ask someone"
        same = ask(memory, {"model": "m", "messages": body(TASK)["messages"]})
        assert memory.trace(same.trace_id)["answer"] == "an answer"


def test_an_insertion_that_did_not_go_out_is_not_recorded(tmp_path: Path) -> None:
    """When the host fell back to the plain call the trace says so, and the ledger does not repeat it."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        turn = memory.begin(body(TASK))
        memory.finish(turn.as_sent(), response("x"))
        memory.store.flush()
        assert memory.trace(turn.trace_id)["action"] == "plain"
        assert memory.trace(turn.trace_id)["injected"] == []
        later = memory.begin(body(TASK, assistant("x"), "thanks"))
        assert texts(later)[0] == TASK


def test_a_closed_memory_refuses(tmp_path: Path) -> None:
    """After close nothing is acknowledged, and what was queued before is on disk."""
    memory = lexical_memory(tmp_path)
    turn = memory.begin(body(TASK))
    memory.finish(turn, response(ANSWER))
    memory.close()
    with pytest.raises(StoreUnavailable):
        tell(memory, turn)
    with lexical_memory(tmp_path) as again:
        assert again.trace(turn.trace_id)["answer"] == ANSWER


def test_large_requests_go_without_recall_and_are_stored_short(tmp_path: Path) -> None:
    """Ten megabytes are handed on as they came; the trace keeps the ends of the text."""
    with lexical_memory(tmp_path, max_text=1_000) as memory:
        huge = body("first words " + "x" * 10_000_000 + " last words")
        started = time.monotonic()
        turn = memory.begin(huge, size=10_000_030)
        assert time.monotonic() - started < 5
        assert reasons(turn) == ["too_large"]
        assert turn.messages[0] is huge["messages"][0]
        memory.finish(turn, response("ok"))
        memory.store.flush()
        task = memory.trace(turn.trace_id)["task"]
        assert len(task) <= 1_000
        assert task.startswith("first words")
        assert task.endswith("last words")


@pytest.mark.parametrize("given_limits", [{"token_budget": 0}, {"max_items": 0}, {"token_budget": 40}])
def test_limits_of_a_request_are_kept(tmp_path: Path, given_limits: dict[str, int]) -> None:
    """What does not fit the request's budget is left out whole and named; a limit of nothing injects nothing."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER + " now" * 100)
        turn = memory.begin(body(TASK, agent_memory=given_limits))
        assert (turn.action, turn.injected, texts(turn)) == ("plain", (), [TASK])
        if "token_budget" in given_limits:
            assert {"reason": "over_budget", "memory_id": memory.recall(TASK)[0].memory.memory_id} in turn.skipped


# -- episodes and the ledger -----------------------------------------------------------------------


def test_a_conversation_is_one_episode(tmp_path: Path) -> None:
    """A request that continues a recorded conversation joins its episode, at once and after a restart."""
    request = body(TASK, assistant(ANSWER), "and apache?")
    with lexical_memory(tmp_path) as memory:
        turn = memory.begin(body(TASK))
        memory.finish(turn, response(ANSWER))
        assert memory.begin(request, options=READ).episode_id == turn.episode_id
        assert memory.begin(body(TASK), options=READ).episode_id != turn.episode_id
    with lexical_memory(tmp_path) as memory:
        assert memory.begin(request, options=READ).episode_id == turn.episode_id
        assert memory.begin(request, tenant="t").episode_id != turn.episode_id


def test_an_episode_is_never_given_its_own_traces(tmp_path: Path) -> None:
    """What an episode itself taught is not evidence for it; another episode gets it."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER, options=Options(episode_id="e"))
        assert memory.begin(body(TASK), options=Options(episode_id="e")).action == "plain"
        assert memory.begin(body(TASK), options=Options(episode_id="f")).action == "inject"


@pytest.mark.parametrize("processes", ["one", "each its own", "two in turn"])
def test_the_ledger_puts_the_same_at_the_same_place(tmp_path: Path, processes: str) -> None:
    """Every later request of a conversation starts with what its earlier ones sent, whichever process answers it."""
    memory, other = lexical_memory(tmp_path), lexical_memory(tmp_path)
    teach(memory, TASK, ANSWER)
    teach(memory, "stop the apache server", "apachectl stop")
    said: list[Any] = []
    sent: list[dict[str, Any]] = []
    for number, task in enumerate([TASK, "thank you so much", "stop the apache server", "bye then"]):
        said.append({"role": "user", "content": task})
        turn = memory.begin(body(*said))
        assert turn.messages[: len(sent)] == sent
        sent = turn.messages
        memory.finish(turn, response(f"answer {number}"))
        said.append(assistant(f"answer {number}"))
        sent = [*sent, said[-1]]
        if processes == "each its own":
            memory.close()
            memory = lexical_memory(tmp_path)
        elif processes == "two in turn":
            memory.store.flush()
            memory, other = other, memory
    assert len(turn.injected) == 1
    assert len(turn.messages) == 7 + 2
    assert "apachectl stop" not in str(turn.messages)  # a turn in the middle of a dialogue is not a task
    edited = memory.begin(body("something else", *said[1:]))
    assert ANSWER not in str(edited.messages)
    memory.close()
    other.close()


def test_what_was_forgotten_stays_so_when_that_is_no_longer_noted(tmp_path: Path) -> None:
    """A process that is up for weeks puts nothing forgotten into an old episode again."""
    week = 7 * 86_400.0
    with lexical_memory(tmp_path) as memory:
        taught = teach(memory, TASK, ANSWER)
        assert ask(memory, TASK, "I do not know").action == "inject"
        memory.forget(Selection(trace_id=taught.trace_id))
        memory.store.write(lambda tx: deletion.drop_old_notes(tx, time.time() + 2 * week)).result(10)
        memory._clock = memory._locator._clock = lambda: time.time() + 2 * week
        assert ANSWER not in str(memory.begin(body(TASK, assistant("I do not know"), "please")).messages)


@pytest.mark.parametrize("reopen", [False, True])
def test_conversations_of_one_episode_keep_their_own_insertions(tmp_path: Path, reopen: bool) -> None:
    """Two conversations under one episode id do not make each other forget what stands in them."""
    memory = lexical_memory(tmp_path)
    teach(memory, TASK, ANSWER)
    options = Options(episode_id="e")
    one = ask(memory, TASK, "one", options=options)
    if reopen:
        memory.close()
        memory = lexical_memory(tmp_path)
    ask(memory, "a subject of its own", "two", options=options)
    later = memory.begin(body(TASK, assistant("one"), "go on please"), options=options)
    assert later.messages[: len(one.messages)] == one.messages
    memory.close()


# -- read-only -------------------------------------------------------------------------------------


def test_read_only_means_read_only(tmp_path: Path) -> None:
    """What is opened to look at is neither created nor changed, and starts no thread until the encoder is needed."""
    with pytest.raises(NotFound):
        Memory.open(tmp_path / "memory.db", read_only=True)
    assert list(tmp_path.iterdir()) == []
    with hashing_memory(tmp_path) as memory:
        turn = teach(memory, TASK, ANSWER)
        assert until(lambda: memory.stats()["memories_without_vector"] == 0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    threads = set(threading.enumerate())
    with Memory(settings(tmp_path, encoder="hashing"), read_only=True) as memory:
        assert memory.trace(turn.trace_id)["answer"] == ANSWER
        assert [m.answer for m in memory.memories()] == [t["answer"] for t in memory.traces()] == [ANSWER]
        assert memory.uplift()["object"] == "uplift"
        assert set(threading.enumerate()) == threads
        assert memory.encoder.wait(10) == "ready"
        assert [hit.cosine for hit in memory.recall(TASK)] == [pytest.approx(1.0, abs=1e-5)]
        helped = memory.begin(body(TASK))
        assert helped.action == "inject"
        for writes in (
            lambda: memory.finish(helped, response("done")),
            lambda: tell(memory, turn),
            memory.rebuild,
            memory.probe,
            lambda: memory.forget(Selection(trace_id=turn.trace_id)),
        ):
            with pytest.raises(StoreUnavailable, match="read-only"):
                writes()
        memory.finish(memory.begin(body(TASK), options=READ), response("done"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# -- holdout ---------------------------------------------------------------------------------------


def test_holdout_is_sticky_recorded_and_near_its_share(tmp_path: Path) -> None:
    """About the set share of episodes goes without memory, all of an episode alike, each with its propensity."""
    with lexical_memory(tmp_path, holdout=0.2) as memory:
        teach(memory, TASK, ANSWER)
        turns = [memory.begin(body(TASK), options=Options(episode_id=f"e{n}", mode="read")) for n in range(1_000)]
        held = [t for t in turns if t.held_out]
        assert 150 < len(held) < 250
        assert {t.action for t in held} == {"holdout"}
        assert {t.action for t in turns if not t.held_out} == {"inject"}
        assert all(texts(t) == [TASK] for t in held)
        assert {(t.held_out, t.propensity) for t in turns} == {(True, 0.2), (False, 0.8)}
        episode = held[0].episode_id
        again = ask(memory, body(TASK), options=Options(episode_id=episode))
        shown = memory.trace(again.trace_id)
        assert (shown["action"], shown["held_out"], shown["propensity"]) == ("holdout", True, 0.2)
        nothing = memory.begin(body("a subject of its own"), options=Options(episode_id=episode))
        assert (nothing.action, nothing.held_out) == ("plain", True)
        salt = memory.store.salt()
    with lexical_memory(tmp_path, holdout=0.2) as memory:
        assert memory.store.salt() == salt
        assert memory.begin(body(TASK), options=Options(episode_id=episode)).action == "holdout"


def test_what_a_held_out_request_would_have_had_is_recorded(tmp_path: Path) -> None:
    """The other half of a memory's comparison: it had something to say, and was kept from saying it."""
    with lexical_memory(tmp_path, holdout=1.0) as memory:
        teach(memory, TASK, "an answer")
        turn = ask(memory, TASK, "another answer")
        (known,) = memory.store.list_memories(None)
        shown = memory.why(turn.trace_id)
        assert ([i["memory_id"] for i in shown["withheld"]], shown["injected"]) == ([known.memory_id], [])
        tell(memory, turn)
        assert memory.memory(known.memory_id).used_successes == 0  # it had no part in that


def test_holdout_cannot_be_picked_by_name() -> None:
    """Another database assigns the same names otherwise; a share of 0 holds none out, of 1 all."""
    names = [f"e{n}" for n in range(400)]
    one, two = ([assign(n, salt, 0.5).held_out for n in names] for salt in (b"a" * 16, b"b" * 16))
    assert 140 < sum(a == b for a, b in zip(one, two, strict=True)) < 260
    assert not any(assign(n, b"s", 0.0).held_out for n in names)
    assert all(assign(n, b"s", 1.0).held_out for n in names)


# -- the encoder comes late ------------------------------------------------------------------------


def test_recall_is_lexical_until_the_encoder_is_there(tmp_path: Path) -> None:
    """Before the encoder is ready words find and the metadata says so; then older memories get vectors too."""
    there = threading.Event()

    def load() -> Encoder:
        assert there.wait(20)
        return HashingEncoder()

    with Memory(settings(tmp_path), encoder=load) as memory:
        teach(memory, TASK, ANSWER)
        early = memory.begin(body(TASK), options=READ)
        assert early.action == "inject"
        assert reasons(early) == ["encoder_loading_recall_is_lexical"]
        assert memory.begin(body("restarting nginx servers"), options=READ).action == "plain"
        there.set()
        assert memory.encoder.wait(10) == "ready"
        assert until(lambda: memory.begin(body("restarting nginx servers"), options=READ).action == "inject")
        assert memory.recall(TASK)[0].cosine == pytest.approx(1.0, abs=1e-5)
        assert reasons(memory.begin(body(TASK), options=READ)) == []


def test_a_memory_that_nobody_asked_for_gets_its_vector(tmp_path: Path) -> None:
    """What was only written, and what was shown later, is encoded behind the scenes, also after a rebuild."""
    with hashing_memory(tmp_path) as memory:
        for number in range(3):
            teach(memory, f"restart the nginx server {number}", ANSWER, options=Options(mode="write"))
        fingerprint = memory.encoder.fingerprint
        assert until(lambda: not memory.store.vectors.missing(fingerprint, 0, 9)[0])
        memory.store.write(lambda tx: tx.db.execute("DELETE FROM vectors")).result(10)
        memory.rebuild()
        assert until(lambda: not memory.store.vectors.missing(fingerprint, 0, 9)[0])
        assert until(lambda: memory.begin(body("restarting nginx servers"), options=READ).action == "inject")


def test_a_slow_encoder_does_not_hold_a_request(tmp_path: Path) -> None:
    """When encoding takes longer than the deadline allows, recall goes on with words and says so."""
    release = threading.Event()

    class Slow(HashingEncoder):
        def encode(self, texts: Any) -> Any:
            if len(texts) == 1:
                release.wait(20)
            return super().encode(texts)

    with Memory(settings(tmp_path, deadline_ms=100), encoder=Slow) as memory:
        assert memory.encoder.wait(10) == "ready"
        started = time.monotonic()
        turn = memory.begin(body(TASK))
        waited_s = time.monotonic() - started
        release.set()
        assert waited_s < 10
        assert reasons(turn)[0] == "encoder_slow_recall_is_lexical"
