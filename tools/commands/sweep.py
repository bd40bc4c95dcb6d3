"""`carryon sweep`: several carry-ons trained from one read of a store."""

import logging
from typing import Any

from carryon.tools.cli.output import print_result
from carryon.tools.cli.table import format_table
from carryon.train.config import TrainSettings

logger = logging.getLogger(__name__)


def sweep(
    *,
    store: list[str],
    out: str,
    vary: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    runs: str = "",
    settings: TrainSettings,
) -> list[dict[str, Any]]:
    """Train several carry-ons side by side from one read of a store.

    Runs may differ in every setting of the carry-on, the optimization and the loss, but not in
    how the store is read. Each run has a folder OUT/NAME and gives the same carry-on, bit for
    bit, as carryon train with its settings. After an interruption the same command resumes.
    OUT/sweep.json and OUT/curves.png compare the runs. stdout gets a JSON line for each run.

    Example:
        carryon sweep --store store --out sweep --vary learning_rate=1e-3,3e-3 width=64,128

    Args:
        store: Folder of the store. Several stores of one base with the same taps are mixed.
        out: Folder of the sweep, created if missing. An existing sweep is resumed.
        vary: Settings and their values, NAME=VALUE,VALUE; several make a grid. The items of a
            list are joined by +, as in taps=final,final+layer.15.
        runs: YAML file with a list of runs instead: for each the settings that differ, and
            optionally a name.
        settings: Settings that all runs share.
    """
    from carryon.train.trainer.held_out.nll import shown_nll
    from carryon.train.trainer.sweep import choose_runs
    from carryon.train.trainer.sweep import sweep as train_sweep

    chosen = choose_runs(runs, vary)
    reports = train_sweep(store, out=out, settings=settings, runs=chosen)
    results = {name: report.to_dict() for name, report in zip(chosen, reports, strict=True)}
    for name, result in results.items():
        print_result({"run": name, **result})
    rows = [("run", "held-out NLL", "steps", "MB", "seconds", "tokens/s")]
    rows += [
        (
            name,
            shown_nll(result["carryon_nll"], result["carryon_nll_se"]),
            f"{result['num_steps']:,}",
            f"{result['carryon_bytes'] / 1e6:.2f}",
            f"{result['train_s']:.0f}",
            f"{result['tokens_per_second']:,.0f}",
        )
        for name, result in sorted(results.items(), key=lambda item: item[1]["carryon_nll"])
    ]
    base = reports[0]
    rows.append(("base", shown_nll(base.base_nll, base.base_nll_se), "", "", "", ""))
    logger.info(f"held-out NLL on {base.held_out_targets:,} targets, +- its standard error:")
    logger.info(format_table(rows))
    return list(results.values())
