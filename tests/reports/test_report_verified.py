"""What a cache serves is not what was verified: cut off, redacted or shortened, and sent out as a whole answer.

Reports: https://github.com/diegosouzapw/OmniRoute/pull/12885 and https://github.com/HKUDS/LightRAG/pull/3446 (answers
that ended for length were cached, and served as complete from then on).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import assistant, body, hashing_memory, tell

from optillm_memory import Memory, Turn

TASK = "How do I write the retry loop of the uploader?"
REUSE = {"reuse": {"max_error": 0.05}}
JSON = dict[str, Any]
SECRET = "postgres://admin:hunter2secret@db.internal/ledger"


def taught(memory: Memory, choices: list[JSON], **fields: Any) -> Turn:
    """Answer the task with these choices, and have code say that it was right."""
    turn = memory.begin(body(TASK, **fields))
    memory.finish(turn, {"choices": choices})
    memory.store.flush()
    tell(memory, turn)
    return turn


def choice(message: JSON | str, reason: str | None = "stop", **fields: Any) -> JSON:
    """Return one choice of a completion."""
    said = assistant(message) if isinstance(message, str) else {"role": "assistant", **message}
    return {"index": 0, "message": said, "finish_reason": reason, **fields}


def given(memory: Memory, **fields: Any) -> str:
    """Return the action of the same request again, which allows reuse."""
    return memory.begin(body(TASK, agent_memory=REUSE, **fields)).action


NOT_WHOLE = {
    "length": [choice("for attempt in range(", "length")],
    "max_tokens": [choice("for attempt in range(", "max_tokens")],
    "content filter": [choice("I can only say so much", "content_filter")],
    "refusal": [choice({"content": None, "refusal": "I can't help with that."})],
    "refusal beside words": [choice({"content": "Sorry.", "refusal": "I can't help with that."})],
    "tool call": [choice({"content": "Let me look.", "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "ls", "arguments": "{}"}}]}, "tool_calls")],
    "secret": [choice(f"Connect with {SECRET} and retry.")],
    "long": [choice("x = 1\n" * 5_000)],
    "one of two cut off": [choice("a"), choice("a", "length")],
    "two answers": [choice("a"), choice("b")],
    "no words": [choice({"content": ""})],
    "thoughts alone": [choice("<think>first I would</think>")],
    "cut off in thought": [choice("<think>first I would", "length")],
    "broken text": [choice("half of an emoji \ud83d")],
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_what_is_not_whole_is_neither_reused_nor_injected(tmp_path: Path, case: str) -> None:
    """An answer that was cut off, refused, redacted or shortened is no exemplar, though its outcome is a success."""
    with hashing_memory(tmp_path) as memory:
        turn = taught(memory, NOT_WHOLE[case])
        assert memory.trace(turn.trace_id)["outcome"]["verdict"] == "success"
        assert [m for m in memory.store.list_memories(None) if m.kind == "exemplar"] == []
        assert given(memory) == "plain"
        memory.rebuild()
        assert given(memory) == "plain"


@pytest.mark.parametrize("reason", ["stop", None, "end_turn", "stop_sequence"])
def test_what_ended_of_itself_is_served(tmp_path: Path, reason: str | None) -> None:
    """A whole answer is served again to the letter, whatever the provider calls its end."""
    answer = "  while True:\n      upload()\n"
    with hashing_memory(tmp_path) as memory:
        taught(memory, [choice(answer, reason)])
        turn = memory.begin(body(TASK, agent_memory=REUSE))
        assert turn.action == "reuse"
        (served,) = turn.reused()["choices"]
        assert (served["message"]["content"], served["finish_reason"]) == (answer, "stop")


@pytest.mark.parametrize(
    "beside",
    [
        {"annotations": [{"type": "url_citation", "url_citation": {"url": "https://example.org"}}]},
        {"audio": {"id": "a1", "data": "UklGRg==", "transcript": "hm"}},
        {"images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]},
    ],
    ids=["citations", "audio", "images"],
)
def test_what_came_beside_the_words_cannot_be_served(tmp_path: Path, beside: JSON) -> None:
    """An answer with citations, sound or pictures is shown as an example, and not served without them."""
    with hashing_memory(tmp_path) as memory:
        taught(memory, [choice({"content": "Use a loop.", **beside})])
        assert given(memory) == "inject"


@pytest.mark.parametrize(
    "fields",
    [{"logprobs": True}, {"n": 2}, {"modalities": ["text", "audio"]}, {"response_format": {"type": "json_object"}}],
    ids=["logprobs", "several", "audio", "json"],
)
def test_who_asks_for_more_than_words_is_not_served(tmp_path: Path, fields: JSON) -> None:
    """Log probabilities, several choices, sound or another format cannot be had from an answer in words."""
    with hashing_memory(tmp_path) as memory:
        taught(memory, [choice("Use a loop.")])
        assert given(memory) == "reuse"
        assert given(memory, **fields) != "reuse"


@pytest.mark.parametrize("shown", [f"Use {SECRET}", "y = 2\n" * 5_000, "<think>hm</think>"])
def test_a_demonstration_is_held_to_the_same(tmp_path: Path, shown: str) -> None:
    """The right answer that feedback shows is no exemplar either, once it was redacted or shortened for storing."""
    with hashing_memory(tmp_path) as memory:
        turn = memory.begin(body(TASK))
        memory.finish(turn, {"choices": [choice("no idea", "length")]})
        memory.store.flush()
        tell(memory, turn, shown, metric="demonstration")
        assert memory.store.list_memories(None) == []
