"""Personal data, for strict redaction: cards, accounts, e-mail, telephones and IP addresses, by checked patterns."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

from optillm_memory.conversation.secret_tokens import Span

_CARD = re.compile(r"(?<![\w.-])[2-6][0-9](?:[ -]?[0-9]){10,17}(?![\w-]|\.[0-9])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}(?![A-Za-z0-9])")
_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_IP4 = re.compile(r"(?<![\w.-])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w-]|\.[0-9])")
_IP6 = re.compile(
    r"(?:(?<![\w:.])|(?<=\\[nt]))(?:[0-9A-Fa-f]{1,4}:|::)(?:[0-9A-Fa-f]{0,4}:){0,7}[0-9A-Fa-f]{0,4}(?:%[\w.]{1,15})?(?![\w:])"
)
# A number in the international form, or with the separators in which people write one.
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+[1-9](?:[ ()./-]{0,2}[0-9]){7,14}"
    r"|\([0-9]{2,5}\)[ -]?[0-9]{3,4}[ -][0-9]{3,6}|0[0-9]{1,4}[ /-][0-9]{3,4}(?:[ -][0-9]{2,5}){1,3}"
    r"|[2-9][0-9]{2}[ .-][0-9]{3}[ .-][0-9]{4})(?![\w-]|\.[0-9])"
)


def personal_data_in(text: str) -> Iterator[Span]:
    """Yield where personal data are in a text."""
    for kind, mark, pattern, holds in _KINDS:
        if mark in text:
            for found in pattern.finditer(text):
                if (end := holds(found[0])) > 0:
                    yield found.start(), found.start() + end, kind


def _is_card(found: str) -> int:
    """Check a card's number by the formula of Luhn (ISO/IEC 7812-1); return its length, 0 for another number."""
    digits = [int(c) for c in found if c.isdigit()]
    doubled = (d * 2 - 9 if d > 4 else d * 2 for d in digits[-2::-2])  # noqa: PLR2004
    return len(found) if len(digits) >= 12 and (sum(doubled) + sum(digits[::-2])) % 10 == 0 else 0  # noqa: PLR2004


def _is_iban(found: str) -> int:
    """Check an account's number modulo 97 (ISO 13616); words that follow it are not part of it."""
    for end in range(len(found), 14, -1):
        compact = found[:end].replace(" ", "").upper()
        if found[end - 1] == " " or len(compact) < 15 or (end < len(found) and found[end] != " "):  # noqa: PLR2004
            continue
        if int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1:
            return end
    return 0


def _is_address(found: str) -> int:
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return 0
    return 0 if address.is_loopback or address.is_unspecified or (":" in found and len(found) < 6) else len(found)  # noqa: PLR2004


_KINDS: tuple[tuple[str, str, re.Pattern[str], Callable[[str], int]], ...] = (
    ("email", "@", _EMAIL, len),
    ("card", "", _CARD, _is_card),
    ("iban", "", _IBAN, _is_iban),
    ("ip", ".", _IP4, _is_address),
    ("ip", ":", _IP6, _is_address),
    ("phone", "", _PHONE, len),
)
