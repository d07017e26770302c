"""An answer that a client sends back in another form makes a new conversation, and the prompt changes.

The provider's prompt cache then breaks at the first message. Reports:
https://github.com/coddy-project/coddy-agent/pull/271 (a request is cached by its prefix, and one moved byte throws it
away) and https://github.com/sigoden/aichat/pull/1141 (a client that takes `<think>` out of what it sends back).
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from builders import assistant, body, lexical_memory, response, teach
from hypothesis import given, settings
from hypothesis import strategies as st

from optillm_memory import Memory, Turn
from optillm_memory.conversation.identity import identity_of, prefix_hashes
from optillm_memory.conversation.options import Options
from optillm_memory.conversation.text import text_of
from optillm_memory.inject.place import strip
from optillm_memory.records import Placement

JSON: TypeAlias = dict[str, Any]
Rewriting: TypeAlias = Callable[[random.Random, list[JSON]], list[JSON]]
PER_CONVERSATION = 10
_names = itertools.count()

# -- twenty conversations --------------------------------------------------------------------------


def user(*parts: str | JSON, **fields: Any) -> JSON:
    """Return what a user says: one text, or several parts."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0], **fields}
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def calling(*calls: tuple[str, str, Any], content: str | None = None, **fields: Any) -> JSON:
    """Return an answer that calls tools: (id, name, arguments)."""
    made = [
        {"id": i, "type": "function", "function": {"name": n, "arguments": json.dumps(a, ensure_ascii=False)}}
        for i, n, a in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": made, **fields}


def result(call_id: str, text: str, **fields: Any) -> JSON:
    """Return what a tool printed."""
    return {"role": "tool", "tool_call_id": call_id, "content": text, **fields}


def picture(url: str, **fields: Any) -> JSON:
    """Return a picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": url, **fields}}


SYSTEM = {"role": "system", "content": "You are a careful helper.\nAnswer in one sentence.  \n"}
DEVELOPER = {"role": "developer", "content": "Use the tools where they help."}
CODE = "Here it is:\n\n```python\ndef total(rows):\n    if not rows:\n        return 0\n    return sum(rows)\n```\n"
MAKEFILE = "```make\nbuild:\n\tgcc -o app app.c  \n\nclean:\n\trm -f app\n```"
THOUGHT = "<think>\nThe user asks for a capital.\n\n```\nnot an answer\n```\n</think>\n\n"
PNG = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA"
WAV, PDF = {"data": "UklGRiQAAABXQVZF", "format": "wav"}, "data:application/pdf;base64,JVBERi0xLjQK"

CONVERSATIONS: dict[str, list[JSON]] = {
    "chat": [
        user("how do I restart nginx"), assistant("systemctl restart nginx"), user("and only reload it"),
        assistant("systemctl reload nginx\n"), user("thanks a lot"),
    ],
    "system": [
        SYSTEM, user("which port does ssh use"), assistant("Port 22."), user("and telnet"), assistant("Port 23. \n"),
        user("and smtp then"),
    ],
    "developer": [
        DEVELOPER, user("list the open ports of this host", name="ana"), assistant("ss -tlnp"),
        user("only udp ones", name="ana"), assistant("ss -ulnp"), user("with process names"),
    ],
    "one call": [
        user("weather in Lisbon"), calling(("call_1", "weather", {"city": "Lisbon", "days": 1.0})),
        result("call_1", "18 degrees, wind \n from the west"), assistant("18 degrees in Lisbon."), user("and tomorrow"),
        calling(("call_2", "weather", {"city": "Lisbon", "days": 2})), result("call_2", "20 degrees"),
        assistant("20 degrees."), user("good to know"),
    ],
    "nested arguments": [
        SYSTEM, user("create the invoice of June"),
        calling(("call_a", "create", {
            "lines": [{"net": 10.0, "tax": 0.19, "text": "a  b\n"}, {"net": 2.5e3, "tax": 0, "text": ""}],
            "meta": {"paid": False, "due": None, "tags": [], "more": {"deep": [[1.0], [2]]}},
        })),
        result("call_a", '{"id": 17, "total": 2511.9}'), assistant("Number 17 is there."), user("send it to him"),
        calling(("call_b", "send", {"id": 17})), result("call_b", "sent"), assistant("Sent."), user("perfect work"),
    ],
    "unicode arguments": [
        user("übersetze die Wörter für das Menü"),
        calling(("c1", "translate", {"text": "Gemüse, “frisch” 🥕 日本語", "to": "pt", "ключ": "значение"})),
        result("c1", "legumes frescos 🥕"), assistant("Legumes frescos 🥕."), user("und auf Japanisch"),
        assistant("新鮮な野菜\u3000"), user("vielen Dank dafür"),
    ],
    "parallel calls": [
        user("compare the sizes of both folders"),
        calling(("p1", "size", {"path": "/a"}), ("p2", "size", {"path": "/b"}), content="I look at both."),
        result("p1", "10 MB"), result("p2", "12 MB"), assistant("/b is larger."), user("delete the smaller folder"),
        calling(("p3", "remove", {"path": "/a", "force": True})), result("p3", ""), assistant("Done."),
        user("all right"),
    ],
    "same call twice": [
        user("run the tests until they pass"), calling(("r1", "shell", {"command": "pytest -q"})),
        result("r1", "1 failed"), calling(("r2", "shell", {"command": "pytest -q"})), result("r2", "1 passed"),
        assistant("They pass now."), user("commit the change"),
    ],
    "legacy function": [
        user("what is on my calendar"),
        {"role": "assistant", "content": None, "function_call": {"name": "events", "arguments": '{"n": 3}'}},
        {"role": "function", "name": "events", "content": '["dentist"]'}, assistant("The dentist."),
        user("move it to Friday"), assistant("Moved."), user("remind me of it"),
    ],
    "thoughts in the text": [
        user("capital of Australia"), assistant(THOUGHT + "Canberra."), user("its population"),
        assistant("<think>\n\n</think>\n\nAbout 470,000."), user("and of Sydney"),
    ],
    "thoughts beside the text": [
        SYSTEM, user("is 91 a prime number"),
        {**assistant("No, it is 7 times 13."), "reasoning_content": "91 = 7 * 13", "refusal": None, "annotations": []},
        user("and is 97 one"), {**assistant("Yes."), "reasoning_content": "no divisor up to 9", "audio": None},
        user("and the next after it"),
    ],
    "thoughts and calls": [
        DEVELOPER, user("find large files in the home folder"),
        calling(("t1", "shell", {"command": "du -sh ~/*", "timeout": 10.0}), content="<think>du will do</think>"),
        result("t1", "4.0G\t/home/a/videos\n12K\t/home/a/notes\n"), assistant("<think>sorted\n</think>\nThe videos."),
        user("move the videos away"), calling(("t2", "shell", {"command": "mv ~/videos /mnt"}), reasoning_content="mv"),
        result("t2", ""), assistant("Moved."), user("check the free space"),
    ],
    "pictures": [
        user("what does this picture show", picture("https://example.org/a.png?x=1", detail="auto")),
        assistant("A cat."), user("and this one", picture(PNG), picture("https://example.org/b.png")),
        assistant("Two dogs."), user("which one is older"),
    ],
    "sound": [
        user("write down what is said here", {"type": "input_audio", "input_audio": WAV}), assistant("Good morning."),
        user("translate the sentence"), assistant("Bom dia."), user("say it politely"),
    ],
    "files": [
        user("summarise the contract", {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}}),
        assistant("It ends in May."), user("and this one", {"type": "file", "file": {"file_id": "file-123"}}),
        assistant("It ends in June."), user("which of them is cheaper"),
    ],
    "code": [
        user("write a function that sums rows"), assistant(CODE),
        user("def total(rows):\n    return 1   \n\n  # wrong?"),
        assistant("It returns 1 always.  \n\n    return sum(rows)\n"), user("add a type hint to it"),
    ],
    "tabs": [
        SYSTEM, user("a makefile for one C file"), assistant(MAKEFILE), user("add a test target\n\tplease"),
        assistant("```make\ntest: build\n\t./app --test\n```\n\n"), user("now a phony one"),
    ],
    "refusal": [
        user("how do I pick the lock of a car"),
        {"role": "assistant", "content": None, "refusal": "I can't help with that.", "annotations": []},
        user("it is my own car"), assistant("Call a locksmith."), user("where do I find one"),
    ],
    "empty answers": [
        user("say nothing for once"), assistant(""), user("not even a word"), assistant("  \n"), user("very good then"),
        {"role": "assistant", "content": []}, user("now speak again please"),
    ],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
        user("name three rivers", "of Poland"),
        {"role": "assistant", "content": [{"type": "text", "text": t} for t in ("Vistula, Oder,", "Warta.")]},
        {"role": "user", "content": [{"type": "text", "text": "and lakes", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Śniardwy."}]}, user("and mountains too"),
    ],
}  # fmt: skip

# -- what clients do to a history ------------------------------------------------------------------


def each(change: Callable[[random.Random, JSON], JSON], *roles: str) -> Rewriting:
    """Return a rewriting that changes some of the messages of these roles, or of all."""

    def rewriting(draw: random.Random, messages: list[JSON]) -> list[JSON]:
        return [change(draw, m) if (not roles or m["role"] in roles) and draw.random() < 0.7 else m for m in messages]

    return rewriting


def on_texts(change: Callable[[random.Random, str], str]) -> Callable[[random.Random, JSON], JSON]:
    """Return a change of every text in a message, be it the content or a part of it."""

    def changed(draw: random.Random, message: JSON) -> JSON:
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": change(draw, content)}
        if isinstance(content, list):
            parts = [{**p, "text": change(draw, p["text"])} if p.get("type") == "text" else p for p in content]
            return {**message, "content": parts}
        return message

    return changed


def as_parts(_: random.Random, message: JSON) -> JSON:
    """Write a text as a list with one text part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def as_text(_: random.Random, message: JSON) -> JSON:
    """Write a list with one text part as a text."""
    content = message.get("content")
    single = isinstance(content, list) and len(content) == 1 and content[0].get("type") == "text"
    return {**message, "content": message["content"][0]["text"]} if single else message


def marks_moved(draw: random.Random, messages: list[JSON]) -> list[JSON]:
    """Take every cache mark away and put some elsewhere: on messages, on parts."""
    moved: list[JSON] = []
    for message in messages:
        made = {key: value for key, value in message.items() if key != "cache_control"}
        if isinstance(made.get("content"), list):
            made["content"] = [{k: v for k, v in p.items() if k != "cache_control"} for p in made["content"]]
            if made["content"] and draw.random() < 0.4:
                made["content"][-1]["cache_control"] = {"type": "ephemeral", "ttl": "5m"}
        elif draw.random() < 0.2:
            made["cache_control"] = {"type": "ephemeral"}
        moved.append(made)
    return moved


def without_thoughts(draw: random.Random, text: str) -> str:
    """Take the thoughts out as clients do, with or without the white space after them."""
    return re.sub(draw.choice([r"<think>.*?</think>", r"<think>.*?</think>\s*"]), "", text, flags=re.DOTALL)


def thoughts_beside(_: random.Random, message: JSON) -> JSON:
    """Move the thoughts out of a text into a field of their own."""
    content = message.get("content")
    found = re.match(r"<think>(.*?)</think>(.*)", content, re.DOTALL) if isinstance(content, str) else None
    return {**message, "content": found[2], "reasoning_content": found[1]} if found else message


def fields_changed(draw: random.Random, message: JSON) -> JSON:
    """Drop or add what an answer holds besides its text."""
    made = dict(message)
    empty: JSON = {
        "refusal": None, "annotations": [], "audio": None, "reasoning_content": None, "reasoning_details": [],
        "function_call": None, "tool_calls": [],
    }  # fmt: skip
    for name, value in empty.items():
        if made.get(name) and name != "reasoning_content":
            continue
        made.pop(name, None)
        if draw.random() < 0.4:
            made[name] = "other thoughts" if name == "reasoning_content" and draw.random() < 0.5 else value
    return dict(draw.sample(list(made.items()), len(made)))  # in whatever order


def spaced(draw: random.Random, text: str) -> str:
    """Add or take away white space at the ends of lines and of the text."""
    if draw.random() < 0.4:
        text = "\n".join(line.rstrip() for line in text.split("\n"))
    elif draw.random() < 0.5:
        text = "\n".join(line + draw.choice(["", " ", "\t", "  \t "]) for line in text.split("\n"))
    return text.rstrip() if draw.random() < 0.5 else text + draw.choice([" ", "\t", "\u00a0"])


def ended(draw: random.Random, message: JSON) -> JSON:
    """Add empty lines to the end of what a message says, or take them away."""
    content = message.get("content")
    if isinstance(content, list) and content and content[-1].get("type") == "text":
        last = {**content[-1], "text": ended(draw, {"content": content[-1]["text"]})["content"]}
        return {**message, "content": [*content[:-1], last]}
    end = draw.choice(["", "\n", "\n\n", "\t\n ", "\r\n"])
    return {**message, "content": content.rstrip() + end} if isinstance(content, str) else message


def with_crlf(_: random.Random, text: str) -> str:
    """Write line ends as Windows does."""
    return text.replace("\r\n", "\n").replace("\n", "\r\n")


def renamed_calls(draw: random.Random, messages: list[JSON]) -> list[JSON]:
    """Give every call another id, and its result the same one."""
    names: dict[str, str] = {}
    made = copy.deepcopy(messages)
    style = draw.choice(["toolu_{:016x}{:08x}", "call_{}", "{:x}"])
    for message in made:
        for call in message.get("tool_calls") or []:
            names[call["id"]] = style.format(draw.getrandbits(48), draw.getrandbits(32))
            call["id"] = names[call["id"]]
        if message.get("tool_call_id") in names:
            message["tool_call_id"] = names[message["tool_call_id"]]
    return made


def as_javascript(value: Any, draw: random.Random | None = None) -> Any:
    """Return a JSON value with numbers as JavaScript writes them and, where asked, keys in another order."""
    if isinstance(value, dict):
        items = [(key, as_javascript(item, draw)) for key, item in value.items()]
        return dict(draw.sample(items, len(items)) if draw else items)
    if isinstance(value, list):
        return [as_javascript(item, draw) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def arguments_rewritten(draw: random.Random, message: JSON) -> JSON:
    """Write the arguments of calls anew: other white space, order of keys, escapes; 1.0 as 1."""
    made = copy.deepcopy(message)
    functions = [call["function"] for call in made.get("tool_calls") or []]
    for function in [*functions, *([made["function_call"]] if made.get("function_call") else [])]:
        value = json.loads(function["arguments"])
        if draw.random() < 0.6:
            value = as_javascript(value, draw)
        style: JSON = draw.choice([{}, {"indent": 2}, {"separators": (",", ":")}, {"sort_keys": True}])
        function["arguments"] = json.dumps(value, ensure_ascii=draw.random() < 0.5, **style)
    return made


def nameless(_: random.Random, message: JSON) -> JSON:
    """Drop the name of who speaks."""
    return {key: value for key, value in message.items() if key != "name" or message["role"] == "function"}


def role_renamed(_: random.Random, message: JSON) -> JSON:
    """Call the system the developer, or the other way round."""
    return {**message, "role": "developer" if message["role"] == "system" else "system"}


def content_of_calls(draw: random.Random, message: JSON) -> JSON:
    """Write the empty content of an answer that calls tools as null, as an empty text, or not at all."""
    if not (message.get("tool_calls") or message.get("function_call")) or text_of(message):
        return message
    made = {key: value for key, value in message.items() if key != "content"}
    return made if draw.random() < 0.2 else {**made, "content": draw.choice([None, ""])}


def detail_changed(draw: random.Random, message: JSON) -> JSON:
    """Add `detail: auto` to pictures, or take it away."""
    made = copy.deepcopy(message)
    for part in made["content"] if isinstance(made.get("content"), list) else []:
        if part.get("type") == "image_url":
            part["image_url"].pop("detail", None)
            if draw.random() < 0.5:
                part["image_url"]["detail"] = "auto"
    return made


REWRITINGS: dict[str, Rewriting] = {
    "as parts": each(as_parts),
    "as text": each(as_text),
    "cache marks": marks_moved,
    "no thoughts": each(on_texts(without_thoughts), "assistant"),
    "thoughts beside": each(thoughts_beside, "assistant"),
    "fields": each(fields_changed, "assistant"),
    "white space": each(on_texts(spaced)),
    "empty lines": each(ended),
    "CRLF": each(on_texts(with_crlf)),
    "call ids": renamed_calls,
    "arguments": each(arguments_rewritten, "assistant"),
    "no name": each(nameless),
    "roles": each(role_renamed, "system", "developer"),
    "content of calls": each(content_of_calls, "assistant"),
    "detail": each(detail_changed, "user"),
}


def rewritten(draw: random.Random, messages: Sequence[JSON]) -> list[JSON]:
    """Return a history after several rewritings in some order."""
    made = copy.deepcopy(list(messages))
    for name in draw.sample(sorted(REWRITINGS), draw.randint(3, len(REWRITINGS))):
        made = REWRITINGS[name](draw, made)
    return made


# -- playing a conversation ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memory]:
    """Open one memory for the module; each play has a namespace of its own."""
    with lexical_memory(tmp_path_factory.mktemp("identity")) as opened:
        yield opened


def answers_at(messages: Sequence[JSON]) -> list[int]:
    """Return where the answers stand."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"]


def play(
    memory: Memory, messages: Sequence[JSON], client: Callable[[list[JSON]], list[JSON]] = lambda history: history
) -> list[Turn]:
    """Send a conversation turn by turn; the client writes everything up to the last answer in its own way."""
    options = Options(namespace=f"play-{next(_names)}")
    for said in messages:
        if said["role"] == "user":
            teach(memory, text_of(said), f"verified: {text_of(said)[:20]}", options=options)
    turns: list[Turn] = []
    ends = [*answers_at(messages), len(messages)]
    for number, end in enumerate(ends):
        history = ends[number - 1] + 1 if number else 0
        sent = [*client(copy.deepcopy(list(messages[:history]))), *copy.deepcopy(list(messages[history:end]))]
        turns.append(memory.begin(body(*sent), options=options))
        memory.finish(turns[-1], response(messages[end] if end < len(messages) else "the end"))
    memory.store.flush()
    return turns


def shown(turn: Turn) -> list[tuple[int, list[JSON] | str]]:
    """Return where a turn's insertions stand, and what they say."""
    return [(p.position, p.payload) for p in turn.placements]


def with_insertions(messages: Sequence[JSON], placements: Sequence[Placement]) -> list[JSON]:
    """Return the prompt that is to go upstream, put together here."""
    prompt: list[JSON] = []
    for index, message in enumerate(messages):
        made = message
        for placement in placements:
            if placement.position == index and isinstance(placement.payload, list):
                prompt += placement.payload
            elif placement.position == index:
                content = made.get("content")
                block: Any = placement.payload
                if isinstance(content, list):
                    block = [*content, {"type": "text", "text": block}]
                elif content is not None:
                    block = f"{content}\n\n{block}"
                made = {**made, "content": block}
        prompt.append(made)
    return prompt


def check(turns: Sequence[Turn], untouched: Sequence[Turn]) -> None:
    """Hold a play against the same one with a client that rewrites nothing."""
    assert turns[0].action == "inject"
    assert len({turn.episode_id for turn in turns}) == 1
    assert [turn.continues for turn in turns] == [False] + [True] * (len(turns) - 1)
    assert [shown(turn) for turn in turns] == [shown(turn) for turn in untouched]
    for before, turn in itertools.pairwise(turns):
        assert shown(turn)[: len(before.placements)] == shown(before)
    for turn in turns:
        assert turn.messages == with_insertions(turn.sent, turn.placements)
        assert strip(turn.messages, turn.placements) == turn.sent


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_rewritten_history_is_the_same_conversation(memory: Memory, name: str) -> None:
    """Ten clients rewrite a conversation at random: one episode, the same insertions at the same places."""
    messages = CONVERSATIONS[name]
    untouched = play(memory, messages)
    check(untouched, untouched)
    for seed in range(PER_CONVERSATION):
        check(play(memory, messages, partial(rewritten, random.Random(f"{name}-{seed}"))), untouched)


@pytest.mark.parametrize("rewriting", REWRITINGS)
def test_each_rewriting_alone_changes_nothing(memory: Memory, rewriting: str) -> None:
    """Whatever a client does, and it alone, to a conversation of every kind, the insertions stay."""
    draw = random.Random(rewriting)
    for name in draw.sample(sorted(CONVERSATIONS), 5):
        messages = CONVERSATIONS[name]
        check(play(memory, messages, lambda h: REWRITINGS[rewriting](draw, h)), play(memory, messages))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_that_went_out_is_how_the_next_one_begins(memory: Memory, name: str) -> None:
    """With a client that rewrites nothing each prompt is, byte by byte, the beginning of the next."""
    turns = play(memory, CONVERSATIONS[name])
    assert len(turns) > 1
    for before, turn in itertools.pairwise(turns):
        assert json.dumps(turn.messages[: len(before.messages)]) == json.dumps(before.messages)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_client_that_rewrites_steadily_keeps_its_cache(memory: Memory, name: str) -> None:
    """With a client that writes a message the same way each time, what was history once stays byte by byte."""

    def steady(history: list[JSON]) -> list[JSON]:
        return [rewritten(random.Random(f"{name}-{i}"), [m])[0] for i, m in enumerate(history)]

    turns = play(memory, CONVERSATIONS[name], steady)
    assert len(turns) > 1
    for before, turn in itertools.pairwise(turns):
        history = (answers_at(before.sent) or [-1])[-1] + 1
        own = sum(len(p.payload) for p in before.placements if isinstance(p.payload, list) and p.position < history)
        assert json.dumps(turn.messages[: history + own]) == json.dumps(before.messages[: history + own])
        assert history == 0 or turn.messages[: history + own]


@pytest.mark.parametrize("rewriting", ["call ids", "arguments"])
def test_a_step_is_recorded_once_however_its_call_is_written(memory: Memory, rewriting: str) -> None:
    """A call that comes back with another id, or with its arguments written anew, is no second attempt."""
    for name in ("one call", "nested arguments", "parallel calls", "same call twice", "thoughts and calls"):
        messages = CONVERSATIONS[name]
        made = sum(len(m.get("tool_calls") or []) for m in messages)
        before = memory.store.stats()["steps"]
        play(memory, messages, partial(REWRITINGS[rewriting], random.Random(name)))
        assert memory.store.stats()["steps"] - before == made, name


def test_each_part_may_lose_the_space_at_its_end() -> None:
    """A client that trims every part of a message, not the last one alone, says the same."""
    for role in ("user", "assistant", "system", "tool"):
        whole = [{"type": "text", "text": t} for t in ("one\n", "two \n\n", "three")]
        trimmed = [{**p, "text": p["text"].rstrip()} for p in whole]
        assert identity_of({"role": role, "content": whole}) == identity_of({"role": role, "content": trimmed})


def test_an_answer_without_a_role_is_the_assistants(memory: Memory) -> None:
    """Some servers leave the role out of their answers; clients put it in."""
    for said in ({"content": "x"}, {"role": None, "content": "<think>why</think>x"}):
        options = Options(namespace=f"play-{next(_names)}")
        first = memory.begin(body("hello there"), options=options)
        memory.finish(first, {"choices": [{"index": 0, "message": said, "finish_reason": "stop"}]})
        turn = memory.begin(body("hello there", assistant("x"), "go on"), options=options)
        assert turn.episode_id == first.episode_id


# -- the space of rewritings, by identity alone ----------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(CONVERSATIONS)),
    st.lists(st.sampled_from(sorted(REWRITINGS)), max_size=20),
    st.randoms(use_true_random=False),
)
def test_identity_is_unchanged_by_any_rewritings(name: str, rewritings: list[str], draw: random.Random) -> None:
    """Any rewritings in any order, some of them several times, leave every message what it was."""
    messages = CONVERSATIONS[name]
    made = copy.deepcopy(messages)
    for rewriting in rewritings:
        made = REWRITINGS[rewriting](draw, made)
    assert [identity_of(m) for m in made] == [identity_of(m) for m in messages]
    assert prefix_hashes(made) == prefix_hashes(messages)


ANY_TEXT = st.text(st.sampled_from("ab1. \t\n\r\u00a0\u3000") | st.characters(), max_size=40)


@settings(deadline=None)
@given(ANY_TEXT, st.sampled_from(["user", "assistant", "system", "tool"]), st.randoms(use_true_random=False))
def test_any_text_survives_what_clients_do_to_it(text: str, role: str, draw: random.Random) -> None:
    """Whatever a text holds, it is itself as a part, with other ends of lines and with space at its end."""
    message = {"role": role, "content": text}
    for change in (as_parts, on_texts(spaced), on_texts(with_crlf)):
        assert identity_of(change(draw, message)) == identity_of(message)


SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, -0.0, 1.0, 2.0, 1e22, 1e-9])
    | st.sampled_from(["", "a", "a ", " a", "A", "1", "true", "null", "a\n", "é", "e\u0301", "\U0001f955", "\ud800"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from("abc"), v, max_size=3), max_leaves=6
)


def with_arguments(arguments: Any) -> JSON:
    """Return an answer with one call whose arguments are written as they are given."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@settings(max_examples=120, deadline=None)
@given(VALUES, VALUES)
def test_calls_are_the_same_where_their_values_are(one: Any, other: Any) -> None:
    """Arguments are one and the same exactly where they are equal as JavaScript's values: `true` is not 1, 1.0 is."""
    same = json.dumps(as_javascript(one), sort_keys=True) == json.dumps(as_javascript(other), sort_keys=True)
    found = [identity_of(with_arguments(json.dumps(value))) for value in (one, other)]
    hashes = [prefix_hashes([with_arguments(json.dumps(value))]) for value in (one, other)]
    assert (hashes[0] == hashes[1]) is same
    assert not same or found[0] == found[1]
    if not isinstance(one, str):  # some servers give the arguments as they are, not as a text
        assert prefix_hashes([with_arguments(one)]) == hashes[0]


@pytest.mark.parametrize(
    "arguments", ["", "  ", "{", "not json", '{"a": 1} x', "NaN", "\ud800", "[" * 3_000, "9" * 9_000]
)
def test_arguments_that_are_no_json_are_compared_as_text(arguments: str) -> None:
    """What a model wrote in place of JSON is taken as it stands, and is not the same as something else."""
    assert prefix_hashes([with_arguments(arguments)]) == prefix_hashes([with_arguments(arguments + " \r\n")])
    assert prefix_hashes([with_arguments(arguments)]) != prefix_hashes([with_arguments(arguments + "y")])


@pytest.mark.parametrize("depth", [50, 400])
def test_deep_nesting_is_no_fault(memory: Memory, depth: int) -> None:
    """A part or an argument that is nested deep is taken here as well, and told from another."""
    found = set()
    for end in ("1", "2"):
        deep = json.loads('{"a":[' * (depth // 2) + end + "]}" * (depth // 2))
        turn = memory.begin(
            body(user("look", {"type": "data", "data": deep}), with_arguments(json.dumps(deep)), "go on")
        )
        assert turn.conversation is not None
        found |= set(turn.conversation.prefixes)
        memory.finish(turn, response("x"))
    assert len(found) == 2 * 3


# -- never merged ----------------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each value of a JSON value that holds no others."""
    if isinstance(value, (dict, list)) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path


def other(draw: random.Random, value: Any) -> Any:
    """Return a value that is not the given one, but near it."""
    if isinstance(value, bool) or value is None:
        return draw.choice([v for v in (True, False, None, 0, "") if v is not value])
    if isinstance(value, (int, float)):
        return value + draw.choice([1, -1, 0.5])
    return changed_text(draw, value) if isinstance(value, str) else [value]


def changed_text(draw: random.Random, text: str) -> str:
    """Return a text with one letter or figure changed, or one word more."""
    start = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
    places = [i for i, c in enumerate(text) if c.isalnum() and i >= start]
    if not places or draw.random() < 0.2:
        return text + " more"
    at = draw.choice(places)
    letter = draw.choice([c for c in "aB7" if c != text[at]])
    return text[:at] + letter + text[at + 1 :]


def text_changed(draw: random.Random, message: JSON) -> JSON | None:
    """Change a word or a number of what is said, or of a tool's result."""
    made = copy.deepcopy(message)
    if isinstance(made.get("content"), str) and made["content"].strip():
        made["content"] = changed_text(draw, made["content"])
        return made
    parts = made["content"] if isinstance(made.get("content"), list) else []
    if texts := [p for p in parts if p.get("type") == "text"]:
        part = draw.choice(texts)
        part["text"] = changed_text(draw, part["text"])
        return made
    if made.get("refusal"):
        return {**made, "refusal": changed_text(draw, made["refusal"])}
    return None


def indented(draw: random.Random, message: JSON) -> JSON | None:
    """Change the indentation of a line after the first."""
    content = message.get("content")
    lines = (
        re.sub(r"<think>.*?</think>\s*", "", content, flags=re.DOTALL).split("\n") if isinstance(content, str) else []
    )
    spoken = [i for i, line in enumerate(lines) if line.strip() and any(before.strip() for before in lines[:i])]
    if not spoken:
        return None
    at = draw.choice(spoken)
    lines[at] = draw.choice(["  ", "\t", " "]) + lines[at]
    return {**message, "content": "\n".join(lines)}


def call_changed(draw: random.Random, message: JSON) -> JSON | None:
    """Change a value of a call's arguments, its name, or leave a call out, or add one."""
    made = copy.deepcopy(message)
    functions = [call["function"] for call in made.get("tool_calls") or []]
    functions += [made["function_call"]] if made.get("function_call") else []
    if not functions:
        return None
    function, way = draw.choice(functions), draw.random()
    if way < 0.15:
        return {key: made[key] for key in ("role", "content") if key in made}  # no call any more
    if way < 0.3:
        function["name"] += "s"
    else:
        value = json.loads(function["arguments"])
        *path, last = draw.choice(list(leaves(value)))
        at = value
        for key in path:
            at = at[key]
        at[last] = other(draw, at[last])
        function["arguments"] = json.dumps(value)
    return made


def part_changed(draw: random.Random, message: JSON) -> JSON | None:
    """Change what a picture, a sound or a file points to, or leave it out."""
    made = copy.deepcopy(message)
    parts = made["content"] if isinstance(made.get("content"), list) else []
    if not (others := [p for p in parts if p.get("type") != "text"]):
        return None
    part = draw.choice(others)
    if draw.random() < 0.2:
        made["content"] = [p for p in parts if p is not part]
        return made
    ways = [p for p in leaves(part) if p[-1] in ("url", "data", "format", "file_data", "file_id", "filename")]
    *path, last = draw.choice(ways)
    at = part
    for key in path:
        at = at[key]
    at[last] = changed_text(draw, at[last])
    return made


CHANGES: dict[str, Callable[[random.Random, JSON], JSON | None]] = {
    "text": text_changed, "indentation": indented, "call": call_changed, "part": part_changed,
}  # fmt: skip


def test_every_change_has_a_conversation_to_be_made_in() -> None:
    """None of the changes below is one that no conversation has a place for."""
    draw = random.Random(0)
    for name, change in CHANGES.items():
        assert any(change(draw, message) is not None for each in CONVERSATIONS.values() for message in each), name


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(CONVERSATIONS)), st.sampled_from(sorted(CHANGES)), st.randoms(use_true_random=False),
    st.booleans(),
)  # fmt: skip
def test_a_conversation_that_says_something_else_is_another(
    name: str, change: str, draw: random.Random, rewrite: bool
) -> None:
    """One letter, figure, argument, result, indentation, picture or file: the prefix from there on is another."""
    messages = CONVERSATIONS[name]
    made = [(i, found) for i, m in enumerate(messages) if (found := CHANGES[change](draw, m)) is not None]
    for index, message in made:
        changed = [*messages[:index], message, *messages[index + 1 :]]
        if rewrite:
            changed = rewritten(draw, changed)
        before, after = prefix_hashes(messages), prefix_hashes(changed)
        assert before[:index] == after[:index]
        assert not set(before[index:]) & set(after), (messages[index], message)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(CONVERSATIONS)), st.randoms(use_true_random=False))
def test_the_order_of_messages_calls_and_pictures_counts(name: str, draw: random.Random) -> None:
    """The same messages, calls or pictures in another order, or fewer of them, are another conversation."""
    messages = CONVERSATIONS[name]
    whole = prefix_hashes(messages)[-1]
    one, two = sorted(draw.sample(range(len(messages)), 2))
    swapped = list(messages)
    swapped[one], swapped[two] = messages[two], messages[one]
    if identity_of(messages[one]) != identity_of(messages[two]):
        assert prefix_hashes(swapped)[-1] != whole
    assert prefix_hashes([*messages[:one], *messages[one + 1 :]])[-1] != whole
    turned = copy.deepcopy(messages)
    for message in turned:
        (message.get("tool_calls") or []).reverse()
        if any(p.get("type") == "image_url" for p in message["content"] or [] if isinstance(p, dict)):
            message["content"].reverse()
    several = name in ("parallel calls", "pictures")
    assert (prefix_hashes(turned)[-1] != whole) is several


def test_twenty_conversations_share_no_prefix_but_their_system_prompt() -> None:
    """No two of the conversations are taken for one another, at any length."""
    found: dict[str, str] = {}
    for name, messages in CONVERSATIONS.items():
        for message, prefix in zip(messages, prefix_hashes(messages), strict=True):
            assert message["role"] in ("system", "developer") or found.setdefault(prefix, name) == name


@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
def test_who_said_it_counts(role: str) -> None:
    """The same words by somebody else are another message."""
    others = {"user", "assistant", "system", "tool"} - {role}
    said = prefix_hashes([{"role": role, "content": "yes"}])
    assert all(prefix_hashes([{"role": other_role, "content": "yes"}]) != said for other_role in others)


def test_calls_of_other_kinds_are_told_apart() -> None:
    """A call of a custom tool is known by its name and its input, as one of a function is by its arguments."""

    def custom(name: str, text: str) -> JSON:
        call = {"id": "c", "type": "custom", "custom": {"name": name, "input": text}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    made = [custom("run", "print(1)"), custom("run", "print(2)"), custom("check", "print(1)"), assistant("")]
    assert len({prefix_hashes([m]) for m in made}) == len(made)


def test_answers_in_sound_are_told_apart() -> None:
    """An answer that is spoken is known by the id under which a client sends it back; dates and data do not count."""
    whole = {"id": "audio_1", "data": "UklGRg==", "expires_at": 1_729_234_747, "transcript": "Good morning."}
    spoken = [{"role": "assistant", "content": None, "audio": a} for a in (whole, {"id": "audio_1"}, {"id": "audio_2"})]
    first, again, second = (prefix_hashes([m]) for m in spoken)
    assert first == again
    assert first != second


def test_thoughts_in_a_users_words_and_in_code_are_no_thoughts() -> None:
    """What a user writes in such marks counts, and so does what stands in a code fence of an answer."""
    for one, two in (
        (user("<think>a</think>x"), user("<think>b</think>x")),
        (assistant("Use:\n```\n<think>a</think>\n```"), assistant("Use:\n```\n<think>b</think>\n```")),
        (assistant("Write <think>a</think> there."), assistant("Write <think>b</think> there.")),
    ):
        assert prefix_hashes([one]) != prefix_hashes([two])


@pytest.mark.parametrize(
    "text",
    [
        "x" + " " * 10_000 + "y", "x" + "\t" * 10_000 + "y", "x" + "\r" * 10_000 + "y", "x" + " \n" * 50_000 + "y",
        "<think>" * 10_000, "\n<think>a" * 5_000 + "</think>", "```" * 20_000 + "<think>a",
    ],
    ids=["spaces", "tabs", "returns", "empty lines", "openers", "lines of openers", "fences"],
)  # fmt: skip
def test_identity_takes_no_longer_than_the_text_is(text: str) -> None:
    """A few kilobytes of white space or of marks in a message, as tables and logs have them, hold nothing up."""
    started = time.process_time()
    identity_of({"role": "assistant", "content": text})
    assert time.process_time() - started < 0.5


def test_the_client_gets_the_same_after_a_restart(tmp_path: Path) -> None:
    """A history rewritten while the process was restarted is still the same conversation, with its insertions."""
    messages = CONVERSATIONS["nested arguments"]
    draw = random.Random(7)
    with lexical_memory(tmp_path) as opened:
        teach(opened, text_of(messages[1]), "verified")
    episodes, seen = set(), []
    for end in [*answers_at(messages), len(messages)]:
        history = (answers_at(messages[:end]) or [-1])[-1] + 1
        sent = [*rewritten(draw, messages[:history]), *messages[history:end]]
        with lexical_memory(tmp_path) as opened:
            turn = opened.begin(body(*sent))
            opened.finish(turn, response(messages[end] if end < len(messages) else "the end"))
        episodes.add(turn.episode_id)
        seen.append(shown(turn))
    assert len(episodes) == 1
    assert seen[0]
    assert all(now[: len(before)] == before for before, now in itertools.pairwise(seen))
