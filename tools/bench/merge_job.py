"""What each measurement of the benchmark `merge` is given: a store, carry-ons trained from it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from carryon.cache.base.model import load_base
from carryon.cache.device import pick_device
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.compose_job import made_up_card
from carryon.tools.bench.lora import RANK, carryon_steps, take_batches
from carryon.tools.bench.merge import BenchMergeSettings, BenchMergeSizes
from carryon.tools.compare.corpora import PYTHON, write_named_corpus
from carryon.tools.compare.figure import Report
from carryon.train.config import CarryOnSettings, rates_of
from carryon.train.modules.carryon import build_carryon
from carryon.train.modules.serialization import save_carryon
from carryon.train.modules.taps import resolve_taps

_LONGEST = 512
_FAR = 10.0
"""Times a kind's own learning rate: a few steps then change logits by more than rounding does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeJob:
    """What a measurement is given."""

    base: str
    store: str
    sizes: BenchMergeSizes
    work: Path
    """A folder for what is written on the way; it is there, and is removed afterwards."""
    report: Report

    def shape(self, name: str) -> CarryOnSettings:
        """Return the shape of `native`, `top`, or `top-lora`."""
        num_layers = int(Store.open(self.store).manifest.base["num_layers"])
        if name == "native":
            shape = CarryOnSettings(kind="native", blocks=self.sizes.native_blocks)
        else:
            shape = CarryOnSettings(
                kind="top",
                blocks=_top_blocks(self.sizes, num_layers),
                lora_rank=RANK if name == "top-lora" else 0,
            )
        return resolve_taps(shape, num_layers)

    def train(self, name: str) -> Path:
        """Train a carry-on of a shape, not well but far from its base; return its folder."""
        shape, store = self.shape(name), Store.open(self.store)
        carryon = build_carryon(shape, store, seed=0).to(pick_device("auto"))
        batches = take_batches(
            self.store, self.sizes.batch_tokens, count=self.sizes.steps, taps=shape.taps
        )
        rate = _FAR * rates_of(shape)[0]
        carryon_steps(carryon, store, batches, learning_rate=rate)()
        card = made_up_card(shape, store.manifest.base)
        save_carryon(self.work / name, carryon, card, dtype=torch.bfloat16)
        return self.work / name

    def tokens(self, most: int) -> Tensor:
        """Return the first tokens of the longest sample, [1, T] int64."""
        store = Store.open(self.store)
        sample = int(store.sample_lengths.argmax())
        most = min(most, int(store.sample_lengths[sample]))
        rows = store.read_sample(sample, taps=store.taps[:1], stop=most)
        return torch.from_numpy(rows.tokens).long()[None]


def make_store(root: Path, settings: BenchMergeSettings, sizes: BenchMergeSizes) -> str:
    """Extract the texts that are given, or Python's standard library; return the store's folder."""
    base = load_base(settings.base, forward=ForwardSettings())
    data = [Path(path) for path in settings.data]
    if not data:
        data = [root / "text.jsonl"]
        # Half as much again: tokenizers differ, and a share is held out.
        write_named_corpus(PYTHON, data[0], num_tokens=sizes.steps * sizes.batch_tokens * 3 // 2)
    num_layers = base.identity.num_layers
    top = _top_blocks(sizes, num_layers)
    longest = min(_LONGEST, sizes.batch_tokens, base.identity.context_tokens)
    extract(
        base=base,
        data=data,
        out=root / "store",
        corpus=CorpusSettings(max_tokens=longest, long="split"),
        store=StoreSettings(
            taps=["prenorm", f"layer.{num_layers - top}"],
            with_blocks=top,
            unit_tokens=4 * longest,
        ),
        forward=ForwardSettings(),
    )
    return str(root / "store")


def _top_blocks(sizes: BenchMergeSizes, num_layers: int) -> int:
    return max(1, min(sizes.top_blocks, num_layers - 1))
