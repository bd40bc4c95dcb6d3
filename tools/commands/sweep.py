"""`carryon sweep`: several carry-ons, trained side by side from one read of a store."""

import json
import logging
from collections.abc import Mapping
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


def sweep(
    *,
    store: list[str],
    out: str,
    vary: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    runs: str = "",
    carryon: CarryOnSettings,
    optimization: OptimizationSettings,
    stream: StreamSettings,
    loss: LossSettings,
    memory: MemorySettings,
    run: RunSettings,
) -> list[dict[str, Any]]:
    """Train several carry-ons side by side; the store is read and decoded once for all of them.

    Any setting of the carry-on, of its optimisation and of the loss may differ from run to run;
    what decides the reading of the store may not. Each run has its folder OUT/NAME, with the
    same carry-on, to the bit, that carryon train gives with its settings. Stop it at any time:
    the same command goes on. OUT/sweep.json and OUT/curves.png sum up; stdout gets a JSON line
    for each run, stderr a table.

    Example:
        carryon sweep --store store --out sweep --vary learning_rate=1e-3,3e-3 width=64,128

    Args:
        store: Folder of the store; or of several, of one base and the same taps, to be mixed.
        out: Folder of the sweep; made if missing. A sweep that is there is gone on with.
        vary: Settings and their values, NAME=VALUE,VALUE; several make a grid. The elements of a
            list are joined by +, as in taps=final,final+layer.15.
        runs: YAML file with a list of runs instead: for each the settings that differ, and a
            name if you want to give one.
        carryon: The shape of a carry-on.
        optimization: How the carry-on's weights are found.
        stream: What is read from the store, and how far ahead.
        loss: How the frozen head is multiplied.
        memory: What the weights and all that belongs to them take up.
        run: Where a run computes, and what it leaves behind.
    """
    from carryon.train.config import TrainSettings
    from carryon.train.trainer.sweep import choose_runs
    from carryon.train.trainer.sweep import sweep as train_sweep

    chosen = choose_runs(runs, vary)
    settings = TrainSettings(
        carryon=carryon,
        optimization=optimization,
        stream=stream,
        loss=loss,
        memory=memory,
        run=run,
    )
    reports = train_sweep(store, out=out, settings=settings, runs=chosen)
    found = {name: report.to_dict() for name, report in zip(chosen, reports, strict=True)}
    for name, report in found.items():
        print(json.dumps({"run": name, **report}))
    print_runs(found)
    return list(found.values())


def print_runs(reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table to stderr, the best run first, the base last."""
    rows = [("run", "held-out NLL", "steps", "MB", "seconds", "tokens/s")]
    rows += [
        (
            name,
            f"{report['carryon_nll']:.4f}",
            f"{report['num_steps']}",
            f"{report['carryon_bytes'] / 1e6:.2f}",
            f"{report['train_s']:.0f}",
            f"{report['tokens_per_second']:,.0f}",
        )
        for name, report in sorted(reports.items(), key=lambda item: item[1]["carryon_nll"])
    ]
    base_nll = next(iter(reports.values()))["base_nll"]
    rows.append(("base", f"{base_nll:.4f}", "", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        logger.info("  ".join(cells).rstrip())
