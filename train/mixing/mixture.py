"""A carry-on with the gate that mixes it with other bases: what a run of a mixture trains.

Letters: M supervised pairs of a batch, S sources, D base width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.store.top_blocks import Blocks
from carryon.train.mixing.gate import Gate, initial_shares, mixture_log_probs, target_shares
from carryon.train.mixing.projected import PairProjections, ProjectedSources
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.card_checks import check_weights
from carryon.train.modules.card_file import GATE, check_digest
from carryon.train.modules.carryon import NO_SOURCES, CarryOn
from carryon.train.modules.packed_attention import Packing
from carryon.train.modules.serialization import load_carryon


class MixedCarryOn(CarryOn):
    """A carry-on and a gate. It corrects as the carry-on alone does."""

    def __init__(self, carryon: CarryOn, gate: Gate) -> None:
        """Join both.

        Args:
            carryon: of any kind.
            gate: for the sources that it is mixed with.
        """
        super().__init__()
        self.settings = carryon.settings
        self.sources = carryon.sources if isinstance(carryon, CarryOn) else NO_SOURCES
        self.carryon = carryon
        self.gate = gate

    def correct_packed(
        self, states: Mapping[str, Tensor], packing: Packing, positions_M: Tensor
    ) -> Tensor:
        """Return the carry-on's correction, [M, D]; see CarryOn."""
        return self.carryon.correct_packed(states, packing, positions_M)

    def customize(
        self, states: Mapping[str, Tensor], positions_M: Tensor, delta_MD: Tensor, *, alpha: float
    ) -> Tensor:
        """Return the states that the carry-on gives to the anchor's head, [M, D]; see CarryOn."""
        return self.carryon.customize(states, positions_M, delta_MD, alpha=alpha)

    def mix(
        self, losses_M: Tensor, base_states_MD: Tensor, projections: PairProjections
    ) -> "MixedLosses":
        """Return the mixture's losses, differentiable in the gate and in `losses_M`.

        Args:
            losses_M: [M] cross-entropy of the carry-on.
            base_states_MD: [M, D] the anchor's own `final` states.
            projections: of the sources at the same pairs.
        """
        logits = self.gate(base_states_MD, projections.features)
        return MixedLosses(
            losses=-mixture_log_probs(logits, -losses_M, projections.log_probs),
            gate=logits.detach().softmax(dim=1),
            targets=target_shares(logits, -losses_M, projections.log_probs),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MixedLosses:
    """A mixture at the supervised pairs of a batch."""

    losses: Tensor
    """[M] cross-entropy of the mixture."""
    gate: Tensor
    """[M, 1 + S] share of the carry-on and of each source."""
    targets: Tensor
    """[M, 1 + S] which part of the target's probability is theirs."""


def inner_carryon(carryon: CarryOn) -> CarryOn:
    """Return the carry-on within a mixture; another one is returned as it is."""
    return carryon.carryon if isinstance(carryon, MixedCarryOn) else carryon


def build_gate(projected: ProjectedSources, is_trained: Tensor, *, width: int, seed: int) -> Gate:
    """Return an untrained gate: at the shares under which the training targets are likeliest.

    Args:
        projected: of the sources.
        is_trained: [P] bool: positions of the training half.
        width: of the anchor's states.
        seed: of its weights.
    """
    logs = [projected.anchor[is_trained].unsqueeze(1), projected.log_probs[is_trained]]
    return Gate(
        anchor_width=width,
        source_widths=(),
        num_sources=len(projected.sources),
        shares=initial_shares(torch.cat(logs, dim=1)),
        seed=seed,
    )


def load_mixture(
    folder: str | Path, *, blocks: Callable[[], Blocks] | None = None
) -> tuple[CarryOn, CarryOnCard]:
    """Return a carry-on that is mixed with other bases, and its card.

    Args:
        folder: of the carry-on.
        blocks: reads the last blocks of its base, for a kind that needs them.

    Returns:
        The carry-on, weights in float32 on the CPU; a `MixedCarryOn` if it has a gate.

    Raises:
        MissingError: there is no carry-on.
        InputError: it is of one base, or a file is damaged.
    """
    carryon, card = load_carryon(folder, blocks=blocks, allow_mixture=True, allow_states=True)
    if not card.mixture:
        raise InputError(
            f"{folder}: expected a carry-on of several bases, got one of a single base. Fix: leave "
            "out --mix"
        )
    if not card.has_gate:
        return carryon, card
    return MixedCarryOn(carryon, load_gate(folder, card)).eval(), card


def load_gate(folder: str | Path, card: CarryOnCard) -> Gate:
    """Return the gate of a mixture, in float32 on the CPU.

    Args:
        folder: of the carry-on.
        card: of it, with sources.

    Raises:
        InputError: the file is missing, damaged or of another gate.
    """
    path, num_sources = Path(folder) / GATE, len(card.mixture["sources"])
    check_digest(path, None)  # its size, before it is read
    try:
        with torch.device("cpu"):  # the caller's default may be another
            gate = Gate(
                anchor_width=card.base_width,
                source_widths=(),
                num_sources=num_sources,
                shares=torch.ones(1 + num_sources),
                seed=0,
            )
            weights = load_file(path)
        check_weights(weights, gate.state_dict())
        gate.load_state_dict(weights)
    except (SafetensorError, ValueError, KeyError, RuntimeError, InputError) as error:
        raise InputError(f"{path}: expected the gate of {folder}: {error!s:.300}") from error
    return gate
