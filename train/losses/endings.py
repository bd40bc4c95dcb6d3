"""Whether the base finds the ends of a corpus's answers unlikely.

A base continues its own wording well. After "Therefore, the final answer is 120." it expects the
end; after "#### 120" it does not, and a carry-on has to learn to stop there, and what stands there.
An answer is a run of targets behind a prompt; its last target is its stop token. Whole texts, which
have no prompt, end anywhere and are left out.
Letters: M supervised pairs of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from carryon.cache.store.view import StoreLike
from carryon.train.data.batch import Batch

LAST_TOKENS = 8
"""Targets before the stop token that count as an answer's end: a marker and a number."""
MIN_ANSWERS = 8
_MIN_NLL = 2.5
_MIN_EXCESS = 1.5
"""Nats per target. SmolLM2-135M: stop tokens are 1.9 to 3.8 nats above the rest after `#### X` in
chats and 7 to 9 without a chat template; at most 0.8 after "the final answer is X.", and in chats
and code. Ends such as `<answer>X</answer>` are 1.9 above the rest."""


@dataclass(slots=True)
class Endings:
    """Losses of the base at the ends of answers."""

    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(7))
    """Answers; then loss and number of stop tokens, of the last targets before them, and of the
    targets before those."""
    ends: list[tuple[float, int, int, int]] = field(default_factory=list)
    """Of each answer the mean loss of its end, its sample, and the first and last token of its
    end."""

    def add(self, losses_M: NDArray[np.float64], batch: Batch) -> None:
        """Count the losses of a batch."""
        positions, rows = batch.host.positions.cpu().numpy(), batch.rows_of_pairs()
        starts = np.cumsum(batch.lengths) - batch.lengths
        is_new = (np.diff(positions) != 1) | (np.diff(rows) != 0)
        bounds = [0, *(np.flatnonzero(is_new) + 1).tolist(), len(positions)]
        for first, end in zip(bounds[:-1], bounds[1:], strict=True):
            if first == end:
                continue
            start = starts[rows[first]]
            stop, tail = end - 1, max(first, end - 1 - LAST_TOKENS)
            if positions[first] == start:
                continue  # a whole text
            parts = (losses_M[stop:end], losses_M[tail:stop], losses_M[first:tail])
            self.sums[0] += 1
            self.sums[1:] += [value for part in parts for value in (part.sum(), len(part))]
            sample, shift = int(batch.samples[rows[first]]), 1 - start
            self.ends.append(
                (
                    float(losses_M[tail:end].mean()),
                    sample,
                    int(positions[tail] + shift),
                    int(positions[stop] + shift),
                )
            )

    def warning(self, store: StoreLike, *, total: Callable[..., list[float]]) -> str:
        """Return a warning if ends are unlikely; empty if not.

        Args:
            store: of the samples.
            total: sums numbers over all processes.
        """
        count, *sums = total(*self.sums.tolist())
        (stop, _), (tail, tails), (rest, rests) = zip(sums[::2], sums[1::2], strict=True)
        if count < MIN_ANSWERS or not tails or not self.ends:
            return ""
        before = (tail + rest) / (tails + rests)
        stop, tail, rest = stop / count, tail / tails, rest / max(rests, 1)
        found = ""
        if stop >= max(_MIN_NLL, before + _MIN_EXCESS):
            found = f"{stop:.1f} nats at the stop token, {before:.1f} before it"
        elif rests and tail >= max(_MIN_NLL, rest + _MIN_EXCESS):
            found = f"{tail:.1f} nats at the last {LAST_TOKENS} tokens, {rest:.1f} before them"
        if not found:
            return ""
        _, sample, first, last = sorted(self.ends)[len(self.ends) // 2]
        return (
            f"the base finds the ends of answers unlikely: {found}, such as tokens {first} to "
            f"{last} of sample {store.sample_id(sample)}, which carryon inspect {store.root} "
            f"--sample {store.sample_id(sample)} shows. Such ends are hard to learn. Fix: reword "
            "them as the base would write them, such as 'Therefore, the final answer is 12.' in "
            "place of '#### 12'"
        )
