"""How long a run takes, from its first steps and its first evaluation. Pure.

Steps cost by their tokens. An evaluation costs the base's, which is measured before the first step,
and the carry-on's forward pass, which is a share of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from carryon.train.data.evaluation_set import Work

TIMED_STEPS = 10
"""Steps after which a run is predicted; of a shorter one, a quarter of them."""
_MIN_STEPS = 3
_LEFT_STEPS = 5  # fewer are not worth a line


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluations:
    """What a run evaluates on its way and at its end."""

    left: int
    """Evaluations on the way that are to come."""
    base_s: float
    """Seconds of one of the base. 0: the run evaluates nothing."""
    tokens: int
    """Of the samples evaluated on the way."""
    last_tokens: int
    """Of all held-out samples."""
    last_targets: int
    """Targets of all held-out samples."""
    target_s: float
    """Seconds of the exact loss of a target, without gradient; less with several processes."""

    def seconds(self, work: Work, *, token_s: float, density: float) -> float:
        """Return the seconds of those to come, the last one of base and carry-on included.

        Args:
            work: of the run.
            token_s: seconds of a step for each token.
            density: targets per token of the steps.
        """
        if self.base_s == 0:
            return 0.0
        # Forward is a third of what a carry-on multiplies in a step.
        forward_s = token_s * work.weights / work.of_training(1.0, density)
        of_each = self.base_s + forward_s * self.tokens
        last = 2 * self.target_s * self.last_targets + forward_s * self.last_tokens
        return self.left * of_each + last


def awaited_steps(num_left: int) -> int:
    """Return the steps to time before the others are predicted; 0: there are too few."""
    timed = min(TIMED_STEPS, max(_MIN_STEPS, num_left // 4))
    return timed if num_left >= timed + _LEFT_STEPS else 0


def seconds_per_token(seconds: Sequence[float], tokens: Sequence[int], *, skipped: int) -> float:
    """Return the seconds of a token of the timed steps.

    Args:
        seconds: of each step.
        tokens: of each step.
        skipped: first steps that do not count, as they set up memory, if there are more.
    """
    if len(seconds) <= skipped:
        skipped = 0
    return sum(seconds[skipped:]) / max(1, sum(tokens[skipped:]))
