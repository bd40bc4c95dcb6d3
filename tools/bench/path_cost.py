"""The cost ledger: steps that each way of releasing versions takes, counted and by formula.

Letters: N versions, T steps of an increment.
"""

from collections.abc import Sequence
from fractions import Fraction

from carryon.train.optim.lr_paths import Paradigm, branch_point


def steps_by_formula(paradigm: Paradigm, *, versions: int, steps: int, alpha: float) -> Fraction:
    """Return the steps of N versions of T steps each, exactly.

    Args:
        paradigm: how versions follow each other.
        versions: N.
        steps: T.
        alpha: part of an increment's steps in which a branch falls.
    """
    if paradigm == "scratch":
        return Fraction(versions * (versions + 1) * steps, 2)
    if paradigm == "switch":
        # As the decimal that was written: 0.6 is 3/5, not its nearest binary fraction.
        return versions * steps + Fraction(str(alpha)) * (versions - 1) * steps
    return Fraction(versions * steps)


def steps_to_take(paradigm: Paradigm, ends: Sequence[int], *, alpha: float) -> int:
    """Return the steps of as many versions as there are increments, of any lengths.

    Args:
        paradigm: how versions follow each other.
        ends: the step at which each increment ends.
        alpha: part of an increment's steps in which a branch falls.
    """
    if paradigm == "scratch":
        return sum(ends)
    if paradigm != "switch":
        return ends[-1]
    # The trunk goes past a branch point only when the next version asks for it.
    firsts = [0, *ends[:-1]]
    twice = [
        stop - branch_point(first, stop, alpha=alpha)
        for first, stop in zip(firsts, ends, strict=True)
    ]
    return ends[-1] + sum(twice[:-1])
