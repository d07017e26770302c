"""Induction of the edit programs that explain one example, the simplest first.

Programming by example as in FlashFill (Gulwani 2011, "Automating string processing in spreadsheets using input-output
examples"): every derivation of the working action from the failing action and its output is a hypothesis; agreement
among examples shows which of them generalise.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from difflib import SequenceMatcher

from optillm_memory.learn.cases import TRANSFORMS, Case, occurrences
from optillm_memory.learn.edits import (
    Expression,
    Program,
    Selector,
    apply,
    cost,
    expression_cost,
    safe,
    select,
    selector_cost,
)

MOST_PROGRAMS = 16
_PER_WORD, _PER_HUNK, _ANCHORS = 6, 14, 6
_AFFIX = 40
_MOST_CHARS, _MOST_WORDS = 4_000, 80
_PIECE = re.compile(r"\w+|\s+|[^\w\s]")
_IDENTIFIER = re.compile(r"[A-Za-z_*][\w.]*")
_MOST_PIECES, _MOST_PAIRS = 600, 6
_INNER = ("dirname", "basename", "without_slash", "unquoted", "bare")
_NEAR = ("any", "suggested", "output", "known")


def induce(case: Case, fix: str) -> list[Program]:
    """Return programs that turn the case into the fix, the simplest first, `MOST_PROGRAMS` at most.

    Each of them, applied to the case, gives the fix (white space collapsed). The last is the fix itself.
    A long action or fix is only explained as a whole: by texts before and after it, and by the fix as it is.
    """
    fix = " ".join(fix.split()) if "\n" not in fix else fix.strip()
    if max(len(case.action), len(fix)) > _MOST_CHARS or max(len(case.tokens), len(_words(fix))) > _MOST_WORDS:
        found = _fitting(_wrapped(case, fix), case, fix)
    else:
        found = {*_single(case, fix), *_fitting(_chains(case, fix), case, fix)}
    found.discard(("whole", fix))
    ranked = sorted(found, key=lambda p: (cost(p), repr(p)))[: MOST_PROGRAMS - 1]
    return [*ranked, *_fitting([("whole", fix)], case, fix)]


def _single(case: Case, fix: str) -> list[Program]:
    candidates = itertools.chain(_renamed(case, fix), _named(case, fix), _wholesale(case, fix), _hunks(case, fix))
    return sorted(_fitting(candidates, case, fix), key=lambda p: (cost(p), repr(p)))


def _fitting(candidates: Iterable[Program], case: Case, fix: str) -> set[Program]:
    wanted = _words(fix)
    made = ((p, apply(p, case)) for p in candidates)
    if "\n" in fix or "\n" in case.action:  # white space matters in several lines
        return {p for p, text in made if text is not None and text.strip() == fix.strip()}
    return {p for p, text in made if text is not None and _words(text) == wanted}


def _chains(case: Case, fix: str) -> Iterable[Program]:
    # Another action comes before or after: each part is an edit of the action, or composed of its words.
    pieces = fix.split(" && ")
    if not 1 < len(pieces) <= 3 or len(pieces) == len(case.action.split(" && ")):  # noqa: PLR2004
        return
    options: list[list[Program]] = []
    for piece in pieces:
        if _words(piece) == case.action.split():
            options.append([("same",)])
            continue
        sources = [_expressions(word, case, None)[:4] for word in _words(piece)[:12]]
        every = itertools.islice(itertools.product(*sources), 400)
        made = sorted(every, key=lambda c: sum(expression_cost(e) for e in c))[:8]
        options.append([*_single(case, piece)[:8], *(("words", content) for content in made)])
    for combination in itertools.islice(itertools.product(*options), 120):
        yield ("chain", "&&", combination)


def _words(action: str) -> list[str]:
    return action.split()


def _wholesale(case: Case, fix: str) -> Iterable[Program]:
    if case.is_query or "\n" in case.action or "(" in case.action:
        yield from _swapped(case.action, fix)
    yield from _spans(case, fix)
    yield from (("without", token) for token in dict.fromkeys(case.tokens))
    yield from _wrapped(case, fix)
    old, new = set(case.action) - set(fix), set(fix) - set(case.action)
    if len(old) == 1 and len(case.action) == len(fix):
        changed = {b for a, b in zip(case.action, fix, strict=True) if a != b}
        yield from (("characters", old.copy().pop(), b) for b in changed | new)
    for number in range(len(case.proposals)):
        yield from (("propose", number, how) for how in ("rest", "flags", "alone"))


def _swapped(action: str, fix: str) -> Iterable[Program]:
    # Code: the pieces that differ, with neighbouring pieces where a piece alone would match anywhere.
    one, other = _PIECE.findall(action), _PIECE.findall(fix)
    if max(len(one), len(other)) > _MOST_PIECES:
        return
    for beside in (0, 1, 2):
        pairs = []
        for tag, low, high, first, last in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
            if tag == "equal":
                continue
            more = beside or (1 if low == high else 0)
            before, after = min(more, low, first), min(more, len(one) - high, len(other) - last)
            old, new = one[low - before : high + after], other[first - before : last + after]
            pairs.append(("".join(old), "".join(new)))
        if 0 < len(pairs) <= _MOST_PAIRS:
            yield ("swaps", tuple(pairs))


def _wrapped(case: Case, fix: str) -> Iterable[Program]:
    action = case.action.strip()
    if not action:
        return
    for quoted in (True, False):
        before, found, after = fix.partition(action.replace('"', '\\"') if quoted else action)
        if found and len(action) > 1 and (not quoted or before.endswith('"')):
            yield ("wrap", before, after, quoted)
            break


def _named(case: Case, fix: str) -> Iterable[Program]:
    # One of the likely wrong words (or a part of it) is replaced.
    for number, (index, part) in enumerate(case.named[:4]):
        before, after = case.tokens[index].split(part, 1) if part in case.tokens[index] else ("", "")
        made = _words(fix)
        if len(made) != len(case.tokens):
            continue
        word = made[index]
        if word.startswith(before) and word.endswith(after) and len(word) > len(before) + len(after):
            text = word[len(before) : len(word) - len(after)]
            for expression in _expressions(text, case, part):
                yield ("named", number, expression)


def _renamed(case: Case, fix: str) -> Iterable[Program]:
    # A name that the output quotes stands for something else, or needs the name of what it belongs to.
    for number, name in enumerate(case.identifiers):
        yield ("unprefix", number)
        for how in ("all", "bare", "first"):
            match = occurrences(name, bare=how != "all").search(case.action)
            if match is None or not fix.startswith(case.action[: match.start()]):
                continue
            found = _IDENTIFIER.match(fix, match.start())
            if found is None or found[0] == name:
                continue
            text = found[0]
            for expression in _expressions(text, case, name)[:_PER_HUNK]:
                yield ("rename", number, how, expression)
            before, dot, last = text.rpartition(".")
            if dot and last == name:
                for keyword in ("FROM", "JOIN"):
                    yield ("rename", number, how, ("dotted", ("clause", keyword), ("own",)))
                for number_of, quoted in enumerate(case.quoted[:4]):
                    if quoted.startswith(f"{before}."):
                        inner = ("map", "first_part", ("quoted", number_of))
                        yield ("rename", number, how, ("dotted", inner, ("own",)))


def _spans(case: Case, fix: str) -> Iterable[Program]:
    # Between two keywords of a query something short stands instead.
    if not case.is_query:
        return
    words = [w for w in dict.fromkeys(case.tokens) if w.isalpha() and w.isupper()][:8]
    for start, end in itertools.pairwise(words):
        _, _, rest = fix.partition(f"{start} ")
        text, found, _ = rest.partition(f" {end}")
        if found and len(text) <= _AFFIX:
            yield ("span", start, end, text)


def _hunks(case: Case, fix: str) -> Iterable[Program]:
    target = Case(fix, "").tokens
    if " ".join(target).split() != _words(fix):
        target = _words(fix)
    matcher = SequenceMatcher(None, case.tokens, target, autojunk=False)
    options: list[list[tuple[Selector, int, int, tuple[Expression, ...]]]] = []
    for tag, low, high, first, last in matcher.get_opcodes():
        if tag == "equal":
            continue
        if len(options) == 3 or last - first > 12:  # noqa: PLR2004
            return
        contents = _contents(case, target[first:last], list(range(low, high)))
        anchors = _anchors(case, low, high)
        pairs = itertools.product(anchors, contents)
        found = [(anchor, high - low, side, content) for (anchor, side), content in pairs]
        options.append(sorted(found, key=_hunk_cost)[: _PER_HUNK * 3])
    if not options:
        return
    keep = {1: _PER_HUNK * 3, 2: 9, 3: 4}[len(options)]
    for combination in itertools.product(*(o[:keep] for o in options)):
        yield ("hunks", combination)


def _hunk_cost(hunk: tuple[Selector, int, int, tuple[Expression, ...]]) -> float:
    return selector_cost(hunk[0]) + sum(expression_cost(e) for e in hunk[3])


def _anchors(case: Case, low: int, high: int) -> list[tuple[Selector, int]]:
    # The start of the hunk: the word itself, or for an insertion a word beside it.
    if high > low:
        return [(s, 0) for s in _selectors(case, low)]
    found: list[tuple[Selector, int]] = []
    if low > 0:
        found += [(s, 1) for s in _selectors(case, low - 1)]
    if low < len(case.tokens):
        found += [(s, 0) for s in _selectors(case, low)]
    return sorted(found, key=lambda pair: selector_cost(pair[0]))[: 2 * _ANCHORS]


def _selectors(case: Case, index: int) -> list[Selector]:
    found: list[Selector] = [
        ("start", index - case.head),
        ("end", len(case.tokens) - 1 - index),
        ("is", case.tokens[index]),
    ]
    found += [("named", k) for k, (i, _) in enumerate(case.named[:3]) if i == index]
    return [s for s in found if select(s, case) == index]


def _contents(case: Case, words: list[str], replaced: list[int]) -> list[tuple[Expression, ...]]:
    if not words:
        return [()]
    found: list[tuple[Expression, ...]] = []
    joined = " ".join(words)
    for number, proposal in enumerate(case.proposals):
        shown = [safe(w) for w in proposal]
        starts = (start for start in range(min(len(shown), 6)) if " ".join(shown[start:]) == joined)
        found += [(("proposed", number, start, True),) for start in starts]
    sources: list[list[Expression]] = []
    for offset, word in enumerate(words):
        own = replaced[offset] if offset < len(replaced) else replaced[-1] if replaced else None
        sources.append(_expressions(word, case, None if own is None else case.tokens[own])[:_PER_WORD])
    # All combinations of a few words; else only all literal texts, and the simplest expression of each.
    if len(words) <= 3:  # noqa: PLR2004
        found += itertools.islice(itertools.product(*sources), 60)
    else:
        found.append(tuple(s[0] for s in sources))
        found.append(tuple(("text", w) for w in words))
    unique = dict.fromkeys(found)
    return sorted(unique, key=lambda c: sum(expression_cost(e) for e in c))[:_PER_HUNK]


def _expressions(text: str, case: Case, own: str | None) -> list[Expression]:
    """Return expressions with this value in a case, the simplest first; `own` is the replaced word."""
    found: list[Expression] = [("text", text)]
    if own is not None:
        found += [("near", where, ("own",)) for where in _NEAR if case.near(own, where) == text]
        found += _mapped(own, text, ("own",))
        found += _spelled(own, text, ("own",))
    for index, word in enumerate(case.tokens):
        if word != own:
            for selector in _selectors(case, index):
                found += _from_word(word, text, ("word", selector))
    found += _from_output(case, text)
    return sorted(dict.fromkeys(found), key=lambda e: (expression_cost(e), repr(e)))


def _from_word(word: str, text: str, expression: Expression) -> list[Expression]:
    if word == text:
        return [expression]
    found = _mapped(word, text, expression)
    # In a short word any part may be wrong: a flag's letter, a mistyped sign.
    found += _spelled(word, text, expression) if len(word) < 4 else _affixed(word, text, expression)  # noqa: PLR2004
    for name in _INNER:
        inner = TRANSFORMS[name](word)
        if inner and inner != word:
            found += _affixed(inner, text, ("map", name, expression))
    return found


def _from_output(case: Case, text: str) -> list[Expression]:
    found: list[Expression] = []
    for number, item in enumerate(case.quoted):
        name, expression = safe(item), ("quoted", number)
        derived = [*_mapped(name, text, expression), *_affixed(name, text, expression)]
        found += [expression] if name == text else derived
    for number, proposal in enumerate(case.proposals):
        found += [("proposed", number, i, False) for i, word in enumerate(proposal[:8]) if safe(word) == text]
    if len(text) > 1:
        for word, after in itertools.pairwise(case.words):
            if after == text and case.after(word) == text and word.isalpha():
                found.append(("after", word.lower()))
    return found


def _mapped(value: str, text: str, expression: Expression) -> list[Expression]:
    return [("map", name, expression) for name, change in TRANSFORMS.items() if value != text and change(value) == text]


def _affixed(value: str, text: str, expression: Expression) -> list[Expression]:
    if len(value) < 2 or len(text) - len(value) > _AFFIX:  # noqa: PLR2004
        return []
    if text.startswith(value):
        return [("affix", "", text[len(value) :], expression)]
    if text.endswith(value):
        return [("affix", text[: -len(value)], "", expression)]
    at = text.find(value)
    # Texts on both sides are quotation marks or the like; letters on both sides are a coincidence.
    if at > 0 and not text[at - 1].isalnum() and not text[at + len(value)].isalnum():
        return [("affix", text[:at], text[at + len(value) :], expression)]
    return []


def _spelled(value: str, text: str, expression: Expression) -> list[Expression]:
    # The word with a text before or after it, or with a part replaced.
    found = _affixed(value, text, expression) if value != text else []
    start = 0
    while start < min(len(value), len(text)) and value[start] == text[start]:
        start += 1
    end = 0
    while end < min(len(value), len(text)) - start and value[-1 - end] == text[-1 - end]:
        end += 1
    old, new = value[start : len(value) - end], text[start : len(text) - end]
    if old and len(new) <= _AFFIX and (start or end):
        where = "start" if not start else "end" if not end else "inside"
        if where != "inside" or len(old) > 1:
            found.append(("replace", where, old, new, expression))
    return found
