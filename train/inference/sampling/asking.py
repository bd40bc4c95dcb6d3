"""Settings of a sampling: how problems are posed, and which answers become records."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How problems are posed, and which answers become records."""

    samples: int = 8
    """Answers to each problem."""
    max_samples: int = 0
    """Answers at most to a problem without a right one; below `samples`: no more than those."""
    instruction: str = ""
    """Text behind the question."""
    keep_instruction: bool = False
    """Store the question with the instruction."""
    shots: int = 0
    """Solved problems shown before the question, at most."""
    example_sets: int = 1
    """Sets of them at most that are tried in rounds; the last one left asks the rest."""
    hint: str = ""
    """Text behind the question, with RESULT in place of the right answer."""
    keep: int = 4
    """Most records of a problem; 0: no limit."""
    keep_cut: bool = False
    """Keep right answers that were cut at the limit of new tokens."""
    form_ratio: float = 0.0
    """Leave out right answers of forms that are right less often than this times the best form."""
    known: Sequence[str] = ()
    """Corpora of earlier samplings, whose answers are not kept again."""
    unsolved: bool = False
    """Pose only the problems without an answer in `known`."""
    drop_long: bool = False
    """Leave out problems whose prompt is too long for the base."""
    held_out_ratio: float = 0.05
    """Fraction of problems whose records are marked held out."""
