"""A base's config with few of its blocks, and a model of them without weights of the base."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

    from carryon.cache.base.pretrained import PreTrainedModel

_PATTERN_ITEMS = 1 << 16
_PATTERN_SCALE = 0.02  # as weights of a language model: no infinity, no number too small to be fast


def shortened_config(values: Mapping[str, Any], number: int) -> "PretrainedConfig":
    """Return a base's config with its last `number` blocks only, and no vocabulary."""
    from transformers import AutoConfig

    values = dict(values)
    kind = values.pop("model_type")
    values.pop("auto_map", None)  # it names code
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(values.get(name), list):
            values[name] = repeat_last(values[name], number)
    tokens = {name: None for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    values |= {"num_hidden_layers": number, "vocab_size": 1, **tokens}
    config: PretrainedConfig = AutoConfig.for_model(kind, **values)
    return config


def repeat_last(kinds: list[str], number: int) -> list[str]:
    """Return the last `number` of a base's kinds of blocks."""
    return (kinds * -(-number // len(kinds)))[-number:]


def empty_block(
    values: Mapping[str, Any], dtype: "torch.dtype", *, attention: str
) -> "PreTrainedModel":
    """Return a decoder of the base's class with one block, on the device meta, without weights.

    Args:
        values: config of the base's text model.
        dtype: of its weights.
        attention: backend of transformers; `sdpa` becomes eager where an architecture lacks it.
    """
    import torch
    from transformers import AutoModel

    from carryon.cache.base.pretrained import PreTrainedModel

    auto: Any = AutoModel
    backend = {} if attention == "sdpa" else {"attn_implementation": attention}
    config = shortened_config(values, 1)
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(
            config, dtype=dtype, trust_remote_code=False, **backend
        )
    model.requires_grad_(False)
    return model


def make_up_weights_(model: "PreTrainedModel", device: "torch.device") -> None:
    """Give a model without weights small random numbers, on a device."""
    import torch

    model.to_empty(device=device)
    model.train(False)
    random = torch.Generator().manual_seed(0)
    pattern = torch.randn(_PATTERN_ITEMS, generator=random).mul_(_PATTERN_SCALE).to(device)
    for tensor in [*model.parameters(), *model.buffers()]:
        _fill_(tensor, pattern)


def _fill_(tensor: "Tensor", pattern: "Tensor") -> None:
    """Repeat a pattern at the speed of memory; whole numbers become 0."""
    if not tensor.is_floating_point():
        tensor.zero_()
        return
    flat = tensor.view(-1)
    whole = math.floor(len(flat) / len(pattern)) * len(pattern)
    flat[:whole].view(-1, len(pattern)).copy_(pattern)
    flat[whole:].copy_(pattern[: len(flat) - whole])
