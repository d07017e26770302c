"""Fixes: a failing action and the action that worked instead, mined from the steps of an episode."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from optillm_memory.conversation.actions import Action, normal_action
from optillm_memory.conversation.episodes import root_of
from optillm_memory.conversation.wrapping import unwrap
from optillm_memory.learn.attempts import Attempt
from optillm_memory.learn.intents import EDITS, LONGEST_FIX, LOOKS, drops_module, is_document, same_intent
from optillm_memory.learn.procedures.effects import COMMAND_FIELDS, is_named_change
from optillm_memory.records import Feedback, Scope

Relation = Literal["instead", "first", "note"]
# The steps after a failure in which its fix is searched; later steps solve something else.
WINDOW = 8
_NOTE = 180  # characters of each action of a note
_FIRST_MOST = 3  # actions in between that may together be the precondition of a repeated action
_WRITES = re.compile(
    r"(?<![0-9&<=-])>{1,2}(?!\s{0,4}(?:/dev/null|&))|\|\s{0,4}(?:tee|xargs|sh|bash)\b|-(?:delete|exec)\b"
)
# The tested or compiled code was wrong, not the action.
ABOUT_SOMETHING_ELSE = frozenset(("test_summary", "compiler"))
CORROBORATING = 2  # independent sources of an unverified fix
SUGGESTED = ("verified", "corroborated")  # statuses of fixes that act
_SAYS_SO = frozenset(("tool_error", "http", "dialect"))
_SHELL_FIELDS = ("", "command", "cmd", "bash_command")


@dataclass(frozen=True, slots=True)
class Fix:
    """A failing action, its output, and the action that worked `instead`, or that was needed `first`.

    A `note` describes what was done if it was no action of the same tool: a file written, a diff, a paragraph.
    """

    action: Action
    output: str
    signature: str
    relation: Relation
    text: str

    def memory_id(self, scope: Scope) -> str:
        """Return the memory id: the same fix of the same failure in a scope is one memory."""
        action = Action(self.action.tool, self.action.field, self.action.text)
        parts = (scope.tenant, scope.namespace, scope.user_id, scope.agent_id, action.key, self.signature)
        text = "\x1f".join((*parts, self.relation, normal_action(self.text)))
        return "fix-" + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True)
class FixEvidence:
    """The evidence of one step for one fix. `role`: `mined`, `shown` by a demonstration, `followed` on advice."""

    memory_id: str
    step_id: str
    role: Literal["mined", "shown", "followed"]
    success: bool
    verified: bool
    trace_id: str
    fix: Fix | None = None


def mine(attempts: Sequence[Attempt]) -> list[tuple[Fix, Attempt]]:
    """Return the fixes in the steps of one episode, each with the step that worked.

    A failing step is fixed by the next success of the same intent on its own branch: another action of the same tool
    that is a small edit of it, or the same action after something else was done first. Success is that the error is
    gone and the action ran: a test run that now shows failing tests did run. A file's text is no fix, nor is another
    decision: a booking that was refused is not mended by booking something else.
    """
    found: list[tuple[Fix, Attempt]] = []
    last = {a.parent_id: a for a in attempts}
    words = {a.step_id: normal_action(a.action.text) for a in attempts}
    for failed in attempts:
        if failed.verdict != "failure" or not failed.action.text.strip():
            continue
        between: list[Attempt] = []
        for later in _after(failed, last):
            if later.asked_by and later.asked_by == failed.asked_by:
                continue  # requested in the same answer: before the failure was known
            same = words[later.step_id] == words[failed.step_id]
            if same and later.action.key == failed.action.key:
                done = _between(between) if later.verdict == "success" else []
                relation, text = _preparation(done, failed.action) if done else ("first", "")
                if 0 < len(text) <= LONGEST_FIX:
                    found.append((Fix(failed.action, failed.output, failed.signature, relation, text), later))
                if later.verdict != "unknown":
                    break
            elif same:
                pass  # the same words with another folder or another limit: no other action
            elif (
                failed.basis not in ABOUT_SOMETHING_ELSE
                and not _decides(failed.action)
                and same_intent(failed.action, later.action, failed.output)
                and _ran(failed, later, last)
            ):
                text = later.action.text
                found.append((Fix(failed.action, failed.output, failed.signature, "instead", text), later))
                break
            between.append(later)
    return found


def _decides(action: Action) -> bool:
    """Whether a call changes something for somebody, as a booking does: with other values it is another decision."""
    return is_named_change(action.tool) and action.field not in COMMAND_FIELDS


def demonstrated_fix(
    standing: Iterable[Feedback], attempts: Sequence[Attempt], answer: str | None
) -> tuple[Fix, Feedback] | None:
    """Return the fix by a demonstration on a failed trace, with the demonstration.

    The failing action is the evidence's command, else the first failing action of the trace, else its answer.
    """
    rows = list(standing)
    demonstrations = [f for f in rows if f.metric == "demonstration" and isinstance(f.value, str)]
    failures = [f for f in rows if f.metric == "error" or (f.evidence and f.evidence.get("exit_code"))]
    failed = [a for a in attempts if a.verdict == "failure"]
    if not demonstrations or not (failures or failed):
        return None
    evidence: Mapping[str, object] = next((f.evidence for f in failures if f.evidence), {})
    output = str(evidence.get("output") or next((f.value for f in failures if f.metric == "error"), "") or "")
    if command := evidence.get("command"):
        tool, field = (failed[0].action.tool, failed[0].action.field) if failed else ("shell", "")
        action = Action(tool, field, str(command))
    elif failed:
        action = failed[0].action
    elif answer:
        action = Action("shell", "", answer)
    else:
        return None
    known = failed[0] if failed and _is(failed[0].action, action.text) else None
    text = str(demonstrations[-1].value)
    if normal_action(text) == normal_action(action.text):
        return None
    signature = known.signature if known else ""
    relation: Relation = "note" if text.strip().count("\n") > action.text.count("\n") + 1 else "instead"
    return Fix(action, output or (known.output if known else ""), signature, relation, text), demonstrations[-1]


def advice_evidence(attempts: Sequence[Attempt], advice: Mapping[str, Sequence[tuple[str, str]]]) -> list[FixEvidence]:
    """Return the evidence of steps that followed a fix; `advice` has (memory id, action) by trace."""
    found = []
    for attempt in attempts:
        for memory_id, text in advice.get(attempt.trace_id, ()):
            decided = attempt.verdict in ("success", "failure")
            if decided and attempt.basis not in ABOUT_SOMETHING_ELSE and _is(attempt.action, text):
                success = attempt.verdict == "success"
                found.append(FixEvidence(memory_id, attempt.step_id, "followed", success, False, attempt.trace_id))
    return found


def voices_of(found: Iterable[tuple[str, str]]) -> int:
    """Return how many independent sources found a fix, from (episode id, end user): the users, where they are named.

    Where they are not each conversation counts, and its forks with it.
    """
    return len({("user", user) if user else ("episode", root_of(episode_id)) for episode_id, user in found})


def fix_status(tallies: Iterable[tuple[int, int, int, int]], voices: int = 0) -> str:
    """Return a fix's status from (verified successes, verified failures, inferred successes, inferred failures).

    There is one tuple for each environment: a fix that fails in one may work in another. Without a verified success it
    is `corroborated` by two `voices` or more; a mere `candidate` is suggested nowhere, for it may have been planted.
    """
    rows = list(tallies)
    if any(good > bad for good, bad, _, _ in rows):
        return "verified"
    if any(good for good, _, _, _ in rows):
        return "quarantined"
    if any(good > bad + wrong for _, wrong, good, bad in rows):
        return "corroborated" if voices >= CORROBORATING else "candidate"
    return "quarantined" if any(good for _, _, good, _ in rows) else "withdrawn"


def value_in(environment: str, tallies: Mapping[str, tuple[int, int, int, int]]) -> float:
    """Return a fix's value in one environment: its own record there, shrunk to a quarter of its record elsewhere.

    A posterior mean under Beta(2, 1); inferred evidence weighs half of verified evidence.
    """
    good, bad = 2.0, 1.0
    for where, (right, wrong, likely, unlikely) in tallies.items():
        weight = 1.0 if where == environment else 0.25
        good += weight * (right + 0.5 * likely)
        bad += weight * (wrong + 0.5 * unlikely)
    return good / (good + bad)


def _after(failed: Attempt, last: Mapping[str, Attempt]) -> list[Attempt]:
    # The following steps on the same branch, nearest first; at a fork the latest branch.
    chain: list[Attempt] = []
    at = failed.step_id
    while at in last and len(chain) < WINDOW:
        chain.append(last[at])
        at = last[at].step_id
    return chain


def _ran(failed: Attempt, later: Attempt, last: Mapping[str, Attempt]) -> bool:
    silent = unwrap(later.output).is_silent
    if later.verdict == "success" and not silent:
        return True
    if silent and drops_module(failed.action, later.action):
        return False  # a file of tests that is run without pytest prints nothing and tests nothing
    if later.verdict == "failure":  # tests that now run and fail did run
        return later.basis in ABOUT_SOMETHING_ELSE and later.signature != failed.signature
    # Without a verdict it ran if its tool says so when something fails, or if the agent did not try the same again.
    if failed.basis in _SAYS_SO and later.output.strip() and not _is_shell(failed.action):
        return True
    return not any(same_intent(later.action, after.action) for after in _after(later, last))  # so also without output


def _is_shell(action: Action) -> bool:
    return action.field in _SHELL_FIELDS


def _between(between: Sequence[Attempt]) -> list[Action]:
    # The actions in between without those that failed and those that only read.
    done = [a.action for a in between if a.verdict != "failure" and not _only_looks(a.action.text)]
    return done if len(done) <= _FIRST_MOST else []


def _only_looks(text: str) -> bool:
    return (text.split() or [""])[0] in LOOKS and not _WRITES.search(text)


def _preparation(done: Sequence[Action], action: Action) -> tuple[Relation, str]:
    alike = all((a.tool, a.field) == (action.tool, action.field) for a in done)
    if alike and (len(done) == 1 or action.field or not action.text.startswith("{")):
        lines = [a.text.strip() for a in done]
        if any(is_document(a) or EDITS.search(a.text) or _WRITES.search(a.text) for a in done):
            return "first", ""
        shell = _is_shell(action) and not any("\n" in line for line in lines)
        return "first", (" && " if shell else "\n").join(lines)
    return "note", "\n".join(f"{a.tool}: {a.text.strip()[:_NOTE]}" for a in done)


def _is(action: Action, text: str) -> bool:
    return normal_action(action.text) == normal_action(text)
