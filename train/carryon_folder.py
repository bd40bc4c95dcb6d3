"""A carry-on on disk: weights in safetensors, everything else in one JSON, a card for people.

Nothing is pickled, and nothing in the files names a class of ours. The folder says which base it
belongs to by the base's digests, not by a path.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from carryon.cache.atomic import write_json
from carryon.cache.errors import InputError, MissingError
from carryon.train.carryon import CarryOn
from carryon.train.config import CarryOnSettings
from carryon.train.folder import whole_folder

FORMAT_VERSION = 1
WEIGHTS = "carryon.safetensors"
CARD = "carryon.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class CarryOnCard:
    """What is known of a carry-on besides its weights, as plain JSON values."""

    settings: dict[str, Any]
    """CarryOnSettings: the shape."""
    base_width: int
    """D, the width of the base's hidden states."""
    base: dict[str, Any]
    """Identity of the base, as in the manifest of the store."""
    store_fingerprint: str
    """Of the store it was trained on."""
    split: dict[str, Any]
    """held_out_share and seed: which samples of that store it never saw."""
    alpha: float
    """Strength of the correction to use by default."""
    figures: dict[str, Any]
    """Held-out NLL and what else the run measured."""
    versions: dict[str, str]
    """Versions of the libraries that trained it."""
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CarryOnCard":
        """Build from plain values.

        Raises:
            InputError: another format version, or keys that do not belong there.
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"format version: expected {FORMAT_VERSION}, got {version}")
        expected = {item.name for item in fields(cls)}
        if set(values) != expected:
            raise InputError(f"expected the keys {sorted(expected)}, got {sorted(values)}")
        return cls(**values)


def save_carryon(
    folder: str | Path, carryon: CarryOn, card: CarryOnCard, *, dtype: torch.dtype
) -> int:
    """Write a carry-on to `folder`, replacing one that is there; returns the bytes of its weights.

    Args:
        folder: appears whole or not at all.
        carryon: the module.
        card: what is known of it.
        dtype: of the saved weights; bfloat16 halves the file and rounds each weight to 8 bits.
    """
    weights = {
        name: weight.detach().to("cpu", dtype).contiguous()
        for name, weight in carryon.state_dict().items()
    }
    with whole_folder(Path(folder)) as partial:
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        write_json(partial / CARD, card.to_dict())
        num_bytes = (partial / WEIGHTS).stat().st_size
        text = _model_card(card, num_bytes=num_bytes)
        (partial / "README.md").write_text(text, encoding="utf-8")
    return num_bytes


def load_carryon(folder: str | Path) -> tuple[CarryOn, CarryOnCard]:
    """Return the carry-on in `folder`, weights in float32 on the CPU, and its card.

    Raises:
        MissingError: there is no carry-on.
        InputError: a file of it is not what `save_carryon` writes.
    """
    root = Path(folder)
    if not (root / CARD).is_file() or not (root / WEIGHTS).is_file():
        raise MissingError(
            f"{root}: expected a carry-on ({CARD} and {WEIGHTS}), found none: run carryon train, "
            "which writes one to RUN/carryon"
        )
    try:
        card = CarryOnCard.from_dict(json.loads((root / CARD).read_text(encoding="utf-8")))
        settings = CarryOnSettings.from_dict(card.settings)
        carryon = CarryOn(settings, base_width=card.base_width)
        weights = load_file(root / WEIGHTS)
        carryon.load_state_dict({name: weight.float() for name, weight in weights.items()})
    except (json.JSONDecodeError, SafetensorError, RuntimeError, InputError) as error:
        raise InputError(f"{root}: not a carry-on as carryon train writes it: {error}") from error
    return carryon.eval(), card


def check_base(card: CarryOnCard, base: Mapping[str, Any], *, folder: str | Path) -> None:
    """Refuse a carry-on that was trained on another base than `base`.

    Raises:
        InputError: the digests of the weights differ; names both.
    """
    expected, got = card.base.get("weights_sha256"), base.get("weights_sha256")
    if expected != got:
        raise InputError(
            f"{folder}: this carry-on belongs to the base {card.base.get('id')} (weights "
            f"{str(expected)[:12]}), got {base.get('id')} (weights {str(got)[:12]}): use a store "
            "or a base of the same weights"
        )


def _model_card(card: CarryOnCard, *, num_bytes: int) -> str:
    shape = CarryOnSettings.from_dict(card.settings)
    lines = [
        f"# Carry-on for {card.base.get('id')}",
        "",
        f"A {shape.kind} of {shape.blocks} blocks, width {shape.width}, on the taps "
        f"{', '.join(shape.taps)}; {num_bytes / 1e6:.2f} MB. It corrects the last hidden state of "
        "its frozen base, whose weights are not in here:",
        "",
        "    carryon generate --carryon . --prompt TEXT",
        "",
        "| | |",
        "| --- | --- |",
        f"| base | {card.base.get('id')} (weights {str(card.base.get('weights_sha256'))[:12]}) |",
        f"| store | {card.store_fingerprint[:12]} |",
        f"| alpha | {card.alpha:g} |",
    ]
    lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in card.figures.items()]
    return "\n".join(lines) + "\n"
