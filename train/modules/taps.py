"""TODO."""

from collections.abc import Sequence

from carryon.cache.errors import InputError
from carryon.cache.settings import parse_tap
from carryon.cache.store.reader import Store
from carryon.train.config import CarryOnSettings


def stream_taps(carryon: CarryOnSettings) -> list[str]:
    """Return what must be read for a carry-on: its taps, and `final` for a bottleneck, which
    corrects it; the other kinds take its place."""
    own = carryon.taps
    return list(dict.fromkeys(["final", *own])) if carryon.kind == "bottleneck" else list(own)


def check_taps(store: Store, taps: Sequence[str]) -> None:
    """Refuse a store that lacks one of `taps`.

    Raises:
        InputError: names the taps that are missing and those that are there.
    """
    missing = [tap for tap in taps if tap not in store.taps]
    if missing:
        words = ["--taps", *store.taps, *missing]
        if "final" not in taps:  # a kind that merges, which needs the base's blocks as well
            num_layers = int(store.manifest.base["num_layers"])
            layers = [parse_tap(tap, num_layers=num_layers) or num_layers - 1 for tap in taps]
            words += ["--with-blocks", str(num_layers - min(layers))]
        raise InputError(
            f"{store.root}: expected the taps {', '.join(taps)}, it has "
            f"{', '.join(store.taps)}: extract again with {' '.join(words)}"
        )


MAX_ALPHA = 10.0
"""Largest strength of a correction; far beyond what is of use."""


def check_alpha(alpha: float) -> float:
    """Return `alpha`.

    Raises:
        InputError: it is no number from 0 to MAX_ALPHA.
    """
    if not 0 <= alpha <= MAX_ALPHA:
        raise InputError(f"alpha: expected 0 to {MAX_ALPHA:g}, got {alpha}")
    return float(alpha)
