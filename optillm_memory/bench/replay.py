"""`bench replay`: what each arm, and the policy itself, would have earned on the traffic in a log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optillm_memory.learn.offpolicy import Estimate, LoggedEpisode, Prices, always, estimate, logged_policy

_FEW = 10  # effective episodes, below which an estimate means little
_HEAVY = 20.0  # a weight above which single episodes dominate


def run(rows: Sequence[LoggedEpisode], prices: Prices) -> dict[str, Any]:
    """Return the estimates of the policy and of every arm in the log, and warnings."""
    judged = [row for row in rows if row.reward is not None]
    arms = sorted({arm for row in rows for arm in (row.arm, *row.probabilities)})
    found = {
        "policy": estimate(rows, logged_policy, prices),
        **{arm: estimate(rows, always(arm), prices) for arm in arms},
    }
    return {
        "episodes": len(rows),
        "episodes_with_outcome": len(judged),
        "policy": found["policy"].as_dict(),
        "arms": {arm: found[arm].as_dict() for arm in arms},
        "warnings": [
            *_log_warnings(rows, judged),
            *(
                f"{name}: {warning}"
                for name, value in found.items()
                for warning in _estimate_warnings(value, len(judged))
            ),
        ],
    }


def lines(figures: dict[str, Any]) -> dict[str, str]:
    """Return a readable line for each estimate and warning, by name."""
    shown = {"episodes": f"{figures['episodes']} ({figures['episodes_with_outcome']} with an outcome)"}
    for name, value in (("policy", figures["policy"]), *figures["arms"].items()):
        if value["utility"] is None:
            shown[name] = "never chosen in an episode with an outcome"
        else:
            shown[name] = (
                f"{value['utility']:.3f} [{value['low']:.3f}, {value['high']:.3f}]  reward {value['reward']:.3f}  "
                f"tokens {value['tokens']:.0f}  ms {value['latency_ms']:.0f}  ESS {value['effective_sample_size']}"
            )
    return {**shown, **{f"warning {i}": warning for i, warning in enumerate(figures["warnings"], 1)}}


def _log_warnings(rows: Sequence[LoggedEpisode], judged: Sequence[LoggedEpisode]) -> list[str]:
    if not rows:
        return ["the policy made no decision in this log: requests with approach `auto` do"]
    warnings = []
    if not judged:
        warnings.append("no episode with a decision has a verified outcome")
    if switched := sum(row.switched for row in judged):
        warnings.append(f"{switched} episodes changed their arm: their outcome is counted for the first")
    if impossible := sum(row.propensity <= 0 for row in judged):
        warnings.append(f"{impossible} episodes have no propensity and are ignored")
    return warnings


def _estimate_warnings(found: Estimate, judged: int) -> list[str]:
    warnings = []
    if found.covered < judged:
        warnings.append(f"could have been chosen in {found.covered} of {judged} episodes: the figures are about these")
    if found.covered and found.utility is None:
        warnings.append("was never chosen where it could have been")
    elif found.covered and found.effective < _FEW:
        warnings.append(f"rests on {found.effective:.1f} effective episodes")
    if found.largest_weight > _HEAVY:
        warnings.append(f"single episodes weigh up to {found.largest_weight:.0f}")
    return warnings
