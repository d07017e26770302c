"""The house: rooms import upwards, modules stay small, the surface is pinned, and one place holds the SQL."""

from __future__ import annotations

import ast
import contextlib
import graphlib
import inspect
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import optillm_memory
from optillm_memory import errors
from optillm_memory.store.base import Store
from optillm_memory.store.sqlite.store import DIALECT, SqliteStore
from optillm_memory.store.transaction import Transaction

PACKAGE = Path(optillm_memory.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
RESEARCH = sorted((Path(__file__).parent.parent / "benchmarks").rglob("*.py"))
# Each line imports only from the lines below it and from the vocabulary.
VOCABULARY = {"records", "errors", "settings"}
LAYERS = [
    {"cli", "ui"},
    {"demo", "bench"},
    {"testing"},
    {"host"},
    {"adapters"},
    {"memory"},
    {"request"},
    {"background"},
    {"store"},
    {"inject", "learn", "decide"},
    {"recall"},
    {"conversation"},
]
PURE = {"inject", "learn", "decide", "recall", "conversation"}
# Loaded into other people's test sessions: they import pytest, each other, and the standard library.
CLIENTS = {"adapters/pytest_plugin.py", "adapters/pytest_report.py"}


def name_of(path: Path) -> str:
    """Return a module's path inside the package."""
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    """Return the room that a module is in: its folder, or itself at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path, *, at_import: bool = False) -> set[str]:
    """Return the modules that a module imports anywhere in it, or when it is itself imported."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_import else ast.walk(tree):
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
def test_packages_import_only_from_those_below(path: Path) -> None:
    """What a module imports of the package is vocabulary, its own package, or a package on a lower line."""
    package = room_of(path)
    if package == "__init__":
        return
    used = {m.split(".")[1] for m in imports_of(path) if m.startswith("optillm_memory.")}
    if package in VOCABULARY:
        assert used <= VOCABULARY
        return
    if name_of(path) in CLIENTS:
        modules = {f"optillm_memory/{name}".removesuffix(".py").replace("/", ".") for name in CLIENTS}
        outer = {m for m in imports_of(path) if m.split(".")[0] not in sys.stdlib_module_names}
        assert all(m == "pytest" or any(f"{m}.".startswith(f"{module}.") for module in modules) for m in outer)
        return
    rank = next(n for n, line in enumerate(LAYERS) if package in line)
    assert used <= VOCABULARY.union(*LAYERS[rank:])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_package_needs_nothing_that_is_not_in_the_wheel(path: Path) -> None:
    """No module imports the research code or the tests: they are not installed with it."""
    assert not {m.split(".")[0] for m in imports_of(path)} & {"benchmarks", "tests"}


def test_no_module_imports_in_a_circle() -> None:
    """No module needs, at its own import, one that needs it."""
    names = {f"optillm_memory.{name_of(p)[:-3].replace('/', '.')}".removesuffix(".__init__"): p for p in MODULES}
    needs = {name: imports_of(path, at_import=True) & names.keys() - {name} for name, path in names.items()}
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("path", [*MODULES, *RESEARCH], ids=lambda path: path.relative_to(PACKAGE.parent).as_posix())
def test_modules_stay_small(path: Path) -> None:
    """No module is far over 400 lines, where one asks if it holds two ideas; no function scrolls; all say what for."""
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 480
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
    assert {room_of(path) for path in MODULES} >= PURE
    for path in MODULES:
        if room_of(path) in PURE:
            assert not {m.split(".")[0] for m in imports_of(path)} & world, path


def test_surface_is_pinned() -> None:
    """The public names are these; one more or less is a decision, not an accident."""
    assert optillm_memory.__all__ == [
        "AgentMemoryError", "EncoderUnavailable", "Feedback", "FeedbackReceipt", "Hit", "HostError", "InvalidField",
        "Memory", "MemoryRecord", "NotAllowed", "NotFound", "Scope", "Settings", "StoreError", "StoreTooNew",
        "StoreTooOld", "StoreUnavailable", "TooLarge", "TooMany", "Turn", "View", "__version__",
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


def test_the_store_is_composed_of_its_tables(tmp_path: Path) -> None:
    """No class of the store has two bases of ours, stubs or forwards by name; it has parts."""
    names = {n.name for p in MODULES for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.ClassDef)}
    for path in (path for path in MODULES if room_of(path) == "store"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert len([base for base in node.bases if ast.unparse(base).split(".")[-1] in names]) <= 1, node.name
            elif isinstance(node, ast.FunctionDef):
                assert node.name != "__getattr__", path
            elif isinstance(node, ast.Raise):
                assert "NotImplementedError" not in ast.unparse(node), path
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        written = list(vars(Transaction(db, DIALECT)).values())
    with contextlib.closing(SqliteStore(tmp_path / "memory.db")) as store:
        read = list(vars(store).values())
    for kind, parts in ((Transaction, written), (Store, read)):
        assert kind.__bases__ == (object,)
        families = {type(part).__module__ for part in parts}
        assert len([name for name in families if name.startswith("optillm_memory.store.tables.")]) >= 7


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
    assert inside >= {"store/sqlite/connection.py", "store/sqlite/migrations.py", "store/transaction.py"}
    assert found - inside <= {"recall/encoder.py", "host/doctor.py"}
    executes = {
        name_of(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("execute", "executemany", "executescript")
    }
    assert {name for name in executes if not name.startswith("store/")} <= {"host/doctor.py"}


def test_memory_is_the_facade() -> None:
    """Only what Memory is made of reaches the store behind it: routes, commands and benches call Memory."""
    inside = {"memory.py", "request", "background", "store"}
    reaching = {
        name_of(path)
        for path in MODULES
        if path.relative_to(PACKAGE).parts[0] not in inside
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("store", "_store")
    }
    assert reaching == set()


def test_threads_are_started_in_one_place() -> None:
    """Whatever else needs a thread takes a `ThreadStarter`; what runs in processes of its own starts its own."""
    starts = {"Thread", "Timer", "ThreadPoolExecutor", "start_new_thread"}
    found = {
        name_of(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in starts
    }
    allowed = {"store/threads.py", "adapters/pytest_report.py"}
    assert {name for name in found if name.split("/")[0] not in ("testing", "bench")} <= allowed
    assert "store/threads.py" in found


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
    rooms = {name for name in broad if name.split("/")[0] not in ("cli", "bench", "testing", "demo")}
    handed_on = {
        "host/doctor.py", "host/runtime.py", "host/direct.py", "adapters/pytest_report.py", "recall/openvino.py",
        "background/encoder_service.py", "background/maintenance.py", "background/worker.py", "background/threads.py",
        "store/threads.py", "store/writer.py", "store/sqlite/writer.py", "learn/forms.py",
    }  # fmt: skip
    assert rooms <= {"host/failopen.py", *handed_on}
