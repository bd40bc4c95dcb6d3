"""A teacher's log-probabilities of all tokens at the student's training targets, in a file.

float16 is off by 0.004 at a log-probability of -16; bfloat16 would be off by 0.03.
Letters: P training targets of the student, n some of them, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.files.atomic import whole_file
from carryon.cache.store.reader import Store
from carryon.tools.bench.teacher.join import Joined
from carryon.tools.bench.teacher.loss import CHUNK, LogProbs
from carryon.train.config import StreamSettings
from carryon.train.data.batch import Batch
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import plan_pass
from carryon.train.data.split import sample_units
from carryon.train.losses.base_states import BaseStates, get_base_states
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.mixing.logits import log_probabilities
from carryon.train.mixing.projected import rows_of
from carryon.train.modules.carryon import CarryOn, taps_of
from carryon.train.trainer.step import pair_delta

_BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LogProbFile:
    """Log-probabilities that were written."""

    path: Path
    """Of [P, V] float16."""
    rows: NDArray[np.int64]
    """[P] rows of the student's store that they belong to, ascending."""
    vocab_size: int

    def at(self, rows: NDArray[np.int64]) -> Tensor:
        """Return those of some rows, [n, V] float32."""
        places = np.searchsorted(self.rows, rows)
        shape = (len(self.rows), self.vocab_size)
        return torch.from_numpy(
            np.memmap(self.path, np.float16, mode="r", shape=shape)[places].astype(np.float32)
        )

    def picked(self, rows: NDArray[np.int64]) -> LogProbs:
        """Return what gives those of some of these rows."""
        return lambda part: self.at(rows[part])


def num_bytes(joined: Joined, vocab_size: int) -> int:
    """Return the size of the file of one teacher."""
    return 2 * len(joined.rows) * vocab_size


@torch.no_grad()
def write_log_probs(
    path: Path,
    teacher: Store,
    joined: Joined,
    *,
    train: NDArray[np.int64],
    carryon: CarryOn | None,
    alpha: float,
    head: FrozenHead,
) -> float:
    """Write the file, and return the teacher's mean loss at the training targets, in nats.

    Args:
        path: of the file, which appears whole or not at all.
        teacher: its store.
        joined: with the student's.
        train: the student's training samples.
        carryon: corrects the states. None: the bare teacher.
        alpha: strength of the correction.
        head: of the teacher, in float32.

    Raises:
        DiskFullError: no space left.
    """
    base = get_base_states(teacher, device=head.device)
    windows = plan_pass(
        np.sort(joined.samples[train]),
        lengths=teacher.sample_lengths,
        units=sample_units(teacher),
        tokens_per_step=_BATCH_TOKENS,
    )
    taps = [base.tap, *(taps_of(carryon) if carryon else ())]
    reader = Stream(
        teacher, windows, taps=list(dict.fromkeys(taps)), settings=StreamSettings(), is_pinned=False
    )
    count, total = 0, 0.0
    with whole_file(path) as partial, partial.open("wb") as file, reader as steps:
        for batch in (each.to(head.device) for batches in steps for each in batches):
            states = _states(batch, base, carryon, alpha, head)
            places = np.searchsorted(joined.rows, rows_of(batch, joined.starts))
            for first in range(0, len(states), CHUNK):
                part = slice(first, first + CHUNK)
                logs = log_probabilities(states[part], head)
                total += float(logs.gather(1, batch.targets[part].unsqueeze(1)).double().sum())
                halves = logs.half().cpu().numpy()
                for place, row in zip(places[part].tolist(), halves, strict=True):
                    file.seek(place * row.nbytes)
                    file.write(row.data)
            count += len(states)
        assert count == len(joined.rows), "the masks of both stores were compared"
    return -total / count


def _states(
    batch: Batch, base: BaseStates, carryon: CarryOn | None, alpha: float, head: FrozenHead
) -> Tensor:
    """Return the states that the teacher's head reads at the supervised pairs."""
    if carryon is None:
        return base.at_pairs(batch, head)
    delta = pair_delta(carryon, batch, head=head)
    return carryon.customize(batch.states, batch.positions, delta, alpha=alpha)
