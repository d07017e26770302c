"""The plugin file: installed where optillm looks for plugins, and removed again."""

from __future__ import annotations

from pathlib import Path

from optillm_memory.errors import HostError

FILE_NAME = "agent_memory_plugin.py"
_MARK = "# Written by `optillm-memory install`"
CONTENT = f"""{_MARK}; all code and state live in the package.
from optillm_memory.host.plugin import SLUG, run

__all__ = ["SLUG", "run"]
"""


def plugin_path(directory: Path) -> Path:
    """Return the path of the plugin file that `optillm` loads if it is started in the directory."""
    return directory / "optillm" / "plugins" / FILE_NAME


def install(directory: Path) -> Path:
    """Write the plugin file if it is missing or different. Raises HostError for a file that is not ours."""
    path = plugin_path(directory)
    _refuse_foreign(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != CONTENT:
        path.write_text(CONTENT, encoding="utf-8")
    return path


def uninstall(directory: Path) -> bool:
    """Remove the plugin file and folders that are empty without it; False if there was none. Raises HostError."""
    path = plugin_path(directory)
    if not path.exists():
        return False
    _refuse_foreign(path)
    path.unlink()
    for folder in (path.parent, path.parent.parent):
        if any(item.name != "__pycache__" for item in folder.iterdir()):
            break
        for cached in folder.rglob("*"):
            if cached.is_file():
                cached.unlink()
        for empty in sorted(folder.rglob("*"), reverse=True):
            empty.rmdir()
        folder.rmdir()
    return True


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        raise HostError(f"{path} was not written by optillm-memory; move it elsewhere first")
