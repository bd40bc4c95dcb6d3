"""Negative log-likelihood of base and carry-on on samples of a store, without the base."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from carryon.cache.errors import InputError
from carryon.cache.reader import Store
from carryon.train.carryon import CarryOn
from carryon.train.carryon_folder import CarryOnCard, check_base, load_carryon
from carryon.train.config import LossSettings, StreamSettings
from carryon.train.device import pick_chunk, pick_device, pick_head_dtype
from carryon.train.loss import FrozenHead, frozen_head, token_losses
from carryon.train.order import count_steps, plan_pass
from carryon.train.split import split_samples
from carryon.train.step import final_states, pair_losses
from carryon.train.stream import Stream

BATCH_TOKENS = 4096
"""Tokens of an evaluation's batch, pads included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nll:
    """Mean negative log-likelihood of supervised tokens, in nats."""

    base: float
    """Of the base alone; nan where it was not asked for."""
    carryon: float
    """Of base and carry-on; nan where it was not asked for."""
    samples: int
    """Samples looked at."""
    targets: int
    """Supervised tokens looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateReport:
    """What an evaluation found."""

    store: str
    carryon: str
    samples: str
    """`held-out` or `all` of the store."""
    alpha: float
    num_samples: int
    num_targets: int
    base_nll: float
    carryon_nll: float
    base_perplexity: float
    carryon_perplexity: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def evaluate(
    *,
    store: str,
    carryon: str,
    samples: Literal["auto", "held-out", "all"] = "auto",
    alpha: float | None = None,
    device: str = "auto",
    stream: StreamSettings | None = None,
    loss: LossSettings | None = None,
) -> EvaluateReport:
    """Measure base and carry-on on a store; nothing is written.

    Args:
        store: folder of the store.
        carryon: folder of the carry-on.
        samples: `held-out` takes those that training never saw, `all` every sample; `auto` is
            `held-out` on the store that the carry-on was trained on, and `all` on another.
        alpha: strength of the correction. None: the carry-on's own.
        device: as in RunSettings.
        stream: how the store is read. None: the defaults.
        loss: how the head is multiplied. None: the defaults.

    Raises:
        InputError: the carry-on belongs to another base, or the store lacks a tap.
    """
    opened = Store.open(store)
    module, card = load_carryon(carryon)
    check_base(card, opened.manifest.base, folder=carryon)
    check_taps(opened, module.settings.taps)
    chosen, name = _choose(opened, card, samples)
    strength = card.alpha if alpha is None else alpha
    loss = loss or LossSettings()
    place = pick_device(device)
    head = frozen_head(opened.head(), device=place, dtype=pick_head_dtype(loss.head_dtype, place))
    nll = measure_nll(
        opened,
        chosen,
        carryon=module.to(place),
        head=head,
        chunk=pick_chunk(loss.chunk_tokens, place),
        alpha=strength,
        stream=stream or StreamSettings(),
        with_base=True,
        with_carryon=True,
    )
    return EvaluateReport(
        store=store,
        carryon=carryon,
        samples=name,
        alpha=strength,
        num_samples=nll.samples,
        num_targets=nll.targets,
        base_nll=nll.base,
        carryon_nll=nll.carryon,
        base_perplexity=math.exp(nll.base),
        carryon_perplexity=math.exp(nll.carryon),
    )


def measure_nll(
    store: Store,
    samples: NDArray[np.int64],
    *,
    carryon: CarryOn,
    head: FrozenHead,
    chunk: int,
    alpha: float,
    stream: StreamSettings,
    with_base: bool,
    with_carryon: bool,
) -> Nll:
    """Return the mean NLL of `samples`, summed in float64, in one pass over their units."""
    windows = plan_pass(
        samples, lengths=store.sample_lengths, units=sample_units(store), batch_tokens=BATCH_TOKENS
    )
    device = head.weight.device
    base_sum = carryon_sum = 0.0
    targets = 0
    reader = Stream(
        store,
        windows,
        taps=stream_taps(carryon.settings.taps if with_carryon else []),
        settings=stream,
        is_pinned=device.type == "cuda",
    )
    with torch.no_grad(), reader as steps:
        for batches in tqdm(steps, total=count_steps(windows), desc="evaluate", leave=False):
            for batch in (each.to(device) for each in batches):
                targets += batch.num_targets
                if with_base:
                    losses = token_losses(
                        final_states(batch), batch.targets, head=head, chunk=chunk
                    )
                    base_sum += float(losses.double().sum())
                if with_carryon:
                    losses = pair_losses(carryon, batch, head=head, chunk=chunk, alpha=alpha)
                    carryon_sum += float(losses.double().sum())
    if targets == 0:
        raise InputError(
            f"{store.root}: no supervised token in the {len(samples)} samples to evaluate on"
        )
    return Nll(
        base=base_sum / targets if with_base else math.nan,
        carryon=carryon_sum / targets if with_carryon else math.nan,
        samples=len(samples),
        targets=targets,
    )


def stream_taps(taps: Sequence[str]) -> list[str]:
    """Return what must be read for a carry-on on `taps`: those, and `final`, which it corrects."""
    return list(dict.fromkeys(["final", *taps]))


def check_taps(store: Store, taps: Sequence[str]) -> None:
    """Refuse a carry-on on `taps` where the store cannot feed it.

    Raises:
        InputError: names the taps that are missing and those that are there.
    """
    missing = [tap for tap in stream_taps(taps) if tap not in store.taps]
    if missing:
        raise InputError(
            f"{store.root}: expected the taps {', '.join(stream_taps(taps))}, it has "
            f"{', '.join(store.taps)}: extract again with --taps "
            f"{' '.join([*store.taps, *missing])}"
        )


def sample_units(store: Store) -> NDArray[np.int64]:
    """Return the unit of each sample, [S]."""
    return np.asarray(store.sample_starts // store.manifest.unit_tokens, dtype=np.int64)


def _choose(
    store: Store, card: CarryOnCard, samples: Literal["auto", "held-out", "all"]
) -> tuple[NDArray[np.int64], str]:
    is_own = store.fingerprint == card.store_fingerprint
    if samples == "all" or (samples == "auto" and not is_own):
        return np.arange(store.num_samples, dtype=np.int64), "all"
    if not is_own and not store.sample_held_out.any():
        raise InputError(
            f"{store.root}: marks no sample as held out, and the carry-on was trained on another "
            "store: evaluate on all samples"
        )
    split = split_samples(
        store.sample_held_out,
        share=card.split["held_out_share"],
        seed=card.split["seed"],
        fingerprint=store.fingerprint,
    )
    return split.held_out, "held-out"
