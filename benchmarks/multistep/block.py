r"""The procedure in a prompt, as the scripted agent reads it: the contract between the renderer and this agent.

The procedure is in a block of memory, between `<agent_memory>` and `</agent_memory>`, under a line that holds the word
`procedure`. Each step is one line; its number is that of the step in the whole procedure, so that the steps that are
done may be left out:

    A procedure that solved tasks like this before (3 of 3 times):
    1. find_user_id_by_name_zip(first_name: from the user, last_name: from the user, zip: from the user)
    2. get_order_details(order_id: from step 1's `orders[]`, for each)
    3. ask the user to confirm, and wait for the reply
    4. cancel_order(order_id: from step 2's `order_id`, reason: your choice)

- A call is the tool's name and, in parentheses, `argument: source` for each argument, with commas between them. An
  argument inside another is named by its path, `a.b` or `items[]`.
- The sources are:
  `from the user` - the request or a reply holds the value;
  ``from step N's `path` `` - the observation of step N holds it at that path, where `[]` is each place of a list, `{}`
  each key of an object whose keys are data, and an empty path the whole observation;
  `always "constant"` - the value itself, as a JSON string;
  `your choice` - the agent makes it up (`free` and words that are not known are read as this).
- `for each` behind a comma or semicolon, inside or behind the parentheses: the call is made for one value after the
  other, until the agent has found what it looks for.
- A line that begins with `ask` is a question to the user, whose reply is waited for.

A mark `|` before the line, backquotes around names, and words behind a line are tolerated. A line of another shape
ends nothing and is ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.multistep.view import SAY, text_of

SourceKind = Literal["user", "step", "constant", "free"]
_BLOCK = re.compile(r"<agent_memory[^>]*>\n?(.*?)</agent_memory[^>]*>", re.DOTALL)
_LINE = re.compile(r"\s*(?:\|\s*)?(\d{1,2})[.)]\s+(.*\S)")
_CALL = re.compile(r"`?([A-Za-z_][\w.-]*)`?\s*\((.*)\)([^()]*)$")
_ASK = re.compile(r"ask\b", re.IGNORECASE)
_EACH = re.compile(r"[,;]\s*for each\b")
_ARGUMENT = re.compile(
    r"""`?(?P<name>[\w.\-\[\]{}]+)`?\s*:\s*(?:
        (?P<constant>always\s+"(?:[^"\\]|\\.)*")
        | from\ step\ (?P<step>\d+)(?:'s\s+`(?P<path>[^`]*)`)?
        | (?P<user>from\ the\ user)
        | (?P<other>[^,;]*)
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an argument's value comes from: `text` is the constant or the path, `step` the number of a step."""

    kind: SourceKind
    text: str = ""
    step: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """One step of a procedure in a prompt; its tool is empty where the user is asked."""

    number: int
    tool: str
    arguments: Mapping[str, Origin]
    each: bool = False


def procedure_in(messages: Sequence[Mapping[str, Any]]) -> tuple[Line, ...]:
    """Return the procedure that stands last in a prompt; empty where there is none."""
    for message in reversed(messages):
        for block in reversed(_BLOCK.findall(text_of(message))):
            if lines := lines_of(block):
                return lines
    return ()


def lines_of(block: str) -> tuple[Line, ...]:
    """Return the steps of the last procedure in a block's text."""
    found: list[Line] = []
    open_ = False
    for text in block.splitlines():
        match = _LINE.match(text)
        if match is None:
            if "procedure" in text.lower():
                found, open_ = [], True
        elif open_ and (line := _line(int(match[1]), match[2])) is not None:
            found.append(line)
    return tuple(found)


def _line(number: int, text: str) -> Line | None:
    if _ASK.match(text):
        return Line(number, SAY, {})
    call = _CALL.match(text)
    if call is None:
        return None
    tool, inside, behind = call.groups()
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', f"{inside}{behind}")  # a constant may hold the words
    origins = {match["name"]: _origin(match) for match in _ARGUMENT.finditer(inside)}
    return Line(number, tool, origins, each=bool(_EACH.search(bare)))


def _origin(match: re.Match[str]) -> Origin:
    if match["constant"]:
        try:
            return Origin("constant", str(json.loads(match["constant"].removeprefix("always").strip())))
        except ValueError:
            return Origin("free")
    if match["step"]:
        return Origin("step", match["path"] or "", int(match["step"]))
    return Origin("user" if match["user"] else "free")
