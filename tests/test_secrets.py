"""Redaction: whatever form a secret comes in, nothing of it is stored, and what is no secret stays as it is."""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path

import pytest
from canaries import FORMATS, HARMLESS, PERSONAL
from hypothesis import given
from hypothesis import strategies as st

from optillm_memory.conversation.redact import is_whole, redact

_PIECE = 12  # characters of a long secret that must not be left


def left_of(secret: str, text: str) -> list[str]:
    """Return the pieces of a secret that a text holds."""
    pieces = {secret[i : i + _PIECE] for i in range(max(len(secret) - _PIECE, 0) + 1)}
    return [piece for piece in pieces if piece in text]


def code(lines: int) -> list[str]:
    """Return lines of the standard library, spread over its modules."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found: list[str] = []
    for module in modules:
        found += module.read_text(encoding="utf-8", errors="replace").splitlines()[40:120]
    return found[:: max(len(found) // lines, 1)][:lines]


def logs(lines: int) -> list[str]:
    """Return lines as servers, builds and tests print them."""
    forms = (
        '127.0.0.1 - - [30/Nov/2026 12:{0:02}:11] "GET /v1/models?limit={0} HTTP/1.1" 200 -',
        "2026-11-30 12:{0:02}:11,123 INFO worker.{0}: processed 12 items in 0.{0} s",
        "INFO:root:token bucket refilled: {0} tokens left, key=user:{0}",
        "tests/test_auth_{0}.py::test_password_reset[case{0}] PASSED [ {0}%]",
        "Downloading key_value-{0}.1.2-py3-none-any.whl (11 kB)",
        "commit 9fceb02d0ae598e95dc970b74767f19372d61a{0:02} Author: Bob, fix session handling (#{0})",
        '  File "/usr/lib/python3/site-packages/auth/session.py", line {0}, in get_token',
        "WARNING: password for user{0} expired; secret rotation is due",
        'time=12:{0:02} level=info msg="login ok" session=open auth=none user=user{0}',
        "container_{0}: started, port 8{0:02}/tcp, health: starting, sha256:4f{0:02}",
    )  # fmt: skip
    return [form.format(number % 100) for number in range(lines // len(forms)) for form in forms]


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_left_of_a_secret(name: str) -> None:
    """Each format is found by itself, within a text, and as a value of JSON; a second pass changes nothing."""
    secret, text = FORMATS[name]
    for given_text in (text, f"I ran this:\n{text}\nand it failed", text.replace("\n", "\\n")):
        stored = redact(given_text)
        assert not left_of(secret, stored), stored
        assert not is_whole(stored)
        assert redact(stored) == stored


def test_there_are_ninety_formats_and_more() -> None:
    """The table has not shrunk."""
    assert len({name.partition("/")[0] for name in FORMATS}) > 140


@pytest.mark.parametrize("kind", PERSONAL)
def test_personal_data_are_replaced_in_strict_redaction_only(kind: str) -> None:
    """Cards, accounts, addresses and telephones go by their check digits or forms, and stay by default."""
    for value in PERSONAL[kind]:
        text = f"it is {value}, he said"
        assert redact(text, "strict") == f"it is [REDACTED:{kind}], he said"
        assert redact(text) == redact(text, "off") == text


def test_what_only_looks_like_personal_data_stays() -> None:
    """A number with a wrong check digit, a time, a version and a loopback address are none."""
    for text in (
        "4111 1111 1111 1112",
        "DE88370400440532013000",
        "12:10:11",
        "a[1::2]",
        "1.2.3",
        "127.0.0.1",
        "std::map",
    ):
        assert redact(text, "strict") == text


@pytest.mark.parametrize("text", HARMLESS)
def test_code_and_prose_that_speak_of_secrets_stay(text: str) -> None:
    """A variable, an expression, a placeholder and a sentence are no secret."""
    assert redact(text) == text


@pytest.mark.parametrize("lines", [code, logs])
def test_false_alarms_are_rare(lines: object) -> None:
    """Of two thousand lines of code, and of logs, at most one in two hundred is changed."""
    found = (code if lines is code else logs)(2_000)
    assert len(found) == 2_000
    changed = [line for line in found if redact(line) != line]
    assert len(changed) <= 10, changed


def test_four_kilobytes_cost_a_millisecond() -> None:
    """The median over pieces of code is a millisecond, with room for a slow machine."""
    text = "\n".join(code(2_000))
    seconds = []
    for start in range(0, len(text) - 4_096, 4_096):
        piece = text[start : start + 4_096]
        started = time.process_time()
        redact(piece)
        seconds.append(time.process_time() - started)
    assert sorted(seconds)[len(seconds) // 2] < 0.004


@pytest.mark.parametrize(
    "unit",
    [
        "password", "password=", "password='\"", '\\"password\\":', "token=a1", "pass:", "curl -u ", "mysql -p",
        "mysql ", "authorization: ", "cookie: a=b", "kind: Secret\ndata:\n a: b\n", "::", "1:", "a@", "a.", "1 ",
        "+1 ", "login a password ", ":5432:", "$1$", "?key=1", "password: |\n  a\n", "Mabc.", '{"password":{',
        'variable "password" { ', "auth=(", "echo a|", "hf_a1", "key", '\\\\"', "DE89 ", "4111 ",
        "[REDACTED:password]", "configure set secret ", "secret: >\n ",
    ],
)  # fmt: skip
def test_hostile_text_costs_linear_time(unit: str) -> None:
    """Eight times as much of what the patterns stumble over costs about eight times as much, at every level."""

    def seconds(size: int) -> float:
        text, started = (unit * size)[:size], time.process_time()
        redact(text, "strict")
        return time.process_time() - started

    small, large = seconds(16_000), seconds(128_000)
    assert large < 2
    assert large < 24 * small + 0.1


@given(
    st.lists(st.sampled_from([text for _, text in FORMATS.values()] + list(HARMLESS)), max_size=4), st.text(max_size=20)
)
def test_redaction_is_stable(texts: list[str], between: str) -> None:
    """The same text gives the same result, which a second pass leaves as it is."""
    text = between.join(texts)
    for level in ("default", "strict"):
        stored = redact(text, level)
        assert redact(text, level) == stored
        assert redact(stored, level) == stored
