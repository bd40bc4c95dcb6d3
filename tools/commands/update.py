"""`carryon update`: new data in, the next version of a carry-on out."""

import json
import logging
from collections.abc import Sequence
from typing import Any

from carryon.cache.errors import InputError
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
)

logger = logging.getLogger(__name__)


def update(
    *,
    lineage: str,
    data: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    base: str = "",
    store: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    alpha: float = 0.6,
    new_base: str = "",
    old_lineage: str = "",
    also_from_scratch: bool = False,
    carryon: CarryOnSettings,
    optimization: OptimizationSettings,
    stream: StreamSettings,
    loss: LossSettings,
    memory: MemorySettings,
    run: RunSettings,
) -> dict[str, Any]:
    """Release the next version of a carry-on from new data alone.

    A lineage has a trunk, whose learning rate never falls, and for every version a branch off it,
    whose learning rate falls fast and all the way (--schedule and --min-lr-ratio say how and how
    far). An update moves the trunk on to the new data and releases a branch; the branch leaves the
    trunk as it is. Stop it at any time: the same command goes on. The version is
    LINEAGE/versions/N/carryon; the last line on stdout is a JSON line with its figures.

    New texts (--data) are appended to one growing store, LINEAGE/store or --store, and only they
    are extracted. Without --data, all parts of --store that the lineage has not seen are the new
    data: STORE#2 is the second part of a store.

    When the base itself is updated, --new-base begins a lineage on it, in another folder, with the
    texts and the newest weights of --old-lineage, which stays as it is: hidden states of another
    base are other numbers, so store, trunk and versions begin again. --also-from-scratch trains an
    untrained carry-on beside it, over the same steps, and so shows whether the old one helps.

    Example:
        carryon update --lineage lineage --data march.jsonl --base base
        carryon update --lineage lineage --data april.jsonl --base base --config lineage/config.yaml
        carryon update --lineage lineage-2 --old-lineage lineage --new-base base-2 \\
            --also-from-scratch --config lineage/config.yaml

    Args:
        lineage: Folder of the lineage; made if missing.
        data: Files of the new texts, or folders of such files; as in carryon extract. With
            --new-base: the texts of the old lineage, if they are not where they were.
        base: The base that extracts --data: hub id, folder or .gguf file.
        store: Folder of the store of the new data, or of several. None given: LINEAGE/store.
        alpha: Part of the new data's steps in which the branch falls.
        new_base: An updated base to begin a new lineage on: hub id, folder or .gguf file.
        old_lineage: The lineage that a new one on --new-base begins from.
        also_from_scratch: With --new-base: also train from an untrained carry-on, to compare.
        carryon: The shape of a carry-on; all settings stay the same from the first update on.
        optimization: How the carry-on's weights are found.
        stream: What is read from the store, and how far ahead.
        loss: How the frozen head is multiplied.
        memory: What the weights and all that belongs to them take up.
        run: Where a run computes, and what it leaves behind.
    """
    from carryon.train.config import TrainSettings

    settings = TrainSettings(
        carryon=carryon,
        optimization=optimization,
        stream=stream,
        loss=loss,
        memory=memory,
        run=run,
    )
    if not new_base:
        if old_lineage or also_from_scratch:
            raise InputError(
                "--old-lineage and --also-from-scratch: expected with --new-base, got none"
            )
        return _update(lineage, settings, store, data, base, alpha)
    if base or store or not old_lineage:
        raise InputError("--new-base: expected --old-lineage, and neither --base nor --store")
    from carryon.train.continual.rebase import rebase

    found = rebase(
        lineage=lineage,
        old_lineage=old_lineage,
        base=new_base,
        settings=settings,
        data=data,
        alpha=alpha,
        also_from_scratch=also_from_scratch,
    )
    logger.info(
        f"{found.carryon}: held-out NLL {found.from_old_nll:.4f} after {found.steps} steps from "
        f"version {found.old_version} of {found.old_lineage} ({found.start_nll:.4f} before them, "
        f"new base alone {found.base_nll:.4f})"
        + ("" if found.from_scratch_nll is None else f"; from scratch {found.from_scratch_nll:.4f}")
    )
    print(json.dumps(found.to_dict()))
    return found.to_dict()


def _update(
    lineage: str,
    settings: Any,  # noqa: ANN401 -- TrainSettings, whose module loads torch
    store: Sequence[str],
    data: Sequence[str],
    base: str,
    alpha: float,
) -> dict[str, Any]:
    from carryon.train.continual.lineage import update as update_lineage

    report = update_lineage(
        lineage=lineage, store=store, data=data, base=base, settings=settings, alpha=alpha
    )
    logger.info(
        f"{report.carryon}: held-out NLL on the new data {report.carryon_nll:.4f}, of the base "
        f"{report.base_nll:.4f}"
    )
    print(json.dumps(report.to_dict()))
    return report.to_dict()
