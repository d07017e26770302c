"""The README says what the code does: generated parts are fresh, and nothing is left out of it."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import readme_parts

from optillm_memory.cli.commands import main
from optillm_memory.conversation.options import KEYS
from optillm_memory.settings import table

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("part", ["settings", "commands", "tree"])
def test_generated_parts_are_fresh(part: str) -> None:
    """The README holds each generated part as the code would write it now."""
    assert getattr(readme_parts, part)() in README, f"run: cog -r README.md ({part} is stale)"


def test_every_command_and_option_has_help() -> None:
    """No command and no option of the command line is without a word of help."""

    def walk(command: click.Command) -> None:
        assert command.help, command.name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{command.name} {parameter.name}"
        for inner in command.commands.values() if isinstance(command, click.Group) else ():
            walk(inner)

    walk(main)


def test_every_setting_key_and_route_is_in_the_readme() -> None:
    """Every setting, request key and route can be found in the README."""
    from optillm_memory.host.routes import blueprint

    app_source = Path(blueprint.root_path, "routes.py").read_text(encoding="utf-8")
    routes = re.findall(r'@blueprint\.(?:get|post)\("/([^"]+)"\)', app_source)
    assert len(routes) >= 8
    for name in [env for env, _, _ in table()] + list(KEYS):
        assert f"`{name}`" in README, name
    for route in routes:
        assert route.replace("<trace_id>", "{id}").replace("<memory_id>", "{id}") in README, route


def test_ci_runs_the_command_of_the_readme() -> None:
    """The test command that .ci/run takes from the README is there, once, and runs pytest under the constraints."""
    found = re.findall(r"<!-- test command -->\n```bash\n(.*?)\n```", README, re.DOTALL)
    assert len(found) == 1
    assert "-c constraints.txt" in found[0]
    assert "pytest" in found[0]
