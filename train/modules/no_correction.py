"""A carry-on without weights: the base itself, for a mixture of which only the gate is trained."""

from collections.abc import Mapping

import torch
from torch import Tensor

from carryon.train.config import CarryOnSettings
from carryon.train.modules.carryon import CarryOn
from carryon.train.modules.packed_attention import Packing


class NoCorrection(CarryOn):
    """The kind `none`: its correction is zero everywhere."""

    def __init__(self, settings: CarryOnSettings, *, base_width: int) -> None:
        """Keep the sizes.

        Args:
            settings: of the kind `none`.
            base_width: D.
        """
        super().__init__()
        self.settings = settings
        self.base_width = base_width

    def correct_packed(
        self, states: Mapping[str, Tensor], packing: Packing, positions_M: Tensor
    ) -> Tensor:
        """Return zeros, [M, D]; see CarryOn."""
        final = states["final"]
        return torch.zeros(len(positions_M), final.shape[1], device=final.device)

    def customize(
        self, states: Mapping[str, Tensor], positions_M: Tensor, delta_MD: Tensor, *, alpha: float
    ) -> Tensor:
        """Return the base's states, [M, D] float32."""
        return states["final"][positions_M].float()
