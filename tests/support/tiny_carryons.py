"""Tiny carry-ons for tiny bases, with random weights in place of trained ones."""

from collections.abc import Sequence
from typing import Literal

from carryon.cache.base.model import Base
from carryon.train.config import CarryOnSettings
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.carryon import CarryOn
from carryon.train.modules.serialization import CarryOnCard
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
