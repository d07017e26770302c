"""Foreign values: what an injection repeats of other people's runs and this request does not hold."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optillm_memory.bench.trajectories.actions import texts_in
from optillm_memory.bench.trajectories.runs import Run, calls_in
from optillm_memory.conversation.text import text_of
from optillm_memory.inject.render import MARK

FAMILIES = 3  # a value that stands in so many is nobody's
_LEAF = 4  # characters of a text inside of JSON that counts as a value
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"[\w.+-]+@[\w-]+\.[\w.-]*\w",  # e-mails
        r"https?://[^\s\"'<>)\]}|]*[^\s\"'<>)\]}|.,;:]",  # URLs
        r"(?<![\w/.~-])(?:~|\.{1,2})?(?:/[\w.@+-]+)+",  # paths from a root
        r"(?<![\w/.~-])[\w@+-][\w.@+-]*(?:/[\w.@+-]+)+",  # relative ones: see _is_path
        r"\b\d{4}-\d{2}-\d{2}\b|\b\d{1,2}/\d{1,2}/\d{2,4}\b|\b\d{1,2}\.\d{1,2}\.\d{4}\b",  # dates
        r"(?<!\d[/.])\b\d{4,}\b(?!-\d\d?-\d)",  # numbers, but for the year of a date
        r"\b(?=\w*[^\W\d_])(?=\w*[\d_])\w{5,}\b",  # tokens that mix letters with digits or _
        r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+)\b)",  # capitalised pairs, overlapping ones too
    )
)
_WORD = re.compile(r"\w+")
_EXTENSION = re.compile(r"\.\w{1,5}$")


def values_in(text: str) -> set[str]:
    """Return the values of a text that belong to somebody or something: addresses, paths, dates, numbers, names."""
    found = set()
    for pattern in _PATTERNS:
        for match in pattern.finditer(text):
            value = match.group(1) if pattern.groups else match.group()
            if "/" not in value or _is_path(value):
                found.add(value)
    return found


def _is_path(value: str) -> bool:
    # `and/or` is none.
    return (
        value[0] in "/~."
        or value.count("/") > 1
        or bool(_EXTENSION.search(value))
        or value[0].isdigit()
        or "@" in value
    )


class Values:
    """Which values stand in which runs: what memory repeats of one run's values in another is foreign there."""

    def __init__(self, runs: Sequence[Run]) -> None:
        """Read all runs."""
        self._families: defaultdict[str, set[str]] = defaultdict(set)
        self._runs: defaultdict[str, set[int]] = defaultdict(set)
        self._leaves: defaultdict[str, set[str]] = defaultdict(set)  # by their first word
        for run in runs:
            leaves = {leaf for act in run.acts for t in (act.arguments, act.observation) for leaf in leaves_in(t)}
            for leaf in leaves:
                if word := _WORD.search(leaf):
                    self._leaves[word.group()].add(leaf)
            texts = [text for message in run.messages for text in texts_of(message)]
            for value in leaves.union(*(values_in(text) for text in texts)):
                self._families[value].add(run.family)
                self._runs[value].add(run.number)

    def foreign(self, inserted: str, run: Run, request: str) -> set[str]:
        """Return the values of an insertion that are another run's, and neither this request's nor of many families.

        `request` is what `request_text` returns.
        """
        text = folded("\n".join(line.removeprefix(MARK) for line in inserted.splitlines()))
        found = values_in(inserted) | set(self._standing(text))
        lowered = request.lower()
        return {
            value
            for value in found
            if self._runs.get(value, set()) - {run.number}
            and len(self._families[value]) < FAMILIES
            and value.lower() not in lowered
        }

    def _standing(self, text: str) -> Iterator[str]:
        """Return the texts inside of JSON, of any run, that stand in this text as words of their own."""
        for word in _WORD.finditer(text):
            for leaf in self._leaves.get(word.group(), ()):
                start = word.start() - leaf.index(word.group())
                end = start + len(leaf)
                if (
                    start >= 0
                    and text.startswith(leaf, start)
                    and not (
                        (leaf[-1].isalnum() and text[end : end + 1].isalnum())
                        or (leaf[0].isalnum() and start and text[start - 1].isalnum())
                    )
                ):
                    yield leaf


def request_text(run: Run, index: int) -> str:
    """Return all texts of the request that a message answers, as the client sent it, with its tools."""
    texts = [text for message in run.messages[:index] for text in texts_of(message)]
    return folded("\n".join([*texts, json.dumps(list(run.tools), ensure_ascii=False) if run.tools else ""]))


def texts_of(message: Mapping[str, Any]) -> Iterator[str]:
    """Return the texts of a message: its content, and its calls' tools and arguments, as sent and taken out of JSON."""
    yield text_of(message)
    for _, tool, arguments in calls_in(message):
        yield tool
        yield arguments
        yield from leaves_in(arguments)


def leaves_in(text: str) -> Iterator[str]:
    """Return the texts of some length inside of a JSON text, white space folded."""
    if text[:1] in ("{", "["):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return
        yield from (leaf for leaf in map(folded, texts_in(value)) if len(leaf) >= _LEAF)


def folded(text: str) -> str:
    """Return a text with white space folded."""
    return " ".join(text.split())
