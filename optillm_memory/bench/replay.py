"""`bench replay`: what each arm, and the policy itself, would have earned on the traffic in a log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optillm_memory.learn.offpolicy import Estimate, LoggedEpisode, Prices, always, estimate, logged_policy

_THIN = 10  # effective episodes, below which an estimate is not worth the name
_HEAVY = 20.0  # a weight from which single episodes decide


def run(rows: Sequence[LoggedEpisode], prices: Prices) -> dict[str, Any]:
    """Return the estimates of the policy and of every arm in the log, and what to be careful with."""
    told = [row for row in rows if row.reward is not None]
    arms = sorted({arm for row in rows for arm in (row.arm, *row.probabilities)})
    found = {
        "policy": estimate(rows, logged_policy, prices),
        **{arm: estimate(rows, always(arm), prices) for arm in arms},
    }
    return {
        "episodes": len(rows),
        "episodes_with_outcome": len(told),
        "policy": found["policy"].as_dict(),
        "arms": {arm: found[arm].as_dict() for arm in arms},
        "warnings": [
            *_of_log(rows, told),
            *(f"{name}: {said}" for name, value in found.items() for said in _of_estimate(value, len(told))),
        ],
    }


def lines(figures: dict[str, Any]) -> dict[str, str]:
    """Return the figures in lines for people, by name."""
    shown = {"episodes": f"{figures['episodes']} ({figures['episodes_with_outcome']} with an outcome)"}
    for name, value in (("policy", figures["policy"]), *figures["arms"].items()):
        if value["utility"] is None:
            shown[name] = "never chosen in an episode with an outcome"
        else:
            shown[name] = (
                f"{value['utility']:.3f} [{value['low']:.3f}, {value['high']:.3f}]  reward {value['reward']:.3f}  "
                f"tokens {value['tokens']:.0f}  ms {value['latency_ms']:.0f}  ESS {value['effective_sample_size']}"
            )
    return {**shown, **{f"warning {i}": said for i, said in enumerate(figures["warnings"], 1)}}


def _of_log(rows: Sequence[LoggedEpisode], told: Sequence[LoggedEpisode]) -> list[str]:
    if not rows:
        return ["the policy made no decision in this log: requests with approach `auto` do"]
    said = []
    if not told:
        said.append("no episode with a decision has a verified outcome")
    if switched := sum(row.switched for row in told):
        said.append(f"{switched} episodes changed their arm: their outcome is counted for the first")
    if impossible := sum(row.propensity <= 0 for row in told):
        said.append(f"{impossible} episodes have no propensity and are left out")
    return said


def _of_estimate(found: Estimate, told: int) -> list[str]:
    said = []
    if found.covered < told:
        said.append(f"could have been chosen in {found.covered} of {told} episodes: the figures are about these")
    if found.covered and found.utility is None:
        said.append("was never chosen where it could have been")
    elif found.covered and found.effective < _THIN:
        said.append(f"rests on {found.effective:.1f} effective episodes")
    if found.largest_weight > _HEAVY:
        said.append(f"single episodes weigh up to {found.largest_weight:.0f}")
    return said
