"""The documentation says what the code does: nothing is left out, nothing is stale, links and paths resolve."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click
import pytest
from conftest import SLOW
from readme_parts import PAGES, ROOT, route_list, slug, walk

import optillm_memory
from optillm_memory.conversation.options import KEYS
from optillm_memory.settings import CLIENT_VARIABLES, ENV_PREFIX, table

PACKAGE = ROOT / "optillm_memory"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
HTTP_API = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
LINKED = [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"))]


def prose(path: Path) -> str:
    """Return a page's text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def section(text: str, heading: str) -> str:
    """Return what stands under a heading, up to the next one of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{level}}} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, heading
    return found[1]


def test_generated_parts_are_fresh() -> None:
    """Every page holds its generated parts as the code would write them now."""
    pages = [str(page.relative_to(ROOT)) for page in PAGES]
    command = [sys.executable, "-m", "cogapp", "--check", *pages]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"run: cog -r README.md docs/*.md\n{done.stdout}{done.stderr}"
    parts = ("settings", "routes", "commands", "command_line", "python_api", "tree")
    written = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [part for part in parts if f"readme_parts.{part}()" not in written] == []


def test_the_readme_is_short() -> None:
    """The front page is read in two minutes: at most 200 lines."""
    assert README.count("\n") <= 200


PRIVATE = ("starts shut", "behind the requests", "behind its back", "taken in a second", "believed")


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.name)
def test_the_language_is_plain(page: Path) -> None:
    """No page uses the private words that once made this project hard to read; generated parts are included."""
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert [word for word in PRIVATE if word in text] == []


# -- what must be in it -----------------------------------------------------------------------------


def test_every_command_and_option_has_help() -> None:
    """No command and no option of the command line is without a word of help."""
    for name, command in walk():
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


def test_every_route_and_method_has_a_section() -> None:
    """Each route is documented under a heading of its own with its method, and no other route is."""
    routes = {f"{method} {path}" for method, path, _ in route_list()}
    assert sum(route.startswith("DELETE ") for route in routes) >= 3  # what once was not looked for
    assert all(help_ for _, _, help_ in route_list())
    headings = re.findall(r"^### `([A-Z]+ /\S+)`$", HTTP_API, re.MULTILINE)
    assert sorted(headings) == sorted(routes)
    for heading in headings:
        assert section(HTTP_API, f"### `{heading}`").strip(), heading


def test_every_route_that_is_mentioned_exists() -> None:
    """A method with one of our paths, wherever it stands in the documentation, names a route that is there."""
    known = {(method, path) for method, path, _ in route_list()}
    short = {(method, path.removeprefix("/v1/agent_memory/")) for method, path in known}
    for page in LINKED:
        for method, path in re.findall(r"`(GET|POST|PUT|PATCH|DELETE) ([a-z/_{}1]+)", page.read_text(encoding="utf-8")):
            assert (method, path) in known | short | {("GET", "/v1/models")}, f"{page.name}: {method} {path}"


def test_every_request_key_is_documented() -> None:
    """Every key of the field `agent_memory` has a row in its table, and no other key has."""
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", section(HTTP_API, "### Request field"), re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == list(KEYS)


def test_every_setting_that_is_mentioned_exists() -> None:
    """Each variable with our prefix that stands in the documentation is a setting, or one of the pytest plugin's."""
    known = {name for name, _, _ in table()} | CLIENT_VARIABLES
    renamed = {ENV_PREFIX + name for name in ("AUDITION", "EXPLORATION")}  # the changelog tells of them
    for page in LINKED:
        found = set(re.findall(rf"{ENV_PREFIX}[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")))
        allowed = known | renamed if page.name == "CHANGELOG.md" else known
        assert found <= allowed, f"{page.name}: {found - allowed}"


def test_every_error_code_and_reason_is_documented() -> None:
    """Each error code, and each reason for what memory did or left out, is explained in the HTTP API's page."""
    codes = set(_keywords(PACKAGE / "host", "code"))
    assert {"invalid_field", "not_found", "too_large", "memory_unavailable"} <= codes
    reasons = {*_reasons(), *_refusals()}
    assert {"mode_off", "nothing_relevant", "refused_before", "veto_numbers", "several_choices", "better"} <= reasons
    assert {"reuse_no_action", "tool_forbidden", "changes_state", "unsupported_approach"} <= reasons
    assert len(reasons) > 30
    assert {name for name in codes | reasons if f"`{name}`" not in HTTP_API} == set()


def _trees(folder: Path) -> Iterator[ast.AST]:
    for path in sorted(folder.rglob("*.py")):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def _texts(node: ast.AST | None) -> list[str]:
    """Return the texts that an expression may be: itself, or the branches of a choice."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) and node.value else []
    return _texts(node.body) + _texts(node.orelse) if isinstance(node, ast.IfExp) else []


def _keywords(folder: Path, name: str) -> Iterator[str]:
    for node in _trees(folder):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == name:
                    yield from _texts(keyword.value)


def _reasons() -> Iterator[str]:
    for node in _trees(PACKAGE):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "skip":
            yield from _texts(node.args[0] if node.args else None)
    yield from _keywords(PACKAGE / "decide", "reason")
    for node in _trees(PACKAGE / "decide"):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "reason" for t in node.targets):
            yield from _texts(node.value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"veto_[a-z]+", node.value):
            yield node.value
    for node in ast.walk(ast.parse((PACKAGE / "conversation" / "partition.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            yield from _texts(node.value.elts[1])


def _refusals() -> Iterator[str]:
    """Yield why an action is not served although the gate lets it."""
    source = (PACKAGE / "request" / "permission.py").read_text(encoding="utf-8")
    refusals = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name.startswith("_not_")]
    assert len(refusals) == 2
    for node in (n for refusal in refusals for n in ast.walk(refusal)):
        if isinstance(node, ast.Return):
            yield from _texts(node.value)


# -- links and paths --------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(path), re.MULTILINE):
        name = slug(re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", heading))
        assert name not in found, f"{path.name} has two headings {heading!r}"
        found.add(name)
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    """Every relative link leads to a file that is there, and to a heading in it; pages of docs/ link within docs/."""
    for target in re.findall(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if page.parent == ROOT / "docs":
            assert path.parent == page.parent, f"{page.name} links out of docs/: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """A path of the repository in back quotes is that of a file or folder that is there."""
    tops = "optillm_memory|tests|docs|examples|benchmarks|\\.ci|\\.github"
    for path in re.findall(rf"`((?:{tops})/[\w./-]*)`", page.read_text(encoding="utf-8")):
        if "NNN" not in path:
            assert (ROOT / path).exists(), f"{page.name} names {path}"


# -- commands of the project itself -----------------------------------------------------------------


def marked(text: str, mark: str) -> str:
    """Return the one line of the code block that follows a mark."""
    found = re.findall(rf"<!-- {mark} -->\n```bash\n(.*?)\n```", text, re.DOTALL)
    assert len(found) == 1, mark
    return str(found[0])


def test_ci_runs_the_command_of_the_readme() -> None:
    """The test command that .ci/run takes from the README is there, once, and runs pytest under the constraints."""
    command = marked(README, "test command")
    assert "-c constraints.txt" in command
    assert "pytest" in command
    assert "optillm-memory demo" in marked(README, "demo command")


def test_the_fast_tier_is_what_contributing_says(request: pytest.FixtureRequest) -> None:
    """CONTRIBUTING, .ci/fast and the marks of pyproject.toml agree on the fast tier: all but what is marked."""
    command = marked(CONTRIBUTING, "fast tests")
    assert f'{command} "$@"' in (ROOT / ".ci" / "fast").read_text(encoding="utf-8").splitlines()
    left_out = set(re.findall(r"not (\w+)", command))
    ours = {line.split(":")[0] for line in request.config.getini("markers")} & {"host", "model", "slow", "long"}
    assert left_out == ours == {"host", "model", "slow", "long"}


def test_slow_modules_are_there() -> None:
    """What the fast tier leaves out by its module's name is the name of a module: a renamed one would slow it down."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in SLOW if names.count(name) != 1] == []


def test_workflows_run_only_what_is_documented() -> None:
    """Each command of the GitHub workflows is one of the README, CONTRIBUTING or .ci/run: none that nobody tries."""
    known = README + CONTRIBUTING + (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = []
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        commands += re.findall(r"^\s*- run: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) > 10
    assert [command for command in commands if command not in known] == []


def test_hooks_run_what_is_in_the_environment() -> None:
    """Every pre-commit hook is local and runs a command of CONTRIBUTING's environment."""
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"repo: (\S+)", text) == ["local"]
    tools = re.findall(r"\.venv/bin/([\w-]+)", text)
    assert len(tools) == text.count("- id:") == 4
    assert all(f".venv/bin/{tool} " in CONTRIBUTING + "\n" or f".venv/bin/{tool}\n" in CONTRIBUTING for tool in tools)


def test_the_version_has_one_source() -> None:
    """The package's metadata takes its version from the code; pyproject.toml holds none; the changelog knows it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text
    assert not re.search(r'^version = "', text, re.MULTILINE)
    assert metadata.version("optillm-memory") == optillm_memory.__version__
    assert f"## {optillm_memory.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
