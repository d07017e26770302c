"""Attempts: steps with the verdicts on their observations, the input of mining fixes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from optillm_memory.conversation.actions import Action
from optillm_memory.conversation.error_search import lines_of
from optillm_memory.conversation.observation import Reading
from optillm_memory.conversation.reports import report_of
from optillm_memory.conversation.wrapping import unwrap
from optillm_memory.records import Scope, Verdict

OUTPUT_LIMIT = 4_000


@dataclass(frozen=True, slots=True)
class Attempt:
    """A step with the verdict on its observation.

    `trace_id` is the trace that requested it, else the one that contained its observation; `asked_by` is only the
    former, empty if unknown. `at` is in Unix seconds.
    """

    step_id: str
    parent_id: str
    trace_id: str
    action: Action
    output: str
    verdict: Verdict
    basis: str
    signature: str
    message: str
    at: float
    asked_by: str = ""


def message_of(reading: Reading, observation: str) -> str:
    """Return a short text of the error, with the slots of its signature filled in."""
    if reading.verdict != "failure":
        return ""
    signature = reading.signature
    if signature is None:
        return f"exit code {reading.exit_code}" if reading.exit_code else observation.strip().partition("\n")[0][:200]
    text = signature.message
    for content in signature.slots:
        start = text.find("<")
        end = text.find(">", start)
        if start < 0 or end < 0:
            break
        kind = text[start + 1 : end]
        filled = f"'{content}'" if kind == "quoted" else content
        text = f"{text[:start]}{filled}{text[end + 1 :]}"
    named = f"{signature.error}: {text}" if signature.error and signature.error.lower() not in text.lower() else text
    return named.strip(": ")[:300]


def nature_of(reading: Reading, observation: str) -> str:
    """Return the basis of a verdict; `test_summary` or `compiler` where the tested or compiled code is the cause."""
    if reading.verdict != "failure" or reading.basis != "exit_code":
        return reading.basis
    if report_of(lines_of(unwrap(observation).text)) is not None:
        return "test_summary"
    signature = reading.signature
    compiled = signature is not None and (
        signature.language in ("c", "rust") or (signature.language in ("java", "go") and signature.error == "error")
    )
    return "compiler" if compiled else reading.basis


def shortened(text: str) -> str:
    """Return an output's ends, which contain what is learned from."""
    if len(text) <= OUTPUT_LIMIT:
        return text
    return f"{text[: OUTPUT_LIMIT // 2]}\n…\n{text[-OUTPUT_LIMIT // 2 :]}"


def inferred_id(scope: Scope, episode_id: str, step_id: str) -> str:
    """Return the id of the feedback inferred from a step's observation.

    It contains the episode, since clients that number their calls give steps of two episodes the same id.
    """
    where = f"{scope.tenant}\x1f{scope.namespace}\x1f{scope.user_id}\x1f{scope.agent_id}\x1f{episode_id}"
    digest = hashlib.blake2b(where.encode("utf-8", "replace"), digest_size=6).hexdigest()
    return f"inferred-{step_id}-{digest}"


def environment_of(tags: Mapping[str, str]) -> str:
    """Return the name of the environment that a request's tags describe."""
    return json.dumps(dict(sorted(tags.items())))
