"""`carryon plan-memory`: peak memory of training, estimated before a run."""

import sys
from typing import Any

from carryon.tools.cli.output import print_result
from carryon.tools.cli.sizes import parse_bytes
from carryon.tools.cli.table import format_table
from carryon.train.config import CarryOnSettings, LossSettings, MemorySettings


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
) -> dict[str, Any]:
    """Estimate the peak memory of training; nothing is run.

    With --limit, memory settings are added until the run fits, the fastest first. The last line
    on stdout is a JSON line with the bytes of each part.

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
    """
    from carryon.train.trainer.memory_estimate import MemoryCase, leaner_settings
    from carryon.train.trainer.memory_estimate import plan_memory as plan

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
