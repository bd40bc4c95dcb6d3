"""The base's last blocks in a store: `native` and `top` are trained from them without the base.

`blocks/` holds the base's config, its final norm, and one safetensors file per block. transformers
rebuilds them as a decoder of the base's class that has only these blocks and reads hidden states.
Before they are stored, that decoder is compared with the base on a few tokens: an architecture
whose blocks do not run alone is refused.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from carryon.cache.base.calibration.few_blocks import shortened_config
from carryon.cache.errors import DamagedStoreError, InputError
from carryon.cache.files.documents import json_bytes, parse_json
from carryon.cache.format.arrays import read_file
from carryon.cache.format.manifest import Manifest

if TYPE_CHECKING:  # the trainer reads blocks and loads no base
    from carryon.cache.base.model import Base
    from carryon.cache.base.pretrained import PreTrainedModel

CONFIG_PATH = "blocks/config.json"
_COMPARED_TOKENS = 12
_MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The last blocks of a base, with config and norm to run them."""

    config: dict[str, Any]
    """The base's own config (of its text part), as transformers writes it."""
    names: dict[str, str]
    """Attributes of the decoder that hold its list of `blocks` and its final `norm`."""
    norm: dict[str, Tensor]
    """Weights of the final norm."""
    blocks: list[dict[str, Tensor]]
    """Weights of each block, in order; the last is the base's last."""

    @property
    def num_layers(self) -> int:
        """Blocks of the base."""
        return int(self.config["num_hidden_layers"])


def read_blocks(base: "Base", number: int) -> Blocks:
    """Return the last `number` blocks of a loaded base, after comparing them with the base.

    Raises:
        InputError: it has fewer blocks, or they cannot be run alone.
    """
    if quantization := base.identity.quantization:
        raise InputError(
            f"base {base.source}: expected dense blocks to keep or replace, got quantized ones "
            f"({quantization}). Fix: leave out --with-blocks and train a bottleneck, or leave out "
            "--quantize"
        )
    num_layers = base.identity.num_layers
    if not 1 <= number < num_layers:
        raise InputError(
            f"with_blocks: expected 1 to {num_layers - 1} blocks, as the base has {num_layers}, "
            f"got {number}"
        )
    architecture, dtype = base.architecture, _stored_dtype(base)
    config = json.loads(base.model.config.get_text_config().to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # the folder it was loaded from, which is nobody's business
    blocks = Blocks(
        config=config,
        names={
            name: next(
                key for key, child in architecture.decoder.named_children() if child is module
            )
            for name, module in (("blocks", architecture.blocks), ("norm", architecture.norm))
        },
        norm=_weights(architecture.norm, dtype),
        blocks=[_weights(block, dtype) for block in list(architecture.blocks)[-number:]],
    )
    _compare_with_base(base, blocks)
    return blocks


def build_decoder(
    blocks: Blocks, number: int, *, with_weights: bool, attention: str = "sdpa"
) -> "PreTrainedModel":
    """Return a decoder of the base's class with `number` blocks, in float32, without embeddings.

    Args:
        blocks: of the base.
        number: of blocks to build.
        with_weights: give them the weights of the base's last blocks, else transformers' random
            ones. The final norm is always the base's.
        attention: backend.
    """
    from transformers import AutoModel

    from carryon.cache.base.pretrained import PreTrainedModel

    config = shortened_config(blocks.config, number)
    config._attn_implementation = attention
    auto: Any = AutoModel
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    getattr(model, blocks.names["norm"]).load_state_dict(blocks.norm)
    if with_weights:
        own = getattr(model, blocks.names["blocks"])
        for block, weights in zip(own, blocks.blocks[-number:], strict=True):
            block.load_state_dict(weights)
    model.set_input_embeddings(nn.Identity())  # it reads hidden states
    return model


def block_files(base: "Base", number: int) -> dict[str, bytes]:
    """Return path and content of each file that stores a base's last `number` blocks; 0: none.

    Raises:
        InputError: as `read_blocks`.
    """
    if not number:
        return {}
    blocks = read_blocks(base, number)
    facts = {"config": blocks.config, "names": blocks.names, "blocks": len(blocks.blocks)}
    files = {CONFIG_PATH: json_bytes(facts), "blocks/norm.safetensors": save(blocks.norm)}
    weights = enumerate(blocks.blocks)
    return files | {f"blocks/{index}.safetensors": save(block) for index, block in weights}


def load_blocks(root: Path, manifest: Manifest) -> Blocks:
    """Return the blocks of the store at `root`.

    Raises:
        InputError: the store was made without blocks.
        DamagedStoreError: a file is missing or is not the one that was written.
    """
    if not manifest.num_blocks:
        raise InputError(
            f"{root}: expected a store with the base's last blocks, got none. Fix: extract with "
            "--with-blocks K, or train a bottleneck"
        )

    def read(path: str) -> bytes:
        return read_file(root, path, digests=manifest.files)

    def tensors(path: str) -> dict[str, Tensor]:
        try:
            return load(read(path))
        except SafetensorError as error:
            raise DamagedStoreError(f"{root / path}: no safetensors file: {error}") from error

    config, names = _parse_facts(read(CONFIG_PATH), manifest, name=str(root / CONFIG_PATH))
    return Blocks(
        config=config,
        names=names,
        norm=tensors("blocks/norm.safetensors"),
        blocks=[tensors(f"blocks/{index}.safetensors") for index in range(manifest.num_blocks)],
    )


def _parse_facts(
    content: bytes, manifest: Manifest, *, name: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the base's config, and the decoder's names of its blocks and norm."""
    try:
        facts = parse_json(content)
        config, names, num_blocks = facts["config"], facts["names"], facts["blocks"]
        if not isinstance(config, dict) or not isinstance(config["model_type"], str):
            raise TypeError("config: expected an object with a model_type")
        if type(config["num_hidden_layers"]) is not int or num_blocks != manifest.num_blocks:
            raise TypeError(f"blocks: expected {manifest.num_blocks}")
        for key in ("blocks", "norm"):  # attributes that are looked up, so none of Python's own
            if not re.fullmatch("[a-zA-Z][a-zA-Z0-9_]{0,60}", names[key]):
                raise TypeError(f"names: expected attributes of a decoder, got {names[key]!a:.60}")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(f"{name}: damaged: {error}") from error
    return config, names


def _weights(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    from carryon.cache.base.placement import weights_of

    return {
        name: weight.detach().to("cpu", dtype).contiguous()
        for name, weight in weights_of(module).items()
    }


def _stored_dtype(base: "Base") -> torch.dtype:
    # Computing in float32 widens the checkpoint's values and nothing else.
    is_widened = base.compute_dtype == torch.float32
    return base.checkpoint_dtype if is_widened else base.compute_dtype


def _compare_with_base(base: "Base", blocks: Blocks) -> None:
    from carryon.cache.base.hooks import capture

    number = len(blocks.blocks)
    tap = f"layer.{base.identity.num_layers - number}"
    tokens = torch.arange(_COMPARED_TOKENS)[None] % base.identity.vocab_size
    states = capture(base, [tap, "final"], tokens)
    try:
        decoder: Any = build_decoder(blocks, number, with_weights=True, attention=base.attention)
        decoder.eval()
        with torch.inference_mode():
            alone = decoder(
                inputs_embeds=states[tap].float().cpu(), use_cache=False
            ).last_hidden_state
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _refusal(base, f"they do not run without it: {reason}") from error
    expected = states["final"].float().cpu()
    relative_error = float((alone - expected).norm() / expected.norm())
    if not relative_error <= _MAX_ERROR[base.compute_dtype]:
        raise _refusal(base, f"their relative error without the base is {relative_error:.2g}")


def _refusal(base: "Base", reason: str) -> InputError:
    return InputError(
        f"{base.identity.architecture}: expected blocks that run without the base, but {reason}. "
        "Fix: leave out --with-blocks"
    )
