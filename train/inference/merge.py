"""Merge a `native` or `top` into its base: an ordinary model of the base's class."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from carryon.cache.base.architecture import get_architecture
from carryon.cache.base.calibration.few_blocks import repeat_last
from carryon.cache.base.model import Base, load_base
from carryon.cache.base.placement import refuse_spread
from carryon.cache.base.recorded import load_recorded_base, tokenizer_of
from carryon.cache.errors import InputError, MissingError
from carryon.cache.files.atomic import whole_folder
from carryon.cache.files.new_folder import refuse_content, replaceable
from carryon.cache.optional import require
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.top_blocks import read_blocks
from carryon.train.kinds import get_kind
from carryon.train.modules.base_blocks import BlocksCarryOn, lora_targets
from carryon.train.modules.card import CarryOnCard, check_base
from carryon.train.modules.serialization import load_carryon, locate_carryon, read_card


def merge(
    carryon: str | Path,
    *,
    out: str | Path,
    base: str | Path | None = None,
    adapter: bool = False,
    device: str = "auto",
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Write base and carry-on as a checkpoint for transformers, or as a PEFT adapter.

    Args:
        carryon: folder of a `native` or `top`, or its id on the hub.
        out: a new or empty folder, or a link to one.
        base: hub id, folder or .gguf file. None: where the base was at extraction.
        adapter: write the LoRA of a `top` for PEFT instead of a checkpoint.
        device: where the base is loaded: `auto`, `cpu`, `cuda`, ...
        allow_pickle: read weights of the base from pickle files too.

    Returns:
        `out`, `kind`, `blocks` (of the merged model) and `bytes` (of its weights).

    Raises:
        InputError: the carry-on is a bottleneck, the adapter has no LoRA, or `out` is not empty or
            a mount point.
        DiskFullError: no space left; nothing of the checkpoint remains.
        MissingError: there is no carry-on, or its base is not found.
        SettingMismatchError: the carry-on belongs to another base.
        StoreBusyError: another process is writing `out`.
    """
    place = locate_carryon(carryon)
    card = read_card(place)
    _check_kind(card.settings, place, adapter=adapter)
    target = replaceable(Path(out), name="merged")
    forward = ForwardSettings(device=device, allow_pickle=allow_pickle)
    with whole_folder(target) as partial:
        refuse_content(target, out)  # of another process that ended since
        loaded = load_own_base(card, base, forward=forward, folder=carryon)
        module = load_for_base(place, loaded)
        if adapter:
            _write_adapter(partial, loaded, module)
        else:
            model: Any = merge_into(loaded, module).model
            model.to(loaded.checkpoint_dtype).save_pretrained(partial)
            loaded.tokenizer.save_pretrained(partial)
    return {
        "out": str(out),
        "kind": card.settings["kind"],
        "blocks": loaded.model.config.get_text_config().num_hidden_layers,
        "bytes": sum(path.stat().st_size for path in target.glob("*.safetensors")),
    }


def load_own_base(
    card: CarryOnCard,
    base: str | Path | Base | None,
    *,
    forward: ForwardSettings,
    folder: str | Path,
) -> Base:
    """Return the base of a carry-on: `base`, or for None the one at the place of extraction.

    Raises:
        MissingError: no base is there.
        SettingMismatchError: the carry-on was trained on another base or tokenizer.
    """
    if base is None:
        try:
            base = load_recorded_base(
                card.base,
                where=folder,
                forward=forward,
                has_own_template=bool(card.framing.get("chat_template")),
            )
        except MissingError as error:
            raise MissingError(
                f"{folder}: the base that it was trained on was not found. Fix: give its place "
                f"with base. {error}"
            ) from error
    elif not isinstance(base, Base):
        base = load_base(str(base), forward=forward, like=tokenizer_of(card.base))
    check_base(card, base.identity.to_dict(), where=f"base {base.source}")
    return base


def load_for_base(place: Path, base: Base) -> BlocksCarryOn:
    """Return the `native` or `top` in folder `place`, rebuilt with the blocks of its base."""
    refuse_spread(base.model, what=f"{place}: native and top")
    settings = read_card(place).settings
    number = settings["blocks"] if get_kind(settings["kind"]).merges == "replace" else 1
    module, _ = load_carryon(place, blocks=lambda: read_blocks(base, number))
    assert isinstance(module, BlocksCarryOn)
    return module


def merge_in_memory(place: Path, base: Base, *, is_shared: bool) -> Base:
    """Return a base with the `native` or `top` in folder `place`: a copy if others use it."""
    module = load_for_base(place, base)
    if is_shared:
        model = copy.deepcopy(base.model)
        base = replace(base, model=model, architecture=get_architecture(model))
    return merge_into(base, module)


@torch.no_grad()
def merge_into(base: Base, module: BlocksCarryOn) -> Base:
    """Put the carry-on's blocks into the model of `base`, in place, and return the base."""
    blocks = base.architecture.blocks
    if get_kind(module.settings.kind).merges == "append":
        _append_blocks(base, module.settings.blocks)
    for block, own in zip(
        list(blocks)[-module.settings.blocks :], module.block_weights(), strict=True
    ):
        block.load_state_dict({name: weight.to(base.compute_dtype) for name, weight in own.items()})
    return replace(base, identity=replace(base.identity, num_layers=len(blocks)))


def _append_blocks(base: Base, more: int) -> None:
    blocks = base.architecture.blocks
    text: Any = base.model.config.get_text_config()
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(text, name, None)
        if isinstance(kinds, list):
            setattr(text, name, [*kinds, *repeat_last(kinds, more)])
    text.num_hidden_layers = len(blocks) + more
    for index in range(len(blocks), len(blocks) + more):
        maker: Any = type(blocks[0])
        block = maker(text, index).to(device=base.device, dtype=base.compute_dtype)
        blocks.append(block.eval().requires_grad_(False))


def _check_kind(settings: dict[str, Any], place: Path, *, adapter: bool) -> None:
    kind = settings["kind"]
    if not get_kind(kind).merges:
        raise InputError(
            f"{place}: expected a carry-on of the kind native or top, got a {kind}, which cannot "
            "be merged: use it with carryon generate, or train --kind native or --kind top"
        )
    if adapter and not settings.get("lora_rank"):
        raise InputError(
            f"{place}: expected a top trained by LoRA (--lora-rank), got a {kind} trained "
            "whole: leave out --adapter"
        )


def _write_adapter(folder: Path, base: Base, module: BlocksCarryOn) -> None:
    peft: Any = require("peft", extra="lora", purpose="a carry-on trained by LoRA")
    paths = {child: path for path, child in base.model.named_modules()}
    where, own = paths[base.architecture.blocks], module.names["blocks"]
    settings, num_layers = module.settings, len(base.architecture.blocks)
    first = num_layers - settings.blocks
    weights = {}
    for name, weight in module.state_dict().items():
        index, _, rest = name.removeprefix(f"body.{own}.").partition(".")
        key = f"base_model.model.{where}.{first + int(index)}.{rest.replace('.default', '')}"
        weights[key] = weight.detach().to("cpu", torch.bfloat16).contiguous()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=[name for name in lora_targets(base.architecture.blocks) if name],
        layers_to_transform=list(range(first, num_layers)),
        layers_pattern=where.rpartition(".")[2],
        base_model_name_or_path=str(base.identity.id),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
