"""The taps that a carry-on reads, and the strength of its correction."""

from collections.abc import Sequence
from dataclasses import replace

from carryon.cache.errors import InputError
from carryon.cache.settings import tap_depth
from carryon.cache.store.view import StoreLike
from carryon.train.config import CarryOnSettings
from carryon.train.kinds import get_kind


def middle_taps(num_layers: int) -> list[str]:
    """Return the taps at two thirds and at one third of a base's blocks."""
    return [f"layer.{-(-2 * num_layers // 3)}", f"layer.{-(-num_layers // 3)}"]


def resolve_taps(settings: CarryOnSettings, num_layers: int) -> CarryOnSettings:
    """Return the settings with the tap that the kind reads, if it has its own.

    Args:
        settings: of a carry-on of any kind.
        num_layers: L, blocks of the base.

    Raises:
        InputError: other taps are given, or as many blocks as the base has.
    """
    own_tap = get_kind(settings.kind).own_tap
    if not own_tap:
        return settings
    below = num_layers - settings.blocks
    if "{below}" in own_tap and below < 1:
        raise InputError(
            f"blocks: expected 1 to {num_layers - 1} for the kind {settings.kind}, as the base has "
            f"{num_layers} blocks, got {settings.blocks}"
        )
    own = [own_tap.format(below=below)]
    if settings.taps not in (["final"], own):
        raise InputError(
            f"taps: expected {own[0]} for the kind {settings.kind} with {settings.blocks} blocks "
            f"on a base of {num_layers}, got {' '.join(settings.taps)}. Fix: leave out --taps"
        )
    return replace(settings, taps=own)


def stream_taps(carryon: CarryOnSettings) -> list[str]:
    """Return the taps to read for a carry-on: its own, and `final` if it corrects that."""
    if get_kind(carryon.kind).own_tap:
        return list(carryon.taps)
    return list(dict.fromkeys(["final", *carryon.taps]))


def source_tap(number: int, tap: str) -> str:
    """Return the name of a tap of another base among those that a carry-on reads.

    Args:
        number: of the base among those that are mixed in, from 1.
        tap: of its store.
    """
    return f"{number}:{tap}"


def check_taps(store: StoreLike, taps: Sequence[str]) -> None:
    """Refuse a store that lacks one of `taps`.

    Raises:
        InputError: names the missing taps and those of the store.
    """
    missing = [tap for tap in taps if tap not in store.taps]
    if missing:
        words = ["--taps", *store.taps, *missing]
        if "final" not in taps:  # a kind that merges, which needs the base's blocks too
            num_layers = int(store.base.get("num_layers", 0))
            depth = min(tap_depth(tap, num_layers=num_layers) for tap in taps)
            words += ["--with-blocks", str(max(num_layers - depth, 1))]
        raise InputError(
            f"{store.root}: expected the taps {', '.join(taps)}, got {', '.join(store.taps)}. "
            f"Fix: extract again with {' '.join(words)}"
        )


MAX_ALPHA = 10.0
"""Largest strength of a correction, far beyond any useful one."""


def check_alpha(alpha: float) -> float:
    """Return `alpha`.

    Raises:
        InputError: it is not a number from 0 to MAX_ALPHA.
    """
    if not 0 <= alpha <= MAX_ALPHA:
        raise InputError(f"alpha: expected 0 to {MAX_ALPHA:g}, got {alpha}")
    return float(alpha)
