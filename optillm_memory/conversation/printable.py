"""Text for a terminal: characters that would act on it (move the cursor, reverse a line) or hide are shown.

Unicode's bidirectional controls can make a line read as another one (Boucher and Anderson 2021, "Trojan Source"), and
its tag characters carry text that only models read.
"""

from __future__ import annotations

import json
import re
from typing import Any

# C0 and C1 controls but the line feed and the tab; soft hyphen; bidirectional controls and marks; zero-width characters
# that no script needs; line and paragraph separators; fillers that show nothing; tags; variation selectors but those of
# emoji; lone surrogates; noncharacters and private use. U+200C and U+200D stay: Persian, Indic scripts and emoji are
# written with them.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ue000-\uf8ff\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff\U000f0000-\U0010ffff]"
)
_BYTE, _PLANE = 0x100, 0x10000


def printable(text: str) -> str:
    r"""Return a text whose control and invisible characters are shown as escapes: `\x1b`."""
    return _UNSAFE.sub(_escaped, text)


def printable_json(value: Any) -> str:
    """Return a value as indented JSON, with the same characters escaped: it is read as the same value."""
    rendered = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return _UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], rendered)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < _BYTE else f"\\u{code:04x}" if code < _PLANE else f"\\U{code:08x}"
