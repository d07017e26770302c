"""Edit programs for failing actions: they explain their example, carry over to other cases, and never break."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optillm_memory.learn.cases import Case, Vocabulary, most_similar, tokenize
from optillm_memory.learn.edits import Program, apply, cost, literals
from optillm_memory.learn.induce import MOST_PROGRAMS, induce

WORDS = st.sampled_from(
    ["git", "sudo", "run", "-v", "--all", "a/b/c", "./x.sh", "foo", "foo.py", "'q r'", '"', "&&", "0d", "=", "é", "x=1"]
)
ACTIONS = st.one_of(st.lists(WORDS, min_size=1, max_size=7).map(" ".join), st.text(max_size=40))
LINES = ["error: no such 'foo'", "Did you mean?", "\tfood", "  git run foo", "use `run --all`", "/a/b/c:", "' '"]
OUTPUTS = st.one_of(st.text(max_size=120), st.lists(st.sampled_from(LINES), max_size=6).map("\n".join))
RELAXED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = [
    ("git puhs", "git: 'puhs' is not a git command.\n\nThe most similar command is\n\tpush\n", "git push"),
    ("touch /p/q/r", "touch: cannot touch '/p/q/r': No such file or directory", "mkdir -p /p/q && touch /p/q/r"),
    ("pip install foo", "Permission denied", "pip install --user foo"),
    ("tool push", "no upstream, use\n\n    tool push --to origin main\n", "tool push --to origin main"),
    ('say "a" > b', "Permission denied", 'sudo sh -c "say \\"a\\" > b"'),
    ("cc cc foo", "", "cc foo"),
    ("open here.io", "here.io: nothing of that name", "open http://here.io"),
    ("tool tag 0k foo", "", "tool tag -R 0k && tool tag -k foo"),
]
PIECES = [
    ":",
    "'",
    "a",
    "'a",
    "a/",
    "\\",
    " ",
    "\n",
    '"\n`',
    "- ",
    "error 'x' ",
    "\x00\ud800é",
    "x=",
    "did you mean: ",
    "did you mean?\n",
]
HOSTILE = [(piece * 20_000)[:20_000] for piece in PIECES]


def normal(action: str) -> str:
    """Return an action with single blanks."""
    return " ".join(action.split())


def programs(action: str, output: str, fix: str) -> list[Program]:
    """Return what explains one example."""
    return induce(Case(action, output, Vocabulary()), fix)


@RELAXED
@given(ACTIONS, OUTPUTS, ACTIONS)
def test_every_program_reproduces_its_example(action: str, output: str, fix: str) -> None:
    """Whatever the example: each induced program, applied to it, gives the fix, and there are not too many."""
    case = Case(action, output, Vocabulary([fix]))
    found = induce(case, fix)
    assert len(found) <= MOST_PROGRAMS
    for program in found:
        made = apply(program, case)
        assert made is not None
        assert normal(made) == normal(fix)
        assert cost(program) > 0


@RELAXED
@given(st.sampled_from(MANY), ACTIONS, OUTPUTS)
def test_programs_never_raise_on_another_case_and_are_deterministic(
    example: tuple[str, str, str], action: str, output: str
) -> None:
    """A program meets any other text without raising, and says the same twice."""
    vocabulary = Vocabulary(fix for _, _, fix in MANY)
    for program in programs(*example):
        first = apply(program, Case(action, output, vocabulary))
        assert first == apply(program, Case(action, output, vocabulary))
        assert first is None or (first.strip() and first != action)


@pytest.mark.parametrize("example", MANY, ids=lambda e: e[0])
def test_something_better_than_the_string_explains_each_kind_of_repair(example: tuple[str, str, str]) -> None:
    """For every kind of repair there is a simpler program than the fix as it is, which stands last."""
    found = programs(*example)
    assert found[-1] == ("whole", example[2])
    assert len(found) > 1
    assert cost(found[0]) < cost(found[-1])


@pytest.mark.parametrize(
    ("example", "action", "output", "wanted"),
    [
        (MANY[0], "helm instal x", "Error: unknown 'instal'\n\nDid you mean this?\n\tinstall\n", "helm install x"),
        (MANY[1], "touch /x/y", "touch: cannot touch '/x/y': No such file or directory", "mkdir -p /x && touch /x/y"),
        (MANY[2], "pip install bar", "Permission denied", "pip install --user bar"),
        (MANY[3], "tool push", "no upstream, use\n\n    tool push --to mine dev\n", "tool push --to mine dev"),
        (MANY[4], "ls > c", "Permission denied", 'sudo sh -c "ls > c"'),
        (MANY[5], "make make all", "", "make all"),
        (MANY[6], "open there.io", "there.io: nothing of that name", "open http://there.io"),
        (MANY[7], "tool tag 0m bar", "", "tool tag -R 0m && tool tag -m bar"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else None,
)  # fmt: skip
def test_slots_bind_to_another_cases_own_words(
    example: tuple[str, str, str], action: str, output: str, wanted: str
) -> None:
    """Some program of one example makes the right action of a like case with other words."""
    case = Case(action, output, Vocabulary())
    assert wanted in {apply(program, case) for program in programs(*example)}


def test_proposals_keep_what_else_the_action_said() -> None:
    """A proposed command takes the place of what it says anew; other options stay where they belong."""
    output = "no upstream, use\n\n    tool push --set-upstream origin main\n"
    cases = {
        "tool push -u": "tool push --set-upstream origin main",
        "tool push origin": "tool push --set-upstream origin main",
        "tool push --quiet": "tool push --set-upstream origin main --quiet",
        "tool -c a=b push --quiet origin": "tool -c a=b push --set-upstream origin main --quiet",
        "sudo tool push": "sudo tool push --set-upstream origin main",
    }
    assert {action: apply(("propose", 0, "rest"), Case(action, output)) for action in cases} == cases


def test_the_word_at_fault_is_the_one_complained_of() -> None:
    """What the output quotes as wrong comes before words that it merely mentions."""
    case = Case("tool --all run biuld now", "usage: tool run NAME now\nunknown task 'biuld'")
    assert case.named[0] == (3, "biuld")


def test_nearness_prefers_swapped_letters_and_what_is_proposed() -> None:
    """A swap of letters is a likely slip, and a proposed word beats a known one."""
    assert [word for word, _ in most_similar("sl", ["so", "ls"], 0.0)] == ["ls"]
    assert list(most_similar("abc", ["xyz", "abc", ""], 0.0)) == []
    case = Case("tool stat", "Did you mean this?\n\tstatus\n", Vocabulary(["tool start"]))
    assert case.near("stat", "any") == "status"
    assert case.near("stat", "known") == "start"


def test_a_vocabulary_without_an_action_is_as_if_it_had_not_seen_it() -> None:
    """Leaving an action out changes the copy alone, and only by that action."""
    vocabulary = Vocabulary(["git push here", "git pull", "ls && cd there"])
    less = vocabulary.without("git push here")
    assert set(less.words("git", first=False)) == {"pull"}
    assert set(less.words("", first=False)) == {"pull", "there"}
    assert set(vocabulary.words("git", first=False)) == {"push", "here", "pull"}
    assert set(vocabulary.without("ls && cd there").words("", first=True)) == {"git"}


def test_quoted_texts_are_one_word_and_odd_marks_none() -> None:
    """Quotation marks hold a word together where they match."""
    assert tokenize("say 'a b' \"c d\"") == ["say", "'a b'", '"c d"']
    assert tokenize("say 'a b") == ["say", "'a", "b"]


def test_literals_are_what_a_program_spells_out() -> None:
    """Only a program's own texts are literals, wherever they stand in it."""
    program = ("chain", "&&", (("words", (("text", "mkdir"), ("word", ("is", "foo")))), ("wrap", "a ", "", False)))
    assert literals(program) == ["mkdir", "foo", "a ", ""]
    assert literals(("named", 0, ("affix", "x", "", ("own",)))) == ["x", ""]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:3]))
def test_hostile_texts_take_no_long_time(text: str) -> None:
    """20 kB of anything, as action, output or fix, is explained and mended in bounded time."""
    started = time.process_time()
    vocabulary = Vocabulary(["git push"])
    for action, output, fix in (("git psh", text, "git push"), (text, "no", "git push"), ("git psh", "no", text)):
        case = Case(action, output, vocabulary)
        for program in induce(case, fix):
            apply(program, case)
    for example in MANY[:4]:
        for program in programs(*example):
            apply(program, Case(text, text, vocabulary))
    assert time.process_time() - started < 5
