"""The house: rooms import upwards, modules stay small, the surface is pinned, and one place holds the SQL."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optillm_memory
from optillm_memory import errors

PACKAGE = Path(optillm_memory.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# In the order of the data: a room imports from rooms above it and from the vocabulary.
VOCABULARY = {"records", "errors", "settings"}
ORDER = [
    "conversation",
    "recall",
    "decide",
    "inject",
    "learn",
    "store",
    "turn",
    "locating",
    "advising",
    "reusing",
    "routing",
    "recording",
    "upkeep",
    "memory",
    "host",
    "cli",
    "bench",
]
# Loaded into other people's processes: they import nothing of the package, and nothing that is not there anyway.
CLIENTS = {"pytest_plugin": {"pytest"}}


def name_of(path: Path) -> str:
    """Return a module's path inside the package."""
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    """Return the room that a module is in: its folder, or itself at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Return the modules that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_import_is_light() -> None:
    """`import optillm_memory` loads no model library, no web framework and no host."""
    heavy = ("torch", "transformers", "sentence_transformers", "flask", "optillm", "openai", "httpx")
    code = f"import sys, optillm_memory; print([m for m in {heavy!r} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout == "[]\n"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_rooms_import_only_from_rooms_above(path: Path) -> None:
    """No room looks down: what it imports of the package is vocabulary, itself, or a room earlier in the data's way."""
    room = room_of(path)
    if room == "__init__":
        return
    used = {m.split(".")[1] for m in imports_of(path) if m.startswith("optillm_memory.")}
    if room in VOCABULARY:
        assert used <= VOCABULARY
        return
    if room in CLIENTS:
        outer = {m.split(".")[0] for m in imports_of(path)} - sys.stdlib_module_names
        assert outer == CLIENTS[room]
        return
    rank = ORDER.index(room)
    above = {*VOCABULARY, *ORDER[: rank + 1]}
    if room in ("cli", "bench"):  # people's ways in lie side by side
        above |= {"cli", "bench", "__version__"}
    assert used <= above


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_stay_small(path: Path) -> None:
    """No module is over 400 lines, no function scrolls, and every module says what it is."""
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 400
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name


def test_rooms_are_pure_but_for_those_that_touch_the_world() -> None:
    """The rooms of the algorithms open no file, socket, process or database and read no environment."""
    world = {
        "sqlite3",
        "socket",
        "subprocess",
        "os",
        "requests",
        "httpx",
        "openai",
        "flask",
        "sqlite_utils",
        "tempfile",
    }
    for path in MODULES:
        if room_of(path) in ("conversation", "decide", "inject", "learn", "recall", "turn"):
            assert not {m.split(".")[0] for m in imports_of(path)} & world, path


def test_surface_is_pinned() -> None:
    """The public names are these; one more or less is a decision, not an accident."""
    assert optillm_memory.__all__ == [
        "AgentMemoryError", "EncoderUnavailable", "Feedback", "FeedbackReceipt", "Hit", "HostError", "InvalidField",
        "Memory", "MemoryRecord", "NotFound", "Scope", "Settings", "StoreError", "StoreTooNew", "StoreUnavailable",
        "TooLarge", "Turn", "__version__",
    ]  # fmt: skip
    for name in optillm_memory.__all__:
        assert hasattr(optillm_memory, name)


def test_error_tree_is_the_docstring() -> None:
    """The tree in the module's docstring is the tree of the classes, and every error is public."""
    shown = []
    for indent, name in re.findall(r"^( *)- (\w+):", errors.__doc__ or "", re.MULTILINE):
        shown.append((len(indent) // 2, name))

    def walk(kind: type, depth: int) -> list[tuple[int, str]]:
        children: list[type] = type.__subclasses__(kind)
        below = [child for child in children if child.__module__ == errors.__name__]
        order = sorted(below, key=lambda child: inspect.getsourcelines(child)[1])
        return [(depth, kind.__name__), *(item for child in order for item in walk(child, depth + 1))]

    assert shown == walk(errors.AgentMemoryError, 0)
    classes = {n for n, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__}
    assert classes == {name for _, name in shown}
    assert classes <= set(optillm_memory.__all__)


SQL = re.compile(
    r"^\s*(?:SELECT\s.+\sFROM\b|INSERT\s+(?:OR\s+\w+\s+)?INTO\b|UPDATE\s+\w+\s+SET\b|DELETE\s+FROM\b|PRAGMA\s|"
    r"CREATE\s+(?:VIRTUAL\s+)?(?:TABLE|INDEX)\b|BEGIN\s+IMMEDIATE)",
    re.DOTALL,
)


def test_only_the_store_holds_sql() -> None:
    """No string outside `store/` is SQL, but for a sample text, the doctor's write probe and tasks about SQL."""
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and SQL.match(node.value):
                found.add(name_of(path))
    inside = {name for name in found if name.startswith("store/")}
    assert inside >= {"store/connection.py", "store/migrations.py", "store/sqlite.py", "store/transaction.py"}
    tasks = {name for name in found if name.startswith("bench/agent_tasks")}
    assert found - inside - tasks <= {"recall/encoder.py", "host/doctor.py"}
    executes = {
        name_of(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("execute", "executemany", "executescript")
    }
    assert {name for name in executes if not name.startswith("store/")} <= {"host/doctor.py", "bench/faultdisk.py"}


def test_one_place_fails_open() -> None:
    """Outside the few that hand a fault to whoever asked, only the host's guard catches every exception."""
    broad = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None
                or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
            ):
                reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                if not reraises:
                    broad.add(name_of(path))
    rooms = {name for name in broad if name.split("/")[0] not in ("cli", "bench")}
    handed_on = {
        "host/doctor.py", "host/hooks.py", "upkeep.py", "pytest_plugin.py", "recall/openvino.py", "recall/service.py",
        "recall/behind.py", "store/writer.py", "reusing.py", "learn/forms.py",
    }  # fmt: skip
    assert rooms <= {"host/failopen.py", *handed_on}
