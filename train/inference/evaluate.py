"""Negative log-likelihood of base and carry-on on samples of a store, without the base."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from carryon.cache.device import pick_chunk, pick_device
from carryon.cache.errors import InputError
from carryon.cache.settings import apply_options
from carryon.cache.store.reader import Store
from carryon.cache.store.view import manifest_of_part, open_store
from carryon.train.config import LossSettings, StreamSettings
from carryon.train.data.split import split_samples
from carryon.train.losses.frozen_head import place_head
from carryon.train.modules.carryon import blocks_of
from carryon.train.modules.serialization import (
    CarryOnCard,
    check_base,
    load_carryon,
    locate_carryon,
)
from carryon.train.modules.taps import check_alpha, check_taps, stream_taps
from carryon.train.trainer.nll import EvalJob, measure_nlls


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
    store: str | Path,
    *,
    carryon: str | Path,
    alphas: Sequence[float] | None = None,
    samples: Literal["auto", "held-out", "all"] = "auto",
    device: str = "auto",
    stream: StreamSettings | None = None,
    loss: LossSettings | None = None,
    **options: Any,  # noqa: ANN401
) -> EvaluateReport:
    """Measure the held-out loss of base and carry-on in one pass over a store.

    The base model itself is not loaded, and nothing is written.

    Args:
        store: folder of the store, or STORE#NUMBER for one part of it.
        carryon: folder of the carry-on, or its id on the hub.
        alphas: strengths of the correction to measure. None: the carry-on's own.
        samples: `held-out` takes those that training never saw, `all` every sample; `auto` is
            `held-out` on the store that the carry-on was trained on, and `all` on another.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        stream: how the store is read. None: the defaults.
        loss: how the LM-head loss is computed. None: the defaults.
        options: fields of `stream` and `loss` by name, such as `chunk_tokens=512`.

    Raises:
        SettingMismatchError: the carry-on belongs to another base.
        InputError: an alpha is out of range, or the store lacks a tap.
    """
    stream, loss = apply_options(options, stream or StreamSettings(), loss or LossSettings())
    opened = open_store(str(store))
    module, card = load_carryon(locate_carryon(carryon), blocks=partial(blocks_of, opened))
    check_base(card, opened.manifest.base, where=store)
    check_taps(opened, stream_taps(module.settings))
    chosen, name = _choose(opened, card, samples)
    strengths = [check_alpha(alpha) for alpha in alphas or [card.alpha]]
    place = pick_device(device)
    module, head = module.to(place), place_head(opened, loss, device=place)
    chunk = pick_chunk(loss.chunk_tokens)
    judged = [
        EvalJob(carryon=module, head=head, chunk=chunk, alpha=alpha, with_base=True)
        for alpha in strengths
    ]
    found = measure_nlls(opened, chosen, judged, stream=stream)
    best = min(range(len(found)), key=lambda index: found[index].carryon)
    return EvaluateReport(
        store=str(store),
        carryon=str(carryon),
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
        share=card.split["held_out_ratio"],
        seed=card.split["seed"],
        digest=store.samples_digest,
    )
    return split.held_out, "held-out"
