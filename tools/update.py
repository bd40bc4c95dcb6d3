"""`carryon update`: new data in, the next version of a carry-on out."""

import json
import sys
from typing import Any

from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
)


def update(
    *,
    lineage: str,
    store: list[str],
    alpha: float = 0.6,
    carryon: CarryOnSettings,
    optimization: OptimizationSettings,
    stream: StreamSettings,
    loss: LossSettings,
    memory: MemorySettings,
    run: RunSettings,
) -> dict[str, Any]:
    """Release the next version of a carry-on from a store of new data alone.

    A lineage has a trunk, whose learning rate never falls, and for every version a branch off it,
    whose learning rate falls fast and all the way (--schedule and --final-share say how and how
    far). An update moves the trunk on to the new data and releases a branch; the branch leaves the
    trunk as it is. Stop it at any time: the same command goes on. The version is
    LINEAGE/versions/N/carryon; the last line on stdout is a JSON line with its figures.

    Example:
        carryon update --lineage lineage --store store-2 --config lineage/config.yaml

    Args:
        lineage: Folder of the lineage; made if missing.
        store: Folder of the store of the new data, or of several.
        alpha: Part of the new data's steps in which the branch falls.
        carryon: The shape of a carry-on; all settings stay the same from the first update on.
        optimization: How the carry-on's weights are found.
        stream: What is read from the store, and how far ahead.
        loss: How the frozen head is multiplied.
        memory: What the weights and all that belongs to them take up.
        run: Where a run computes, and what it leaves behind.
    """
    from carryon.train.lineage import update as update_lineage
    from carryon.train.run import TrainSettings

    settings = TrainSettings(
        carryon=carryon,
        optimization=optimization,
        stream=stream,
        loss=loss,
        memory=memory,
        run=run,
    )
    report = update_lineage(lineage=lineage, store=store, settings=settings, alpha=alpha)
    print(
        f"{report.carryon}: held-out NLL on the new data {report.carryon_nll:.4f}, of the base "
        f"{report.base_nll:.4f}",
        file=sys.stderr,
    )
    print(json.dumps(report.to_dict()))
    return report.to_dict()
