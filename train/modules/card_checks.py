"""Limits on a carry-on from anyone: checked before a module is built or memory is taken."""

import math
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.store.top_blocks import Blocks
from carryon.train.config import CarryOnSettings
from carryon.train.kinds import get_kind
from carryon.train.modules.taps import check_alpha

MAX_BASE_WIDTH = 1 << 17
_MAX_TEXT = 4096
_MAX_ITEMS = 1 << 16
_MAX_SOURCES = 64
SOURCE_FACTS = (
    "name",
    "base",
    "revision",
    "weights_sha256",
    "tokenizer_sha256",
    "vocabulary_map_sha256",
    "store_fingerprint",
)
"""What a card says of each base that is mixed in."""
QUANTIZATION = "quantization"
"""Besides, of a base whose weights are quantized."""
_OF_STATES = ("taps", "width")
"""Besides, of a base whose states are read."""
_WAYS = ("probability", "state", "both")
_MAX_TAPS = 64
_TYPES: dict[str, tuple[type, ...]] = {
    "settings": (dict,),
    "base_width": (int,),
    "base": (dict,),
    "store_fingerprint": (str,),
    "split": (dict,),
    "alpha": (int, float),
    "figures": (dict,),
    "versions": (dict,),
    "framing": (dict,),
    "mixture": (dict,),
}
_TAP = re.compile(r"final|prenorm|layer\.(?:0|[1-9][0-9]{0,4})")


def check_values(values: Mapping[str, Any]) -> None:
    """Check the types and sizes of a card's values.

    Raises:
        InputError: names the first that is wrong.
    """
    for name, types in _TYPES.items():
        _check(name, values.get(name, {}), types)
    for name in ("base", "figures", "versions"):
        kinds: tuple[type, ...] = (str,) if name == "versions" else (str, int, float)
        for key, value in values[name].items():
            if value is not None or name == "versions":
                _check(f"{name}: {key!a:.80}", value, kinds)
    _check("base: id", values["base"].get("id"), (str,))
    for key in ("revision", "weights_sha256", "tokenizer_sha256"):
        if values["base"].get(key) is not None:
            _check(f"base: {key}", values["base"][key], (str,))
    _check_split(values["split"])
    if mixture := values.get("mixture"):
        _check_mixture(mixture)
    check_alpha(values["alpha"])
    width = values["base"].get("width", values["base_width"])
    if not 1 <= values["base_width"] <= MAX_BASE_WIDTH or width != values["base_width"]:
        raise InputError(
            f"base_width: expected the width of the base, 1 to {MAX_BASE_WIDTH}, got "
            f"{values['base_width']}"
        )
    settings = CarryOnSettings.from_dict(values["settings"])
    if wrong := [tap for tap in settings.taps if not _TAP.fullmatch(tap)]:
        raise InputError(f"taps: expected final, prenorm or layer.K, got {wrong[0]!a:.80}")


_STORE_KEYS = ("stores", "samples", "parts")


def _check_split(split: Mapping[str, Any]) -> None:
    if unknown := set(split) - {"held_out_ratio", "seed", *_STORE_KEYS}:
        raise InputError(f"split: unknown key {min(map(str, unknown))!a:.80}")
    ratio, seed = split.get("held_out_ratio", 0.5), split.get("seed", 0)
    _check("split: held_out_ratio", ratio, (int, float))
    _check("split: seed", seed, (int,))
    if not 0 < ratio < 1 or seed < 0:
        raise InputError(f"split: expected a ratio in 0 to 1 and a seed >= 0, got {ratio}, {seed}")
    for key in _STORE_KEYS:
        if (stores := split.get(key)) is not None:
            _check(f"split: {key}", stores, (list,))
            for store in stores:
                _check(f"split: {key}", store, (str,))


def _check_states(source: Mapping[str, Any]) -> None:
    """Check what is said of the states of another base that are read."""
    _check("mixture: sources: width", source["width"], (int,))
    _check("mixture: sources: taps", source["taps"], (list,))
    taps = source["taps"]
    is_sound = 0 < len(taps) <= _MAX_TAPS and len({str(tap) for tap in taps}) == len(taps)
    if not is_sound or not all(isinstance(tap, str) and _TAP.fullmatch(tap) for tap in taps):
        raise InputError(
            f"mixture: sources: taps: expected 1 to {_MAX_TAPS} of final, prenorm or layer.K, each "
            f"once, got {taps!r:.80}"
        )
    if not 1 <= source["width"] <= MAX_BASE_WIDTH:
        raise InputError(
            f"mixture: sources: width: expected 1 to {MAX_BASE_WIDTH}, got {source['width']}"
        )


def _check_mixture(mixture: Mapping[str, Any]) -> None:
    if set(mixture) != {"by", "sources"}:
        raise InputError(f"mixture: expected by and sources, got {sorted(map(str, mixture))!r:.80}")
    _check("mixture: by", mixture["by"], (str,))
    _check("mixture: sources", mixture["sources"], (list,))
    for source in mixture["sources"]:
        _check("mixture: sources", source, (dict,))
        expected = SOURCE_FACTS if mixture["by"] == "probability" else (*SOURCE_FACTS, *_OF_STATES)
        if set(source) - {QUANTIZATION} != set(expected):
            raise InputError(
                f"mixture: sources: expected {', '.join(expected)}, got "
                f"{sorted(map(str, source))!r:.80}"
            )
        if mixture["by"] != "probability":
            _check_states(source)
        for name in (*SOURCE_FACTS, *({QUANTIZATION} & set(source))):
            _check(f"mixture: sources: {name}", source[name], (str,))
            if not source[name].isprintable():  # errors and the model card show them
                raise InputError(
                    f"mixture: sources: {name}: expected printable text, got {source[name]!a:.80}"
                )
    if mixture["by"] not in _WAYS or not 1 <= len(mixture["sources"]) <= _MAX_SOURCES:
        raise InputError(
            f"mixture: expected 1 to {_MAX_SOURCES} sources by {', '.join(_WAYS)}, got "
            f"{len(mixture['sources'])} by {mixture['by']!a:.80}"
        )


def _check(name: str, value: Any, types: tuple[type, ...]) -> None:  # noqa: ANN401
    if type(value) not in types:
        raise InputError(f"{name}: expected {_named(types)}, got {value!r:.80}")
    if isinstance(value, str | list | dict):
        most = _MAX_TEXT if isinstance(value, str) else _MAX_ITEMS
        if len(value) > most:
            raise InputError(f"{name}: expected a length of at most {most}, got {len(value)}")
    elif abs(value) >= 1 << 63 and not (isinstance(value, float) and math.isinf(value)):
        raise InputError(f"{name}: expected a number below 2**63, got a larger one")


def _named(types: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in types)


def check_sizes(
    settings: CarryOnSettings,
    base_width: int,
    weights: Mapping[str, Tensor],
    *,
    source_widths: Collection[int] = (),
) -> None:
    """Compare the sizes of a carry-on with its weights, before a module of them is built.

    A module that passes has at most a few times the values of the file; `check_weights` then
    compares it in full.

    Raises:
        InputError: the file has too few weights for the sizes.
    """
    num_values = sum(weight.numel() for weight in weights.values())
    most = {"blocks": len(weights), "taps": len(weights)}
    needed = {"blocks": settings.blocks, "taps": len(settings.taps)}
    if settings.kind == "bottleneck":
        block = settings.width * max(settings.width, settings.intermediate_size)
        needed |= {
            "width": settings.width * base_width,
            "intermediate_size": settings.blocks * block,
        }
        most |= {"width": num_values, "intermediate_size": num_values}
        bridges = sum(source_widths) * settings.width
        if len(source_widths) > len(weights) or bridges > num_values:
            raise InputError(
                f"mixture: expected taps of other bases that fit the {len(weights)} tensors with "
                f"{num_values:,} values in the weights file, got {len(source_widths)} of "
                f"{sum(source_widths):,} channels"
            )
    elif get_kind(settings.kind).needs_blocks:
        needed["lora_rank"], most["lora_rank"] = settings.lora_rank, num_values
    else:
        return  # of the user's own making
    for name, number in needed.items():
        if number > most[name]:
            raise InputError(
                f"{name}: expected sizes that fit the {len(weights)} tensors with {num_values:,} "
                f"values in the weights file, got {getattr(settings, name)!r:.80}"
            )


def check_memory(
    settings: CarryOnSettings,
    *,
    base_width: int,
    blocks: Blocks | None,
    source_widths: Collection[int] = (),
) -> None:
    """Refuse a module whose weights alone do not fit this machine; nothing is built.

    Args:
        settings: perhaps a stranger's, each within its own limits.
        base_width: D.
        blocks: the base's last blocks, for a kind made of them.
        source_widths: of the taps of other bases.

    Raises:
        InputError: names the sizes.
    """
    if settings.kind == "bottleneck":
        a_block = settings.width * (4 * settings.width + 3 * settings.intermediate_size)
        ends = (len(settings.taps) + 2) * settings.width * base_width
        ends += sum(source_widths) * settings.width
    elif blocks is not None:
        sizes = [
            weight.numel() + settings.lora_rank * sum(weight.shape)
            for weight in blocks.blocks[-1].values()
        ]
        a_block, ends = sum(sizes), 0
    else:
        return  # of the user's own making
    needed = 4 * (settings.blocks * a_block + ends)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise InputError(
            f"{settings.kind}: expected weights that fit the memory of this machine, "
            f"{memory / 1e9:,.0f} GB, got {needed / 1e9:,.0f} GB. Fix: lower --blocks, --width, "
            "--intermediate-size or --lora-rank"
        )


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare weights with those of a module: names, shapes, floating dtype, finite values.

    Raises:
        InputError: names the first tensor that is wrong.
    """
    for name in sorted(set(weights) | set(expected)):
        got, own = (
            tuple(each[name].shape) if name in each else "nothing" for each in (weights, expected)
        )
        if got != own:
            raise InputError(f"weights: {name:.200}: expected {own}, got {got}")
        weight = weights[name]
        if expected[name].is_floating_point() and not weight.is_floating_point():
            raise InputError(f"weights: {name}: expected floating point, got {weight.dtype}")
        # One pass without a copy: NaN is passed on, infinity is an extreme.
        if weight.numel() and not all(map(math.isfinite, map(float, weight.aminmax()))):
            raise InputError(f"weights: {name}: expected finite values, got inf or NaN")
