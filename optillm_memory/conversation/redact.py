"""Redaction: secrets are replaced before a text is stored. Every pattern is linear in the text's length."""

from __future__ import annotations

import re

# (kind, marks, pattern). Each pattern has a literal prefix and bounded or single character classes, so that matching is
# linear. Each match contains one of the marks: a text without them, as nearly all are, is not searched.
_SECRETS: tuple[tuple[str, tuple[str, ...], re.Pattern[str]], ...] = (
    (
        "private-key",
        ("-----BEGIN ",),
        re.compile(
            r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:\s{0,4}[A-Z][A-Za-z-]{1,20}: [^\n]{0,200}\n){0,5}"
            r"[A-Za-z0-9+/=\s\\]{0,20000}(?:-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----)?"
        ),
    ),
    ("api-key", ("sk-", "pk-", "rk-"), re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,400}")),
    ("api-key", ("sk_", "rk_"), re.compile(r"\b(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{10,200}")),
    (
        "token",
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"),
        re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,400}|\bgithub_pat_[A-Za-z0-9_]{20,400}|\bglpat-[A-Za-z0-9_-]{16,200}"),
    ),
    (
        "token",
        ("xox", "hf_", "AIza"),
        re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,400}|\bhf_[A-Za-z0-9]{20,200}|\bAIza[A-Za-z0-9_-]{30,60}"),
    ),
    ("access-key", ("AKIA", "ASIA"), re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("jwt", ("eyJ",), re.compile(r"\beyJ[A-Za-z0-9_-]{10,1000}\.[A-Za-z0-9_-]{10,8000}\.[A-Za-z0-9_-]{10,4000}")),
    ("token", ("earer ",), re.compile(r"(?<=[Bb]earer )[A-Za-z0-9._~+/-]{20,4000}=*")),
    ("password", ("://",), re.compile(r"(?<=://)[^\s:/@]{1,100}:[^\s/@]{1,200}(?=@)")),
)
QUOTED = "[… quoted from memory, left out …]"
_ALTERED = re.compile(rf"\[REDACTED:[a-z-]{{1,30}}\]|\[… \d{{1,12}} characters left out …\]|{re.escape(QUOTED)}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST = 22_000  # characters of the longest secret
_NOTE = 48  # characters of the note about what was left out


def redact(text: str) -> str:
    """Return the text with API keys, tokens, private keys and passwords in URLs replaced by `[REDACTED:kind]`."""
    for kind, marks, pattern in _SECRETS:
        for mark in marks:
            if mark in text:
                text = pattern.sub(f"[REDACTED:{kind}]", text)
                break
    return text


def is_whole(stored: str) -> bool:
    """Whether a stored text is the original one: nothing was redacted, shortened or replaced."""
    return _ALTERED.search(stored) is None and "\ufffd" not in stored


def storable(text: str, limit: int, *, secrets: bool = True) -> str:
    """Return the text for storing: valid Unicode, without secrets, shortened to `limit` characters.

    The middle of a longer text is removed, since the question is at its ends. Lone surrogates, which
    SQLite and JSON cannot carry, become U+FFFD.
    """
    margin = limit + _LONGEST  # enough of both ends that no secret is cut before it is found
    left_out = max(len(text) - 2 * margin, 0)
    if left_out:
        text = text[:margin] + text[-margin:]
    text = text if text.isascii() else _SURROGATE.sub("\ufffd", text)
    text = redact(text) if secrets else text
    if len(text) > limit:
        room = limit - _NOTE
        head, tail = text[: room * 2 // 3], text[len(text) - room // 3 :]
        text = f"{head}\n[… {left_out + len(text) - len(head) - len(tail)} characters left out …]\n{tail}"
    return text
