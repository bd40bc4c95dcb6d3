"""A carry-on to measure on held-out samples, and the head that it is measured through."""

from dataclasses import dataclass

from torch import Tensor

from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.mixing.mixture import MixedCarryOn
from carryon.train.mixing.projected import ProjectedSources
from carryon.train.modules.carryon import CarryOn


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalJob:
    """A carry-on to measure, and the head that it is measured through."""

    carryon: CarryOn | None
    """None: only the base."""
    head: FrozenHead
    chunk: int
    """Positions whose logits exist at one time."""
    alpha: float = 1.0
    """Strength of the correction."""
    with_base: bool = False
    """Whether to measure the base too."""
    projected: ProjectedSources | None = None
    """Other bases that a carry-on with a gate is mixed with: its loss is then the mixture's."""
    token_bytes: Tensor | None = None
    """[V] bytes of each token, of a carry-on that only reads the states of other bases."""

    @property
    def corrects(self) -> bool:
        """Whether the carry-on runs: at alpha 0 a carry-on of any kind is the base."""
        return self.carryon is not None and self.alpha != 0

    @property
    def needs_base(self) -> bool:
        """Whether the base's own states are read."""
        return self.with_base or (self.carryon is not None and not self.corrects) or self.mixes

    @property
    def mixes(self) -> bool:
        """Whether other bases are mixed in."""
        return self.projected is not None and isinstance(self.carryon, MixedCarryOn)
