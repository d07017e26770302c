"""Intents: whether a later action is another try at what a failing one was for, and no more than an edit of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache

from optillm_memory.conversation.actions import Action
from optillm_memory.conversation.commands import SEARCHERS
from optillm_memory.learn.procedures.values import leaves, parsed

LONGEST_FIX = 600  # characters: what is longer is a text of its own, and no correction of an action
_ALIKE, _SHARED, _KEPT = 0.6, 0.34, 0.5
_COMPARED = 600  # characters of two actions that are compared
_FEW_WORDS = 4  # that may differ whatever the rest
_MOST_LINES, _LONG_LEAF = 8, 300
_SPECIFIC = 8  # characters of a plain word that says what an action is about
_HEREDOC = re.compile(r"<<-?\s{0,3}['\"\\]?[A-Za-z_]\w*")
_CD = re.compile(r"^\s*cd\s+\S+\s*(?:&&|;)\s*")
# An interpreter with a file, or a file itself: what fails is what the file says.
_SCRIPT = re.compile(
    r"^(?:\S*/)?(?:python[\d.]*|node|ruby|perl|php|bash|sh)\s+[^\s-]\S*\.\w+|^\./\S+|^\S+\.(?:py|sh|js|rb|pl)\b"
)
# Programs that change files, or run the agent's own: what they did is of this episode.
EDITS = re.compile(
    r"(?:^|[;&|\n]\s*)(?:(?:sed|perl|awk|patch|tee|cp|mv|rm|ed|dd"
    r"|git (?:apply|checkout|restore|stash|reset|add|commit))"
    r"(?=\s|$)|(?:\S*/)?(?:python[\d.]*|node|ruby|bash|sh)\s)"
)
_MODULE = re.compile(r"(?:\S*/)?python[\d.]*(?:\s+-[A-Za-ln-z]\S*)*\s+-m\s*([\w.]+)")
_MISSING = re.compile(r"no such file|can(?:no|')t (?:open|find|access)|not found|does not exist", re.IGNORECASE)
_INTERPRETER = re.compile(r"(?:\S*/)?(?:python[\d.]*|node|ruby|bash|sh)")
# Programs that only show something.
LOOKS = frozenset(
    (
        *("cat", "ls", "head", "tail", "pwd", "which", "find", "tree", "less", "echo", "type", "file", "wc"),
        *("show", "desc", "describe", "explain", "pragma", "help"),
        *SEARCHERS,
    )
)
_PAGER = re.compile(
    r"\s*(?:2>&1|2>/dev/null|&>\S+|\|&?\s*(?:cat|less|more|head|tail|tee)(?:\s+-{1,2}\w[\w=]*|\s+\d+)*)\s*$"
)


def core(text: str) -> str:
    """Return a command without the folder that it changes to first and the pipes that only shorten its output."""
    text = _CD.sub("", text)
    while (shorter := _PAGER.sub("", text)) != text:
        text = shorter
    return text.strip()


def is_document(action: Action) -> bool:
    """Whether an action carries a text of its own: a file's content, a long script, a passage to be replaced."""
    text = action.text
    if len(text) > LONGEST_FIX or text.count("\n") >= _MOST_LINES or _HEREDOC.search(text):
        return True
    bodies = [action.rest] if action.field else [text, action.rest]
    return any(len(leaf) > _LONG_LEAF or leaf.count("\n") > 1 for body in bodies for leaf in _leaves(body))


def same_intent(failed: Action, later: Action, error: str = "") -> bool:
    """Whether an action tries again what another was for, as a small edit of it.

    Its words are alike, or, where the program was at fault by the `error`, its objects (paths, names) are the same.
    A script fails for what is in it: another script is another action, unless it was not found.
    """
    if (failed.tool, failed.field) != (later.tool, later.field):
        return False
    before, after = core(failed.text), core(later.text)
    one, other = before.split(), after.split()
    if not one or not other or is_document(later):
        return False
    changes = EDITS.match(after) is not None and not _INTERPRETER.fullmatch(other[0])
    looks = other[0].lower() in LOOKS and not SEARCHERS.issuperset((one[0], other[0]))
    if other[0] != one[0] and (changes or looks):
        return False
    objects, kept = _objects(one), _objects(other)
    if objects and not objects & kept and _SCRIPT.search(before) and not _MISSING.search(error):
        return False
    if _program_at_fault(one, error) and objects and 2 * len(objects & kept) > len(objects):
        return True
    return _alike_words(one, other, before, after) and _is_small(tuple(one), tuple(other))


def drops_module(failed: Action, later: Action) -> bool:
    """Whether an action runs without the module that another one ran, as `python f.py` for `python -m pytest f.py`."""
    module = _MODULE.match(core(failed.text))
    return module is not None and _MODULE.match(core(later.text)) is None and module[1] not in later.text.split()


def _program_at_fault(words: list[str], error: str) -> bool:
    """Whether an error names the program, or the module that an interpreter was to run: what is before any object."""
    program = list(itertools.takewhile(lambda w: w not in _objects(words), words))
    return any(len(w) > 1 and re.search(rf"(?<![\w.-]){re.escape(w)}(?![\w-])", error) for w in program[:4])


def _alike_words(one: list[str], other: list[str], before: str, after: str) -> bool:
    first, second = set(one), set(other)
    if first <= second:
        return True  # the same with more words, or after something else
    shared = len(first & second) / len(first | second)
    if shared >= _SHARED and (one[0] == other[0] or one[0] in other or len(one) > 1):
        return True
    return alike(before[:_COMPARED], after[:_COMPARED], _ALIKE)


def _objects(words: Sequence[str]) -> set[str]:
    return {
        word
        for word in words[1:]
        if not word.startswith("-") and (any(c in word for c in "/._") or len(word) >= _SPECIFIC)
    }


@lru_cache(maxsize=8192)
def _is_small(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    kept = sum(block.size for block in matcher.get_matching_blocks())
    return max(len(one), len(other)) - kept <= _FEW_WORDS or kept >= _KEPT * max(len(one), len(other))


@lru_cache(maxsize=16_384)  # an episode is mined again with each of its steps
def alike(one: str, other: str, least: float) -> bool:
    """Whether two texts share so much of their characters, in order (Ratcliff and Metzener 1988)."""
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)  # each is an upper bound of the next
    return all(bound() >= least for bound in bounds)


def _leaves(text: str) -> list[str]:
    """Return the texts in JSON arguments; what looks like JSON and is none is one text."""
    return [leaf for _, leaf in leaves(parsed(text)) if isinstance(leaf, str)] if text.startswith(("{", "[")) else []
