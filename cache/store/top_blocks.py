"""The base's last blocks in a store: from which kinds that merge are trained without the base.

`blocks/` holds the base's config, its final norm, and one safetensors file a block. They are
rebuilt by transformers' own classes, as a decoder of the same class that has only these blocks and
reads hidden states. Before anything is stored that decoder is run on a few tokens beside the base;
an architecture whose blocks cannot be cut out like this is refused.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from carryon.cache.errors import DamagedStoreError, InputError
from carryon.cache.files import json_bytes
from carryon.cache.format.manifest import Manifest, sha256_hex

if TYPE_CHECKING:  # the trainer reads blocks and loads no base
    from transformers import PretrainedConfig, PreTrainedModel

    from carryon.cache.base.model import Base

CONFIG_PATH = "blocks/config.json"
_PROOF_TOKENS = 12
_PROOF_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The last blocks of a base, and what is needed to run them."""

    config: dict[str, Any]
    """The base's own config (of its text part), as transformers writes it."""
    names: dict[str, str]
    """How the decoder calls its list of `blocks` and its final `norm`."""
    norm: dict[str, Tensor]
    """Weights of the final norm."""
    blocks: list[dict[str, Tensor]]
    """Weights of each block, in order; the last is the base's last."""

    @property
    def num_layers(self) -> int:
        """Blocks of the base."""
        return int(self.config["num_hidden_layers"])


def read_blocks(base: "Base", number: int) -> Blocks:
    """Return the last `number` blocks of a loaded base, proved to do what the base does.

    Raises:
        InputError: it has fewer blocks, or they cannot be run alone.
    """
    num_layers = base.identity.num_layers
    if not 1 <= number < num_layers:
        raise InputError(
            f"with_blocks: expected 1 to {num_layers - 1} blocks, as the base has {num_layers}, "
            f"got {number}"
        )
    architecture, dtype = base.architecture, _stored_dtype(base)
    found = Blocks(
        config=json.loads(base.model.config.get_text_config().to_json_string(use_diff=False)),
        names={
            name: next(
                key for key, child in architecture.decoder.named_children() if child is module
            )
            for name, module in (("blocks", architecture.blocks), ("norm", architecture.norm))
        },
        norm=_weights(architecture.norm, dtype),
        blocks=[_weights(block, dtype) for block in list(architecture.blocks)[-number:]],
    )
    _prove(base, found)
    return found


def build_decoder(
    blocks: Blocks, number: int, *, with_weights: bool, attention: str = "sdpa"
) -> "PreTrainedModel":
    """Return a decoder of the base's class with `number` blocks, in float32, without embeddings.

    Args:
        blocks: of the base.
        number: of blocks to build.
        with_weights: give them the weights of the base's last blocks; else they are as
            transformers begins them. The final norm is always the base's.
        attention: backend.
    """
    from transformers import AutoModel

    config = shortened_config(blocks.config, number)
    config._attn_implementation = attention
    auto: Any = AutoModel
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    getattr(model, blocks.names["norm"]).load_state_dict(blocks.norm)
    if with_weights:
        own = getattr(model, blocks.names["blocks"])
        for block, weights in zip(own, blocks.blocks[-number:], strict=True):
            block.load_state_dict(weights)
    model.set_input_embeddings(nn.Identity())  # states stand in
    return model


def shortened_config(values: Mapping[str, Any], number: int) -> "PretrainedConfig":
    """Return a base's config with its last `number` blocks only, and no vocabulary."""
    from transformers import AutoConfig

    values = dict(values)
    kind = values.pop("model_type")
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


def block_files(base: "Base", number: int) -> dict[str, bytes]:
    """Return (path, content) of each file that keeps a base's last `number` blocks; 0: none.

    Raises:
        InputError: as `read_blocks`.
    """
    return dict(_encode(read_blocks(base, number))) if number else {}


def _encode(blocks: Blocks) -> Iterator[tuple[str, bytes]]:
    facts = {"config": blocks.config, "names": blocks.names, "blocks": len(blocks.blocks)}
    yield CONFIG_PATH, json_bytes(facts)
    yield "blocks/norm.safetensors", save(blocks.norm)
    for index, weights in enumerate(blocks.blocks):
        yield f"blocks/{index}.safetensors", save(weights)


def load_blocks(root: Path, manifest: Manifest) -> Blocks:
    """Return the blocks of the store at `root`.

    Raises:
        InputError: it was made without any.
        DamagedStoreError: a file is missing or is not the one that was written.
    """
    if not manifest.num_blocks:
        raise InputError(
            f"{root}: expected a store with the base's last blocks, it has none: extract with "
            "--with-blocks K, or train a bottleneck"
        )

    def read(path: str) -> bytes:
        try:
            content = (root / path).read_bytes()
        except FileNotFoundError:
            content = b""
        if sha256_hex(content) not in manifest.files.get(path, []):
            raise DamagedStoreError(f"{root / path}: not as it was written")
        return content

    facts = json.loads(read(CONFIG_PATH))
    return Blocks(
        config=facts["config"],
        names=facts["names"],
        norm=load(read("blocks/norm.safetensors")),
        blocks=[load(read(f"blocks/{index}.safetensors")) for index in range(facts["blocks"])],
    )


def _weights(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    found = module.state_dict()
    return {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in found.items()}


def _stored_dtype(base: "Base") -> torch.dtype:
    # Computing in float32 widens the checkpoint's values and nothing else.
    is_widened = base.compute_dtype == torch.float32
    return base.checkpoint_dtype if is_widened else base.compute_dtype


def _prove(base: "Base", blocks: Blocks) -> None:
    from carryon.cache.base.hooks import capture

    number = len(blocks.blocks)
    tap = f"layer.{base.identity.num_layers - number}"
    tokens = torch.arange(_PROOF_TOKENS)[None] % base.identity.vocab_size
    states = capture(base, [tap, "final"], tokens)
    try:
        decoder: Any = build_decoder(blocks, number, with_weights=True, attention=base.attention)
        decoder.eval()
        with torch.inference_mode():
            found = decoder(
                inputs_embeds=states[tap].float().cpu(), use_cache=False
            ).last_hidden_state
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _refusal(base, f"they do not run alone: {reason}") from error
    expected = states["final"].float().cpu()
    error_size = float((found - expected).norm() / expected.norm())
    if not error_size <= _PROOF_ERROR[base.compute_dtype]:
        raise _refusal(base, f"run alone they are {error_size:.2g} off what the base computes")


def _refusal(base: "Base", reason: str) -> InputError:
    return InputError(
        f"{base.identity.architecture}: expected blocks that can be cut out of the base, but "
        f"{reason}: leave out --with-blocks"
    )
