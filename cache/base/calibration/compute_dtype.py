"""The dtype in which a base is computed fastest here, by timing one of its blocks.

bfloat16 is 2 to 4 times as fast as float32 on a device with units for it, and 3 to 6 times as slow
on one that emulates it. Equal machines may find other seconds, not another choice.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from carryon.cache.base.calibration.few_blocks import empty_block, make_up_weights_
from carryon.cache.base.identity import digest_config
from carryon.cache.base.loading import read_checkpoint_dtype
from carryon.cache.base.placement import Placement
from carryon.cache.base.pretrained import PreTrainedModel
from carryon.cache.base.source.location import BaseSource
from carryon.cache.device import attention_of_any_shape, multiplies_bfloat16, pick_device
from carryon.cache.settings import ForwardSettings
from carryon.cache.timing import least_seconds

logger = logging.getLogger(__name__)

SMALLEST_BLOCK = 1 << 20
"""Weights of a block from which it is timed; a smaller one is computed in float32, which is more
exact and never slow."""
_CLEARLY = 1.1
"""float32 is taken where it is faster by more; else bfloat16, which needs half the memory."""
_CALL_FLOPS = 1.5e9
"""Of the products of one timed call on a CPU: 10 to 100 ms."""
_FEWEST = 32  # positions of such a call
_PER_EXPERT = 4  # positions for each expert of a mixture, so that each multiplies some
_ROW = 512  # most positions of a row
_MEMORY_PART = 4  # a config may come from anyone, and tell of blocks of any size
_CANDIDATES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_known: dict[tuple[object, ...], torch.dtype] = {}
"""Of the bases of this process: one base has one dtype in it."""


def pick_compute_dtype(
    place: BaseSource,
    config: PreTrainedConfig,
    forward: ForwardSettings,
    placement: Placement,
    *,
    quantization: str | None,
) -> torch.dtype:
    """Return the dtype to compute in; `auto`: a quantized checkpoint's own, else the faster one.

    Args:
        place: of the base.
        config: of the base.
        forward: how it is run.
        placement: of its weights.
        quantization: how they are quantized, in the checkpoint or on load; None for dense ones.
    """
    if forward.compute_dtype != "auto":
        dtype: torch.dtype = getattr(torch, forward.compute_dtype)
        return dtype
    saved = read_checkpoint_dtype(place)
    is_packed = quantization is not None and forward.quantize == "none"
    if is_packed and isinstance(saved, torch.dtype):
        return saved
    work = Work(
        config=config,
        device=_main_device(placement),
        attention=forward.attention,
        batch_tokens=forward.batch_tokens,
    )
    return fastest_dtype(work, name=place.id)


def _main_device(placement: Placement) -> torch.device:
    """Return the device that most of a base is computed on."""
    places = placement.device_map
    if isinstance(places, torch.device):
        return places
    is_on_cpu = isinstance(places, dict) and set(places.values()) <= {"cpu", "disk"}
    return torch.device("cpu") if is_on_cpu else pick_device("auto")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is timed of a base."""

    config: PreTrainedConfig
    """Of the base."""
    device: torch.device
    """That computes most of it."""
    attention: str
    """Backend of transformers."""
    batch_tokens: int
    """Positions of a forward pass; a CPU is timed with some of them."""


def fastest_dtype(work: Work, *, name: str) -> torch.dtype:
    """Return bfloat16 or float32, the one that a base is computed in faster; a line says so.

    A base that is quantized on load is judged by its dense blocks; one whose blocks are huge, or
    that transformers cannot make from its config, such as one with code of its own, by plain
    matrix products.

    Args:
        work: to time.
        name: of the base.
    """
    key = (digest_config(work.config), work.device, work.attention)
    if key not in _known:
        _known[key] = _measure(work, name)
    return _known[key]


def choose_dtype(seconds: Mapping[str, float]) -> str:
    """Return `float32` where it is clearly faster than `bfloat16`, else that.

    Args:
        seconds: of the same work, by dtype.
    """
    return "float32" if seconds["bfloat16"] > _CLEARLY * seconds["float32"] else "bfloat16"


def _measure(work: Work, name: str) -> torch.dtype:
    calls = _block_calls(work)
    if calls is None:
        return torch.float32
    if not calls:
        products = "bfloat16" if multiplies_bfloat16(work.device) else "float32"
        logger.info(
            f"base {name}: compute dtype {products}, in which plain products are faster here: no "
            "block could be timed"
        )
        return _CANDIDATES[products]
    seconds = dict.fromkeys(_CANDIDATES, float("inf"))
    seconds |= least_seconds(calls, num_threads=torch.get_num_threads())
    chosen = choose_dtype(seconds)
    [other] = set(_CANDIDATES) - {chosen}
    ratio = seconds[other] / seconds[chosen]
    how = f"takes {ratio:.1f} times as long here" if other in calls else "does not run here"
    logger.info(f"base {name}: compute dtype {chosen}: {other} {how}")
    return _CANDIDATES[chosen]


def _block_calls(work: Work) -> dict[str, Callable[[], None]] | None:
    """Return a forward pass of one block in each dtype in which it runs; None: it is small."""
    text = work.config.get_text_config()
    values = json.loads(text.to_json_string(use_diff=False))
    calls: dict[str, Callable[[], None]] = {}
    for name, dtype in _CANDIDATES.items():
        try:
            model = empty_block(values, dtype, attention=work.attention)
            sizes = [weight.shape for weight in model.parameters()]
            weights = sum(map(math.prod, sizes))
            if weights < SMALLEST_BLOCK:
                return None
            if work.device.type == "cpu" and weights > _most_weights():
                return {}
            make_up_weights_(model, work.device)
            rows, length = _shape(work, sizes, getattr(text, "max_position_embeddings", None))
            states = torch.randn(rows, length, text.hidden_size).to(work.device, dtype)
            call = partial(_run, model, states)
            call()  # kernels are made, and libraries loaded
        except Exception:  # noqa: S112 -- whatever transformers makes of it: it is not a candidate
            continue
        calls[name] = call
    return calls


def _most_weights() -> int:
    """Return how many weights of a block, in each dtype, fit in a part of this machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory // _MEMORY_PART // sum(dtype.itemsize for dtype in _CANDIDATES.values())


def _shape(work: Work, sizes: Sequence[torch.Size], context: object) -> tuple[int, int]:
    """Return rows and positions of each, in a call."""
    longest = min(_ROW, work.batch_tokens)
    if isinstance(context, int):
        longest = max(1, min(longest, context))
    if work.device.type != "cpu":  # few positions keep it waiting for the host
        return max(1, work.batch_tokens // longest), longest
    experts = max((size[0] for size in sizes if len(size) == 3), default=0)
    affordable = int(_CALL_FLOPS / (2 * sum(map(math.prod, sizes))))
    wanted = min(max(_FEWEST, affordable, _PER_EXPERT * experts), work.batch_tokens)
    return max(1, wanted // longest), min(wanted, longest)


def _run(model: PreTrainedModel, states: Tensor) -> None:
    with torch.inference_mode(), attention_of_any_shape():
        model(inputs_embeds=states, use_cache=False)
    if states.device.type != "cpu":
        torch.accelerator.synchronize(states.device)
