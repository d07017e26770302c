"""What the documentation shows of the code, written from the code: `cog -r README.md docs/*.md` renews it."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import flask

import optillm_memory
from optillm_memory.cli.commands import main
from optillm_memory.host.routes import blueprint
from optillm_memory.settings import Settings, table

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_TOP = {
    ".ci/fast": "the tests of the fast tier",
    ".ci/full": "what takes longer than .ci/run may",
    ".ci/run": "what must pass on main",
    "constraints.txt": "the whole tested environment, pinned",
    "mkdocs.yml": "how docs/ becomes a web site",
    "pyproject.toml": "the package, and the settings of its tools",
}


def settings() -> str:
    """Return the table of settings."""
    rows = [f"| `{name}` | {f'`{default}`' if default else ''} | {help_} |" for name, default, help_ in table()]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


# -- the HTTP API -----------------------------------------------------------------------------------


def route_list() -> list[tuple[str, str, str]]:
    """Return (method, path, first line of help) of every route of ours, as the host's app has them."""
    app = flask.Flask(__name__)
    app.register_blueprint(blueprint)
    found = []
    for rule in app.url_map.iter_rules():
        if rule.endpoint == "static":
            continue
        path = rule.rule
        for argument in rule.arguments:
            short = "name" if argument == "name" else "id"
            path = path.replace(f"<{argument}>", f"{{{short}}}")
        help_ = (app.view_functions[rule.endpoint].__doc__ or "").split("\n", 1)[0]
        found += [(method, path, help_) for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}]
    return sorted(found, key=lambda route: (route[1], route[0]))


def routes() -> str:
    """Return the table of routes."""
    rows = [f"| [`{method} {path}`](#{slug(f'{method} {path}')}) | {help_} |" for method, path, help_ in route_list()]
    return "\n".join(["| route | what it does |", "|---|---|", *rows])


def slug(heading: str) -> str:
    """Return a heading's anchor, as GitHub and mkdocs make it."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.strip().replace(" ", "-")


# -- the command line -------------------------------------------------------------------------------


def walk(command: click.Command = main, name: str = "optillm-memory") -> Iterator[tuple[str, click.Command]]:
    """Yield (full name, command) of a command and all below it."""
    yield name, command
    if isinstance(command, click.Group):
        for inner in sorted(command.commands):
            yield from walk(command.commands[inner], f"{name} {inner}")


def commands() -> str:
    """Return the table of commands."""
    rows = []
    for name, command in walk():
        if name != "optillm-memory":
            rows.append(f"| [`{name}`](#{slug(name)}) | {_first_line(command)} |")
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def command_line() -> str:
    """Return a section for each command, with its arguments and options."""
    return "\n\n".join(_section(name, command) for name, command in walk() if name != "optillm-memory")


def _section(name: str, command: click.Command) -> str:
    arguments = [_argument(p) for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join([name, *arguments, *(["COMMAND"] if isinstance(command, click.Group) else [])])
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    parts = [f"### `{name}`", f"`{usage}{' [OPTIONS]' if options else ''}`", command.help or ""]
    if options:
        rows = [f"| {_option_names(option)} | {_option_help(option)} |" for option in options]
        parts.append("\n".join(["| option | meaning |", "|---|---|", *rows]))
    if command.epilog and "\b" not in command.epilog:
        parts.append(command.epilog)
    return "\n\n".join(part.strip() for part in parts)


def _argument(argument: click.Argument) -> str:
    name = (argument.name or "").upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _option_names(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    return names if option.is_flag or option.secondary_opts else f"{names} {_kind(option)}"


def _kind(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "\\|".join(f"`{choice}`" for choice in option.type.choices)
    if isinstance(option.type, click.types._NumberRangeBase):
        low, high = option.type.min, option.type.max
        bounds = [f"from {low}"] if low is not None else []
        bounds += [f"to {high}"] if high is not None else []
        return f"number {' '.join(bounds)}".strip()
    return {"integer": "number", "float": "number", "text": "text"}.get(option.type.name, option.type.name)


def _option_help(option: click.Option) -> str:
    default = option.default
    shown = option.show_default and isinstance(default, (int, float, str)) and not isinstance(default, bool)
    text = (option.help or "").replace("|", "\\|")
    text += f" Default: `{default}`." if shown and default != "" else ""
    return text + (" Required." if option.required else "") + (" May be repeated." if option.multiple else "")


def _first_line(command: click.Command) -> str:
    return (command.help or "").split("\n", 1)[0]


# -- the Python API ---------------------------------------------------------------------------------


def python_api() -> str:
    """Return a section for each public name: signature, docstring, fields and methods."""
    sections = []
    for name in sorted(optillm_memory.__all__, key=lambda n: (n != "Memory", n)):
        thing = getattr(optillm_memory, name)
        if isinstance(thing, type) and not issubclass(thing, Exception):
            sections.append(_class_section(name, thing))
    errors = [n for n in optillm_memory.__all__ if _is_error(getattr(optillm_memory, n))]
    rows = [f"| `{n}` | {_flat(getattr(optillm_memory, n).__doc__ or '')} |" for n in errors]
    table_ = "\n".join(["| error | when |", "|---|---|", *rows])
    return "\n\n".join([*sections, "## Errors", table_])


def _is_error(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)


def _class_section(name: str, thing: type) -> str:
    node = _definition(thing)
    parts = [f"## `{name}`", _paragraphs(ast.get_docstring(node) or "")]
    if thing is not Settings and hasattr(thing, "__dataclass_fields__"):
        lines = [f"{f.name}: {f.type}" for f in fields(thing)]
        parts.append("```text\n" + "\n".join(lines) + "\n```")
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and (not item.name.startswith("_") or item.name == "__init__"):
            constructor = item.name == "__init__"
            if constructor and hasattr(thing, "__dataclass_fields__"):
                continue
            label = name if constructor else f"{name}.{item.name}"
            kinds = {d.id for d in item.decorator_list if isinstance(d, ast.Name)}
            shown = label if "property" in kinds else f"{label}({_arguments(item)})"
            result = "" if constructor or item.returns is None else f" -> {ast.unparse(item.returns)}"
            heading = "" if constructor else f"### `{label}`\n\n"
            parts.append(f"{heading}```text\n{shown}{result}\n```")
            parts.append(_paragraphs(ast.get_docstring(item) or ""))
    return "\n\n".join(parts)


def _definition(thing: type) -> ast.ClassDef:
    source = Path(str(__import__(thing.__module__, fromlist=["_"]).__file__)).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == thing.__name__:
            return node
    raise LookupError(thing.__name__)


def _arguments(function: ast.FunctionDef) -> str:
    kept = ast.parse(f"def f({ast.unparse(function.args)}): ...").body[0]
    assert isinstance(kept, ast.FunctionDef)
    first = [*kept.args.posonlyargs, *kept.args.args][:1]
    if first and first[0].arg in ("self", "cls"):
        kept.args.args = kept.args.args[1:]
    return ast.unparse(kept.args)


def _paragraphs(docstring: str) -> str:
    return "\n\n".join(_flat(part) for part in docstring.split("\n\n"))


def _flat(text: str) -> str:
    return " ".join(text.split())


# -- the files --------------------------------------------------------------------------------------


def tree() -> str:
    """Return the file tree with one clause for each file."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    lines: list[str] = ["```text"]
    shown: set[Path] = set()
    for name in sorted(listed, key=lambda n: (n.count("/") == 0, n)):
        path = Path(name)
        clause = _TOP.get(name) or (_clause(ROOT / path) if path.suffix == ".py" and (ROOT / path).exists() else "")
        if not clause or not (ROOT / path).exists():
            continue
        for parent in reversed(path.parents[:-1]):
            if parent not in shown:
                shown.add(parent)
                lines.append("  " * (len(parent.parts) - 1) + f"{parent.name}/")
        lines.append(f"{'  ' * (len(path.parts) - 1) + path.name:28} {clause}")
    return "\n".join([*lines, "```"])


def _clause(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n", 1)[0].rstrip(".")
