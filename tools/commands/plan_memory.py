"""`carryon plan-memory`: peak memory of training, estimated before a run."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from carryon.cache.checked_settings import Bounds
from carryon.cache.errors import InputError
from carryon.tools.cli.output import print_result
from carryon.tools.cli.sizes import parse_bytes
from carryon.tools.cli.table import format_table
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    MixSettings,
    TrainSettings,
)
from carryon.train.kinds import get_kind

if TYPE_CHECKING:
    from carryon.train.trainer.forecast.memory_estimate import SourceCase

_MOST = 1 << 40  # of a number of tokens, channels or rows
_BOUNDS = {
    "--base-width": Bounds(at_least=1, at_most=1 << 20),
    "--vocab-size": Bounds(at_least=1, at_most=1 << 30),
    "--tokens-per-step": Bounds(at_least=1, at_most=_MOST),
    "--supervised-ratio": Bounds(at_least=0, at_most=1),
    "--window-tokens": Bounds(at_least=0, at_most=_MOST),
}


def plan_memory(
    *,
    base_width: int,
    vocab_size: int,
    tokens_per_step: int = 1024,
    supervised_ratio: float = 1.0,
    window_tokens: int = 16384,
    head_bytes: int = 2,
    limit: str = "",
    carryon: CarryOnSettings,
    loss: LossSettings,
    memory: MemorySettings,
    mixing: MixSettings,
) -> dict[str, Any]:
    """Estimate the peak memory of training; nothing is run.

    With --limit, memory settings are added until the run fits, the fastest first. Of the ways of
    the loss that a run may choose by timing them, the one with the most bytes is counted; give
    --loss-way for another. The last line on stdout is a JSON line with the bytes of each part.

    Example:
        carryon plan-memory --base-width 5120 --vocab-size 152064 --width 1760
            --intermediate-size 4576 --heads 16 --tokens-per-step 2048 --limit 0.75GB

    Args:
        base_width: Hidden width of the base, in channels.
        vocab_size: Rows of the base's LM head.
        tokens_per_step: Tokens computed at a time, in a step or a micro-batch.
        supervised_ratio: Fraction of the tokens that are training targets.
        window_tokens: Tokens of a window of units; two windows are in memory.
        head_bytes: Bytes of a number in the LM head's products: 2 for bfloat16, 4 for float32.
        limit: Memory that the run may use, such as 0.75GB. Empty: no limit.
        carryon: The shape of the carry-on.
        loss: LM-head loss.
        memory: Memory settings.
        mixing: Other bases, whose stores are opened.
    """
    from carryon.train.trainer.forecast.memory_estimate import MemoryCase, leaner_settings
    from carryon.train.trainer.forecast.memory_estimate import plan_memory as plan

    _check(
        carryon.kind,
        head_bytes,
        {
            "--base-width": base_width,
            "--vocab-size": vocab_size,
            "--tokens-per-step": tokens_per_step,
            "--supervised-ratio": supervised_ratio,
            "--window-tokens": window_tokens,
        },
    )
    case = MemoryCase(
        base_width=base_width,
        vocab_size=vocab_size,
        micro_batch_tokens=tokens_per_step,
        supervised_ratio=supervised_ratio,
        window_tokens=window_tokens,
        head_bytes=head_bytes,
        carryon=carryon,
        loss=loss,
        memory=memory,
        sources=_read_sources(
            TrainSettings(mixing=mixing, carryon=carryon, loss=loss),
            vocab_size=vocab_size,
            supervised_ratio=supervised_ratio,
        ),
        has_gate=mixing.has_gate,
    )
    max_bytes = parse_bytes("--limit", limit) if limit else sys.maxsize
    tried: list[dict[str, Any]] = [
        {"settings": name, "parts": (parts := plan(each)), "total": sum(parts.values())}
        for name, each in leaner_settings(case, limit=max_bytes)
    ]
    rows = [("settings", "GB"), *((x["settings"], f"{x['total'] / 1e9:.3f}") for x in tried)]
    sizes = [("part", "MB"), *((k, f"{v / 1e6:,.1f}") for k, v in tried[-1]["parts"].items())]
    summary = f"{format_table(rows)}\n\n{format_table(sizes)}"
    fits = tried[-1]["total"] <= max_bytes
    if limit:
        answer = "fits" if fits else "does not fit with any settings. Fix: lower --tokens-per-step"
        summary += f"\n\n--limit {limit}: {answer}"
    document = {**tried[-1], "limit": max_bytes if limit else None, "fits": fits, "tried": tried}
    return print_result(document, summary)


def _check(kind: str, head_bytes: int, given: Mapping[str, float]) -> None:
    """Check the options that no settings hold.

    Raises:
        InputError: a number is out of range, or the carry-on has the sizes of a base's blocks.
    """
    for name, value in given.items():
        if problem := _BOUNDS[name].problem(value):
            raise InputError(f"{name}: {problem}")
    if head_bytes not in (2, 4):
        raise InputError(f"--head-bytes: expected 2 or 4, got {head_bytes}")
    if get_kind(kind).needs_blocks:
        raise InputError(
            f"--kind: expected bottleneck or none, got {kind}, which has the sizes of its base's "
            "blocks. Fix: carryon train --dry-run, which reads them from the store"
        )


def _read_sources(
    settings: TrainSettings, *, vocab_size: int, supervised_ratio: float
) -> list["SourceCase"]:
    """Read from their stores what decides the memory of other bases.

    Raises:
        InputError: a store is aligned to no other or to that of another base, or lacks a tap.
    """
    from carryon.cache.store.reader import Store
    from carryon.train.trainer.forecast.memory_estimate import SourceCase

    settings.check_mix()
    mixing, sources = settings.mixing, []
    for path in mixing.mix:
        store = Store.open(path, allow_aligned=True)
        facts = store.manifest.alignment
        if not facts:
            raise InputError(
                f"--mix: {path}: expected a store that is aligned to another, got a store alone. "
                "Fix: carryon extract --align-to"
            )
        if facts["anchor_vocab_size"] != vocab_size:
            raise InputError(
                f"--vocab-size: expected {facts['anchor_vocab_size']} as of the base that {path} "
                f"is aligned to, got {vocab_size}"
            )
        taps = mixing.mix_taps if mixing.reads_states else []
        if missing := [tap for tap in taps if tap not in store.taps]:
            raise InputError(
                f"--mix-taps: {path}: expected {', '.join(store.taps)}, got {', '.join(missing)}"
            )
        sources.append(
            SourceCase(
                width=store.width,
                vocab_size=int(store.manifest.head["vocab_size"]),
                taps=taps,
                num_targets=int(store.num_tokens * supervised_ratio),
                head_bytes=4 if store.head(is_mapped=True).weight.dtype == "float32" else 2,
            )
        )
    return sources
