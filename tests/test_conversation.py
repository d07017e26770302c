"""What came in: messages, options and feedback are read; secrets and bad Unicode are kept out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from builders import NOW, assistant, body
from hypothesis import given
from hypothesis import strategies as st

from optillm_memory import InvalidField
from optillm_memory.conversation.feedback import parse_feedback
from optillm_memory.conversation.options import KEYS, Options, parse_options
from optillm_memory.conversation.parse import key_of, parse
from optillm_memory.conversation.recent import RecentEpisodes
from optillm_memory.conversation.redact import redact, storable
from optillm_memory.conversation.text import BLOCK_OPEN, without_insertions, without_thoughts
from optillm_memory.records import Placement, Scope

ANY_TEXT = st.text(st.characters())  # with lone surrogates and NUL
GOOD = {"trace_id": "t1", "metric": "success", "value": True, "source": "code"}


def calls(*names: str) -> dict[str, Any]:
    """Return an assistant message that calls tools."""
    made = [{"id": f"c-{n}", "type": "function", "function": {"name": n, "arguments": '{"x": 1}'}} for n in names]
    return {"role": "assistant", "content": None, "tool_calls": made}


def result(name: str, text: str) -> dict[str, Any]:
    """Return a tool's result."""
    return {"role": "tool", "tool_call_id": f"c-{name}", "content": text}


# -- messages --------------------------------------------------------------------------------------


def test_task_is_the_last_user_text() -> None:
    """The task is what the user said last, whatever came before or after it."""
    assert parse(body("one", assistant("1"), "two", calls("ls"), result("ls", "a b"))).task == "two"
    assert parse(body({"role": "system", "content": "be brief"})).task == ""


def test_text_parts_make_the_task_and_images_do_not() -> None:
    """A message of parts reads as its texts; an image adds nothing."""
    parts = [
        {"type": "text", "text": "what is"},
        {"type": "image_url", "image_url": {}},
        {"type": "text", "text": "it"},
    ]
    assert parse(body({"role": "user", "content": parts})).task == "what is\nit"


def test_tool_calls_pair_with_their_results_by_id() -> None:
    """Steps come in the order of the calls, each with its own observation, also when results are out of order."""
    steps = parse(body("go", calls("ls", "cat"), result("cat", "text"), result("ls", "files"), calls("rm"))).steps
    assert [(s.ordinal, s.tool, s.arguments, s.observation) for s in steps] == [
        (0, "ls", '{"x": 1}', "files"),
        (1, "cat", '{"x": 1}', "text"),
        (2, "rm", '{"x": 1}', None),
    ]


def test_legacy_function_calls_pair_with_the_message_that_follows() -> None:
    """A function call of the old form is a step, observed by the function message after it."""
    call = {"role": "assistant", "content": None, "function_call": {"name": "grep", "arguments": {"q": "x"}}}
    (step,) = parse(body("go", call, {"role": "function", "name": "grep", "content": "3 lines"})).steps
    assert (step.tool, step.arguments, step.observation) == ("grep", '{"q": "x"}', "3 lines")


@pytest.mark.parametrize("messages", [None, 3, "hi", [], ["hi", None], [{"role": ["x"], "content": 7}], [{}]])
def test_malformed_messages_read_as_absent(messages: Any) -> None:
    """What the upstream will refuse is not ours to refuse: it parses to an empty task."""
    assert parse({"messages": messages}).task == ""


def test_prefixes_grow_with_the_conversation() -> None:
    """A longer conversation keeps the prefixes of the shorter one, and any earlier change alters all after it."""
    short, longer = parse(body("one", assistant("1"))), parse(body("one", assistant("1"), "two"))
    assert longer.prefixes[:2] == short.prefixes
    assert longer.answered_prefixes() == [(short.prefixes[1], longer.prefixes[2])]
    assert short.answered_prefixes() == [(short.prefixes[1], "")]
    other = parse(body("uno", assistant("1"), "two"))
    assert not set(other.prefixes) & set(longer.prefixes)


def test_prefixes_ignore_what_clients_change_when_they_echo() -> None:
    """An answer that comes back without its extra fields, or with outer white space gone, is the same answer."""
    sent = {**assistant(" 42\n"), "refusal": None, "annotations": []}
    assert parse(body("q", sent)).prefixes == parse(body("q", assistant("42"))).prefixes


def test_frame_masks_digits_and_sees_the_rest() -> None:
    """A date in the system prompt keeps the frame; other words, tools or a response format make another."""

    def frame(system: str, **fields: Any) -> str:
        return parse(body({"role": "system", "content": system}, "q", **fields)).frame

    base = frame("today is 2024-05-01")
    assert base == frame("today is 2025-11-23")
    assert base != frame("tonight is 2024-05-01")
    assert base != frame("today is 2024-05-01", tools=[{"type": "function", "function": {"name": "ls"}}])
    assert base != frame("today is 2024-05-01", response_format={"type": "json_object"})


@pytest.mark.parametrize(
    ("request_body", "plain"),
    [
        (body("q"), True),
        (body({"role": "system", "content": "s"}, "q"), True),
        (body("q", assistant("a"), "q2"), False),
        (body("q", tools=[{"type": "function", "function": {"name": "f"}}]), False),
        (body({"role": "user", "content": [{"type": "text", "text": "q"}]}), False),
        (body("q", {"role": "system", "content": "s"}), False),
        (body(), False),
    ],
)
def test_plain_is_one_user_text_and_no_tools(request_body: dict[str, Any], plain: bool) -> None:
    """Only one plain turn may get exemplars as turns."""
    assert parse(request_body).plain is plain


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_only_known_insertions_are_taken_out(before: str, inside: str, other: str) -> None:
    """What the ledger knows is taken off a text's end; what only looks like it is the user's own and stays."""
    block = f"{BLOCK_OPEN}{inside}</agent_memory>"
    assert without_insertions(f"{before}\n\n{block}", [block]) == before
    kept = f"{before}{BLOCK_OPEN}{other} and then"
    assert without_insertions(kept, [block]) == kept


@given(ANY_TEXT)
def test_key_is_one_short_encodable_line(task: str) -> None:
    """The key of any task fits an encoder: one line of valid Unicode, at most 1,401 characters."""
    key = key_of(task)
    key.encode("utf-8")
    assert len(key) <= 1_401
    assert "\n" not in key
    assert key_of("a" * 5_000 + "the end").endswith("the end")


def test_recent_knows_what_is_not_on_disk_yet() -> None:
    """The episode of a prefix and its placements are known at once, and only in their own scope."""
    recent, scope = RecentEpisodes(), Scope("a")
    placement = Placement("h", 0, "block", "text")
    recent.remember(scope, "ep", ["p1"], [placement], 0.0)
    assert [c.episode_id for c in recent.episodes_of(scope, "p1")] == ["ep"]
    assert recent.episodes_of(scope, "p0") == []
    assert recent.ledger(scope, "ep", list, 1.0) == [placement]
    assert recent.episodes_of(Scope("b"), "p1") == []
    assert recent.ledger(Scope("b"), "ep", list, 1.0) == []


def test_recent_adds_what_is_under_way_to_what_is_written() -> None:
    """In order of position, each place once and as it was written; once seen there it goes with what is written."""
    recent, scope = RecentEpisodes(), Scope("a")
    first, second, third = (Placement(f"h{n}", n, "block", f"text {n}") for n in (0, 2, 4))
    recent.remember(scope, "ep", (), [replace(first, payload="of another"), second], 0.0)
    assert recent.ledger(scope, "ep", lambda: [first, third], 1.0) == [first, second, third]
    assert recent.ledger(scope, "ep", list, 1.0) == [second]

    def meanwhile() -> list[Placement]:  # another request sees the commit between our two looks
        assert recent.ledger(scope, "ep", lambda: [second], 1.0) == [second]
        return []

    assert recent.ledger(scope, "ep", meanwhile, 1.0) == [second]
    assert recent.ledger(scope, "ep", list, 1.0) == []


def test_recent_lets_go_of_what_is_old() -> None:
    """What was never written is of no use after a few hours, neither in a prompt nor as advice."""
    recent, scope, hour = RecentEpisodes(), Scope("a"), 3600.0
    for placement, now in ((Placement("h0", 0, "block", "old"), 0.0), (Placement("h2", 2, "block", "new"), 5 * hour)):
        recent.remember(scope, "ep", (), [placement], now)
    assert [p.payload for p in recent.ledger(scope, "ep", list, 5 * hour)] == ["old", "new"]
    assert [p.payload for p in recent.ledger(scope, "ep", list, 7 * hour)] == ["new"]
    for now, said in ((hour, ("take care",)), (7 * hour, ())):
        recent.advise(scope, "ep", ["take care"], 0.0)
        assert recent.pending_advice(scope, "ep", now) == said


# -- options ---------------------------------------------------------------------------------------


def bad(key: str, *values: Any) -> list[tuple[str, Any]]:
    """Return a key with each of the values that it must refuse."""
    return [(key, value) for value in values]


VALID = {
    "namespace": "n", "user_id": "u", "agent_id": "a", "episode_id": "e", "goal": "g", "mode": "read",
    "approach": "moa", "reuse": {"max_error": 0.02, "actions": True}, "tools": {"read_only": ("t",), "never": ("x",)},
    "max_items": 2, "token_budget": 100, "tags": {"k": "v"}, "feedback": [GOOD],
}  # fmt: skip


def test_every_option_is_read() -> None:
    """Each key of the contract reaches the options, and there is no key besides."""
    assert set(VALID) == set(KEYS)
    options = parse_options(VALID, now=NOW)
    for key, value in VALID.items():
        assert key == "feedback" or getattr(options, key) == value
    assert [f.trace_id for f in options.feedback] == ["t1"]
    assert parse_options(None, now=NOW) == parse_options({"mode": None}, now=NOW) == Options()


@pytest.mark.parametrize("mode", ["readwrite", "read", "write", "off"])
def test_mode_says_what_may_happen(mode: str) -> None:
    """Read and write follow from the mode."""
    options = parse_options({"mode": mode}, now=NOW)
    assert (options.reads, options.writes) == (mode in ("readwrite", "read"), mode in ("readwrite", "write"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(pair for key in ("namespace", "user_id", "agent_id") for pair in bad(key, "", " ", 3, "x" * 201, "\ud800")),
        *(pair for key in ("episode_id", "approach") for pair in bad(key, "", " ", 3, "x" * 201, "\ud800")),
        *bad("mode", "on", True, []),
        *bad("reuse", True, {}, {"max_error": 0}, {"max_error": True}, {"max_error": 0.1, "x": 1}),
        *bad("reuse", {"actions": True}, {"max_error": 0.1, "actions": 1}, {"max_error": 0.1, "actions": None}),
        *bad("goal", 3, ["x"], "x" * 4_001, "\ud800"),
        *bad("tools", [], "x", {"write": ["x"]}, {"allow": "x"}, {"allow": [3]}, {"never": [""]}),
        ("tools", {"never": ["x"] * 1_001}),
        *bad("max_items", -1, 1.5, True, "2"),
        *bad("token_budget", -1, 1.5, True, "2"),
        *bad("tags", [], {"k": 1}, {"": "v"}, {str(i): "v" for i in range(51)}),
        *bad("feedback", "x", [], [3]),
        *bad("namspace", "typo"),
    ],
)
def test_a_wrong_option_is_named(key: str, value: Any) -> None:
    """An unknown key and a value of the wrong type or range are refused with the key's name."""
    with pytest.raises(InvalidField) as caught:
        parse_options({key: value}, now=NOW)
    assert caught.value.param.startswith(f"agent_memory.{key}")
    assert str(caught.value).startswith(caught.value.param)


@pytest.mark.parametrize("value", [[], "readwrite", 3, True])
def test_the_field_must_be_an_object(value: Any) -> None:
    """Anything but an object is refused under the field's own name."""
    with pytest.raises(InvalidField, match=r"agent_memory: must be an object"):
        parse_options(value, now=NOW)


def test_headers_stand_for_keys_and_the_field_wins() -> None:
    """A header names its key in any case; structured ones hold JSON; the body's field outranks them."""
    headers = {
        "x-agent-memory-user-id": "u",
        "X-Agent-Memory-Max-Items": "3",
        "X-Agent-Memory-Mode": "off",
        "Host": "h",
    }
    options = parse_options({"mode": "read"}, headers, now=NOW)
    assert (options.user_id, options.max_items, options.mode) == ("u", 3, "read")
    for headers in ({"X-Agent-Memory-Tags": "{"}, {"X-Agent-Memory-Colour": "red"}):
        with pytest.raises(InvalidField, match=r"(?i)tags|colour"):
            parse_options(None, headers, now=NOW)


# -- feedback --------------------------------------------------------------------------------------


def wrong(key: str, *values: Any, **others: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return a field's name and what it is to be changed to, for each of the values that it must refuse."""
    return [(key, {**others, key: value}) for value in values]


@pytest.mark.parametrize(
    ("param", "change"),
    [
        ("extra", {"extra": 1}),
        ("trace_id", {"episode_id": "e"}),
        *wrong("trace_id", None, "", 3, "x" * 201, "\udfff"),
        *wrong("metric", None, "sucess", ["success"], 1),
        *wrong("source", None, "inferred", "robot", {}),
        *wrong("value", "yes", 2, 0.5, [], {}),
        *wrong("value", True, -0.1, 1.1, "1", float("nan"), 10**400, metric="score"),
        *(
            pair
            for metric in ("comment", "demonstration", "error")
            for pair in wrong("value", "", " ", 1, metric=metric)
        ),
        ("feedback_id", {"value": None}),
        *wrong("feedback_id", "", 3),
        *wrong("evidence", 3, "x", []),
        ("evidence.stdout", {"evidence": {"stdout": "x"}}),
        *(("evidence.exit_code", pair) for _, pair in wrong("evidence", *({"exit_code": v} for v in ("0", 1.5, True)))),
        *((f"evidence.{key}", {"evidence": {key: 3}}) for key in ("command", "output")),
        *wrong("occurred_at", "noon", [], True, -1, NOW * 1000, float("inf"), 10**400),
    ],
)
def test_wrong_feedback_names_its_field(param: str, change: dict[str, Any]) -> None:
    """Each thing that can be wrong with feedback is refused under the name of its field, and its index in a list."""
    item = {k: v for k, v in {**GOOD, **change}.items() if v is not None or k == "value"}
    with pytest.raises(InvalidField) as caught:
        parse_feedback(item, now=NOW)
    assert caught.value.param == f"feedback.{param}"
    with pytest.raises(InvalidField) as caught:
        parse_feedback([GOOD, item], now=NOW)
    assert caught.value.param == f"feedback[1].{param}"


def test_missing_value_is_not_a_retraction() -> None:
    """Feedback without a value is refused; only an explicit null retracts, and that needs an id."""
    with pytest.raises(InvalidField, match=r"feedback\.value: is missing"):
        parse_feedback({k: v for k, v in GOOD.items() if k != "value"}, now=NOW)
    (item,) = parse_feedback({"feedback_id": "f", "value": None}, now=NOW)
    assert (item.value, item.trace_id, item.episode_id) == (None, None, None)


def test_good_feedback_is_read_whole() -> None:
    """Values are normalised: 1 is true, ISO times become seconds, a bare UUID becomes a trace id."""
    (item,) = parse_feedback(
        {**GOOD, "trace_id": "0" * 32, "value": 1, "occurred_at": "2023-11-14T22:00:00Z", "evidence": {"exit_code": 0}},
        now=NOW,
    )
    assert (item.value, item.trace_id, item.occurred_at) == (True, "chatcmpl-" + "0" * 32, 1_699_999_200.0)
    assert item.evidence == {"exit_code": 0}
    assert parse_feedback(GOOD, now=NOW)[0].feedback_id != parse_feedback(GOOD, now=NOW)[0].feedback_id


# -- redaction -------------------------------------------------------------------------------------

KEY_BODY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC" * 20
SECRETS = {
    "private-key": f"-----BEGIN RSA PRIVATE KEY-----\n{KEY_BODY}\n-----END RSA PRIVATE KEY-----",
    "api-key": "sk-proj-abcdefghijklmnop0123",
    "api-key 2": "sk_live_abcdefghij0123456789",
    **{f"api-key {start}": start + "abcdefghijklmnop0123" for start in ("pk-", "rk-", "rk_test_")},
    "token": "ghp_" + "a1B2" * 9,
    **{f"token {start}": start + "a1B2" * 9 for start in ("gho_", "ghu_", "ghs_", "ghr_", "github_pat_")},
    "token gitlab": "glpat-abcdefghij0123456789",
    "token slack": "xoxb-1234567890-abcdefghij",
    "token hf": "hf_" + "aB3" * 11,
    "token google": "AIza" + "Sy_-0" * 7,
    "access-key": "AKIAIOSFODNN7EXAMPLE",
    "access-key for a while": "ASIAIOSFODNN7EXAMPLE",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_each_kind_of_secret_is_replaced(kind: str) -> None:
    """Nothing of a secret is left, and what stands around it is."""
    secret = SECRETS[kind]
    assert redact(f"use {secret} here") == f"use [REDACTED:{kind.split(maxsplit=1)[0]}] here"


def test_secrets_that_need_their_surroundings_are_replaced() -> None:
    """A bearer token and a password in a URL go; the address stays."""
    assert redact("Authorization: Bearer abcdefghij.klmnopqrst_uv==") == "Authorization: Bearer [REDACTED:token]"
    assert redact("bearer abcdefghij.klmnopqrst_uv==") == "bearer [REDACTED:token]"
    assert redact("postgres://bob:hunter2@db/x") == "postgres://[REDACTED:password]@db/x"
    assert redact("git clone https://example.org/a:b and pick a risk-free task") == (
        "git clone https://example.org/a:b and pick a risk-free task"
    )


@pytest.mark.parametrize(
    "unit",
    [
        "-eyJ", "eyJaaaaaaaaaa.", "sk-", "sk-a ", "://", "://a:", "Bearer ", "-----BEGIN ",
        "-----BEGIN PRIVATE KEY-----", "a", "-", "ghp_", "<think></think>\n", "<think>\n", "```\n<think>\n",
        "</think>", "[THINK]", "<|channel|>analysis<|message|>\n",
    ],
)  # fmt: skip
def test_hostile_text_costs_linear_time(unit: str) -> None:
    """A megabyte of what the patterns stumble over costs about eight times an eighth of it, and seconds at most."""

    def seconds(size: int) -> float:
        text, best = (unit * size)[:size], float("inf")
        for _ in range(2):
            started = time.process_time()
            redact(text)
            without_thoughts(text)
            best = min(best, time.process_time() - started)
        return best

    small, large = seconds(125_000), seconds(1_000_000)
    assert large < 10
    assert large < 24 * small + 0.1


@given(ANY_TEXT, st.integers(200, 400))
def test_storable_is_valid_unicode_within_the_limit(text: str, limit: int) -> None:
    """Whatever comes, what is stored is valid UTF-8, no longer than the limit, and unchanged where it can be."""
    for given_text in (text, text * 100):
        stored = storable(given_text, limit)
        stored.encode("utf-8")
        assert len(stored) <= limit
        if len(given_text) <= limit and given_text.isascii() and "://" not in given_text:
            assert stored == given_text


def test_storable_cuts_no_secret_in_two() -> None:
    """A key that lies across the cut leaves neither of its halves behind."""
    for secret in SECRETS.values():
        for offset in range(0, 400, 7):
            text = "x " * offset + secret + " y" * (600 - offset)
            kept = storable(text, 400)
            pieces = {secret[i : i + 12] for i in range(len(secret) - 11)} - {"-----BEGIN R"}
            assert not [p for p in pieces if p in kept]
    assert storable(SECRETS["jwt"], 400, "off") == SECRETS["jwt"]
