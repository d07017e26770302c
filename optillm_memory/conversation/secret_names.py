"""Values beside a name that tells of a secret: `DB_PASSWORD=…`, `"api_key": "…"`, `--token …`, `<password>…</password>`.

A name is found by a plain search for its key word; patterns run from there, and only forwards, so that the time is
linear. Whether the value is a secret depends on the word (any text can be a password; a token or a key looks made by
chance), on the place (in a file of settings, a command or a URL a word is a value, in a program it is a variable), and
on the value (no placeholder, no expression).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from optillm_memory.conversation.secret_tokens import Span
from optillm_memory.conversation.secret_values import PLACEHOLDER, Context, Place, Word, is_secret

_INSIDE = re.compile(r"[a-z]\Z")  # "bypass" has "pass" inside
_OF_KEYS = re.compile(
    r"(?:api|app|application|access|account|admin|auth|aes|client|consumer|deploy|encryption|encrypt|hmac|host|integration|jwt"
    r"|licen[cs]e|live|machine|management|master|preshared|primary|private|rsa|read|recovery|root|secondary|secret|security|server"
    r"|service|session|shared|sharedaccess|signing|sign|signature|storage|subscription|user|vault|webhook|wireguard|write)"
    r"[_\-. ]{0,2}\Z"
)


_WORDS = {
    **{w: Word("password", "any") for w in ("password", "passwd", "passphrase", "passcode", "passwort", "pwd", "senha")},
    **{w: Word("password", "any") for w in ("contraseña", "пароль", "密码", "mot de passe", "mnemonic", "seed phrase", "seed_phrase")},
    **{w: Word("password", "any", alone=True) for w in ("pass", "pw", "psk")},
    **{w: Word("secret", "made") for w in ("secret", "credential")},
    "key": Word("api-key", "made"),
    **{w: Word("token", "weak") for w in ("token", "auth", "jwt", "bearer", "csrf", "cookie", "session", "signature")},
    **{w: Word("token", "weak", alone=True) for w in ("sid", "sig", "cred", "salt", "otp", "pin", "dsn")},
}  # fmt: skip
# What may follow a key word within a name; none of `tokenizer`, `password_file`, `key_id`, `author`.
_SUFFIX = (
    r"(?:[_\-.]?(?:access|key|token|secret|password|pass|value|val|base64|base|b64|hash|hex|string|str|raw|plain|text|data|prod"
    r"|production|dev|test|staging|live|main|primary|secondary|current|previous|old|new|default|admin|root|user|db|auth|header"
    r"|confirmation|confirm|repeat|[0-9]{1,3})){0,6}"
)
_QUOTE = r"\\{0,15}[\"'`]"
_AFTER = re.compile(
    rf"{_SUFFIX}(?:{_QUOTE})?[ \t]{{0,2}}\]?(?:"
    # The name and the value under names of their own: {{"name": "DB_PASSWORD", "value": "…"}}.
    rf"(?P<pair>[\s,}};]{{0,3}}(?:\\n)?[\s,\-]{{0,40}}(?:{_QUOTE})?(?:value|default|content)(?:{_QUOTE})?[ \t]{{0,3}}[=:][ \t]{{0,3}})"
    r"|(?P<typed>(?::[ \t]{0,3}[A-Za-z][\w.\[\]| ]{0,40}|[ \t](?:string|String|str|byte\[\]|\[\]byte))[ \t]{0,3}=(?!=)[ \t]{0,3})"
    r"|(?P<assigned>[ \t]{0,20}(?:=>|:=|\?=|\+=|={1,3}|!={1,2}|::?)[ \t]{0,20})"
    r"|(?P<element>>)"
    r"|(?P<called>\([ \t]{0,3})"
    r"|(?P<prose>[ \t]{1,3}(?:is|was|to|are|ist|est|es)[ \t]{1,3}:?[ \t]{0,2})"
    r"|(?P<flag>[ \t]{1,3}))"
)
_NAME_BEFORE = re.compile(r"[\w.\-$]{0,60}\Z")
_OPENS = re.compile(r"(?:[brfu@$]{1,2}(?=[\"'`]))?(\"\"\"|\'\'\'|\\{0,15}[\"'`])")
_QUOTES = {quote: re.compile(rf"\\*{quote}") for quote in "\"'`"}
_CHARACTER = r"(?:[^\s\"'`\\%s]|\\(?![nrt\"'`\\]))"  # of a value without quotes, less these; not `\n`, as JSON writes a line break
_IN_PROGRAM = re.compile(_CHARACTER % r",;)\]}<>&|" + "{1,160}")
_IN_SETTINGS = re.compile(_CHARACTER % "<>" + "{1,160}")
_IN_CONNECTION = re.compile(_CHARACTER % ";" + "{1,160}")
_IN_QUERY = re.compile(_CHARACTER % r"<>&#;,)\]}" + "{1,160}")
_IN_ELEMENT = re.compile(r"[^<>\n]{1,160}")
_BLOCK = re.compile(r"[|>][-+]?[0-9]?(?:\n|\\n)((?:[ \t]+[^\n]{1,500}(?:\n|\Z)){1,50})")
_LONGEST = 4_000
_LINE_START = re.compile(
    r"(?:\A|\n|\\[nrt]|\r|[\"'`])[ \t]{0,40}(?:[-+#*;>$] ?|// ?|(?:export|set|setx|env|ENV|ARG|-e|local|declare -x) |[0-9]{1,5}[:|→\t] ?){0,3}\"?\Z"
)


def named_secrets_in(text: str) -> Iterator[Span]:
    """Yield where the values of names that tell of a secret are in a text."""
    low = text.lower()
    if len(low) != len(text):  # a few letters become two
        low = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    for key in [key for key in _WORDS if key in low]:
        at, word = low.find(key), _WORDS[key]
        while at >= 0:
            end = at + len(key)
            after = _AFTER.match(low, end)
            in_marker = low.endswith("[redacted:", 0, at)
            if (
                after is not None
                and not in_marker
                and _is_word(low, at, word)
                and (span := _value_at(text, at, after, word))
            ):
                yield span
                end = span[1]  # what is inside is replaced: to look there would cost the square of the time
            at = low.find(key, end)


def _is_word(low: str, at: int, word: Word) -> bool:
    if word.kind == "api-key":
        return _OF_KEYS.search(low, max(at - 24, 0), at) is not None
    return not (word.alone and _INSIDE.search(low, max(at - 1, 0), at))


def _value_at(text: str, at: int, after: re.Match[str], word: Word) -> Span | None:
    """Return where the value of the name around `at` is, if it is a secret."""
    before = _NAME_BEFORE.search(text, max(at - 60, 0), at)
    begin, start = before.start() if before else at, after.end()
    if text[begin - 1 : begin] == "\\" and text[begin] in "nrt":  # an escaped line break
        begin += 1
    is_flag = "-" in (text[begin : begin + 1], text[begin - 1 : begin])
    is_element = text[begin - 1 : begin] == "<"
    manner = str(after.lastgroup)
    if (manner == "flag" and not is_flag) or (manner == "element" and not is_element):
        return None
    context = Context(manner, _place_of(text, begin, after), "=" in after[0] and " " not in after[0])
    if ":" in after[0] and word.strength != "weak" and (block := _BLOCK.match(text, start)):
        return block.start(1), block.end(1), word.kind
    if opened := _OPENS.match(text, start):
        inside = opened.end()
        end = _end_of_quoted(text, opened[1], inside)
        is_one = end > inside and is_secret(text[inside:end], word, replace(context, quoted=True))
        return (inside, end, word.kind) if is_one else None
    end = -1 if manner == "called" else _end_of_unquoted(text, begin, start, word, context)
    return (start, end, word.kind) if end > start else None


def _end_of_unquoted(text: str, begin: int, start: int, word: Word, context: Context) -> int:
    """Return where a value without quotes ends; -1 where it is no secret."""
    pattern = _pattern_of(text, begin, context)
    found = None if PLACEHOLDER.match(text, start) else pattern.match(text, start)
    if found is None:
        return -1
    is_program = context.place == "program"
    value = found[0].rstrip(".,:;)}]" if is_program else ",")
    end = start + len(value)
    if not value or (is_program and text[end : end + 1] in ("(", "[")) or not is_secret(value, word, context):
        return -1
    more: re.Match[str] | None = found
    while more is not None and more.end() == end:  # judged by its beginning, it goes as a whole
        if (more := pattern.match(text, end)) is not None:
            end = more.end()
    return end


def _place_of(text: str, begin: int, after: re.Match[str]) -> Place:
    """Return where a name stands, by what precedes it."""
    ahead = text[begin - 1 : begin]
    if ahead in ("?", "&") and "=" in after[0]:
        return "query"
    if after.lastgroup in ("flag", "pair", "element"):
        return "settings"
    is_close = " " not in after[0]
    if is_close and (ahead in (";", "=") or text[begin : begin + 1] == "-"):
        return "settings"
    if _LINE_START.search(text, max(begin - 60, 0), begin):
        return "settings"
    # In a log or a command, as in `user=bob password=…`; an argument in a program follows a bracket or a comma.
    if is_close and ahead in (" ", "\t") and text[begin - 2 : begin - 1] not in ("(", ",", "{", "["):
        return "settings"
    return "program"


def _pattern_of(text: str, begin: int, context: Context) -> re.Pattern[str]:
    if context.manner == "element":
        return _IN_ELEMENT
    if context.place == "query":
        return _IN_QUERY
    if context.place == "program":
        return _IN_PROGRAM
    ahead = text[max(begin - 200, 0) : begin].rpartition("\n")[2]
    after = text[begin : begin + 200].partition("\n")[0]
    is_connection = context.is_close and (";" in ahead or ";" in after) and (ahead + after).count("=") > 1
    return _IN_CONNECTION if is_connection else _IN_SETTINGS


def _end_of_quoted(text: str, opened: str, inside: int) -> int:
    """Return where a quoted text ends: at the quote of its own level of escaping, in one line; -1 where it does not."""
    if opened in ('"""', "'''"):
        return text.find(opened, inside, inside + _LONGEST)
    level = len(opened) - 1
    for found in _QUOTES[opened[-1]].finditer(text, inside, min(inside + _LONGEST, len(text))):
        slashes = len(found[0]) - 1
        if slashes < level or slashes % (2 * level + 2) == level:
            end = found.end() - 1 - min(level, slashes)
            return end if "\n" not in text[inside:end] else -1
    return -1
