"""Unwrapping of tool results: JSON, tags or lines around the output, which may contain the exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

HEAD, TAIL = 6_000, 12_000
_JSON_LIMIT = 65_536
# What is said of a result outside of its text (`is_error` of Anthropic, `isError` of MCP) is kept as MCP writes it.
_FLAGS = ("is_error", "isError")
_CODE_KEYS = (
    "exit_code",
    "exitCode",
    "exitcode",
    "returncode",
    "return_code",
    "returnCode",
    "exit_status",
    "exitStatus",
)
_TEXT_KEYS = (
    *("stdout", "output", "content", "text", "body", "result", "stderr", "message", "error", "logs"),
    *("exception", "errorMessage", "error_message", "err", "detail", "errors"),
)
_WRAPS = frozenset(("stdout", "stderr", "output", "isError", "is_error", "metadata"))
_OUTPUT_KEYS = frozenset(("content", "text", "body", "result", "logs", "data"))
_PAYLOAD_KEYS = frozenset(("message", "error", "output", "stdout", "stderr", "content", "result"))
_HTTP_CODES, _HTTP_BAD = range(100, 600), 400
_FAILED_WORDS = frozenset(("error", "failed", "failure", "timeout", "timed_out", "fail", "rejected", "exception"))
_NO_ERROR = frozenset(("", "none", "null", "nil", "no", "ok", "no error", "success", "false", "0"))
_ERROR_KEYS = ("error", "exception", "errorMessage", "error_message", "err")
_HTTP_KEYS = frozenset(("body", "headers", "url", "text", "data", "content", "response", "statusText"))

_ANSI = re.compile(r"\x1b\[[0-9;?]{0,16}[A-Za-z]")
_CUT_JSON = re.compile(r'(?<!\\)"(?:exit_?code|return_?code|exit_?status)"\s{0,4}:\s{0,4}(-?\d{1,10})', re.IGNORECASE)
_TAG = re.compile(r"<(?:return_?code|exit_?code|exit_?status)>\s{0,4}(-?\d{1,10})\s{0,4}</", re.IGNORECASE)
_COMPLETED = re.compile(r"^CompletedProcess\(args=.{0,2000}?, returncode=(-?\d{1,10})", re.DOTALL)
_STREAM = re.compile(r"(?:'|\")?, std(?:out|err)=b?['\"]|['\"]\)$")
_LINE = re.compile(
    r"^(?P<mark>[\[(*]{0,3})(?:error: )?(?:(?:the )?(?:command|process) )?"
    r"(?:exit[ _-]?(?:code|status)|return[ _-]?code|(?:exit|rc)(?=[:=])|\$\?)[\"']?\s{0,2}(?:[:=]|is|was)?\s{0,2}"
    r"(?P<code>-?\d{1,10})[\])*.]{0,4}$",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"^[\[(]?(?:error: )?(?:the )?(?:command|process|program|script|task|shell|subprocess)\b.{0,60}?"
    r"\b(?:with|returned)\s(?:a\s)?(?:non-zero\s)?(?:exit\s)?(?:code|status)[: ]\s?(?P<code>-?\d{1,10})\b",
    re.IGNORECASE,
)
_RECIPE = re.compile(r"^g?make(?:\[\d{1,3}\])?: \*\*\* \[[^\]]{1,200}\] Error (?P<code>\d{1,3})$")
_TIMED_OUT = re.compile(
    r"^[\[(<]?(?:error: )?(?:the )?(?:command|process|execution|operation|script|tool|bash)\b.{0,60}?\btimed out\b",
    re.IGNORECASE,
)
_FRAME = re.compile(r"</?[a-z_]{1,20}>|^(?:output|stdout|stderr)\s{0,2}:?\s*$", re.IGNORECASE | re.MULTILINE)
_LABEL = re.compile(r"^(?:output|stdout|stderr|wall time)\b.{0,40}$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The output of a tool without its wrapping.

    `firm` is False where the exit code is only a line of text, which a file may contain too; `wraps` is True where the
    wrapping is certain. `failed` is True where the tool protocol reports a failure, else None; `error` is the kind of a
    structured error.
    """

    text: str
    exit_code: int | None = None
    firm: bool = False
    failed: bool | None = None
    http_status: int | None = None
    error: str = ""
    structured: bool = False
    wraps: bool = False

    @property
    def is_silent(self) -> bool:
        """Whether nothing was printed: what there is are the tags and labels that a harness puts around an output."""
        return not _FRAME.sub("", self.text).strip()


def ends_of(text: str) -> str:
    """Return a text's head and tail without colours; the middle is never read."""
    if len(text) > HEAD + TAIL:
        text = f"{text[:HEAD]}\n{text[-TAIL:]}"
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _ANSI.sub("", text) if "\x1b" in text else text


def with_flag(text: str, parts: Iterable[Any]) -> str:
    """Return a result's text, as a failed MCP result where the message or a part of it says `is_error: true`."""
    if not any(isinstance(p, Mapping) and any(p.get(flag) is True for flag in _FLAGS) for p in parts):
        return text
    return json.dumps({"isError": True, "content": [{"type": "text", "text": text}]}, ensure_ascii=False)


def unwrap(observation: str) -> ToolResult:
    """Remove the wrapping of an observation."""
    start = observation[:200].lstrip()
    if start.startswith(("{", "[{")):
        if len(observation) <= _JSON_LIMIT:
            try:
                return _from_json(json.loads(observation))
            except (ValueError, RecursionError):
                pass
        # Truncated, or too long to parse: real keys differ from quoted ones by their quotation marks.
        near = f"{observation[:2000]}\n{observation[-2000:]}"
        if found := _CUT_JSON.search(near):
            return ToolResult(
                ends_of(observation).replace("\\n", "\n"), int(found[1]), firm=True, structured=True, wraps=True
            )
    elif start.startswith("CompletedProcess(") and (found := _COMPLETED.match(start + observation[200:4000])):
        printed = _STREAM.sub("\n", ends_of(observation)).replace("\\n", "\n").partition("\n")[2]
        return ToolResult(printed, int(found[1]), firm=True, wraps=True)
    return _from_text(ends_of(observation))


def _from_text(text: str, *, firm: bool = False) -> ToolResult:
    for near in (text[:400], text[-400:]):
        if found := _TAG.search(near):
            return ToolResult(_TAG.sub("<", text), int(found[1]), firm=True, wraps=True)
    lines = [line for line in text.split("\n") if line.strip()]
    for line in [*lines[:2], *reversed(lines[-4:])]:
        bare = line.strip()[:300]
        if _TIMED_OUT.match(bare):
            return ToolResult(text, failed=True, error="timeout", wraps=True)
        found = _LINE.match(bare) or _SENTENCE.match(bare) or _RECIPE.match(bare)
        if found:
            own = found.re is not _RECIPE and (bare[0] in "[(*" or bool(_LABEL.search(text[:400])))
            return ToolResult(_without(text, line), int(found["code"]), firm=firm or own, wraps=found.re is not _RECIPE)
    return ToolResult(text)


def _without(text: str, line: str) -> str:
    """Return the program's output: the text without the line of the wrapping."""
    if _RECIPE.match(line.strip()):
        return text
    before, _, after = text.partition(line)
    return f"{before}{after}".strip("\n")


def _from_json(value: Any) -> ToolResult:
    """Read a JSON result, its objects one level down, and the parts of a content list."""
    if isinstance(value, list):
        return (
            _from_text(ends_of("\n".join(_texts(value))), firm=True)
            if _are_parts(value)
            else ToolResult(ends_of(str(value)))
        )
    code, failed, status, error = None, None, None, ""
    texts: list[str] = []
    for level in _levels(value):
        for key in _CODE_KEYS:
            found = level.get(key)
            if code is None and isinstance(found, int) and not isinstance(found, bool):
                code = found
        bad, name = _reported_failure(level)
        failed = failed or bad
        error = error or name
        number = level.get("status", level.get("status_code", level.get("statusCode")))
        if status is None and type(number) is int and number in _HTTP_CODES:
            status = number if failed or number >= _HTTP_BAD or _HTTP_KEYS & level.keys() else None
        for key in _TEXT_KEYS:
            texts.extend(_texts(level.get(key)))
    text = ends_of("\n".join(texts))
    if code is None and _are_parts(value.get("content")):
        inner = _from_text(text, firm=True)
        text, code = inner.text, inner.exit_code
        failed = failed or inner.failed
    wraps = bool(_WRAPS & value.keys()) or _are_parts(value.get("content"))
    wraps = wraps or (code is not None and bool(_OUTPUT_KEYS & value.keys()))
    return ToolResult(text, code, code is not None, failed, status, error, structured=True, wraps=wraps)


def _levels(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield value
    for inner in list(value.values())[:20]:
        if isinstance(inner, Mapping):
            yield inner


def _reported_failure(level: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Return whether a result reports that the call failed (True or None), and the kind of the error."""
    error = next((level[key] for key in _ERROR_KEYS if level.get(key)), None)
    if isinstance(error, str) and error.strip().lower() in _NO_ERROR:
        error = None
    name = ""
    if isinstance(error, Mapping):
        name = str(error.get("type") or error.get("code") or error.get("name") or "")[:80]
    elif error is not None and (code := level.get("error_code") or level.get("code")):
        name = str(code)[:80]
    status = level.get("status")
    failed = (
        level.get("isError") is True
        or level.get("is_error") is True
        or level.get("success") is False
        or level.get("ok") is False
        or level.get("timed_out") is True
        or (
            isinstance(status, str)
            and status.lower() in _FAILED_WORDS
            and (len(level) == 1 or bool(_PAYLOAD_KEYS & level.keys()))
        )
        or (isinstance(error, (str, Mapping)) and bool(error))
        or (error is True and bool(_PAYLOAD_KEYS - {"error"} & level.keys()))
        or _only_errors(level)
        or (level.keys() == {"detail"} and isinstance(level["detail"], str))
    )
    return (True if failed else None), name


def _only_errors(level: Mapping[str, Any]) -> bool:
    """Whether a result holds a list of errors and no data, as GraphQL and JSON:API report them."""
    errors = level.get("errors")
    if not isinstance(errors, list) or not errors or any(level.get(key) for key in ("data", "result", "results")):
        return False
    return all(isinstance(e, str) or (isinstance(e, Mapping) and ("message" in e or "detail" in e)) for e in errors)


def _are_parts(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in value[:20]
    )


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a field: itself, its content parts, or an error object's message."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, list):
        for part in value[:50]:
            if isinstance(part, Mapping):
                texts = (part.get(key) for key in ("text", "message", "detail"))
                yield from (text for text in texts if isinstance(text, str))
    elif isinstance(value, Mapping):
        texts = (value.get(key) for key in ("message", "detail", "description"))
        yield from (text for text in texts if isinstance(text, str))
