"""Whether a value beside a name that tells of a secret is one: by the word, by the place, and by the value itself."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

Place = Literal["program", "settings", "query"]

_IDENTIFIER = re.compile(r"[A-Za-z_]+[0-9]{0,2}")
_EXPRESSION = re.compile(
    r"[A-Za-z_$][\w$]*(?:(?:\.|->|::|\?\.)[A-Za-z_]\w*)*(?:[(\[{]|(?:\.|->|::)[A-Za-z_]+(?:[^\w]|\Z))"
    r"|(?:not|await|new|lambda|if|self|cls|this|len|str|int|os|sys)\b[ .(\[]"
)
_CALL = re.compile(r"[A-Za-z_.]+[(\[]|(?:self|this|cls|os|sys|args|config|settings|options|request|process)\.")
PLACEHOLDER = re.compile(
    r"https?://|\$|%[({]?\w|\{|<|\[|\(|\*{2,}|x{3,}|\.{2,}|…|-{2,}|_{2,}|@\{|(?:your|my|the|some|insert|enter|replace|put|example|sample|dummy|fake)"
    r"[_\- ]|!(?:vault|env|sub|ref|include|secret)\b|arn:|vault:|op://|env[.:(]|file:|/(?:run|etc|var|usr|home|tmp|dev|proc|secrets)/|xu003c"
)
# Words that stand beside a name without being a secret: types, states, and other names.
_NO_SECRETS = frozenset(
    """
    true false none null nil undefined nan yes no on off str string int integer bool boolean bytes byte float
    number object any optional required text password passwd pass pwd pw secret token key username user name
    value hidden redacted removed masked empty missing unset invalid valid expired incorrect wrong changed reset
    needed unknown default auto hash plain plaintext basic bearer digest self cls this type uuid void const let
    var final static data result input output prompt field secretstr unicode char array list dict tuple set map
    varchar http https file path url uri json yaml xml md5 sha1 sha256 bcrypt scrypt disabled enabled inherit
    login and or is to in for not with from the a an was has will must should can may that which if as of by on
    at it be are option argument flag parameter authentication auth authorization access read write pending ok
    error failed success denied rejected accepted done get post put delete head test admin public private
    internal external local remote new old current next previous first last manager handler provider service
    client server request response header headers cookie cookies session sessions tokens keys secrets passwords
    credentials credential api_key apikey access_key secret_key access_token auth_token client_secret
    secret_access_key x-oauth-basic redhat string[] str[] ... your_password yourpassword mypassword your_token
    """.split()  # noqa: SIM905 - so many words are read as words
)
_SHAPES = re.compile(
    r"[a-z_]+[-_.]?[0-9]{1,4}|\w+(?:\.\w+)+|[0-9.:-]+[a-z]{0,2}|[a-z]+(?:[-_/.:][a-z0-9]{1,12}){1,8}", re.IGNORECASE
)
_ENTROPY = 2.8  # bits a character, from which on a value beside a weak word looks made by chance
_MADE, _WEAK = 6, 8  # characters at least


@dataclass(frozen=True, slots=True)
class Word:
    """A key word, with the kind of secret that it tells of.

    `strength`: its value can be `any` text, or is one that was `made` by chance, or (`weak`) is a secret only if it looks so.
    `alone` means that no letter precedes the word.
    """

    kind: str
    strength: Literal["any", "made", "weak"]
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Context:
    """How a value stands beside its name, where, and whether in quotes. `is_close` means an equals sign without spaces."""

    manner: str
    place: Place
    is_close: bool
    quoted: bool = False


def is_placeholder(value: str) -> bool:
    """Whether a value stands for a secret that is elsewhere, or is a word that says of what type it is."""
    low = value.strip().lower()
    return not low or low in _NO_SECRETS or PLACEHOLDER.match(low) is not None or low.endswith(("...", "…"))


def is_secret(value: str, word: Word, context: Context) -> bool:
    """Whether a value beside a key word is a secret."""
    if is_placeholder(value) or (context.quoted and is_placeholder(value.strip(" :_-").replace(" ", "_"))):
        return False
    digits = sum(map(str.isdigit, value))
    is_plain = _IDENTIFIER.fullmatch(value) is not None  # it may be a variable, or a word of the language
    if context.manner in ("prose", "called"):
        return word.strength == "any" and digits > 0 and not is_plain and len(value) >= _MADE and " " not in value
    if _is_expression(value, context):
        return False
    if word.strength == "weak":
        return " " not in value.strip() and _looks_made(value, context)
    if word.strength == "made":
        return _is_made(value, context, digits, is_plain=is_plain)
    return _is_password(value, context, digits, is_plain=is_plain)


def _is_password(value: str, context: Context, digits: int, *, is_plain: bool) -> bool:
    """Whether a value beside `password` is one: any text but a sentence, a variable or the name of a constant."""
    if context.quoted:
        return len(value) > 2 and value.count(" ") < 8 and not (" " in value and value.endswith((":", "?", "!", ".")))  # noqa: PLR2004
    if context.place == "program":
        return digits > 0 and not is_plain and len(value) > 3  # noqa: PLR2004
    return len(value) > 2 and not (is_plain and value.isupper() and "_" in value)  # noqa: PLR2004


def _is_expression(value: str, context: Context) -> bool:
    """Whether a value without quotes is an expression of a program: a call, an index, an attribute."""
    if context.quoted or context.place == "query":
        return False
    if context.is_close and context.place == "settings":  # `PASSWORD=correct.horse` is none
        return _CALL.match(value) is not None
    return _EXPRESSION.match(value) is not None


def _is_made(value: str, context: Context, digits: int, *, is_plain: bool) -> bool:
    """Whether a value beside `secret` or `api_key` is one: words that are joined, and words in a program, are names."""
    if len(value) < _MADE or " " in value.strip():
        return False
    if is_plain:
        is_name = "_" in value or value.isupper()
        return not is_name and (
            context.quoted or context.place == "query" or (context.is_close and context.place == "settings")
        )
    return digits > 0 or not re.fullmatch(r"[A-Za-z]+(?:[-_./][A-Za-z]+)+", value)


def _looks_made(value: str, context: Context) -> bool:
    """Whether a value beside a weak word looks made by chance: by its characters, and their entropy (Shannon 1948)."""
    if len(value) < _WEAK or not any(map(str.isalpha, value)):
        return False
    if context.place == "query":
        return not value.islower() or not value.isalpha()
    if not any(map(str.isdigit, value)) and not (value.endswith("=") and len(value) % 4 == 0 and not value.islower()):
        return False
    entropy = -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
    return entropy > _ENTROPY and _SHAPES.fullmatch(value) is None
