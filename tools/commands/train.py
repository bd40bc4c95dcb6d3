"""`carryon train`: store in, carry-on out."""

import json
import logging
from typing import Any

from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
)

logger = logging.getLogger(__name__)


def train(
    *,
    store: list[str],
    out: str,
    carryon: CarryOnSettings,
    optimization: OptimizationSettings,
    stream: StreamSettings,
    loss: LossSettings,
    memory: MemorySettings,
    run: RunSettings,
) -> dict[str, Any]:
    """Fit a carry-on to a store, or to a mix of several; the base is not needed.

    The store has the hidden states, the targets and the base's frozen head, which is all that
    training reads. An untrained carry-on is the base, so the run begins with the base's own
    held-out loss. Stop it at any time: the same command goes on from the newest checkpoint and
    ends with the same weights. The run folder gets config.yaml, metrics.jsonl, curves.png and
    the carry-on itself in carryon/; the last line on stdout is a JSON line with the figures.

    Example:
        carryon train --store store --out run

    Args:
        store: Folder of the store; or of several, of one base and the same taps, to be mixed.
        out: Folder of the run; made if missing. A run that is there is gone on with.
        carryon: The shape of a carry-on.
        optimization: How the carry-on's weights are found.
        stream: What is read from the store, and how far ahead.
        loss: How the frozen head is multiplied.
        memory: What the weights and all that belongs to them take up.
        run: Where a run computes, and what it leaves behind.
    """
    from carryon.train.config import TrainSettings
    from carryon.train.trainer.trainer import train as train_carryon

    settings = TrainSettings(
        carryon=carryon,
        optimization=optimization,
        stream=stream,
        loss=loss,
        memory=memory,
        run=run,
    )
    report = train_carryon(store, out=out, settings=settings)
    logger.info(report.summary())
    print(json.dumps(report.to_dict()))
    return report.to_dict()
