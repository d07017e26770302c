"""What was injected: how often, how much, which kinds, and whether fixes were what the agent did next.

It counts what should not be there, too: reminders of a harness, and values of other people's runs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from optillm_memory.bench.shares import ratio, share
from optillm_memory.bench.trajectories.actions import arguments_of, canonical_action
from optillm_memory.bench.trajectories.replay import Insertion, Replayed
from optillm_memory.bench.trajectories.runs import Act, Run
from optillm_memory.bench.trajectories.values import FAMILIES, Values, request_text
from optillm_memory.conversation.text import BLOCK_BEGIN, text_of

_NEXT = 3  # actions of the agent among which a fix's action counts as followed
_EXAMPLES = 10
_LINE = 20  # characters from which a line that recurs is a reminder
_ITEM = re.compile(r"^\d+\. ", re.MULTILINE)
_DIGITS = re.compile(r"\d+")


def injected(replayed: Replayed, runs: Sequence[Run]) -> dict[str, Any]:
    """Return how much was injected: requests, tokens, memories of each kind, reminders, and the longest."""
    episodes, insertions = replayed.episodes, replayed.insertions
    requests = sum(e.requests for e in episodes)
    kinds = Counter(item.kind for insertion in insertions for item in insertion.placement.items)
    parts = [(e.injected_tokens, e.injected_tokens + e.prompt_tokens) for e in episodes]
    reminders = Reminders(runs)
    return {
        "requests": requests,
        **share("injected_requests", sum(e.injected_requests for e in episodes), requests),
        **ratio("injected_token_share", parts),
        "exemplars": kinds["exemplar"],
        "fixes": kinds["fix"],
        "failures": kinds["failure"],
        "procedures": kinds["procedure"],
        "reminders_injected": sum(reminders.count(insertion) for insertion in insertions),
        "longest_item_chars": max((n for i in insertions for n in item_lengths(i)), default=0),
    }


class Reminders:
    """The harness speaking: messages and lines that recur in three families or more, with digits masked."""

    def __init__(self, runs: Sequence[Run]) -> None:
        """Read what users and tools said in all runs."""
        messages: dict[str, set[str]] = {}
        lines: dict[str, set[str]] = {}
        for run in runs:
            for message in run.messages:
                if message.get("role") in ("user", "tool"):
                    text = text_of(message)
                    messages.setdefault(masked(text), set()).add(run.family)
                    for line in set(map(masked, text.splitlines())):
                        if len(line) >= _LINE:
                            lines.setdefault(line, set()).add(run.family)
        self._messages = {text for text, families in messages.items() if text and len(families) >= FAMILIES}
        self._lines = {line for line, families in lines.items() if len(families) >= FAMILIES}

    def count(self, insertion: Insertion) -> int:
        """Return how many memories of an insertion are reminders: exemplars whose task is one, procedures with one.

        A fix quotes its error, which may well recur.
        """
        kinds = [item.kind for item in insertion.placement.items]
        spoken = any(masked(line.lstrip("| ")) in self._lines for line in insertion.text.splitlines())
        return sum(masked(task) in self._messages for task in insertion.tasks) + spoken * kinds.count("procedure")


def masked(text: str) -> str:
    """Return a text with digits masked and white space folded."""
    return " ".join(_DIGITS.sub("0", text).split())


def item_lengths(insertion: Insertion) -> list[int]:
    """Return the lengths of the memories in an insertion, in characters; of a block's items without its heading."""
    items, payload = insertion.placement.items, insertion.placement.payload
    if not isinstance(payload, str):
        texts = [len(text_of(message)) for message in payload]
        return [sum(texts[i : i + 2]) for i in range(0, len(texts), 2)]
    parts = [part for block in payload.split(BLOCK_BEGIN) for part in _ITEM.split(block)[1:]]
    return [len(part) for part in parts] if len(parts) == len(items) else [len(payload)]


def fixes(insertions: Sequence[Insertion]) -> dict[str, Any]:
    """Return how often a fix that was injected in a resolved run is among the agent's next actions."""
    found = [
        followed(item.suggestion, insertion.run, insertion.index)
        for insertion in insertions
        if insertion.run.resolved
        for item in insertion.placement.items
        if item.kind == "fix"
    ]
    return share("fix_followed", sum(found), len(found))


def followed(suggestion: str | None, run: Run, index: int) -> bool:
    """Whether one of the agent's next actions is a suggestion."""
    if suggestion is None:
        return False
    latest = max((act.index for act in run.acts if act.index < index), default=-1)
    suggested = {key for act in run.acts if act.index == latest for key in suggested_keys(act, suggestion)}
    return any(act.key in suggested for act in run.from_index(index)[:_NEXT])


def suggested_keys(act: Act, suggestion: str) -> Iterator[str]:
    """Return the canonical forms that a suggestion may have: the failed call with one text, or all, replaced."""
    yield canonical_action(act.tool, suggestion)
    given, replaced = arguments_of(act.arguments), arguments_of(suggestion)
    if "" not in replaced:
        yield canonical_action(act.tool, json.dumps({**given, **replaced}))
    for name in (name for name, value in given.items() if isinstance(value, str)):
        yield canonical_action(act.tool, json.dumps({**given, name: suggestion}))


def foreign(insertions: Sequence[Insertion], runs: Sequence[Run]) -> dict[str, Any]:
    """Return the number of foreign values in all insertions, by kind, and examples of them.

    Tools' names are among them where the log brings no tool schemas: their number is given besides.
    """
    values = Values(runs)
    tools = {act.tool for run in runs for act in run.acts}
    found: Counter[tuple[str, str]] = Counter()
    for insertion in insertions:
        request = request_text(insertion.run, insertion.index)
        found.update((insertion.kinds, value) for value in values.foreign(insertion.text, insertion.run, request))
    kinds: Counter[str] = Counter()
    for (kind, _), count in found.items():
        kinds[kind] += count
    return {
        "foreign_values": sum(found.values()),
        "foreign_tool_names": sum(count for (_, value), count in found.items() if value in tools),
        "foreign_by_kind": dict(kinds),
        "foreign_examples": [f"{kind}: {value[:80]}" for (kind, value), _ in found.most_common(_EXAMPLES)],
    }
