"""What the README shows of the code, written from the code: `cog -r README.md` renews it."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import click

from optillm_memory.cli.commands import main
from optillm_memory.settings import table

ROOT = Path(__file__).resolve().parent.parent
_TOP = {
    ".ci/run": "what must pass on main",
    "constraints.txt": "the whole tested environment, pinned",
    "pyproject.toml": "the package",
}


def settings() -> str:
    """Return the table of settings."""
    rows = [f"| `{name}` | `{default}` | {help_} |" for name, default, help_ in table()]
    return "\n".join(["| variable | default | what for |", "|---|---|---|", *rows])


def commands() -> str:
    """Return the table of commands."""
    rows = []
    for name, command in sorted(main.commands.items()):
        names = sorted(command.commands) if isinstance(command, click.Group) else []
        inner = f" ({', '.join(f'`{n}`' for n in names)})" if names else ""
        rows.append(f"| `optillm-memory {name}` | {(command.help or '').splitlines()[0]}{inner} |")
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def tree() -> str:
    """Return the file tree with one clause for each file."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    lines: list[str] = ["```"]
    shown: set[Path] = set()
    for name in sorted(listed, key=lambda n: (n.count("/") == 0, n)):
        path = Path(name)
        clause = _TOP.get(name) or (_clause(ROOT / path) if path.suffix == ".py" else "")
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
