"""The kinds `native` and `top`, which merge: blocks of the base's own class and its frozen norm.

    native: final' = norm(new blocks(prenorm))                output projections start at zero
    top:    final' = norm(copies of the last k(layer.(L-k)))  all weights trained, or by LoRA

They return what the head reads, not a correction, so alpha is 1 or 0, and training needs a store of
their own tap only. A decoder of the base's class runs them (cache/store/top_blocks.py), with the
attention for packed samples. Letters: N tokens of a flat batch, D base width, M chosen positions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from carryon.cache.errors import InputError
from carryon.cache.optional import require
from carryon.cache.store.top_blocks import Blocks, build_decoder
from carryon.train.config import CarryOnSettings
from carryon.train.kinds import get_kind
from carryon.train.modules.carryon import CarryOn
from carryon.train.modules.packed_attention import (
    PACKED_ATTENTION,
    Packing,
    pack,
    register_packed_attention,
    unused_mask,
)

_OUTPUTS = ("o_proj", "out_proj", "dense", "down_proj", "fc2", "c_proj", "dense_4h_to_h", "w2")
"""Names that architectures give to the last projection of attention and of an MLP."""


class BlocksCarryOn(CarryOn):
    """A carry-on of the kind `native` or `top`."""

    def __init__(self, settings: CarryOnSettings, blocks: Blocks) -> None:
        """Build from the base's blocks; a `native` draws from torch's global generator.

        Raises:
            InputError: too few blocks, or new ones cannot start as the identity of the base.
        """
        super().__init__()
        is_copy = get_kind(settings.kind).merges == "replace"
        if is_copy and settings.blocks > len(blocks.blocks):
            raise InputError(
                f"blocks: expected at most the {len(blocks.blocks)} blocks of the store, got "
                f"{settings.blocks}. Fix: extract with --with-blocks {settings.blocks}"
            )
        self.settings = settings
        self.base_width = int(blocks.config["hidden_size"])
        self.names = blocks.names
        register_packed_attention()
        self.body: Any = build_decoder(
            blocks, settings.blocks, with_weights=is_copy, attention=PACKED_ATTENTION
        )
        getattr(self.body, blocks.names["norm"]).requires_grad_(False)
        if not is_copy:
            self._start_as_base_(blocks)
        if settings.lora_rank:
            add_lora_(self.body, settings)

    def correct_packed(
        self, states: Mapping[str, Tensor], packing: Packing, positions_M: Tensor
    ) -> Tensor:
        """Return the customized `final` states at chosen tokens, [M, D]; see CarryOn."""
        [tap] = self.settings.taps
        x_ND = states[tap].to(next(self.body.parameters()).dtype)
        return self._run(x_ND, packing)[positions_M]

    def _run(self, x_ND: Tensor, packing: Packing) -> Tensor:
        final: Tensor = self.body(
            inputs_embeds=x_ND[None],
            position_ids=packing.position_ids,
            attention_mask=unused_mask(x_ND),
            use_cache=False,
            packing=packing,
        ).last_hidden_state[0]
        return final

    def customize(
        self, states: Mapping[str, Tensor], positions_M: Tensor, delta_MD: Tensor, *, alpha: float
    ) -> Tensor:
        """Return the result of `correct_packed` in float32: it replaces the base's states.

        Raises:
            InputError: alpha is not 1; at 0 the result is the base.
        """
        if alpha != 1:
            raise InputError(
                f"alpha: expected 0 or 1 for the kind {self.settings.kind}, which replaces the "
                f"base's states, got {alpha:g}"
            )
        return delta_MD.float()

    def state_dict(self, *args: Any, **settings: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ANN401
        """Return the trained weights; all others are the base's."""
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        weights = super().state_dict(*args, **settings)
        return {name: weight for name, weight in weights.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **settings: Any) -> Any:  # noqa: ANN401
        """Load the result of `state_dict`.

        Raises:
            RuntimeError: other names or shapes.
        """
        if set(state_dict) != set(self.state_dict()):
            raise RuntimeError("expected the trained weights of this kind and shape, got others")
        return super().load_state_dict(state_dict, strict=False)

    def block_weights(self) -> list[dict[str, Tensor]]:
        """Return the plain weights of each block, LoRA added to its matrices."""
        plain = []
        for block in getattr(self.body, self.names["blocks"]):
            weights = {
                name.replace(".base_layer.", "."): weight.detach()
                for name, weight in block.state_dict().items()
                if ".lora_" not in name
            }
            for name, module in block.named_modules():
                if hasattr(module, "get_delta_weight"):
                    key = f"{name}.weight"
                    weights[key] = weights[key] + module.get_delta_weight("default").detach()
            plain.append(weights)
        return plain

    @torch.no_grad()
    def _start_as_base_(self, blocks: Blocks) -> None:
        for name, module in self.body.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _OUTPUTS:
                for weight in module.parameters():
                    weight.zero_()
        states = torch.randn(4, self.base_width, generator=torch.Generator().manual_seed(0))
        final = self._run(states, pack(torch.tensor([4])))
        if not torch.equal(final, getattr(self.body, blocks.names["norm"])(states)):
            raise InputError(
                f"kind native: expected new blocks of {blocks.config['model_type']} that start as "
                "the identity, but this architecture adds more than projections to its states. "
                "Fix: train a top"
            )


def lora_targets(body: nn.Module) -> list[str]:
    """Return the names that the architecture gives to the matrices of its blocks."""
    names = [
        name.rpartition(".")[2]
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return sorted(set(names))


def add_lora_(body: nn.Module, settings: CarryOnSettings) -> None:
    """Freeze `body` and add PEFT's LoRA to every matrix of its blocks."""
    peft: Any = require("peft", extra="lora", purpose="a carry-on trained by LoRA")
    body.requires_grad_(False)
    config = peft.LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=lora_targets(body)
    )
    peft.inject_adapter_in_model(config, body)
