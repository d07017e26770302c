"""Two conversations that begin alike ("hi", the same greeting) share an episode, and feedback on one lands on both.

Reports: https://github.com/headroomlabs-ai/headroom/pull/1912 (the fallback session id is the same for conversations
that share their system prompt) and https://github.com/ranxianglei/billion-context/issues/61 (sessions told apart by how
they begin run into each other).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from builders import NOW, assistant, body, lexical_memory, response, settings, teach
from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as st

from optillm_memory import Memory, Turn
from optillm_memory.conversation.episodes import root_of
from optillm_memory.conversation.options import Options

GREETING = "Hello! How can I help you today?"
HI: tuple[Any, ...] = ("hi", assistant(GREETING))
HOUR = 3_600.0
_names = itertools.count()


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class Chat:
    """A client with a conversation of its own, which it repeats with every request."""

    def __init__(self, name: str, **fields: Any) -> None:
        self.said: list[Any] = ["hi"]
        self.turns: list[Turn] = []
        self._name, self._fields = name, fields
        self._answers = itertools.chain([GREETING], (f"answer {n} to {name}" for n in itertools.count()))

    def request(self, memory: Memory) -> Turn:
        """Begin the request that is due, and leave it under way."""
        return memory.begin(body(*self.said, **self._fields))

    def step(self, memory: Memory) -> Turn:
        """Have the request that is due answered, and say the next thing."""
        turn, answer = self.request(memory), next(self._answers)
        memory.finish(turn, response(answer))
        memory.settle()
        self.said += [assistant(answer), f"{self._name} goes on, {len(self.turns)}"]
        self.turns.append(turn)
        return turn

    def episodes(self) -> set[str]:
        """Return the episodes of what is this chat's alone."""
        return {turn.episode_id for turn in self.turns[1:]}


def namespace() -> dict[str, Any]:
    """Return a request's fields that keep a test's conversations to itself."""
    return {"agent_memory": {"namespace": f"chats-{next(_names)}"}}


def greeted(memory: Memory, **fields: Any) -> Turn:
    """Have one more "hi" greeted."""
    turn = memory.begin(body("hi", **fields))
    memory.finish(turn, response(GREETING))
    memory.settle()
    return turn


def goes_on(memory: Memory, text: str = "x", answer: str | None = "an answer", **fields: Any) -> Turn:
    """Go on from the greeting with a text; an answer of None is a request that failed."""
    turn = memory.begin(body(*HI, text, **fields))
    memory.finish(turn, None if answer is None else response(answer), error="gone" if answer is None else None)
    memory.settle()
    return turn


def taught(memory: Memory) -> None:
    """Give memory something to say to "hi", learned in another conversation."""
    teach(memory, "hi", "Good day to you.")


def judge(memory: Memory, episode_id: str, value: Any = True, **fields: Any) -> None:
    """Give feedback on an episode."""
    said = {"episode_id": episode_id, "metric": "success", "value": value, "source": "code", **fields}
    assert memory.feedback(said)[0].status == "applied"


def shown(turn: Turn) -> list[tuple[int, Any]]:
    """Return where a turn's insertions stand, and what they say."""
    return [(p.position, p.payload) for p in turn.placements]


def begins_with(later: Turn, before: Turn) -> bool:
    """Whether a prompt begins, byte by byte, with an earlier one."""
    return json.dumps(later.messages[: len(before.messages)]) == json.dumps(before.messages)


# -- interleaved -----------------------------------------------------------------------------------


def apart(chats: Sequence[Chat], memory: Memory) -> None:
    """Hold that every chat has one episode, that none is shared, and that feedback on one stays there."""
    for chat in chats:
        assert len(chat.episodes()) == 1
        assert all(begins_with(turn, before) for before, turn in itertools.pairwise(chat.turns[1:]))
        assert all(turn.continues for turn in chat.turns[1:])
    assert len(set.union(*(chat.episodes() for chat in chats))) == len(chats)
    for value, chat in enumerate(chats[:2]):
        (episode,) = chat.episodes()
        judge(memory, episode, bool(value))
    for value, chat in enumerate(chats):
        for turn in chat.turns[1:]:
            found = [f["value"] for f in memory.trace(turn.trace_id)["feedback"] if f["metric"] == "success"]
            assert found == ([bool(value)] if value < 2 else [])


TWO = sorted(set(itertools.permutations([0, 0, 0, 1, 1, 1])))
ORDERS = st.permutations([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])


def test_two_chats_in_every_order(tmp_path: Path) -> None:
    """Two chats that begin with the same words, however their requests alternate, never meet."""
    with lexical_memory(tmp_path) as memory:
        for order in TWO:
            fields = namespace()
            chats = [Chat(f"chat {n}", **fields) for n in range(2)]
            for number in order:
                chats[number].step(memory)
            apart(chats, memory)


def test_two_chats_in_every_order_with_a_restart_after_each_request(tmp_path: Path) -> None:
    """What tells them apart is on disk: the process may end between any two requests."""
    for order in TWO[::2]:
        fields = namespace()
        chats = [Chat(f"chat {n}", **fields) for n in range(2)]
        for number in order:
            with lexical_memory(tmp_path) as memory:
                chats[number].step(memory)
        with lexical_memory(tmp_path) as memory:
            apart(chats, memory)


@pytest.mark.parametrize("sticky", [True, False])
def test_two_chats_in_every_order_in_two_processes(tmp_path: Path, sticky: bool) -> None:
    """Two processes on one file, each chat at its own or every request at the next: the chats never meet."""
    with lexical_memory(tmp_path) as one, lexical_memory(tmp_path) as two:
        for order in TWO:
            fields = namespace()
            chats = [Chat(f"chat {n}", **fields) for n in range(2)]
            for turn, number in enumerate(order):
                chats[number].step((one, two)[number if sticky else turn % 2])
            apart(chats, one)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Open two memories on one file, as two processes would."""
    place = tmp_path_factory.mktemp("pair")
    with lexical_memory(place) as one, lexical_memory(place) as two:
        yield one, two


@how(max_examples=40, deadline=None)
@given(ORDERS, st.lists(st.integers(0, 1), min_size=11, max_size=11))
def test_three_chats_in_any_order_at_any_process(
    pair: tuple[Memory, Memory], order: list[int], places: list[int]
) -> None:
    """Three chats of several turns, each request at either of two processes, stay apart."""
    fields = namespace()
    chats = [Chat(f"chat {n}", **fields) for n in range(3)]
    for number, place in zip(order, places, strict=True):
        chats[number].step(pair[place])
    apart(chats, pair[0])


ACTIONS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["step", "step", "step", "fail", "judge", "restart"])),
    min_size=4, max_size=24,
)  # fmt: skip


@how(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ACTIONS)
def test_chats_that_fail_and_are_judged_stay_apart(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[int, str]]
) -> None:
    """Requests that fail, outcomes and restarts in between: no two chats are ever in one episode."""
    place = tmp_path_factory.mktemp("chats")
    chats = [Chat(f"chat {n}") for n in range(4)]
    memory = lexical_memory(place)
    try:
        for number, action in actions:
            chat = chats[number]
            if action == "step":
                chat.step(memory)
            elif action == "fail":
                memory.finish(chat.request(memory), None, error="gone")
                memory.settle()
            elif action == "judge" and chat.turns:
                judge(memory, chat.turns[-1].episode_id, number % 2 == 0)
            elif action == "restart":
                memory.close()
                memory = lexical_memory(place)
    finally:
        memory.close()
    for one, other in itertools.combinations(chats, 2):
        assert not one.episodes() & other.episodes()


def test_eighty_chats_at_once(tmp_path: Path) -> None:
    """More chats than are kept of one beginning each go on in an episode of their own."""
    with lexical_memory(tmp_path) as memory:
        chats = [Chat(f"chat {n}") for n in range(80)]
        for _ in range(3):
            for chat in chats:
                turn, answer = chat.request(memory), GREETING if not chat.turns else f"{id(chat)} {len(chat.turns)}"
                memory.finish(turn, response(answer))
                chat.turns.append(turn)
                chat.said += [assistant(answer), f"{id(chat)} goes on, {len(chat.turns)}"]
        assert all(len(chat.episodes()) == 1 for chat in chats)
        assert len(set.union(*(chat.episodes() for chat in chats))) == 80


@pytest.mark.parametrize("sticky", [True, False])
def test_two_processes_with_both_requests_under_way(tmp_path: Path, sticky: bool) -> None:
    """A request that another process has under way has taken its place, before anything of it is on disk."""
    with lexical_memory(tmp_path) as one, lexical_memory(tmp_path) as two:
        opened = {greeted(one).episode_id, greeted(two).episode_id}
        first, second = one.begin(body(*HI, "x")), (two if sticky else one).begin(body(*HI, "y"))
        assert {first.episode_id, second.episode_id} == opened


# -- a beginning that is over ----------------------------------------------------------------------

CLOSING: dict[str, Callable[[Memory, Turn], object]] = {
    "success": lambda memory, turn: judge(memory, turn.episode_id),
    "failure": lambda memory, turn: judge(memory, turn.episode_id, value=False),
    "a person's word": lambda memory, turn: judge(memory, turn.episode_id, source="human"),
    "a score": lambda memory, turn: judge(memory, turn.episode_id, 0.9, metric="score"),
    "a verified answer": lambda memory, turn: memory.feedback(
        {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}
    ),
}
OUTCOME = {"feedback_id": "taken-back", "metric": "success", "source": "code"}
NOT_CLOSING: dict[str, Callable[[Memory, Turn], object]] = {
    "a comment": lambda memory, turn: judge(memory, turn.episode_id, "slow", metric="comment"),
    "a failed answer": lambda memory, turn: memory.feedback(
        {"trace_id": turn.trace_id, "metric": "success", "value": False, "source": "code"}
    ),
    "another episode": lambda memory, turn: judge(memory, greeted(memory, **namespace()).episode_id),
    "an outcome taken back": lambda memory, turn: [
        memory.feedback({**OUTCOME, "episode_id": turn.episode_id, "value": value}) for value in (True, None)
    ],
}  # fmt: skip


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("closing", CLOSING)
def test_after_an_outcome_comes_a_new_episode_with_the_same_prompt(
    tmp_path: Path, closing: str, restarted: bool
) -> None:
    """What follows an outcome is an episode of its own; its prompt begins as the one before, byte by byte."""
    memory = lexical_memory(tmp_path)
    taught(memory)
    first = greeted(memory)
    assert first.action == "inject"
    CLOSING[closing](memory, first)
    if restarted:
        memory.close()
        memory = lexical_memory(tmp_path)
    with memory:
        turn = goes_on(memory)
        assert turn.episode_id != first.episode_id
        assert root_of(turn.episode_id) == first.episode_id
        assert not turn.continues
        assert begins_with(turn, first)
        assert shown(turn)[: len(first.placements)] == shown(first)
        assert [m["content"] for m in memory.trace(turn.trace_id)["messages"]][:2] == ["hi", GREETING]
    with lexical_memory(tmp_path) as memory:
        later = memory.begin(body(*HI, "x", assistant("an answer"), "and then"))
        assert (later.episode_id, later.continues) == (turn.episode_id, True)
        assert begins_with(later, turn)
        judged = memory.trace(turn.trace_id)
        assert judged["feedback"] == []
        assert judged["outcome"]["verdict"] == "unknown"


@pytest.mark.parametrize("word", NOT_CLOSING)
def test_what_is_no_outcome_ends_nothing(tmp_path: Path, word: str) -> None:
    """A comment, a failed answer, somebody else's outcome or one that was taken back leave the episode open."""
    with lexical_memory(tmp_path) as memory:
        first = greeted(memory)
        NOT_CLOSING[word](memory, first)
        turn = goes_on(memory)
        assert (turn.episode_id, turn.continues) == (first.episode_id, True)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(("idle", "same"), [(60.0, True), (HOUR - 1, True), (HOUR + 1, False), (9 * HOUR, False)])
def test_an_hour_of_silence_ends_an_episode(tmp_path: Path, idle: float, same: bool, restarted: bool) -> None:
    """What goes on within the hour stays, what comes later is a new episode with the same insertions."""
    clock = Clock()
    memory = Memory(settings(tmp_path), clock=clock)
    taught(memory)
    clock.now += 2 * HOUR
    first = greeted(memory)
    clock.now += idle
    if restarted:
        memory.close()
        memory = Memory(settings(tmp_path), clock=clock)
    with memory:
        turn = goes_on(memory)
        assert (turn.episode_id == first.episode_id) is same
        assert turn.continues is same
        assert begins_with(turn, first)
        clock.now += HOUR - 1  # and it is the latest request that counts, not the first
        later = memory.begin(body(*HI, "x", assistant("an answer"), "and then"))
        assert later.episode_id == turn.episode_id
        assert begins_with(later, turn)


def test_each_outcome_and_each_silence_opens_one_more(tmp_path: Path) -> None:
    """A conversation that goes on for days is as many episodes, all of one root, and its prompt never changes."""
    clock = Clock()
    with Memory(settings(tmp_path), clock=clock) as memory:
        taught(memory)
        chat = Chat("days")
        for number in range(6):
            clock.now += 1.0 if number % 2 else 2 * HOUR
            turn = chat.step(memory)
            if number % 2 == 0:
                judge(memory, turn.episode_id)
        assert len({turn.episode_id for turn in chat.turns}) == 6
        assert len({root_of(turn.episode_id) for turn in chat.turns}) == 1
        assert all(begins_with(turn, before) for before, turn in itertools.pairwise(chat.turns))


# -- another continuation, a retry, a failure ------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True])
def test_another_continuation_is_an_episode_of_its_own(tmp_path: Path, restarted: bool) -> None:
    """A conversation that goes on from one place in three ways is three episodes, each with the same beginning."""
    memory = lexical_memory(tmp_path)
    taught(memory)
    first = greeted(memory)
    turns = [goes_on(memory, text, f"answer to {text}") for text in "xyz"]
    assert len({turn.episode_id for turn in turns}) == 3
    assert turns[0].episode_id == first.episode_id
    assert all(begins_with(turn, first) for turn in turns)
    if restarted:
        memory.close()
        memory = lexical_memory(tmp_path)
    with memory:
        for text, turn in zip("xyz", turns, strict=True):  # the same again, and what comes after each
            again = goes_on(memory, text, f"answer to {text}")
            assert again.episode_id == turn.episode_id
            assert again.messages == turn.messages
            later = memory.begin(body(*HI, text, assistant(f"answer to {text}"), "and then"))
            assert later.episode_id == turn.episode_id
            assert begins_with(later, turn)


@pytest.mark.parametrize("outcome", ["running", "failed", "answered"])
def test_a_retry_stays_in_its_episode(tmp_path: Path, outcome: str) -> None:
    """The same request again, whatever became of the first, is in its episode and gets the same prompt."""
    with lexical_memory(tmp_path) as memory:
        taught(memory)
        root = greeted(memory)
        first = memory.begin(body(*HI, "x"))
        if outcome != "running":
            memory.finish(first, response("y") if outcome == "answered" else None, error="gone")
            memory.settle()
        for _ in range(2):
            again = goes_on(memory)
            assert again.episode_id == first.episode_id == root.episode_id
            assert again.messages == first.messages


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("opened_by", ["an outcome", "another continuation"])
@pytest.mark.parametrize("outcome", ["running", "failed", "answered"])
def test_a_retry_of_what_opened_an_episode_keeps_its_prompt(
    tmp_path: Path, outcome: str, opened_by: str, restarted: bool
) -> None:
    """A request that opened a new episode and is tried again finds the insertions that it found at first."""
    memory = lexical_memory(tmp_path)
    taught(memory)
    root = greeted(memory)
    if opened_by == "an outcome":
        judge(memory, root.episode_id)
    else:
        goes_on(memory, "something else")
    first = memory.begin(body(*HI, "x"))
    assert begins_with(first, root)
    if outcome != "running":
        memory.finish(first, response("y") if outcome == "answered" else None, error="gone")
        memory.settle()
    if restarted:
        memory.close()
        memory = lexical_memory(tmp_path)
    with memory:
        again = goes_on(memory)
        assert again.episode_id != root.episode_id
        assert restarted or again.episode_id == first.episode_id
        assert again.messages == first.messages
        later = memory.begin(body(*HI, "x", assistant("an answer"), "and then"))
        assert begins_with(later, first)


def test_a_request_that_failed_leaves_the_place_free(tmp_path: Path) -> None:
    """After a request that was not answered the conversation has not gone on: another one is no second way."""
    with lexical_memory(tmp_path) as memory:
        taught(memory)
        root = greeted(memory)
        for text in ("x", "y"):
            failed = goes_on(memory, text, None)
            assert failed.episode_id == root.episode_id
        turn = goes_on(memory, "z")
        assert turn.episode_id == root.episode_id
        assert begins_with(turn, root)
        assert goes_on(memory, "x").episode_id != root.episode_id
    with lexical_memory(tmp_path) as memory:
        root = greeted(memory, **(fields := namespace()))
        goes_on(memory, "x", None, **fields)
    with lexical_memory(tmp_path) as memory:
        assert goes_on(memory, "y", **fields).episode_id == root.episode_id


def test_a_failure_does_not_free_the_place_of_a_retry(tmp_path: Path) -> None:
    """Where the first try fails while the second is under way, the place is still taken."""
    with lexical_memory(tmp_path) as memory:
        greeted(memory)
        first, again = memory.begin(body(*HI, "x")), memory.begin(body(*HI, "x"))
        assert again.episode_id == first.episode_id
        memory.finish(first, None, error="the client gave up")
        other = memory.begin(body(*HI, "y"))
        assert other.episode_id != again.episode_id


def test_a_request_without_writing_takes_its_place(tmp_path: Path) -> None:
    """In mode `read` nothing is on disk, and still two continuations are two episodes."""
    with lexical_memory(tmp_path) as memory:
        options = Options(mode="read")
        turns = []
        for said, answer in (("hi", GREETING), ([*HI, "x"], "a"), ([*HI, "y"], "b"), ([*HI, "x"], "a")):
            turns.append(memory.begin(body(*([said] if isinstance(said, str) else said)), options=options))
            memory.finish(turns[-1], response(answer))
        root, one, two, again = (turn.episode_id for turn in turns)
        assert root == one == again
        assert two != one


# -- the holdout -----------------------------------------------------------------------------------


def test_a_fork_is_held_out_as_its_root_is(tmp_path: Path) -> None:
    """The lot is drawn once for a conversation: its later episodes are on the same side, with the same chance."""
    clock = Clock()
    with Memory(settings(tmp_path, holdout=0.5), clock=clock) as memory:
        sides = set()
        for number in range(24):
            fields = namespace()
            root = greeted(memory, **fields)
            turns = [goes_on(memory, text, **fields) for text in "xyz"]
            if number % 2:
                judge(memory, root.episode_id)
            else:
                clock.now += 2 * HOUR
            turns.append(goes_on(memory, "after", **fields))
            assert len({turn.episode_id for turn in turns}) == len(turns)
            assert {(t.held_out, t.propensity) for t in turns} == {(root.held_out, root.propensity)}
            sides.add(root.held_out)
        assert sides == {True, False}


# -- a conversation that is shortened --------------------------------------------------------------


def acted(call_id: str, command: str) -> dict[str, Any]:
    """Return an answer that runs a command."""
    made = {"id": call_id, "type": "function", "function": {"name": "shell", "arguments": json.dumps({"c": command})}}
    return {"role": "assistant", "content": None, "tool_calls": [made]}


def printed(call_id: str, text: str) -> dict[str, Any]:
    """Return what a command printed."""
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def agent(memory: Memory, ids: Sequence[str], keep: int, task: str = "clean the build folder") -> list[Turn]:
    """Run an agent that sends its task with the last `keep` messages; its calls have these ids."""
    said: list[Any] = []
    turns = []
    for number, call_id in enumerate(ids):
        turns.append(memory.begin(body(task, *said[-keep:])))
        answer = acted(call_id, f"step {number}")
        memory.finish(turns[-1], response(answer))
        memory.settle()
        said += [answer, printed(call_id, f"printed {number}")]
    return turns


def ids(prefix: str, number: int = 6) -> list[str]:
    """Return ids of calls as long as real ones."""
    return [f"call_{prefix}{n:016d}" for n in range(number)]


def test_an_agent_that_forgets_its_beginning_stays_in_its_episode(tmp_path: Path) -> None:
    """Old messages are dropped, the calls keep their ids: the episode is still found; two agents stay apart."""
    with lexical_memory(tmp_path) as memory:
        found = [{turn.episode_id for turn in agent(memory, ids(name), keep=4)} for name in "ab"]
    assert [len(episodes) for episodes in found] == [1, 1]
    assert not found[0] & found[1]


def test_an_agent_is_found_by_its_calls_after_a_restart_and_an_outcome(tmp_path: Path) -> None:
    """The calls are on disk; after an outcome the agent goes on in one new episode, found by its calls as well."""
    task, names = "clean the build folder", ids("c", 6)
    with lexical_memory(tmp_path) as memory:
        (episode,) = {turn.episode_id for turn in agent(memory, names[:3], keep=4, task=task)}
    window = [acted(names[2], "step 2"), printed(names[2], "printed 2")]
    with lexical_memory(tmp_path) as memory:
        assert memory.begin(body(task, *window)).episode_id == episode
        judge(memory, episode)
        after = set()
        for number in range(3, 6):
            turn = memory.begin(body(task, *window))
            after.add(turn.episode_id)
            memory.finish(turn, response(acted(names[number], f"step {number}")))
            memory.settle()
            window = [acted(names[number], f"step {number}"), printed(names[number], f"printed {number}")]
    assert len(after) == 1
    assert {root_of(e) for e in after} == {episode}
    assert after != {episode}


def test_short_ids_tell_no_episode(tmp_path: Path) -> None:
    """Ids that every conversation counts from one are no evidence: what was shortened is a new conversation then."""
    with lexical_memory(tmp_path) as memory:
        agent(memory, ["call_1", "call_2"], keep=4)
        (other,) = {turn.episode_id for turn in agent(memory, ["call_1"], keep=4, task="another task")}
        shortened = memory.begin(body("a third task", acted("call_1", "step 0"), printed("call_1", "printed 0")))
        assert shortened.episode_id != other
        assert not shortened.continues


# -- the caller's word -----------------------------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True])
def test_a_named_episode_always_wins(tmp_path: Path, restarted: bool) -> None:
    """A name beats a prefix, an outcome, an hour of silence, another continuation and the ids of calls."""
    clock = Clock()
    memory = Memory(settings(tmp_path), clock=clock)
    greeted(memory)
    goes_on(memory)
    agent(memory, ids("d", 2), keep=4)
    name: dict[str, Any] = {"agent_memory": {"episode_id": "mine"}}
    first = greeted(memory, **name)
    assert first.episode_id == "mine"
    judge(memory, "mine", value=False)
    clock.now += 5 * HOUR
    if restarted:
        memory.close()
        memory = Memory(settings(tmp_path), clock=clock)
    with memory:
        for text in ("x", "y", "x"):
            turn = goes_on(memory, text, **name)
            assert (turn.episode_id, turn.continues) == ("mine", True)
        call = [acted(ids("d")[1], "step 1"), printed(ids("d")[1], "printed 1")]
        assert memory.begin(body("clean up", *call, **name)).episode_id == "mine"
        other = memory.begin(body(*HI, "x", agent_memory={"episode_id": "another"}))
        assert (other.episode_id, other.continues) == ("another", False)


def test_a_named_episode_keeps_its_insertions(tmp_path: Path) -> None:
    """A caller that names its episode in every request has a stable prompt, also after an outcome."""
    with lexical_memory(tmp_path) as memory:
        taught(memory)
        name: dict[str, Any] = {"agent_memory": {"episode_id": "mine"}}
        first = greeted(memory, **name)
        assert first.action == "inject"
        judge(memory, "mine")
        assert begins_with(goes_on(memory, **name), first)


@pytest.mark.parametrize("named_first", [True, False])
def test_a_chat_without_a_name_is_not_put_into_a_named_episode(tmp_path: Path, named_first: bool) -> None:
    """Of two chats that begin alike one is named by its caller: the other goes on in its own, whichever began last."""
    with lexical_memory(tmp_path) as memory:
        name: dict[str, Any] = {"agent_memory": {"episode_id": "mine"}}
        begun = [greeted(memory, **fields) for fields in ([name, {}] if named_first else [{}, name])]
        own = begun[1 if named_first else 0]
        turn = goes_on(memory)
        assert turn.episode_id == own.episode_id
        judge(memory, "mine", value=False)
        assert memory.trace(turn.trace_id)["feedback"] == []
