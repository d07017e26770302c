"""Edit programs: transformations of a failing action into one that worked, which generalise to other cases.

A program is a nested tuple of names, numbers and texts: data, never code. It is interpreted on a Case; where one of its
parts is missing in the case, the result is None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optillm_memory.learn.cases import TRANSFORMS, Case, occurrences

Program = tuple[Any, ...]
Selector = tuple[Any, ...]
Expression = tuple[Any, ...]
_LONGEST = 4_000
_CUT = 1.0


def apply(program: Program, case: Case) -> str | None:
    """Return the result of a program on a case; None where it does not apply or changes nothing."""
    made = _PROGRAMS[program[0]](program, case)
    if made is None or not made.strip() or made.split() == case.action.split() or len(made) > _LONGEST:
        return None
    return made


def evaluate(expression: Expression, case: Case, own: str | None = None) -> str | None:
    """Return the value of an expression in a case; `own` is the word that it replaces."""
    kind = expression[0]
    if kind == "own":
        return own
    if kind in _WRAPPERS:
        text = evaluate(expression[-1], case, own)
        return None if text is None else _WRAPPERS[kind](expression, text, case)
    return _EXPRESSIONS[kind](expression, case)


def select(selector: Selector, case: Case) -> int | None:
    """Return the index of the selected word in a case."""
    kind, value = selector
    if kind == "start":
        index = case.head + value
    elif kind == "end":
        index = len(case.tokens) - 1 - value
    elif kind == "is":
        return case.tokens.index(value) if value in case.tokens else None
    else:
        index = case.named[value][0] if value < len(case.named) else -1
    return index if 0 <= index < len(case.tokens) else None


def literals(program: Program) -> list[str]:
    """Return the literal texts of a program, in contrast to those that it takes from the case."""
    kind = program[0]
    if kind in ("text", "is", "whole"):
        return [program[1]]
    if kind in ("span", "clause"):
        return list(program[3:])
    if kind in ("affix", "wrap"):
        return [program[1], program[2], *(literals(program[3]) if kind == "affix" else ())]
    if kind == "replace":
        return [program[2], program[3], *literals(program[4])]
    if kind == "swaps":
        return [new for _, new in program[1]]
    return [text for part in program if isinstance(part, tuple) and part for text in _nested(part)]


def _nested(part: Program) -> list[str]:
    if isinstance(part[0], str):
        return literals(part)
    return [text for inner in part if isinstance(inner, tuple) and inner for text in _nested(inner)]


def cost(program: Program) -> float:
    """Return the description length of a program in rough bits: it grows with its parts and its literal texts."""
    return float(_PROGRAM_COST[program[0]](*program[1:]))


def _hunks_cost(hunks: Program) -> float:
    total = 0.0
    for anchor, count, side, expressions in hunks:
        total += 1.0 + selector_cost(anchor) + 0.2 * count + (0.3 if side else 0.0)
        total += sum(expression_cost(e) for e in expressions)
    return total


def _piece_cost(piece: Program) -> float:
    if piece[0] == "words":
        return 0.5 + sum(expression_cost(e) for e in piece[1])
    return 0.0 if piece[0] == "same" else cost(piece)


def selector_cost(selector: Selector) -> float:
    """Return a selector's share of a program's cost."""
    kind, value = selector
    if isinstance(value, str):  # a flag or a plain word may be part of the language, a name or a path is of one case
        return 1.2 if value.lstrip("-").replace("-", "").islower() and value.isascii() else 2.5
    return float(_SELECTOR_COST[kind] + 0.4 * abs(value))


def expression_cost(expression: Expression) -> float:
    """Return an expression's share of a program's cost."""
    kind, *parts = expression
    if kind in _EXPRESSION_COST:
        return float(_EXPRESSION_COST[kind](*parts))
    return 1.5 + sum(0.4 * part for part in parts if isinstance(part, int))


def _cut(before: str, after: str) -> float:
    # Letters added directly to letters of a word are seldom meant: such programs explain a word by chance.
    return _CUT if before[-1:].isalnum() or after[:1].isalnum() else 0.0


def _replaced_cost(_where: str, old: str, new: str, inner: Expression) -> float:
    return 2.0 + 0.3 * (len(old) + len(new)) + max(_cut(old, ""), _cut(new, "")) + expression_cost(inner)


def _affixed_cost(before: str, after: str, inner: Expression) -> float:
    return 2.0 + 0.3 * (len(before) + len(after)) + _cut(before, after) + expression_cost(inner)


_NEAR_COST = {"any": 1.0, "suggested": 1.4, "output": 1.4, "known": 1.7}
_PROGRAM_COST: dict[str, Callable[..., float]] = {
    "hunks": _hunks_cost,
    "named": lambda number, expression: 1.5 + 0.4 * number + expression_cost(expression),
    "propose": lambda number, _how: 3.0 + number,
    "wrap": lambda before, after, _quoted: 2.0 + 0.3 * (len(before) + len(after)) + _cut(before, after),
    "characters": lambda _old, _new: 4.0,
    "swaps": lambda pairs: 2.0 + sum(1.0 + 0.15 * (len(old) + len(new)) for old, new in pairs),
    "without": lambda _word: 2.5,
    "rename": lambda number, how, expression: 1.0 + 0.4 * number + 0.3 * (how != "all") + expression_cost(expression),
    "unprefix": lambda number: 2.0 + 0.4 * number,
    "span": lambda _start, _end, text: 3.0 + 0.3 * len(text),
    "chain": lambda _operator, pieces: 1.0 + sum(_piece_cost(piece) for piece in pieces),
    "whole": lambda fix: 12.0 + 0.25 * len(fix),
}
_EXPRESSION_COST: dict[str, Callable[..., float]] = {
    "own": lambda: 0.3,
    "word": lambda selector: 0.5 + selector_cost(selector),
    "after": lambda _keyword: 4.5,
    "clause": lambda _keyword: 0.5,
    "dotted": lambda _before, inner: 0.3 + expression_cost(inner) + expression_cost(_before),
    "map": lambda _name, inner: 1.0 + expression_cost(inner),
    "near": lambda where, inner: _NEAR_COST[where] + expression_cost(inner),
    "affix": _affixed_cost,
    "replace": _replaced_cost,
    "text": lambda text: 2.0 + 0.3 * min(len(text), 30),
}
_SELECTOR_COST = {"start": 0.6, "end": 0.8, "named": 0.5}


def _hunks(program: Program, case: Case) -> str | None:
    words: list[str | None] = list(case.tokens)
    extra: dict[int, list[str]] = {}
    for anchor, count, side, expressions in program[1]:
        at = select(anchor, case)
        if at is None or at + count > len(words):
            return None
        for index in range(at, at + count):
            if words[index] is None:
                return None
            words[index] = None
        made = []
        for offset, expression in enumerate(expressions):
            text = evaluate(expression, case, case.tokens[at + min(offset, count - 1)] if count else None)
            if text is None:
                return None
            made.append(text)
        extra.setdefault(at + side, []).extend(made)
    result: list[str] = []
    for index in range(len(words) + 1):
        result += extra.get(index, [])
        if index < len(words) and (word := words[index]) is not None:
            result.append(word)
    return " ".join(result)


def _named(program: Program, case: Case) -> str | None:
    _, number, expression = program
    if number >= len(case.named):
        return None
    index, part = case.named[number]
    made = evaluate(expression, case, part)
    if made is None or made == part:
        return None
    words = list(case.tokens)
    words[index] = words[index].replace(part, made, 1)
    return " ".join(words)


def _without(program: Program, case: Case) -> str | None:
    return " ".join(t for t in case.tokens if t != program[1])


def _wrap(program: Program, case: Case) -> str:
    _, before, after, quoted = program
    action = case.action.strip()
    if quoted:
        action = action.replace('"', '\\"')
    return f"{before}{action}{after}"


def _propose(program: Program, case: Case) -> str | None:
    # The command that the output suggests, with the other words of the action.
    _, number, how = program
    if number >= len(case.proposals):
        return None
    proposal = [safe(w) for w in case.proposals[number]]
    if how == "alone":
        return " ".join(proposal)
    words = case.tokens[case.head :]
    if not words or words[0] != proposal[0]:  # another program is suggested
        return " ".join([*case.tokens[: case.head], *proposal, *words[1:]])
    # Options before the subcommand stay there.
    at = words.index(proposal[1]) if len(proposal) > 1 and proposal[1] in words else 0
    rest = [w for w in words[at + 1 :] if not _covered(w, proposal)]
    if how == "flags":
        rest = [w for w in rest if w.startswith("-")]
    return " ".join([*case.tokens[: case.head], *words[: max(at, 1)], *proposal[1:], *rest])


def safe(word: str) -> str:
    """Return a word of the output with a single quotation mark escaped."""
    # A single quotation mark in the output is part of a name; in an action it would open a quotation.
    return word.replace("'", "\\'") if word.count("'") == 1 and '"' not in word else word


def _covered(word: str, proposal: list[str]) -> bool:
    # The suggested command contains the word, or the long form of a short flag.
    if word in proposal:
        return True
    letter = word[1:] if len(word) == 2 and word[0] == "-" else ""  # noqa: PLR2004
    return bool(letter) and any(f"-{letter}" in p for p in proposal if p.startswith("--"))


def _chain(program: Program, case: Case) -> str | None:
    made = []
    for piece in program[2]:
        if piece[0] == "same":
            text: str | None = case.action.strip()
        elif piece[0] == "words":
            words = [evaluate(expression, case) for expression in piece[1]]
            text = None if any(w is None for w in words) else " ".join(w for w in words if w is not None)
        else:
            text = apply(piece, case)
        if not text:
            return None
        made.append(text)
    return f" {program[1]} ".join(made)


def _swaps(program: Program, case: Case) -> str | None:
    # The texts are replaced in order, each after the one before.
    text, at = case.action, 0
    for old, new in program[1]:
        found = text.find(old, at)
        if found < 0:
            return None
        text = text[:found] + new + text[found + len(old) :]
        at = found + len(new)
    return text


def _rename(program: Program, case: Case) -> str | None:
    # A name that the output quotes, wherever it stands in the action, or only where it is not qualified.
    _, number, how, expression = program
    if number >= len(case.identifiers):
        return None
    name = case.identifiers[number]
    made = evaluate(expression, case, name)
    if made is None or made == name:
        return None
    pattern = occurrences(name, bare=how != "all")
    return pattern.sub(lambda _: made, case.action, count=1 if how == "first" else 0)


def _unprefix(program: Program, case: Case) -> str | None:
    number = program[1]
    return case.action.replace(f"{case.identifiers[number]}.", "") if number < len(case.identifiers) else None


def _span(program: Program, case: Case) -> str | None:
    # What stands between two words, the first of their kind.
    _, start, end, text = program
    before, found, rest = case.action.partition(f"{start} ")
    _, found_end, after = rest.partition(f" {end}")
    return f"{before}{start} {text} {end}{after}" if found and found_end else None


_PROGRAMS: dict[str, Callable[[Program, Case], str | None]] = {
    "hunks": _hunks,
    "wrap": _wrap,
    "characters": lambda program, case: case.action.replace(program[1], program[2]),
    "swaps": _swaps,
    "named": _named,
    "without": _without,
    "rename": _rename,
    "unprefix": _unprefix,
    "span": _span,
    "propose": _propose,
    "chain": _chain,
    "whole": lambda program, _case: program[1],
}


def _quoted(expression: Expression, case: Case) -> str | None:
    return safe(case.quoted[expression[1]]) if expression[1] < len(case.quoted) else None


def _word(expression: Expression, case: Case) -> str | None:
    index = select(expression[1], case)
    return None if index is None else case.tokens[index]


def _replace(expression: Expression, text: str, _case: Case) -> str | None:
    _, where, old, new, _ = expression
    if where == "start":
        return new + text[len(old) :] if text.startswith(old) else None
    if where == "end":
        return text[: len(text) - len(old)] + new if text.endswith(old) else None
    return text.replace(old, new, 1) if old in text else None


# Expressions on another expression, which is their last part.
_WRAPPERS: dict[str, Callable[[Expression, str, Case], str | None]] = {
    "map": lambda expression, text, _case: TRANSFORMS[expression[1]](text),
    "near": lambda expression, text, case: case.near(text, expression[1]),
    "affix": lambda expression, text, _case: f"{expression[1]}{text}{expression[2]}",
    "replace": _replace,
}


def _proposed(expression: Expression, case: Case) -> str | None:
    _, number, start, whole = expression
    if number >= len(case.proposals):
        return None
    words = [safe(w) for w in case.proposals[number][start:]]
    return (" ".join(words) if whole else words[0]) if words else None


def _dotted(expression: Expression, text: str, case: Case) -> str | None:
    before = evaluate(expression[1], case)
    return None if before is None or before == text else f"{before}.{text}"


_WRAPPERS["dotted"] = _dotted
_EXPRESSIONS: dict[str, Callable[[Expression, Case], str | None]] = {
    "text": lambda expression, _case: expression[1],
    "word": _word,
    "quoted": _quoted,
    "after": lambda expression, case: case.after(expression[1]),
    "clause": lambda expression, case: case.clause(expression[1]),
    "proposed": _proposed,
}
