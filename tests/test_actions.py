"""Actions: what a call does, and when two calls do the same."""

from __future__ import annotations

import json

import pytest

from optillm_memory.conversation.actions import action_of


@pytest.mark.parametrize(
    ("arguments", "field", "text"),
    [
        ('{"command": "ls"}', "command", "ls"),
        ('{"command": "ls -l", "description": "look"}', "command", "ls -l"),
        ('{"cmd": "ls", "timeout": 5}', "cmd", "ls"),
        ('{"path": "a.py"}', "path", "a.py"),
        ('{"command": "git push", "remote": "o"}', "command", "git push"),
        ('{"command": "view", "path": "a.py"}', "", '{"command": "view", "path": "a.py"}'),
        ('{"path": "a.py", "content": "x y"}', "", '{"content": "x y", "path": "a.py"}'),
        (
            '{"command": ["bash", "-lc", "ls"], "workdir": "/r"}',
            "",
            '{"command": ["bash", "-lc", "ls"], "workdir": "/r"}',
        ),
        ("{}", "", "{}"),
        ('{"command": "ls"', "", '{"command": "ls"'),
        ("[1]", "", "[1]"),
        ("ls -l", "", "ls -l"),
        ("", "", ""),
        ("{" * 5_000, "", "{" * 5_000),
    ],
)
def test_the_action_of_a_call(arguments: str, field: str, text: str) -> None:
    """The command is the action; several texts, lists and what is no JSON are it as a whole."""
    action = action_of("bash", arguments)
    assert (action.tool, action.field, action.text) == ("bash", field, text)


def test_which_actions_are_the_same() -> None:
    """White space, the order of keys, remarks and names for a moment do not count; words, folders and ends do."""
    same = [
        ('{"command": "ls  -l", "timeout": 5}', '{ "timeout":5,\n"command":"ls -l\\n"}'),
        ('{"command": "ls", "description": "a"}', '{"command": "ls", "description": "b"}'),
        ('{"command": "cat /tmp/tmpab12/x.py"}', '{"command": "cat /tmp/tmpcd34/x.py"}'),
        ('{"a": "x", "b": "y"}', '{"b": "y", "a": "x"}'),
    ]
    other = [
        ('{"command": "ls"}', '{"command": "ls -l"}'),
        ('{"command": "make", "cwd": "/a"}', '{"command": "make", "cwd": "/b"}'),
        ('{"command": "make", "timeout": 5}', '{"command": "make", "timeout": 500}'),
        ('{"command": "view", "path": "a"}', '{"command": "view", "path": "b"}'),
        (json.dumps({"content": "x" * 9_000, "path": "a"}), json.dumps({"content": "x" * 9_000, "path": "b"})),
        (json.dumps({"command": f"echo {'x' * 30_000} a"}), json.dumps({"command": f"echo {'x' * 30_000} b"})),
    ]
    assert all(action_of("t", a).key == action_of("t", b).key for a, b in same)
    assert all(action_of("t", a).key != action_of("t", b).key for a, b in other)
    assert action_of("t", "ls").key != action_of("u", "ls").key
