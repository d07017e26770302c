"""Error signatures: language, class and message of an error, with variable parts replaced by slots."""

from __future__ import annotations

import re
from dataclasses import dataclass

from optillm_memory.conversation.error_search import FoundError, find_errors, generic_error, lines_of
from optillm_memory.conversation.wrapping import unwrap

_LIMIT = 300
_SLOT = re.compile(
    r"(?P<slot><(?:path|num|addr|hash|quoted|uuid|time|url|name|near)>)"
    r"|(?P<url>\b[a-z]{2,12}://[^\s'\"<>)]{1,300})"
    r"|(?P<name>(?<!\S)[^\s:'\"<>\u2018\u2019\u201c\u201d`]{1,200}"
    r"(?=: (?:No such file|command not found|not found|Permission denied|Is a directory|"
    r"Not a directory|File exists|unbound variable))|(?:(?<=no such table: )|(?<=no such column: ))[^\s:'\"<>]{1,200})"
    # A piece of a query, which may contain quotation marks and may go on in the next line.
    r"|(?P<near>(?<=\bnear )(?:'[^\n]{0,500}'(?= at line \d)|'[^'\n]{1,500}$|\"[^\n]{0,500}\"(?=: syntax error)))"
    r"|(?P<quoted>'[^'\n]{0,200}'(?!\w)|\"[^\"\n]{0,200}\"|`[^`'\n]{0,200}[`']"
    r"|\u2018[^\u2018\u2019\n]{0,200}\u2019|\u201c[^\u201c\u201d\n]{0,200}\u201d)"
    r"|(?P<uuid>\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b)"
    r"|(?P<time>\b\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2})?(?:[.,]\d{1,9})?(?:Z|[+-]\d{2}:?\d{2})?)?"
    r"|\b\d{1,2}:\d{2}:\d{2}\b)"
    r"|(?P<addr>\b0x[0-9a-fA-F]{1,32}\b|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?\b)"
    r"|(?P<path>(?:[A-Za-z]:\\|~?/|\.{1,2}/)[^\s'\"`:;,()<>\[\]]{1,300}(?::\d{1,7}){0,2}"
    r"|(?<![\w.+@-])[\w.+@-]{1,100}/[^\s'\"`:;,()<>\[\]]{1,300}(?::\d{1,7}){0,2}"
    r"|(?<![\w.+-])[\w+-]{1,100}(?:\.[\w+-]{1,60}){0,4}\.(?:py|js|ts|tsx|jsx|mjs|cjs|c|h|cc|cpp|hpp|java|go|rs|rb|php|"
    r"pl|sh|txt|md|json|toml|ya?ml|lock|cfg|ini|log|csv|sql|db|html|xml|o|so|a)\b(?::\d{1,7}){0,2})"
    r"|(?P<hash>\b(?=[0-9a-f]{0,39}\d)(?=[0-9]{0,39}[a-f])[0-9a-f]{7,64}\b)"
    r"|(?P<num>(?<!\w)[-+]?\d{1,600}(?:[.,]\d{1,40}){0,4}(?:[eE][-+]?\d{1,4})?(?![A-Za-z_]\w|\d)"
    r"|(?<![\w.])\d{1,12}(?:\.\d{1,9})?(?=(?:[mun]s|[kKMG]i?B|sec|min)\b))"
)


@dataclass(frozen=True, slots=True)
class Signature:
    """An error with the parts that differ from run to run as slots; `slots` are their contents, in order."""

    language: str
    error: str
    message: str
    slots: tuple[str, ...]

    @property
    def key(self) -> str:
        """Equal for equal errors, on every machine, for every user and in every run."""
        return f"{self.language}|{self.error}|{self.message}"


def signature_of(text: str) -> Signature | None:
    """Return the signature of the error in a failed action's output, or None without output.

    The text may still be in the wrapping of an agent's tool.
    """
    result = unwrap(text)
    return signature_in(lines_of(result.text), structured=result.error if result.failed else "")


def signature_in(lines: list[str], *, structured: str = "", found: list[FoundError] | None = None) -> Signature | None:
    """Return the signature of an output's lines; `structured` is the kind of error in a tool's JSON."""
    errors = [f for f in (find_errors(lines) if found is None else found) if f.message or f.error]
    best = errors[0] if errors else generic_error(lines)
    if best is None:
        return Signature("tool", _valid(structured), "", ()) if structured else None
    if structured and not errors:
        return _signature("tool", structured, best.message)
    return _signature(best.language, best.error, best.message)


def _signature(language: str, error: str, message: str) -> Signature:
    normal, slots = normalised(message)
    return Signature(language, _valid(error)[:120], normal, slots)


def normalised(message: str) -> tuple[str, tuple[str, ...]]:
    """Return (message with paths, numbers, hashes, times, quoted names and the like as slots, contents of slots)."""
    slots: list[str] = []

    def put(match: re.Match[str]) -> str:
        kind = match.lastgroup or "slot"
        if kind == "slot":
            return match[0]
        content = match[0]
        slots.append(content[1:-1] if kind == "quoted" else content)
        return f"<{kind}>"

    cut = " ".join(_valid(message[:600]).split())
    text = _SLOT.sub(put, cut)
    if len(text) > _LIMIT:
        text = text[:_LIMIT].rpartition(" ")[0] or text[:_LIMIT]
    # A replacement can form a new slot with its surroundings (a quote, a cut end): until nothing changes.
    for _ in range(4):
        repeated = _SLOT.sub(put, text)
        if repeated == text:
            break
        text = repeated
    return text, tuple(slots)


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "")
