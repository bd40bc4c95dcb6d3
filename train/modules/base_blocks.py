"""Carry-ons that merge: the base's own kind of blocks, before the base's own frozen final norm.

    native: final' = norm(new blocks(prenorm))           output projections start at zero
    top:    final' = norm(copies of the last k(layer.(L-k)))    trained whole, or by LoRA

They return what the head reads, no correction to it, so their strength is 1 or 0, and they train
from a store of their own tap alone. A decoder of the
base's class runs them (cache/blocks.py), with the attention for samples that lie one after another.
Letters: N tokens of a flat batch, D base width, M chosen positions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from carryon.cache.errors import InputError
from carryon.cache.optional import require
from carryon.cache.store.top_blocks import Blocks, build_decoder
from carryon.train.config import CarryOnSettings
from carryon.train.modules.carryon import CarryOn
from carryon.train.modules.packed_attention import (
    PACKED_ATTENTION,
    Packing,
    pack,
    register_packed_attention,
    unused_mask,
)

_OUTPUTS = ("o_proj", "out_proj", "dense", "down_proj", "fc2", "c_proj", "dense_4h_to_h", "w2")
"""What architectures call the last projection of attention and of an MLP."""


class BlocksCarryOn(CarryOn):
    """A carry-on of the kind `native` or `top`."""

    def __init__(self, settings: CarryOnSettings, blocks: Blocks) -> None:
        """Build from the base's blocks; a `native` draws from torch's global generator.

        Raises:
            InputError: there are not as many blocks, or new ones cannot begin as the base.
        """
        nn.Module.__init__(self)
        is_top = settings.kind == "top"
        if is_top and settings.blocks > len(blocks.blocks):
            raise InputError(
                f"blocks: expected at most the {len(blocks.blocks)} blocks that are there, got "
                f"{settings.blocks}: extract with --with-blocks {settings.blocks}"
            )
        self.settings = settings
        self.base_width = int(blocks.config["hidden_size"])
        self.names = blocks.names
        register_packed_attention()
        self.body: Any = build_decoder(
            blocks, settings.blocks, with_weights=is_top, attention=PACKED_ATTENTION
        )
        getattr(self.body, blocks.names["norm"]).requires_grad_(False)
        if not is_top:
            _begin_as_base(self.body, blocks)
        if settings.lora_rank:
            add_lora_(self.body, settings)

    def correct_packed(
        self, states: Mapping[str, Tensor], packing: Packing, positions_M: Tensor
    ) -> Tensor:
        """Return the customized `final` states at chosen tokens, [M, D]; see CarryOn."""
        [tap] = self.settings.taps
        x_ND = states[tap].to(next(self.body.parameters()).dtype)
        found: Tensor = self.body(
            inputs_embeds=x_ND[None],
            position_ids=packing.position_ids,
            attention_mask=unused_mask(x_ND),
            use_cache=False,
            packing=packing,
        ).last_hidden_state[0]
        return found[positions_M]

    def customize(
        self, states: Mapping[str, Tensor], positions_M: Tensor, delta_MD: Tensor, *, alpha: float
    ) -> Tensor:
        """Return what was said, float32: it takes the place of the base's states.

        Raises:
            InputError: alpha is not 1; at 0 there is nothing but the base.
        """
        if alpha != 1:
            raise InputError(
                f"alpha: expected 0 or 1 for a carry-on of the kind {self.settings.kind}, which "
                f"takes the place of the base's states, got {alpha:g}"
            )
        return delta_MD.float()

    def state_dict(self, *args: Any, **settings: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ANN401
        """Return what is trained; all else is the base's."""
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        found = super().state_dict(*args, **settings)
        return {name: weight for name, weight in found.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **settings: Any) -> Any:  # noqa: ANN401
        """Take what `state_dict` gave.

        Raises:
            RuntimeError: other names or shapes.
        """
        if set(state_dict) != set(self.state_dict()):
            raise RuntimeError("expected the trained weights of this kind and shape, got others")
        return super().load_state_dict(state_dict, strict=False)

    def block_weights(self) -> list[dict[str, Tensor]]:
        """Return the plain weights of each block, LoRA added to what it is on."""
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


def lora_targets(body: nn.Module) -> list[str]:
    """Return what the architecture calls the matrices of its blocks."""
    names = [
        name.rpartition(".")[2]
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return sorted(set(names))


def add_lora_(body: nn.Module, settings: CarryOnSettings) -> None:
    """Freeze `body` and lay PEFT's LoRA on every matrix of its blocks."""
    peft: Any = require("peft", extra="lora", purpose="a carry-on trained by LoRA")
    body.requires_grad_(False)
    config = peft.LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=lora_targets(body)
    )
    peft.inject_adapter_in_model(config, body)


@torch.no_grad()
def _begin_as_base(body: Any, blocks: Blocks) -> None:  # noqa: ANN401 -- any architecture
    for name, module in body.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _OUTPUTS:
            for weight in module.parameters():
                weight.zero_()
    width = int(blocks.config["hidden_size"])
    states = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
    packing = pack(torch.tensor([4]))
    found = body(
        inputs_embeds=states,
        position_ids=packing.position_ids,
        attention_mask=unused_mask(states[0]),
        use_cache=False,
        packing=packing,
    ).last_hidden_state
    if not torch.equal(found, getattr(body, blocks.names["norm"])(states)):
        raise InputError(
            f"kind native: expected new blocks of {blocks.config['model_type']} that begin as the "
            "base; this architecture adds more than projections to its states: train a top"
        )
