"""Intervals of fractions, paired counts, an exact sign test, and pass@k."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt

_Z95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """An arm against the first one, on the same problems."""

    won: int
    """Problems on which it is right more often."""
    lost: int
    p: float
    """Of the two-sided sign test."""


def wilson_interval(right: float, num: int) -> tuple[float, float]:
    """Return the 95 % interval of a fraction by Wilson's score (Wilson 1927, JASA 22)."""
    share, z2 = right / num, _Z95**2
    centre = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = _Z95 / (1 + z2 / num) * sqrt(share * (1 - share) / num + z2 / (4 * num**2))
    # Exact ends: rounding would leave 1e-17 of none, and less than 1 of all
    return (centre - half if right else 0.0), (centre + half if right < num else 1.0)


def compare_paired(first: Sequence[float], other: Sequence[float]) -> Paired:
    """Return how an arm did against the first one, by their fractions right on each problem."""
    pairs = list(zip(first, other, strict=True))
    won = sum(after > before for before, after in pairs)
    lost = sum(after < before for before, after in pairs)
    return Paired(won=won, lost=lost, p=sign_test(won, lost))


def sign_test(won: int, lost: int) -> float:
    """Return the exact two-sided p of a sign test: of fair coins as uneven as these, or more."""
    num, ways, tail = won + lost, 1, 1
    for count in range(min(won, lost)):
        ways = ways * (num - count) // (count + 1)
        tail += ways
    return float(min(2 * tail / 2**num, 1.0))


def pass_at_k(num: int, right: int, k: int) -> float:
    """Return the unbiased estimate that one of k answers is right, from `right` of `num`.

    1 - C(num - right, k) / C(num, k): Chen et al. 2021, "Evaluating Large Language Models Trained
    on Code", equation 1, as a product that does not overflow.
    """
    if num - right < k:
        return 1.0
    return 1.0 - prod(1.0 - k / count for count in range(num - right + 1, num + 1))
