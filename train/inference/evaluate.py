"""Held-out loss of base and carry-on on a store, measured without the base.

Of several alphas the best is chosen on every second sample, and the loss is reported on the others:
a minimum over alphas on the same samples would be too low. Cross-fitting would use all samples for
the report, but average over two alphas, of which neither need be the one that is kept.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from carryon.cache.checked_settings import apply_options
from carryon.cache.device import pick_chunk, pick_device
from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.cache.store.view import StoreLike
from carryon.train.config import LossSettings, StreamSettings
from carryon.train.data.datasets import open_decoded_cache
from carryon.train.data.split import part_digests, refuse_pairs, split_of
from carryon.train.losses.base_states import get_base_states
from carryon.train.losses.frozen_head import place_head
from carryon.train.mixing.mixture import load_mixture
from carryon.train.mixing.projected import project_sources, token_bytes
from carryon.train.mixing.sources import (
    Source,
    join_states,
    open_sources,
    order_sources,
    warn_about_sources,
)
from carryon.train.modules.card import CarryOnCard, check_base
from carryon.train.modules.serialization import load_carryon, locate_carryon
from carryon.train.modules.taps import check_alpha, check_taps, stream_taps
from carryon.train.plots import NLL_LABEL, Line, draw, lines
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.held_out.nll import (
    measure_nlls,
    null_if_nan,
    perplexity_of,
    warn_if_few,
)

Samples = Literal["auto", "held-out", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AlphaChoice:
    """Losses at each alpha on the samples that chose the best, with their standard errors."""

    num_samples: int
    num_targets: int
    base_nll: float
    alphas: list[float]
    nlls: list[float]
    nll_ses: list[float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateReport:
    """Losses of base and carry-on, in nats per supervised token, with their standard errors.

    Standard errors are clustered by sample (trainer/held_out/nll.py); None for a single sample.
    """

    store: str
    carryon: str
    samples: str
    """`held-out` or `all`; if alpha was chosen, the half of them that did not choose it."""
    num_samples: int
    num_targets: int
    alpha: float
    base_nll: float
    base_nll_se: float | None
    carryon_nll: float
    """Loss of base and carry-on at `alpha`."""
    carryon_nll_se: float | None
    nll_difference_se: float | None
    """Standard error of `carryon_nll - base_nll`, which are measured on the same targets."""
    base_perplexity: float
    carryon_perplexity: float
    choice: AlphaChoice | None
    """How alpha was chosen. None: only one was given."""
    mixture: dict[str, Any] = field(default_factory=dict)
    """Of a mixture of several bases, whose loss `carryon_nll` is: losses of its parts, and shares
    of the gate (MixtureNll). Empty: it is of one base."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def evaluate(
    store: str | Path,
    *,
    carryon: str | Path,
    mix: Sequence[str | Path] = (),
    alphas: Sequence[float] | None = None,
    samples: Samples = "auto",
    device: str = "auto",
    stream: StreamSettings | None = None,
    loss: LossSettings | None = None,
    **options: Any,  # noqa: ANN401 -- each setting has its own type
) -> EvaluateReport:
    """Measure the held-out loss of base and carry-on on a store.

    The base model itself is not loaded. A loss on few targets is logged with a warning.

    Args:
        store: folder of the store, or STORE#NUMBER for one part of it.
        carryon: folder of the carry-on, or its id on the hub.
        mix: folders of the stores of the other bases, if the carry-on has a gate.
        alphas: strength of the correction. Of several, the best on one half of the samples is
            chosen and reported on the other half. None: the carry-on's own.
        samples: `held-out` takes those that training never saw, `all` every sample; `auto` is
            `held-out` on the store that the carry-on was trained on, and `all` on another.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        stream: how the store is read. None: the defaults.
        loss: how the LM-head loss is computed. None: the defaults.
        options: fields of `stream` and `loss` by name, such as `chunk_tokens=512`.

    Raises:
        SettingMismatchError: the carry-on belongs to another base, or its gate to others.
        InputError: an alpha is out of range, the store lacks a tap or holds preference pairs, or
            the samples are too few.
    """
    stream, loss = apply_options(options, stream or StreamSettings(), loss or LossSettings())
    plain = Store.open(store, decoded=open_decoded_cache(stream))
    refuse_pairs(plain)
    load = load_mixture if mix else load_carryon
    module, card = load(locate_carryon(carryon), blocks=plain.blocks)
    check_base(card, plain.manifest.base, where=store)
    check_taps(plain, stream_taps(module.settings))
    rows, name = _pick_samples(plain, card, samples)
    sources = _open_sources(plain, mix, card)
    opened = join_states(plain, sources)
    place = pick_device(device)
    module, head = module.to(place), place_head(opened, loss, device=place)
    chunk = pick_chunk(loss.chunk_tokens)
    projected = None
    if card.has_gate:
        base = get_base_states(opened, device=place)
        projected = project_sources(
            opened, sources, base=base, stream=stream, loss=loss, device=place
        )
    sizes = token_bytes(sources) if sources and projected is None else None
    jobs = [
        EvalJob(
            carryon=module,
            head=head,
            chunk=chunk,
            alpha=check_alpha(alpha),
            with_base=True,
            projected=projected,
            token_bytes=sizes,
        )
        for alpha in alphas or [card.alpha]
    ]
    choice = None
    if len(jobs) > 1:
        choice = _choose_alpha(opened, rows, jobs, stream=stream)
        rows, jobs = rows[1::2], [jobs[int(np.argmin(choice.nlls))]]
    [nll] = measure_nlls(opened, rows, jobs, stream=stream)
    warn_if_few(min(nll.targets, choice.num_targets) if choice else nll.targets)
    return EvaluateReport(
        store=str(store),
        carryon=str(carryon),
        samples=name,
        num_samples=nll.samples,
        num_targets=nll.targets,
        alpha=jobs[0].alpha,
        base_nll=nll.base,
        base_nll_se=null_if_nan(nll.base_se),
        carryon_nll=nll.carryon,
        carryon_nll_se=null_if_nan(nll.carryon_se),
        nll_difference_se=null_if_nan(nll.difference_se),
        base_perplexity=perplexity_of(nll.base),
        carryon_perplexity=perplexity_of(nll.carryon),
        choice=choice,
        mixture=nll.mixture.to_dict() if nll.mixture else {},
    )


def _choose_alpha(
    store: StoreLike, rows: NDArray[np.int64], jobs: Sequence[EvalJob], *, stream: StreamSettings
) -> AlphaChoice:
    """Measure each job on every second sample.

    Raises:
        InputError: there is no sample left to measure the best on.
    """
    if len(rows) < 2:
        raise InputError(
            f"alpha: expected 2 samples or more, to choose one of {len(jobs)} alphas and to "
            "measure it on others, got 1. Fix: give one alpha, or samples all"
        )
    nlls = measure_nlls(store, rows[::2], jobs, stream=stream)
    return AlphaChoice(
        num_samples=nlls[0].samples,
        num_targets=nlls[0].targets,
        base_nll=nlls[0].base,
        alphas=[job.alpha for job in jobs],
        nlls=[nll.carryon for nll in nlls],
        nll_ses=[null_if_nan(nll.carryon_se) for nll in nlls],
    )


def _open_sources(store: Store, mix: Sequence[str | Path], card: CarryOnCard) -> list[Source]:
    """Return the other bases in the order of the card, and warn about samples without them."""
    if not mix:
        return []
    sources = order_sources(open_sources(store, [str(path) for path in mix]), card.mixture)
    warn_about_sources(store, sources)
    return sources


def plot_alphas(choice: AlphaChoice, path: Path) -> bool:
    """Draw the loss against alpha, and the base's as a level; return whether it was drawn."""
    best, alpha = min(zip(choice.nlls, choice.alphas, strict=True))
    series = [
        Line(xs=choice.alphas, ys=choice.nlls, label="base + alpha * carry-on"),
        Line(xs=[alpha], ys=[best], label=f"best: {best:.4f} at alpha {alpha:g}"),
    ]
    levels = {f"base: {choice.base_nll:.4f}": choice.base_nll}
    style: dict[str, Any] = {"x_label": "alpha", "y_label": NLL_LABEL, "levels": levels}
    return draw(path, lambda axes: lines(axes, series, **style))


def _pick_samples(
    store: Store, card: CarryOnCard, samples: Samples
) -> tuple[NDArray[np.int64], Literal["held-out", "all"]]:
    """Return the samples to evaluate on, and which of the two choices they are."""
    if card.is_trained_on(store.fingerprint, store.samples_digest) and samples != "all":
        split = split_of(store, share=card.split["held_out_ratio"], seed=card.split["seed"])
        return split.held_out, "held-out"
    name, seen = str(store.root), card.split.get("parts", ())
    alone, parts = list[int](), list[int]()  # alone: a part that was a whole store in training
    for number, digest in enumerate(part_digests(store), 1):
        part = store.manifest.of_part(number, name=name)
        alone += [number] if card.is_trained_on(part.fingerprint, digest) else []
        parts += [number] if number in alone or digest in seen else []
    if samples == "all" or (samples == "auto" and not parts):
        return np.arange(store.num_samples, dtype=np.int64), "all"
    if store.sample_held_out.any():
        return np.flatnonzero(store.sample_held_out), "held-out"
    if parts:
        fix = f"{name}#{alone[-1]} or another part alone" if alone else "the store as it was then"
        raise InputError(
            f"{name}: the carry-on was trained on {', '.join(f'#{part}' for part in parts)} of it, "
            f"which mark no sample as held out. Fix: evaluate on {fix}, or on all samples"
        )
    raise InputError(
        f"{name}: marks no sample as held out, and the carry-on was trained on another store. Fix: "
        "evaluate on all samples"
    )
