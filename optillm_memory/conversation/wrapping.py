"""Unwrapping of tool results: JSON, tags or lines around the output, which may contain the exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

HEAD, TAIL = 6_000, 12_000
_HEAD_LINES, _TAIL_LINES = 2, 4  # lines at the ends of a result in which a harness's code is looked for
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
_CUT_JSON = re.compile(r'(?<!\\)"(exit_?code|return_?code|exit_?status)"\s{0,4}:\s{0,4}(-?\d{1,10})', re.IGNORECASE)
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


@dataclass(frozen=True, slots=True)
class Frame:
    """A place where an exit code stands in a result: a field, or a line by its form and its place from an end."""

    place: str
    form: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The output of a tool without its wrapping.

    `codes` are all that look like an exit code, outermost first, by their frames: a program or a file may have printed
    any of them, so which one is the harness's is known from the tool's other results. `exit_code` is the outermost, for
    the form alone. `own_code` is one that the program itself reports of a part of its work. `wraps` is True where the
    wrapping is certain. `failed` is True where the tool protocol reports a failure, else None; `error` is the kind of a
    structured error.
    """

    text: str
    codes: tuple[tuple[Frame, int], ...] = ()
    own_code: int | None = None
    failed: bool | None = None
    http_status: int | None = None
    error: str = ""
    structured: bool = False
    wraps: bool = False

    @property
    def exit_code(self) -> int | None:
        """The outermost code, whoever printed it."""
        return self.codes[0][1] if self.codes else self.own_code

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
            frame = Frame("json", found[1])
            text = ends_of(observation).replace("\\n", "\n")
            return ToolResult(text, ((frame, int(found[2])),), structured=True, wraps=True)
    elif start.startswith("CompletedProcess(") and (found := _COMPLETED.match(start + observation[200:4000])):
        printed = _STREAM.sub("\n", ends_of(observation)).replace("\\n", "\n").partition("\n")[2]
        return ToolResult(printed, ((Frame("repr", "CompletedProcess"), int(found[1])),), wraps=True)
    return _from_text(ends_of(observation))


def _from_text(text: str, place: str = "") -> ToolResult:
    """Read a text; `place` is where it stands in the result."""
    lines = [line for line in text.split("\n") if line.strip()]
    ends = [(f"{place}-{n}", line) for n, line in enumerate(reversed(lines[-_TAIL_LINES:]))]
    ends += [(f"{place}+{n}", line) for n, line in enumerate(lines[:_HEAD_LINES])]
    codes: list[tuple[Frame, int]] = []
    wrapping: list[str] = []
    timed_out, own_code = False, None
    for at, line in ends:
        bare = line.strip()[:300]
        timed_out = timed_out or _TIMED_OUT.match(bare) is not None
        if recipe := _RECIPE.match(bare):
            own_code = int(recipe["code"]) if own_code is None else own_code
        for form, code in _codes_in(line):
            codes.append((Frame(at, form), code))
            wrapping.append(line)
    outer = _TAG.sub("<", text) if _TAG.search(text[:400]) or _TAG.search(text[-400:]) else text
    if codes and outer == text:
        at_end = codes[0][0].place.startswith(f"{place}-")
        before, _, after = text.rpartition(wrapping[0]) if at_end else text.partition(wrapping[0])
        outer = f"{before}{after}".strip("\n")
    if timed_out:
        return ToolResult(text, tuple(codes), own_code, failed=True, error="timeout", wraps=True)
    return ToolResult(outer, tuple(codes), own_code, wraps=bool(codes))


def _codes_in(line: str) -> Iterator[tuple[str, int]]:
    """Yield the exit codes that a line tells, with its form: a tag, or the line without its number."""
    for found in (*_TAG.finditer(line[:400]), *_TAG.finditer(line[max(400, len(line) - 400) :])):
        yield found[0].partition(">")[0], int(found[1])
    bare = line.strip()[:300]
    if alone := _LINE.match(bare):
        yield f"{bare[: alone.start('code')]}#{bare[alone.end('code') :]}", int(alone["code"])
    elif sentence := _SENTENCE.match(bare):
        yield bare.split()[0], int(sentence["code"])


def _from_json(value: Any) -> ToolResult:
    """Read a JSON result, its objects one level down, and the parts of a content list."""
    if isinstance(value, list):
        return (
            _from_text(ends_of("\n".join(_texts(value))), "parts")
            if _are_parts(value)
            else ToolResult(ends_of(str(value)))
        )
    codes: tuple[tuple[Frame, int], ...] = ()
    failed, status, error = None, None, ""
    texts: list[str] = []
    for level in _levels(value):
        for key in _CODE_KEYS:
            found = level.get(key)
            if not codes and isinstance(found, int) and not isinstance(found, bool):
                codes = ((Frame("json", key), found),)
        bad, name = _reported_failure(level)
        failed = failed or bad
        error = error or name
        number = level.get("status", level.get("status_code", level.get("statusCode")))
        if status is None and type(number) is int and number in _HTTP_CODES:
            status = number if failed or number >= _HTTP_BAD or _HTTP_KEYS & level.keys() else None
        for key in _TEXT_KEYS:
            texts.extend(_texts(level.get(key)))
    text = ends_of("\n".join(texts))
    if not codes and _are_parts(value.get("content")):
        inner = _from_text(text, "parts")
        text, codes = inner.text, inner.codes
        failed = failed or inner.failed
    wraps = bool(_WRAPS & value.keys()) or _are_parts(value.get("content"))
    wraps = wraps or (bool(codes) and bool(_OUTPUT_KEYS & value.keys()))
    return ToolResult(text, codes, None, failed, status, error, structured=True, wraps=wraps)


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
