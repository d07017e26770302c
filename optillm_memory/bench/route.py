"""`bench route`: what the policy earns on requests for which the reward and cost of every arm are known.

The rows take the place of the upstream, so only the policy is measured: the real one, on the real encoder's vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optillm_memory.bench.in_process import cached_encoder
from optillm_memory.bench.rows import read_rows, text_field
from optillm_memory.bench.tasks import load_tasks
from optillm_memory.conversation.parse import key_of
from optillm_memory.decide.policy import Measurement, Policy, Situation, Terms
from optillm_memory.errors import InvalidField
from optillm_memory.records import Arm

Array = NDArray[np.float64]
COST_WEIGHT = 0.1  # utility is the reward less this share of the cost, in units of the most expensive arm's mean cost
WINDOW = 500  # requests over which the policy may not fall far below the default
_ADAPTED = 1500  # requests after an arm's change within which the policy adapts
_SETTLED = 1000  # requests after which the policy has left a bad default


@dataclass(frozen=True, slots=True)
class Row:
    """A request with the reward and cost of each arm; `task` is for scoring only."""

    prompt: str
    arms: Mapping[str, Mapping[str, float]]
    task: str = ""


@dataclass(frozen=True, slots=True)
class Scenario:
    """The conditions of a run: the default arm, and the feedback on the answers.

    A share `feedback` of the answers gets feedback, `delay` requests later, a share `noise` of it wrong. `degrades`
    means that the default's reward is halved from the middle on.
    """

    name: str
    good_default: bool = True
    warmup_share: float = 0.0
    feedback: float = 1.0
    noise: float = 0.0
    delay: int = 0
    degrades: bool = False


_SPARSE: dict[str, Any] = {"feedback": 0.3, "noise": 0.1, "delay": 50}
SCENARIOS = (
    Scenario("good_default"),
    Scenario("good_default_sparse", **_SPARSE),
    Scenario("good_default_warmup", warmup_share=0.5),
    Scenario("bad_default", good_default=False),
    Scenario("bad_default_warmup", good_default=False, warmup_share=0.5),
    Scenario("bad_default_warmup_sparse", good_default=False, warmup_share=0.5, **_SPARSE),
    Scenario("degrades", degrades=True),
    Scenario("degrades_sparse", degrades=True, **_SPARSE),
)


def load_rows(path: Path) -> list[Row]:
    """Read rows of `prompt`, `arms` (by name: `reward`, `cost`) and optionally `task`. Raises InvalidField."""
    rows = [_row(row, place) for row, place in read_rows(path)]
    if any(row.arms.keys() != rows[0].arms.keys() for row in rows):
        raise InvalidField("arms", f"all rows of {path} must have the same arms")
    return rows


def _row(row: Mapping[str, Any], place: str) -> Row:
    try:
        arms = {str(n): {k: float(a[k]) for k in ("reward", "cost")} for n, a in row["arms"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidField("arms", f"must be {{name: {{reward, cost}}}} with numbers in {place}") from None
    return Row(text_field(row, "prompt", place), arms, str(row.get("task", "")))


def synthetic_rows(seed: int = 0, count: int = 2000) -> list[Row]:
    """Return rows on the support tasks: a small, cheap arm good at half of the kinds, and a large, expensive one."""
    tasks = load_tasks(None)
    kinds = sorted({task.output for task in tasks})
    chance = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        task = tasks[number % len(tasks)]
        good = {"small": 0.9 if kinds.index(task.output) % 2 else 0.3, "large": 0.85}
        arms = {name: {"reward": float(chance.random() < p)} for name, p in good.items()}
        arms["small"]["cost"], arms["large"]["cost"] = 0.05, 1.0
        rows.append(Row(task.input, arms, task.output))
    return rows


def vectors_of(rows: Sequence[Row]) -> NDArray[np.float32]:
    """Return the vectors of the prompts from the configured encoder. Raises EncoderUnavailable."""
    encoder = cached_encoder([row.prompt for row in rows])
    return encoder.encode([key_of(row.prompt) for row in rows])


@dataclass(frozen=True, slots=True)
class Table:
    """The rows as arrays of (requests, arms), with the requests' vectors and tasks."""

    names: tuple[str, ...]
    vectors: NDArray[np.float32]
    rewards: Array
    costs: Array
    lengths: NDArray[np.int64]
    tasks: NDArray[np.int64]
    price: float

    @classmethod
    def of(cls, rows: Sequence[Row], vectors: NDArray[np.float32], weight: float) -> Table:
        """Arrange the rows; a unit of cost is worth `weight` / (the most expensive arm's mean cost) of reward."""
        names = tuple(sorted(rows[0].arms))
        rewards, costs = (np.array([[row.arms[n][k] for n in names] for row in rows]) for k in ("reward", "cost"))
        tasks = np.unique([row.task for row in rows], return_inverse=True)[1]
        most_expensive = float(costs.mean(axis=0).max())
        lengths = np.array([len(row.prompt) for row in rows])
        return cls(names, vectors, rewards, costs, lengths, tasks, weight / most_expensive if most_expensive else 0.0)

    @property
    def utility(self) -> Array:
        """Each arm's utility on each request."""
        return self.rewards - self.price * self.costs

    def shuffled(self, seed: int) -> Table:
        """Return the requests in another order."""
        order = np.random.default_rng(seed).permutation(len(self.rewards))
        return replace(
            self, vectors=self.vectors[order], rewards=self.rewards[order], costs=self.costs[order],
            lengths=self.lengths[order], tasks=self.tasks[order],
        )  # fmt: skip

    def degraded(self, arm: int) -> Table:
        """Return the table with an arm's reward halved from the middle on."""
        rewards = self.rewards.copy()
        rewards[len(rewards) // 2 :, arm] *= 0.5
        return replace(self, rewards=rewards)


@dataclass
class Played:
    """One run: its table, the default arm, and the arms that were chosen."""

    table: Table
    default: int
    chosen: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def figures(self, scenario: Scenario) -> dict[str, Any]:
        """Return what was earned, and what each single arm, the best per task and the oracle would have earned."""
        utility, chosen = self.table.utility, self.chosen
        rows = np.arange(len(chosen))
        earned, means = utility[rows, chosen], utility.mean(axis=0)
        best = int(means.argmax())
        half = slice(len(rows) // 2, None)
        late = float(earned[half].mean())
        single, ideal = _per_task(utility[half], None), _per_task(utility[half], self.table.tasks[half])
        return {
            "utility": float(earned.mean()),
            "reward": float(self.table.rewards[rows, chosen].mean()),
            "cost": float(self.table.costs[rows, chosen].mean()),
            "regret": float((utility.max(axis=1) - earned).mean()),
            "single_arms": {name: float(mean) for name, mean in zip(self.table.names, means, strict=True)},
            "best_single_arm": float(means[best]),
            "best_arm_per_task": _per_task(utility, self.table.tasks),
            "oracle": float(utility.max(axis=1).mean()),
            "above_best_single_arm": float(earned.mean() - means[best]),
            "worst_window": _worst(earned - utility[:, self.default]),
            **({} if scenario.degrades else {"way_to_best_per_task_second_half": _way(late, single, ideal)}),
            **self._overcome(scenario, earned, utility),
        }

    def _overcome(self, scenario: Scenario, earned: Array, utility: Array) -> dict[str, float]:
        start = len(earned) // 2 + _ADAPTED if scenario.degrades else _SETTLED
        if (scenario.good_default and not scenario.degrades) or start >= len(earned):
            return {}
        stayed, best = float(utility[start:, self.default].mean()), float(utility[start:].mean(axis=0).max())
        name = "loss_made_good" if scenario.degrades else "way_to_best_arm"
        return {name: _way(float(earned[start:].mean()), stayed, best)}


def play(table: Table, scenario: Scenario, seed: int, exploration_budget: float) -> Played:
    """Let the policy choose for the whole table, in an order and with random draws of this seed."""
    table = table.shuffled(seed)
    means = table.utility.mean(axis=0)
    default = int(means.argmax() if scenario.good_default else means.argmin())
    table = table.degraded(default) if scenario.degrades else table
    chance = np.random.default_rng([seed, 1])
    count = len(table.rewards)
    judged, wrong, draws = (
        chance.random(count) < scenario.feedback,
        chance.random(count) < scenario.noise,
        chance.random(count),
    )
    arms = [Arm(name, "none", name) for name in table.names]
    terms = Terms(cost_price=table.price, exploration_budget=exploration_budget, warmup_share=scenario.warmup_share)
    policy = Policy(arms, table.names[default], terms)
    played = Played(table, default, np.zeros(count, dtype=np.int64))
    for row in range(count):
        situation = Situation(table.vectors[row], int(table.lengths[row]))
        choice = policy.choose(situation, float(draws[row]))
        arm = played.chosen[row] = table.names.index(choice.arm.name)
        policy.add(choice.logged(situation), Measurement(cost=float(table.costs[row, arm])))
        if (late := row - scenario.delay) >= 0 and judged[late]:
            arm = played.chosen[late]
            reward = float(table.rewards[late, arm])
            known = Measurement(1 - reward if wrong[late] else reward, float(table.costs[late, arm]))
            policy.observe(late, known)
    return played


def run(
    rows: Sequence[Row],
    vectors: NDArray[np.float32],
    *,
    seeds: Sequence[int],
    weight: float = COST_WEIGHT,
    exploration_budget: float = Terms().exploration_budget,
    scenarios: Sequence[Scenario] = SCENARIOS,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return each scenario's figures: the mean over the seeds, and the worst seed's."""
    table = Table.of(rows, vectors, weight)
    figures: dict[str, Any] = {}
    for scenario in scenarios:
        found = []
        for seed in seeds:
            found.append(play(table, scenario, seed, exploration_budget).figures(scenario))
            tick()
        figures[scenario.name] = {**_mean(found), **_worst_seed(found)}
    return figures


def scenarios() -> list[dict[str, Any]]:
    """Return the scenarios for a report."""
    return [asdict(scenario) for scenario in SCENARIOS]


def lines(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return a readable line of figures for each scenario."""
    shown = {}
    for name, found in figures.items():
        extra = {k: found[k] for k in ("way_to_best_arm", "loss_made_good") if k in found}
        shown[name] = (
            f"utility {found['utility']:.4f}  best single arm {found['best_single_arm']:.4f}  best per task "
            f"{found['best_arm_per_task']:.4f}  oracle {found['oracle']:.4f}  cost {found['cost']:.6f}  worst window "
            f"{found['worst_window']:+.4f}" + "".join(f"  {key} {value:.2f}" for key, value in extra.items())
        )
    return shown


def _per_task(utility: Array, tasks: NDArray[np.int64] | None) -> float:
    """Return the mean utility of the best arm, or of each task's best arm, in hindsight."""
    if tasks is None:
        return float(utility.mean(axis=0).max())
    return float(sum(utility[tasks == task].sum(axis=0).max() for task in np.unique(tasks)) / len(utility))


def _worst(difference: Array) -> float:
    """Return the lowest mean over any window."""
    sums = np.concatenate([[0.0], np.cumsum(difference)])
    size = min(WINDOW, len(difference))
    return float((sums[size:] - sums[:-size]).min() / size)


def _way(earned: float, start: float, end: float) -> float:
    return (earned - start) / (end - start) if end > start else 1.0


def _mean(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = found[0]
    return {
        key: _mean([f[key] for f in found])
        if isinstance(value, Mapping)
        else round(float(np.mean([f[key] for f in found])), 6)
        for key, value in first.items()
    }


def _worst_seed(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    keys = ("above_best_single_arm", "worst_window", "way_to_best_arm", "loss_made_good")
    return {f"{key}_worst_seed": round(min(f[key] for f in found), 6) for key in keys if key in found[0]}
