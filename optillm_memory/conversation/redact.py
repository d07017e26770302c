"""Redaction: secrets are replaced before a text is stored. The time is linear in the text's length.

What is stored is not what is sent: a request goes upstream as the client wrote it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator

from optillm_memory.conversation.personal_data import personal_data_in
from optillm_memory.conversation.secret_forms import forms_in
from optillm_memory.conversation.secret_names import named_secrets_in
from optillm_memory.conversation.secret_tokens import Span, tokens_in
from optillm_memory.records import Level

QUOTED = "[… quoted from memory, left out …]"
_MARKER = re.compile(r"\[REDACTED:[a-z-]{1,30}\]")
_ALTERED = re.compile(rf"{_MARKER.pattern}|\[… \d{{1,12}} characters left out …\]|{re.escape(QUOTED)}")
_BACKSLASH = "\\"
_ESCAPED_SPACE = re.compile(r"\\+[nrt]")
_ESCAPED_LETTER = re.compile(r"\\+(?=u[0-9A-Fa-f]{4})")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST = 22_000  # characters of the longest secret
_NOTE = 48  # characters of the note about what was left out
_SHORTEST = 7  # characters of the shortest text that can name a secret, such as `pw=hund`


def redact(text: str, level: Level = "default") -> str:
    """Return a text with each secret replaced by `[REDACTED:kind]`; `strict` also replaces personal data.

    The result depends on the text and the level alone, and to redact it again changes nothing.
    """
    if level == "off" or len(text) < _SHORTEST:
        return text
    found = list(_secrets_in(text, level))
    if found and "[REDACTED:" in text:
        markers = [m.span() for m in _MARKER.finditer(text)]
        found = [span for span in found if not any(s <= span[0] and span[1] <= e for s, e in markers)]
    if not found:
        return text
    parts: list[str] = []
    at = 0
    for start, end, kind in _joined(found):
        parts += (text[at:start], f"[REDACTED:{kind}]")
        at = end
    return "".join((*parts, text[at:]))


def _secrets_in(text: str, level: Level) -> Iterator[Span]:
    if "\\" in text:
        # JSON within a text, at any depth: a line break is one, and a letter is a letter. No place moves.
        text = _ESCAPED_SPACE.sub(lambda found: f"{found[0][:-1].replace(_BACKSLASH, ' ')}\n", text)
        text = _ESCAPED_LETTER.sub(lambda found: "x" * len(found[0]), text)
    yield from tokens_in(text)
    yield from forms_in(text)
    yield from named_secrets_in(text)
    if level == "strict":
        yield from personal_data_in(text)


def _joined(found: Iterable[Span]) -> Iterator[Span]:
    """Join secrets that overlap, in order; of equal ones the kind of the first rule counts."""
    current: Span | None = None
    for start, end, kind in sorted(found, key=lambda span: (span[0], -span[1])):
        if current is None or start >= current[1]:
            if current is not None:
                yield current
            current = (start, end, kind)
        elif end > current[1]:
            current = (current[0], end, current[2])
    if current is not None:
        yield current


def digest_of(name: str, key: bytes) -> str:
    """Return the keyed digest that is stored in place of a name with a secret; equal names have equal digests."""
    digest = hmac.new(key, name.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
    return f"redacted-{digest[:24]}"


def is_whole(stored: str) -> bool:
    """Whether a stored text is the original one: nothing was redacted, shortened or replaced."""
    return _ALTERED.search(stored) is None and "\ufffd" not in stored


def storable(text: str, limit: int, level: Level = "default") -> str:
    """Return the text for storing: valid Unicode, without secrets, shortened to `limit` characters.

    The middle of a longer text is removed, since the question is at its ends. Lone surrogates, which
    SQLite and JSON cannot carry, become U+FFFD.
    """
    margin = limit + _LONGEST  # enough of both ends that no secret is cut before it is found
    left_out = max(len(text) - 2 * margin, 0)
    if left_out:
        text = text[:margin] + text[-margin:]
    text = text if text.isascii() else _SURROGATE.sub("\ufffd", text)
    text = redact(text, level)
    if len(text) > limit:
        room = limit - _NOTE
        head, tail = text[: room * 2 // 3], text[len(text) - room // 3 :]
        text = f"{head}\n[… {left_out + len(text) - len(head) - len(tail)} characters left out …]\n{tail}"
    return text
