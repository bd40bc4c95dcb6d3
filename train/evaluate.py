"""Negative log-likelihood of base and carry-on on samples of a store, without the base."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from carryon.cache.errors import InputError
from carryon.cache.reader import Store
from carryon.cache.spec import parse_tap
from carryon.cache.store_part import manifest_of_part, open_store
from carryon.train.base_states import BaseStates, find_base_states
from carryon.train.blocks_carryon import blocks_of
from carryon.train.carryon import CarryOn
from carryon.train.carryon_folder import (
    CarryOnCard,
    check_base,
    load_carryon,
    locate_carryon,
)
from carryon.train.carryon_set import check_alpha
from carryon.train.config import CarryOnSettings, LossSettings, StreamSettings
from carryon.train.device import pick_chunk, pick_device
from carryon.train.frozen_head import FrozenHead, place_head
from carryon.train.loss import token_losses
from carryon.train.order import count_steps, plan_pass, rank_rows
from carryon.train.processes import current_processes, sum_over_processes
from carryon.train.split import split_samples
from carryon.train.step import losses_of_delta, pair_delta
from carryon.train.stream import Stream

BATCH_TOKENS = 4096
"""Tokens of an evaluation's batch, at most."""
BATCH_BYTES = 20 << 20
"""States of a tap in an evaluation's batch, at most; else evaluating a wide base would take more
memory than training."""


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
    """Of those measured, the one with the lowest NLL."""
    num_samples: int
    num_targets: int
    base_nll: float
    carryon_nll: float
    """At that alpha."""
    base_perplexity: float
    carryon_perplexity: float
    alphas: list[float]
    """All that were measured."""
    carryon_nlls: list[float]
    """At each of them."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def evaluate(
    *,
    store: str,
    carryon: str,
    samples: Literal["auto", "held-out", "all"] = "auto",
    alphas: Sequence[float] = (),
    device: str = "auto",
    stream: StreamSettings | None = None,
    loss: LossSettings | None = None,
) -> EvaluateReport:
    """Measure base and carry-on on a store, in one pass over it; nothing is written.

    Args:
        store: folder of the store.
        carryon: folder of the carry-on, or its id on the hub.
        samples: `held-out` takes those that training never saw, `all` every sample; `auto` is
            `held-out` on the store that the carry-on was trained on, and `all` on another.
        alphas: strengths of the correction to measure. None given: the carry-on's own.
        device: as in RunSettings.
        stream: how the store is read. None: the defaults.
        loss: how the head is multiplied. None: the defaults.

    Raises:
        SettingMismatchError: the carry-on belongs to another base.
        InputError: an alpha is out of range, or the store lacks a tap.
    """
    opened = open_store(store)
    module, card = load_carryon(locate_carryon(carryon), blocks=partial(blocks_of, opened))
    check_base(card, opened.manifest.base, where=store)
    check_taps(opened, stream_taps(module.settings))
    chosen, name = _choose(opened, card, samples)
    strengths = [check_alpha(alpha) for alpha in alphas or [card.alpha]]
    loss = loss or LossSettings()
    place = pick_device(device)
    module, head = module.to(place), place_head(opened, loss, device=place)
    chunk = pick_chunk(loss.chunk_tokens)
    judged = [
        Judged(carryon=module, head=head, chunk=chunk, alpha=alpha, with_base=True)
        for alpha in strengths
    ]
    found = measure_nlls(opened, chosen, judged, stream=stream or StreamSettings())
    best = min(range(len(found)), key=lambda index: found[index].carryon)
    return EvaluateReport(
        store=store,
        carryon=carryon,
        samples=name,
        alpha=strengths[best],
        num_samples=found[best].samples,
        num_targets=found[best].targets,
        base_nll=found[best].base,
        carryon_nll=found[best].carryon,
        base_perplexity=math.exp(found[best].base),
        carryon_perplexity=math.exp(found[best].carryon),
        alphas=strengths,
        carryon_nlls=[nll.carryon for nll in found],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A carry-on to be measured, and the head that it is measured through."""

    carryon: CarryOn | None
    """None: only the base."""
    head: FrozenHead
    chunk: int
    """Supervised positions whose logits exist at one time."""
    alpha: float = 1.0
    """Strength of the correction."""
    with_base: bool = False
    """Whether the base is measured too."""

    @property
    def needs_base(self) -> bool:
        """Whether the base's own states are."""
        return self.with_base or (self.carryon is not None and self.alpha == 0)


def measure_nlls(
    store: Store,
    samples: NDArray[np.int64],
    judged: Sequence[Judged],
    *,
    stream: StreamSettings,
) -> list[Nll]:
    """Return the mean NLL of `samples` for each carry-on, all in one pass over their units.

    Sums are in float64; several processes share the samples.

    Raises:
        InputError: there is no supervised token in `samples`.
    """
    processes = current_processes()
    windows = plan_pass(
        rank_rows(samples, rank=processes.rank, world_size=processes.size),
        lengths=store.sample_lengths,
        units=sample_units(store),
        batch_tokens=min(BATCH_TOKENS, BATCH_BYTES // (2 * store.width)),
    )
    device = judged[0].head.device
    taps = [tap for each in judged if each.carryon for tap in stream_taps(each.carryon.settings)]
    base: BaseStates | None = None
    if any(each.needs_base for each in judged):
        base = find_base_states(store, device=device)
        taps.append(base.tap)
    sums = [[0.0, 0.0] for _ in judged]
    targets = 0
    reader = Stream(
        store,
        windows,
        taps=list(dict.fromkeys(taps)),
        settings=stream,
        is_pinned=device.type == "cuda",
    )
    modules = {id(each.carryon): each.carryon for each in judged if each.carryon is not None}
    with torch.no_grad(), reader as steps, _without_dropout(modules.values()):
        for batches in tqdm(steps, total=count_steps(windows), desc="evaluate", leave=False):
            for batch in (each.to(device) for each in batches):
                targets += batch.num_targets
                bases: dict[tuple[int, int], float] = {}
                deltas: dict[int, torch.Tensor] = {}
                for each, total in zip(judged, sums, strict=True):
                    head, chunk = each.head, each.chunk
                    if base is not None and each.needs_base:
                        key = (id(head), chunk)
                        if key not in bases:
                            states = base.at_pairs(batch, head)
                            losses = token_losses(states, batch.targets, head=head, chunk=chunk)
                            bases[key] = float(losses.double().sum())
                        total[0] += bases[key]
                    if each.carryon is not None and each.alpha == 0:
                        total[1] += bases[key]  # the base itself, for carry-ons of any kind
                    elif each.carryon is not None:
                        if id(each.carryon) not in deltas:  # once for all alphas
                            deltas[id(each.carryon)] = pair_delta(each.carryon, batch, head=head)
                        delta = deltas[id(each.carryon)]
                        losses = losses_of_delta(
                            each.carryon, delta, batch, head=head, chunk=chunk, alpha=each.alpha
                        )
                        total[1] += float(losses.double().sum())
    flat = [value for total in sums for value in total]
    count, *found = sum_over_processes(targets, *flat, device=device)
    if count == 0:
        raise InputError(
            f"{store.root}: no supervised token in the {len(samples)} samples to evaluate on"
        )
    return [
        Nll(
            base=base / count if each.with_base else math.nan,
            carryon=carryon / count if each.carryon is not None else math.nan,
            samples=len(samples),
            targets=int(count),
        )
        for each, base, carryon in zip(judged, found[::2], found[1::2], strict=True)
    ]


@contextmanager
def _without_dropout(carryons: Iterable[CarryOn]) -> Iterator[None]:
    before = [(carryon, carryon.training) for carryon in carryons]
    for carryon, _ in before:
        carryon.eval()
    yield
    for carryon, is_training in before:
        carryon.train(is_training)


def stream_taps(carryon: CarryOnSettings) -> list[str]:
    """Return what must be read for a carry-on: its taps, and `final` for a bottleneck, which
    corrects it; the other kinds take its place."""
    own = carryon.taps
    return list(dict.fromkeys(["final", *own])) if carryon.kind == "bottleneck" else list(own)


def check_taps(store: Store, taps: Sequence[str]) -> None:
    """Refuse a store that lacks one of `taps`.

    Raises:
        InputError: names the taps that are missing and those that are there.
    """
    missing = [tap for tap in taps if tap not in store.taps]
    if missing:
        words = ["--taps", *store.taps, *missing]
        if "final" not in taps:  # a kind that merges, which needs the base's blocks as well
            num_layers = int(store.manifest.base["num_layers"])
            layers = [parse_tap(tap, num_layers=num_layers) or num_layers - 1 for tap in taps]
            words += ["--with-blocks", str(num_layers - min(layers))]
        raise InputError(
            f"{store.root}: expected the taps {', '.join(taps)}, it has "
            f"{', '.join(store.taps)}: extract again with {' '.join(words)}"
        )


def sample_units(store: Store) -> NDArray[np.int64]:
    """Return the unit of each sample, [S]."""
    return np.asarray(store.sample_starts // store.manifest.unit_tokens, dtype=np.int64)


def _parts_among(store: Store, fingerprints: Sequence[str]) -> list[int]:
    manifest, name = store.manifest, str(store.root)
    numbers = range(1, len(manifest.parts) + 1)
    return [
        number
        for number in numbers
        if manifest_of_part(manifest, number, name=name).fingerprint in fingerprints
    ]


def _choose(
    store: Store, card: CarryOnCard, samples: Literal["auto", "held-out", "all"]
) -> tuple[NDArray[np.int64], str]:
    known = card.split.get("stores", [card.store_fingerprint])
    is_own = store.fingerprint in known
    own = _parts_among(store, known)
    if own and not is_own and samples != "all":
        if store.sample_held_out.any():
            return np.flatnonzero(store.sample_held_out).astype(np.int64), "held-out"
        raise InputError(
            f"{store.root}: the carry-on was trained on {', '.join(f'#{part}' for part in own)} of "
            f"it, which mark no sample as held out: evaluate on {store.root}#{own[-1]} or another "
            "part alone, or on all samples"
        )
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
        digest=store.samples_digest,
    )
    return split.held_out, "held-out"
