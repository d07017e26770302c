"""Signatures: the same error is the same wherever it happens, and another one is another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optillm_memory.conversation.signature import normalised, signature_of

ANY_TEXT = st.text(st.characters())  # with lone surrogates and NUL
NAMES = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)


def key(text: str) -> str:
    """Return the key of the error in a text."""
    signature = signature_of(text)
    assert signature is not None
    return signature.key


def python(root: str, line: int, error: str, *, first: str = "") -> str:
    """Return a Python traceback as it is printed."""
    frame = f'Traceback (most recent call last):\n  File "{root}/app/run.py", line {line}, in <module>\n    main()\n'
    during = "\nDuring handling of the above exception, another exception occurred:\n\n"
    return (f"{frame}{first}\n{during}" if first else "") + f"{frame}{error}\n"


KNOWN = [
    (
        "python|KeyError|<quoted>",
        python("/tmp/a", 3, "KeyError: 'port'"),
    ),
    (
        "python|RuntimeError|cannot read settings",
        python("/a", 1, "RuntimeError: cannot read settings", first="E: x"),
    ),
    (
        "python|json.decoder.JSONDecodeError|Expecting value: line <num> column <num> (char <num>)",
        python("/a", 3, "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    ),
    (
        "python|SyntaxError|invalid syntax",
        '  File "a.py", line 1\n    def f(:\n          ^\nSyntaxError: invalid syntax\n',
    ),
    (
        "javascript|TypeError|Cannot read properties of undefined (reading <quoted>)",
        (
            "/srv/a.js:2\nuser.name\n\nTypeError: Cannot read properties of undefined (reading 'name')\n"
            "    at f (/srv/a.js:2:5)\n\nNode.js v20.1.0\n"
        ),
    ),
    (
        "java|java.lang.NumberFormatException|For input string: <quoted>",
        (
            'Exception in thread "main" java.lang.IllegalStateException: no\n\tat A.main(A.java:3)\n'
            'Caused by: java.lang.NumberFormatException: For input string: "x1"\n\tat A.main(A.java:2)\n'
            "\t... 1 more\n"
        ),
    ),
    (
        "go|panic|assignment to entry in nil map",
        "panic: assignment to entry in nil map\n\ngoroutine 1 [running]:\nmain.main()\n",
    ),
    ("go|error|undefined: missing", "# example.com/x\n./main.go:6:7: undefined: missing\n"),
    (
        "rust|panic|index out of bounds: the len is <num> but the index is <num>",
        (
            "thread 'main' panicked at src/main.rs:1:50:\n"
            "index out of bounds: the len is 0 but the index is 3\nnote: run with `x`\n"
        ),
    ),
    (
        "rust|E0433|failed to resolve: use of undeclared type <quoted>",
        "error[E0433]: failed to resolve: use of undeclared type `HashMap`\n --> src/main.rs:2:13\n",
    ),
    ("c|error|expected <quoted> before <quoted>", "a.c:3:3: error: expected \u2018;\u2019 before \u2018return\u2019\n"),
    (
        "c|link|undefined reference to <quoted>",
        (
            "/usr/bin/ld: /tmp/ccA1.o: in function `main':\na.c:(.text+0xa): undefined reference to `helper'\n"
            "collect2: error: ld returned 1 exit status\n"
        ),
    ),
    ("shell|command not found|<name>: command not found", "bash: line 1: frob: command not found\n"),
    (
        "shell|No such file or directory|<name>: No such file or directory",
        "cat: notes.txt: No such file or directory\n",
    ),
    ("shell|Permission denied|<name>: Permission denied", "bash: ./run.sh: Permission denied\n"),
    (
        "git|fatal|not a git repository (or any of the parent directories): .git",
        "fatal: not a git repository (or any of the parent directories): .git\n",
    ),
    (
        "cli|error|pathspec <quoted> did not match any file(s) known to git",
        "error: pathspec 'x' did not match any file(s) known to git\n",
    ),
    (
        "npm|error|Missing script: <quoted>",
        'npm error Missing script: "x"\nnpm error\nnpm error To see a list of scripts, run:\n',
    ),
    ("cli|ERROR|No matching distribution found for requests", "ERROR: No matching distribution found for requests\n"),
    (
        "make|error|No rule to make target <quoted>, needed by <quoted>. Stop.",
        "make: *** No rule to make target 'a.o', needed by 'all'.  Stop.\n",
    ),
    ("sqlite3|in prepare|no such table: <name>", "Error: in prepare, no such table: users\n"),
    ("sqlite3|Parse|no such table: <name>", "Parse error near line 1: no such table: users\n"),
    ("psql|ERROR|relation <quoted> does not exist", 'ERROR:  relation "users" does not exist\nLINE 1: select\n'),
    ("mysql|1146 (42S02)|Table <quoted> doesn't exist", "ERROR 1146 (42S02) at line 1: Table 'a.b' doesn't exist\n"),
    ("http|404|Not Found", "HTTP/1.1 404 Not Found\nServer: x\n\nno\n"),
    ("curl|22|The requested URL returned error: <num>", "curl: (22) The requested URL returned error: 404\n"),
    ("tool|not_found|no file at <path>", '{"error": {"type": "not_found", "message": "no file at /tmp/x/y.txt"}}'),
    (
        "python|AssertionError|test_sum: assert <num> == <num>",
        "FAILED tests/test_a.py::test_sum - assert 3 == 4\n1 failed in 0.1s\n",
    ),
    (
        "python|ZeroDivisionError|test_z: division by zero",
        "FAILED test_a.py::A::test_z[1] - ZeroDivisionError: division by zero\n",
    ),
    (
        "go|FAIL|TestTwo: <path>: got <num>, want <num>",
        "--- FAIL: TestTwo (0.00s)\n    a_test.go:7: got 1, want 2\nFAIL\n",
    ),
    (
        "rust|E0382|borrow of moved value: <quoted>",
        '{"exit_code": 1, "stdout": "", "stderr": "error[E0382]: borrow of moved value: `s`\\n"}',
    ),
    (
        "ruby|NoMethodError|undefined method <quoted> for nil:NilClass",
        "a.rb:2:in `f': undefined method `upcase' for nil:NilClass (NoMethodError)\n",
    ),
    ("typescript|TS2304|Cannot find name <quoted>.", "src/a.ts(3,5): error TS2304: Cannot find name 'x'.\n"),
    ("text|could not|could not reach the office", "starting\ncould not reach the office\nbye\n"),
]


@pytest.mark.parametrize(("expected", "text"), KNOWN, ids=[k for k, _ in KNOWN])
def test_each_language_and_tool_has_its_signature(expected: str, text: str) -> None:
    """The language, the class and the message are found, and what varies is a slot."""
    assert key(text) == expected


def test_different_errors_differ() -> None:
    """No two of the known errors share a key, nor are errors of other classes alike."""
    assert len({k for k, _ in KNOWN}) == len(KNOWN)
    left, right = signature_of(python("/a", 1, "KeyError: 'x'")), signature_of(python("/a", 1, "TypeError: 'x'"))
    assert left is not None
    assert right is not None


def test_slots_hold_what_stood_there() -> None:
    """A fix can bind to what the message named, in its order."""
    signature = signature_of(python("/a", 1, "ValueError: row 17 of '/tmp/x.csv' at 0x7f00 lacks \"id\""))
    assert signature is not None
    assert signature.message == "row <num> of <quoted> at <addr> lacks <quoted>"
    assert signature.slots == ("17", "/tmp/x.csv", "0x7f00", "id")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("in /tmp/pytest-of-me/0/x.py now", "in <path> now"),
        ("in C:\\Users\\me\\x.py now", "in <path> now"),
        ("in ./src/a.c:3:5 now", "in <path> now"),
        ("after 3.5 of 1,024 or -1e9", "after <num> of <num> or <num>"),
        ("took 12ms for 3kB", "took <num>ms for <num>kB"),
        ("at 0xdeadBEEF on 10.0.0.1:80", "at <addr> on <addr>"),
        ("commit 63093ed1 is gone", "commit <hash> is gone"),
        ("id 123e4567-e89b-12d3-a456-426614174000", "id <uuid>"),
        ("on 2024-03-01T10:00:01.5Z and 10:00:01", "on <time> and <time>"),
        ("see https://example.org/a?b=1", "see <url>"),
        ("no 'a b' nor \"c\" nor `d` nor ‘e’", "no <quoted> nor <quoted> nor <quoted> nor <quoted>"),  # noqa: RUF001
        ("can't and won't stay", "can't and won't stay"),
        ("E0382 and utf8 and x86_64 stay", "E0382 and utf8 and x86_64 stay"),
    ],
)
def test_what_varies_becomes_a_slot(text: str, expected: str) -> None:
    """Paths, numbers, addresses, hashes, times and quoted names go; words stay."""
    assert normalised(text)[0] == expected


@given(
    st.lists(NAMES, min_size=1, max_size=4),
    st.integers(1, 10**6),
    st.integers(0, 2**64),
    NAMES,
    st.uuids(),
)
def test_the_same_error_elsewhere_has_the_same_key(
    parts: list[str], line: int, number: int, name: str, uuid: object
) -> None:
    """Another temp folder, line, address, hash, id or quoted name does not change the key."""

    def error(root: str, line: int, number: int, name: str, uuid: object) -> str:
        message = f"cannot load '{name}' from {root}/data/{name}.txt at 0x{number:x} (try {number}, id {uuid})"
        return python(root, line, f"app.LoadError: {message}")

    other = error("/tmp/" + "/".join(parts), line, number, name, uuid)
    base = error("/srv/one", 7, 99, "x", "123e4567-e89b-12d3-a456-426614174000")
    assert key(other) == key(base)


@given(NAMES, NAMES)
def test_classes_that_differ_never_share_a_key(one: str, other: str) -> None:
    """The class is part of the key as it is."""
    keys = {name: key(python("/a", 1, f"{name.title().replace('_', '')}XError: same")) for name in (one, other)}
    assert (keys[one] == keys[other]) == (one.title().replace("_", "") == other.title().replace("_", ""))


@given(
    ANY_TEXT | st.lists(st.sampled_from(["'", '"', "/a/b", "1", "0x1", "`", " ", "<num>", ": ", "a.py"])).map("".join)
)
def test_normalisation_is_idempotent(text: str) -> None:
    """A normal message is its own normal form, in valid Unicode, on one line."""
    once, _ = normalised(text)
    once.encode("utf-8")
    assert normalised(once)[0] == once
    assert "\n" not in once


@given(ANY_TEXT)
def test_any_text_has_a_signature_or_none(text: str) -> None:
    """Nothing raises; only a text that says nothing has no signature."""
    signature = signature_of(text)
    assert signature is None or signature.key.count("|") >= 2
    assert signature_of(" \n") is None
