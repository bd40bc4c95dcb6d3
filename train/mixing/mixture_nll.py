"""Losses of a mixture and of its parts, summed over batches.

Letters: M supervised pairs of a batch, S sources.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from carryon.cache.device import to_device
from carryon.train.mixing.mixture import MixedLosses
from carryon.train.mixing.projected import PairProjections, ProjectedSources


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureNll:
    """Mean losses of the parts of a mixture, in nats per target, and what the gate gives them."""

    carryon_nll: float
    """Of base and carry-on, without the gate; by state with the other bases' states."""
    source_nlls: dict[str, float]
    """Of each source alone, by its projection. Empty: there is no gate, nor shares."""
    gate_shares: dict[str, float]
    """Mean share of the carry-on (`carry-on`) and of each source. They sum to 1."""
    target_shares: dict[str, float]
    """Mean part of the target's probability that is theirs. They sum to 1."""
    bytes_per_target: float
    """Mean bytes of text of a target: nats per target divided by it are nats per byte."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def by_state(nll: float, bytes_per_target: float) -> MixtureNll:
    """Return the parts of a mixture without a gate: there are none but its own loss.

    Args:
        nll: of the carry-on that reads the states of other bases.
        bytes_per_target: mean bytes of text of a target.
    """
    return MixtureNll(
        carryon_nll=nll,
        source_nlls={},
        gate_shares={},
        target_shares={},
        bytes_per_target=bytes_per_target,
    )


OWN = "carry-on"
"""Name of the carry-on's share."""


USUAL_GAIN = 0.02
"""Nats a target that a mixture of bases of one tokenizer is better than the best of them at most,
each with its own carry-on, in all measurements so far."""


class MixtureSums:
    """Sums over the batches of an evaluation, in float64."""

    def __init__(self, projected: ProjectedSources) -> None:
        """Begin at zero."""
        self._names = projected.names
        self._bytes = projected.token_bytes
        self._sums = torch.zeros(2 + 3 * len(self._names) + 2, dtype=torch.float64)

    def add(
        self, carryon_M: Tensor, mixed: MixedLosses, pairs: PairProjections, targets_M: Tensor
    ) -> None:
        """Count a batch.

        Args:
            carryon_M: [M] losses of the carry-on alone.
            mixed: of the mixture.
            pairs: of the sources.
            targets_M: [M] token ids, on the host: an accelerator would be waited for.
        """
        device = carryon_M.device
        bytes_M = self._bytes[targets_M.cpu()]
        parts = [
            carryon_M.unsqueeze(1),
            to_device(bytes_M, device).unsqueeze(1),
            -pairs.log_probs,
            mixed.gate,
            mixed.targets,
        ]
        sums = torch.cat([part.double().sum(dim=0) for part in parts])
        self._sums = to_device(self._sums, device) + sums

    def result(self, count: float, sum_all: Callable[..., Sequence[float]]) -> MixtureNll:
        """Return the means.

        Args:
            count: targets of all processes.
            sum_all: sums numbers over all processes.
        """
        carryon, num_bytes, *rest = (value / count for value in sum_all(*self._sums.cpu().tolist()))
        num_sources, names = len(self._names), [OWN, *self._names]
        shares = rest[num_sources:]
        return MixtureNll(
            carryon_nll=carryon,
            source_nlls=dict(zip(self._names, rest[:num_sources], strict=True)),
            gate_shares=dict(zip(names, shares[: len(names)], strict=True)),
            target_shares=dict(zip(names, shares[len(names) :], strict=True)),
            bytes_per_target=num_bytes,
        )


def mixture_rows(base_nll: float, nll: float, parts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a table of a mixture and each of its parts, for people; the first row is its head.

    Args:
        base_nll: of the anchor alone.
        nll: of the mixture.
        parts: of `MixtureNll.to_dict`.
    """
    per_target, has_gate = parts["bytes_per_target"], bool(parts["gate_shares"])

    def row(name: str, value: float, share: str = "") -> tuple[str, ...]:
        cells = [f"{parts[kind][share]:.3f}" if share else "" for kind in _SHARES * has_gate]
        return (name, f"{value:.4f}", f"{value / per_target:.4f}" if per_target else "", *cells)

    return [
        ("", "nats per target", "per byte", *(("gate share", "share of target") * has_gate)),
        row("base", base_nll),
        *([row("carry-on without gate", parts["carryon_nll"], OWN)] if has_gate else []),
        *(row(name, value, name) for name, value in parts["source_nlls"].items()),
        row("mixture", nll),
    ]


_SHARES = ("gate_shares", "target_shares")


def leak_warning(nll: float, parts: MixtureNll, same_tokenizer: Sequence[str]) -> str:
    """Return a warning about a gain that bases of one tokenizer hardly ever have; else nothing.

    Args:
        nll: of the mixture.
        parts: of it.
        same_tokenizer: names of the sources with the anchor's tokenizer.
    """
    best = min([parts.carryon_nll, *parts.source_nlls.values()])
    if len(same_tokenizer) < len(parts.source_nlls) or best - nll <= USUAL_GAIN:
        return ""
    return (
        f"the mixture is {best - nll:.3f} nats a target better than each of its bases, which have "
        f"one tokenizer; {USUAL_GAIN} is usual. Fix: look for held-out text in the training half, "
        "and train a carry-on of equal size on the best base alone"
    )
