"""The guard's second call: at most one, its tokens counted, and the better answer of the two goes out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import ERROR, JSON, RIGHT, WRONG, Agent, calling, mend, work
from builders import body, lexical_memory, response

from optillm_memory import Memory
from optillm_memory.conversation.feedback import parse_feedback
from optillm_memory.conversation.options import Options
from optillm_memory.host.exchange import Exchange, both
from optillm_memory.host.failopen import FailOpen
from optillm_memory.host.incoming import Incoming
from optillm_memory.request.deadline import Deadline

BLOCK = "<agent_memory"


class Upstream:
    """Stands for optillm: answers its `none` with what it was given, one answer after the other."""

    known_approaches = plugin_approaches = ()

    def __init__(self, *answers: Any) -> None:
        """Keep the answers; an exception is raised."""
        self.answers = list(answers)
        self.prompts: list[list[JSON]] = []

    def parse_conversation(self, _messages: Any) -> tuple[str, str, None]:
        """Give a flattened conversation."""
        return "", "flat", None

    def execute_single_approach(self, *given: Any) -> tuple[Any, int]:
        """Answer."""
        self.prompts.append(given[-1])
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer, 3


class Here:
    """Stands for the process's runtime."""

    def __init__(self, memory: Memory, deadline_s: float) -> None:
        """Keep a memory."""
        self.memory, self.fail_open, self.second_calls = memory, FailOpen(deadline_s), FailOpen(10)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    """Give a memory that knows an action to fail, and what works instead."""
    with lexical_memory(tmp_path) as opened:
        mend(opened)
        work(opened, [("ls", "Makefile\nExit code: 0"), ("make it fail", "make: no\nExit code: 2")])
        yield opened


def exchange(
    memory: Memory, *answers: Any, approach: str | None = None, mode: str = "readwrite", deadline_s: float = 10.0,
    feedback: Any = (),
) -> Exchange:  # fmt: skip
    """Begin an exchange with an upstream that will give these answers; ten seconds are enough for any test."""
    options = Options(mode=mode, approach=approach, feedback=feedback)  # type: ignore[arg-type]
    request = body("carry on with the work", tools=[])
    incoming = Incoming(request, 0, "local", options, "SINGLE", ("agent_memory",), "m")
    return Exchange.begin(Upstream(*answers), Here(memory, deadline_s), incoming)  # type: ignore[arg-type]


def asked(made: Exchange, *, finished: bool = True) -> tuple[Any, int, JSON]:
    """Ask; return the answer's message, how often the upstream was asked, and the metadata."""
    made.completion = made.ask_guarded(None, "m", {})
    if finished:
        made.finish()
        assert made.memory is not None
        made.memory.store.flush()
    return made.completion["choices"][0]["message"], len(made.host.prompts), made.metadata()


def test_the_better_second_answer_goes_out(memory: Memory) -> None:
    """A repeated failure is asked for once more with the advisory; the answer that mends it is kept, at both costs."""
    good = calling(RIGHT)
    made = exchange(memory, response(calling(WRONG)), response(good))
    message, calls, metadata = asked(made)
    assert (message, calls) == (good, 2)
    assert [BLOCK in str(p) for p in made.host.prompts] == [False, True]
    assert RIGHT in str(made.host.prompts[1])
    assert made.completion is not None
    assert made.completion["usage"] == {"prompt_tokens": 14, "completion_tokens": 6}
    assert (metadata["extra_calls"], metadata["action"]) == (1, "inject")
    assert [i["suggestion"] for i in metadata["injected"]] == [RIGHT]
    shown = memory.trace(metadata["trace_id"])
    assert (shown["extra_calls"], shown["prompt_tokens"], shown["completion_tokens"]) == (1, 14, 6)
    assert shown["messages"][-1]["tool_calls"][0]["arguments"] == good["tool_calls"][0]["function"]["arguments"]
    assert memory.stats()["extra_llm_calls"] == 1


@pytest.mark.parametrize(
    "second",
    [response(calling(WRONG)), response(calling("make it fail")), response(""), {"choices": []}, RuntimeError("gone"),
     response(calling(RIGHT), calling(RIGHT))],
    ids=["same", "another-failure", "nothing", "no-choice", "error", "two"],
)  # fmt: skip
def test_the_first_answer_stays_where_the_second_is_no_better(memory: Memory, second: Any) -> None:
    """Repetition, other failures, silence and errors of the second call leave the first answer and no advisory."""
    made = exchange(memory, response(calling(WRONG)), second)
    message, calls, metadata = asked(made)
    assert calls == 2
    assert WRONG in str(message)
    assert (metadata["extra_calls"], metadata["action"], metadata["injected"]) == (1, "plain", [])
    shown = memory.trace(metadata["trace_id"])
    assert (shown["error"], shown["extra_calls"], shown["action"]) == (None, 1, "plain")
    assert made.completion is not None
    assert made.completion["usage"]["prompt_tokens"] == (
        7 if isinstance(second, Exception) or "usage" not in second else 14
    )
    turn = made.turn
    agent = Agent(memory, messages=[*body("carry on with the work")["messages"], message], options={"mode": "read"})
    agent.messages.append({"role": "user", "content": "and?"})
    assert agent.begin().episode_id == turn.episode_id
    assert BLOCK not in str(agent.begin().messages)


def test_what_is_not_repeated_is_asked_once(memory: Memory) -> None:
    """Other answers, wrapped approaches and other modes cost no second call."""
    for answer in (response(calling(RIGHT)), response("words")):
        assert asked(exchange(memory, answer))[1] == 1
    wrapped = exchange(memory, response(calling(WRONG)), approach="re2")
    assert asked(wrapped)[1] == 1
    for mode in ("off", "write"):
        message, calls, metadata = asked(exchange(memory, response(calling(WRONG)), mode=mode))
        assert (calls, WRONG in str(message), "extra_calls" in metadata) == (1, True, False)


def test_a_fault_in_the_guard_costs_nothing(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where looking at the answers fails the first one goes out, and the fault is counted."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(memory, "guarded", broken)
    made = exchange(memory, response(calling(WRONG)), response(calling(RIGHT)))
    assert WRONG in str(asked(made)[0])
    monkeypatch.setattr(memory, "guard", broken)
    made = exchange(memory, response(calling(WRONG)))
    message, calls, metadata = asked(made)
    assert (calls, WRONG in str(message), "extra_calls" in metadata) == (1, True, False)
    assert made.fail_open.faults["RuntimeError"] == 1


@pytest.mark.parametrize(
    ("slow", "calls", "reasons"),
    [
        (("consult", "guard", "guarded"), 1, ["deadline"]),
        (("consult", "guarded"), 2, []),
        (("guard", "guarded"), 2, []),
        (("submit_feedback", "consult", "guard"), 1, ["deadline"]),
    ],
)
def test_the_deadline_is_spent_once(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, slow: tuple[str, ...], calls: int, reasons: list[str]
) -> None:
    """However many parts of memory are slow, together they take no longer than the deadline; the answer goes out."""
    deadline_s = 1.5

    def slowly(name: str) -> Any:
        works = getattr(memory, name)

        def work(*given: Any, **named: Any) -> Any:
            time.sleep(0.7 * deadline_s)
            return works(*given, **named)

        return work

    for name in slow:
        monkeypatch.setattr(memory, name, slowly(name))
    told = parse_feedback({"trace_id": "chatcmpl-none", "metric": "success", "value": True, "source": "code"}, now=1.0)
    answers = response(calling(WRONG)), response(calling(RIGHT))
    started = time.monotonic()
    made = exchange(memory, *answers, deadline_s=deadline_s, feedback=told if "submit_feedback" in slow else ())
    message, asked_times, metadata = asked(made, finished=False)
    assert time.monotonic() - started < 1.35 * deadline_s  # two parts alone would take 1.4
    assert (asked_times, WRONG in str(message)) == (calls, True)
    assert [s["reason"] for s in metadata["skipped"] if s["reason"] == "deadline"] == reasons
    assert made.fail_open.faults["deadline"] == 1
    made.finish()


def test_the_deadline_is_not_spent_while_the_model_answers(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may take its time: the guard has what memory has not spent yet."""
    made = exchange(memory, response(calling(WRONG)), response(calling(RIGHT)), deadline_s=1.0)
    answer = made.host.execute_single_approach

    def slowly(*given: Any) -> Any:
        time.sleep(1.2)
        return answer(*given)

    monkeypatch.setattr(made.host, "execute_single_approach", slowly)
    message, calls, _ = asked(made)
    assert (calls, RIGHT in str(message)) == (2, True)


def test_a_deadline_counts_time_once() -> None:
    """What runs within what runs is one time; while nothing runs none passes."""
    deadline = Deadline(5.0)
    with deadline.running(), deadline.running():
        time.sleep(0.05)
        inside = deadline.remaining_s
    assert 4.0 < deadline.remaining_s <= inside <= 4.95
    before = deadline.remaining_s
    time.sleep(0.05)
    assert deadline.remaining_s == before


def test_an_upstream_error_of_the_first_call_is_the_answer(memory: Memory) -> None:
    """Where the first call fails it fails for the client, as without memory."""
    made = exchange(memory, RuntimeError("gone"))
    with pytest.raises(RuntimeError, match="gone"):
        made.ask_guarded(None, "m", {})
    assert made.error == "RuntimeError: gone"
    made.finish()
    memory.store.flush()
    assert memory.trace(made.turn.trace_id)["error"] == "RuntimeError: gone"


def test_usage_of_two_calls_is_added_at_every_level() -> None:
    """Numbers are added, what only one call names is kept, and words stay."""
    one = {"prompt_tokens": 1, "details": {"cached": 2, "kind": "x"}, "only": 5, "none": None}
    two = {"prompt_tokens": 3, "details": {"cached": 4, "kind": "y", "audio": 1}, "none": 2}
    assert both(one, two) == {
        "prompt_tokens": 4, "details": {"cached": 6, "kind": "y", "audio": 1}, "only": 5, "none": 2,
    }  # fmt: skip
    assert both(None, two) == two
    assert both(one, None) == one
    assert both(None, None) is None


def test_the_error_of_an_action_names_it_to_the_next(memory: Memory) -> None:
    """What the guard let pass and failed again is counted the next time."""
    agent = Agent(memory)
    agent.act(WRONG, ERROR)
    agent.close()
    made = exchange(memory, response(calling(WRONG)), response(calling(RIGHT)))
    asked(made)
    assert "failed 2 times" in str(made.host.prompts[1])
