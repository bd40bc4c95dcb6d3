"""Carry-ons of the kinds that merge, trained a few steps from a store, and texts to run them on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from carryon.cache.device import pick_device
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.corpora import PYTHON
from carryon.tools.bench.job import Job
from carryon.tools.bench.lora import RANK, carryon_steps, take_batches
from carryon.tools.bench.random_carryons import empty_card
from carryon.train.config import CarryOnSettings, rates_of
from carryon.train.modules.carryon import build_carryon
from carryon.train.modules.serialization import save_carryon
from carryon.train.modules.taps import resolve_taps

_TOP_BLOCKS, _NATIVE_BLOCKS = 8, 2
TOKENS_PER_STEP = 512
_STEPS = 2
_MAX_TOKENS = 512
_FAR = 10.0
"""Multiple of a kind's learning rate: a few steps then change logits by more than rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeInput:
    """A store with blocks of its base, and shapes that it can train."""

    store: Store
    tokens_per_step: int

    @property
    def num_layers(self) -> int:
        """Blocks of the base."""
        return int(self.store.manifest.base["num_layers"])

    def shape(self, name: str) -> CarryOnSettings:
        """Return the shape of `native`, `top` or `top-lora`."""
        if name == "native":
            shape = CarryOnSettings(kind="native", blocks=_NATIVE_BLOCKS)
        else:
            blocks = count_top_blocks(self.num_layers)
            rank = RANK if name == "top-lora" else 0
            shape = CarryOnSettings(kind="top", blocks=blocks, lora_rank=rank)
        return resolve_taps(shape, self.num_layers)

    def train(self, name: str, out: Path) -> Path:
        """Train a carry-on of a shape for a few large steps; return its folder `out`."""
        shape = self.shape(name)
        carryon = build_carryon(shape, self.store, seed=0).to(pick_device("auto"))
        batches = take_batches(self.store, self.tokens_per_step, count=_STEPS, taps=shape.taps)
        rate = _FAR * rates_of(shape)[0]
        carryon_steps(carryon, self.store, batches, learning_rate=rate)()
        card = empty_card(shape, self.store.manifest.base)
        save_carryon(out, carryon, card, dtype=torch.bfloat16)
        return out

    def tokens(self, most: int) -> Tensor:
        """Return the first tokens of the longest sample, [1, T] int64."""
        sample = int(self.store.sample_lengths.argmax())
        stop = min(most, int(self.store.sample_lengths[sample]))
        rows = self.store.read_sample(sample, taps=self.store.taps[:1], stop=stop)
        return torch.from_numpy(rows.tokens).long()[None]


def open_input(job: Job, *, tokens_per_step: int = TOKENS_PER_STEP) -> MergeInput:
    """Open the given store, or extract one with the taps and blocks that both kinds need.

    A given store needs the taps `prenorm` and `layer.(L-k)`, and the last k blocks.
    """
    if job.given_stores:
        store = job.open_store()
    else:
        num_layers = job.load_base().identity.num_layers
        blocks = count_top_blocks(num_layers)
        max_tokens = min(_MAX_TOKENS, tokens_per_step)
        settings = StoreSettings(
            taps=["prenorm", f"layer.{num_layers - blocks}"],
            with_blocks=blocks,
            unit_tokens=4 * max_tokens,
        )
        # Half as much again: tokenizers differ, and some samples are held out.
        num_tokens = _STEPS * tokens_per_step * 3 // 2
        store = job.open_store(
            settings, default=PYTHON, num_tokens=num_tokens, max_tokens=max_tokens
        )
    return MergeInput(store=store, tokens_per_step=tokens_per_step)


def count_top_blocks(num_layers: int) -> int:
    """Return the blocks of a `top` on a base of `num_layers` blocks."""
    return max(1, min(_TOP_BLOCKS, num_layers - 1))
