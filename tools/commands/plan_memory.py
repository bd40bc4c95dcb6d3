"""`carryon plan-memory`: what training will take up in memory, before anything is run."""

import json
import logging
import sys
from typing import Any

from carryon.cache.errors import InputError
from carryon.train.config import CarryOnSettings, LossSettings, MemorySettings

logger = logging.getLogger(__name__)

_UNITS = {"GB": 1e9, "MB": 1e6, "GiB": 2**30, "MiB": 2**20}


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
    """Say what a run would take up in memory, part by part; nothing is run.

    With a limit, settings are added until the run fits it, those first that cost little time.
    The result is a JSON line with the bytes of each part.

    Example:
        carryon plan-memory --base-width 5120 --vocab-size 152064 --width 1760
            --intermediate-size 4576 --heads 16 --tokens-per-step 2048 --limit 0.75GB

    Args:
        base_width: Width D of the base, in channels.
        vocab_size: Rows V of the base's head.
        tokens_per_step: Tokens that are computed at one time: of a step, or of its micro-batch.
        supervised_ratio: Part of the tokens that are training targets.
        window_tokens: Tokens of a window of units; two windows are in memory.
        head_bytes: Bytes of each number of the head's products, 2 for bfloat16, 4 for float32.
        limit: The most that it may take up, such as 0.75GB. Empty for none.
        carryon: The shape of the carry-on.
        loss: How the frozen head is multiplied.
        memory: What the weights and all that belongs to them take up.
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
    most = parse_bytes(limit) if limit else sys.maxsize
    tried: list[dict[str, Any]] = [
        {"settings": name, "parts": (parts := plan(each)), "total": sum(parts.values())}
        for name, each in leaner_settings(case, limit=most)
    ]
    for entry in tried:
        logger.info(f"{entry['settings']}: {entry['total'] / 1e9:.3f} GB")
    for name, size in tried[-1]["parts"].items():
        logger.info(f"  {name:<12} {size / 1e6:10,.1f} MB")
    fits = tried[-1]["total"] <= most
    if limit:
        answer = "fits" if fits else "does not fit, whatever the settings: take a smaller batch"
        logger.info(f"{limit}: {answer}")
    document = {**tried[-1], "limit": most if limit else None, "fits": fits, "tried": tried}
    print(json.dumps(document))
    return document


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as 0.75GB or 700MiB.

    Raises:
        InputError: it is none.
    """
    for unit, size in sorted(_UNITS.items(), key=lambda item: -len(item[0])):
        number = text.removesuffix(unit)
        if number != text:
            try:
                return int(float(number) * size)
            except ValueError:
                break
    raise InputError(f"limit: expected a size such as 0.75GB or 700MB, got {text!r}")
