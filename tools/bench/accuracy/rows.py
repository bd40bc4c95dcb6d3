"""The rows of the table of experiment-cot: an arm on a task, over all seeds. Pure.

Counts of several seeds are means: the test problems are the same ones, so the interval is that of
one set of them. Arms are compared problem by problem, by their fraction right over the seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from carryon.tools.bench.accuracy.plan import PROMPTED
from carryon.tools.bench.accuracy.recipes import Goal
from carryon.tools.compare.figure import Figure
from carryon.train.inference.scoring.comparison import Paired, compare_paired, wilson_interval

Verdicts = Mapping[str, bool]
"""Problem -> whether the answer is right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a trained arm takes; of several seeds the means."""

    bytes: int = 0
    """Of the weights that are shipped."""
    extract_s: float = 0.0
    """Once for all seeds and kinds."""
    train_s: float = 0.0
    tokens: float = 0.0
    """Trained on, in all passes."""
    nll: float | None = None
    """Held-out loss, in nats per target."""

    @property
    def clock_s(self) -> float:
        """Seconds of a first run."""
        return self.extract_s + self.train_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An arm on a task."""

    task: str
    arm: str
    problems: int
    right: list[int]
    """Of each seed; of the base once."""
    low: float
    """Lower end of the 95 % interval of Wilson of the mean."""
    high: float
    cut: float
    """Fraction of answers that the limit of new tokens ended."""
    against_base: Paired
    against_prompt: Paired
    """Against the prompted arm of the base that is right most often."""
    costs: Costs = field(default_factory=Costs)

    @property
    def accuracy(self) -> float:
        """Fraction right, mean of the seeds."""
        return mean(self.right) / self.problems

    @property
    def worst(self) -> float:
        """Fraction right with the worst seed."""
        return min(self.right) / self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "accuracy": self.accuracy, "clock_s": self.costs.clock_s}


def make_rows(
    task: str,
    verdicts: Mapping[str, Sequence[Verdicts]],
    *,
    cuts: Mapping[str, float],
    costs: Mapping[str, Costs],
) -> list[Row]:
    """Return the rows of a task, in the order of `verdicts`.

    Args:
        task: its name.
        verdicts: arm -> of each seed, on the same problems; `base` is one of the arms.
        cuts: arm -> fraction of answers that were cut.
        costs: of the arms that were trained.
    """
    problems = list(verdicts["base"][0])
    shares = {
        arm: [mean(seed[problem] for seed in seeds) for problem in problems]
        for arm, seeds in verdicts.items()
    }
    asked = [arm for arm in PROMPTED if arm in shares] or ["base"]
    prompt = max(asked, key=lambda arm: sum(shares[arm]))
    rows = list[Row]()
    for arm, seeds in verdicts.items():
        right = [sum(seed[problem] for problem in problems) for seed in seeds]
        low, high = wilson_interval(mean(right), len(problems))
        rows.append(
            Row(
                task=task,
                arm=arm,
                problems=len(problems),
                right=right,
                low=low,
                high=high,
                cut=cuts[arm],
                against_base=compare_paired(shares["base"], shares[arm]),
                against_prompt=compare_paired(shares[prompt], shares[arm]),
                costs=costs.get(arm, Costs()),
            )
        )
    return rows


def figures_of(rows: Sequence[Row], *, goal: Goal | None, kind: str) -> list[Figure]:
    """Return a figure for each row of a task, and that of its goal.

    Args:
        rows: of one task.
        goal: None: the task has none.
        kind: of carry-on that is to reach the goal.
    """
    figures = [
        Figure(
            figure=f"cot.{row.task}.{row.arm}",
            value=row.accuracy,
            unit="of the answers are right, mean of the seeds",
            details={name: value for name, value in row.to_dict().items() if name != "accuracy"},
        )
        for row in rows
    ]
    if goal is None:
        return figures
    accuracy = {row.arm: row.accuracy for row in rows}
    worst = {row.arm: row.worst for row in rows}[kind]
    references = {
        "nothing": 0.0,
        "base": accuracy["base"],
        "prompt": max(accuracy[arm] for arm in ("base", *PROMPTED) if arm in accuracy),
    }
    minus = {"nothing": "", "base": " minus the plain base", "prompt": " minus the best prompt"}
    figures.append(
        Figure(
            figure=f"cot.{rows[0].task}.goal",
            value=round(worst - references[goal.against], 9),  # 0.70 - 0.73 is below -0.03
            target=goal.at_least,
            sense="at least",
            unit=f"of the answers are right with the worst seed of {kind}{minus[goal.against]}",
        )
    )
    return figures
