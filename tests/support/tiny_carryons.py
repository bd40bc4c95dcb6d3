"""Tiny carry-ons for tiny bases, with random weights in place of trained ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from carryon.cache.base.model import Base
from carryon.cache.files.documents import write_json
from carryon.cache.files.regular import digest_file
from carryon.train.config import CarryOnSettings
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.card_file import CARD, GATE, WEIGHTS, signed
from carryon.train.modules.carryon import CarryOn
from support.tiny_bases import randomize_


def make_tiny_carryon(
    base: Base,
    *,
    taps: Sequence[str] = ("final",),
    is_trained: bool = True,
    seed: int = 5,
    blocks: int = 2,
    gate: Literal["channel", "token", "none"] = "channel",
    alpha: float = 1.0,
) -> tuple[CarryOn, CarryOnCard]:
    """Return a carry-on of width 8 for `base`, its output map random if `is_trained`, else 0."""
    settings = CarryOnSettings(
        width=8, heads=2, intermediate_size=8, blocks=blocks, gate=gate, taps=list(taps)
    )
    carryon = build_bottleneck(settings, base_width=base.identity.width, seed=seed)
    if is_trained:
        randomize_(carryon, seed=seed)
    card = CarryOnCard(
        settings=settings.to_dict(),
        base_width=base.identity.width,
        base=base.identity.to_dict(),
        store_fingerprint="0" * 64,
        split={},
        alpha=alpha,
        figures={},
        versions={},
    )
    return carryon, card


def resign(folder: Path, **changes: Any) -> None:  # noqa: ANN401
    """Change values of a card, as a stranger would: with digests that fit. None removes a key."""
    values = json.loads((folder / CARD).read_text(encoding="utf-8")) | changes
    kept = {
        name: value
        for name, value in values.items()
        if name not in ("files", "sha256") and value is not None
    }
    names = [name for name in (WEIGHTS, GATE) if (folder / name).exists()]
    files = {name: digest_file(folder / name) for name in names}
    write_json(folder / CARD, signed(kept, files=files))
