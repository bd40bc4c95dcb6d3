"""`carryon versions`: the versions of a lineage, their cost and their losses."""

import json
import logging
from typing import Any

from carryon.cache.errors import InputError
from carryon.tools.cli.table import format_table

logger = logging.getLogger(__name__)


def versions(
    *, lineage: str, rebuild: int = 0, out: str = "", device: str = "auto"
) -> list[dict[str, Any]]:
    """Show the versions of a lineage: data, steps, cost, and held-out loss on every increment.

    Learning rates are drawn to LINEAGE/paths.png. stdout gets a JSON line for each version,
    stderr a table. Cost is counted up to each version: steps, tokens and seconds of trunk and
    branches, and beside them the steps of training every version from scratch (PTFS), of going on
    from the last one (continual), and of path switching by its formula. With --rebuild a version
    is trained again from the trunk, to the same bits.

    Example:
        carryon versions --lineage lineage

    Args:
        lineage: Folder of the lineage.
        rebuild: ReleasedVersion to train again. 0: none.
        out: Run folder for it.
        device: `auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ...
    """
    from carryon.train.continual.lineage import release
    from carryon.train.continual.lineage_dir import open_lineage, settings_of
    from carryon.train.continual.versions import list_versions

    if rebuild:
        if not out:
            raise InputError(f"--out: expected a folder for version {rebuild}, got none")
        opened = open_lineage(lineage)
        settings = settings_of(opened).with_options(device=device)
        report = release(opened, rebuild, settings=settings, out=out).to_dict()
        print(json.dumps(report))
        return [report]
    found = [version.to_dict() for version in list_versions(lineage, device=device)]
    for version in found:
        print(json.dumps(version))
    logger.info(_table(found))
    return found


def _table(found: list[dict[str, Any]]) -> str:
    """Return the versions as lines of aligned columns: what each is and took, what it gives."""
    increments = range(1, len(found) + 1)
    names = ["version", "steps", "taken", "ptfs", "continual", "formula", "tokens", "seconds"]
    rows = [[*names, *(f"NLL on {number}" for number in increments)]]
    nlls = [f"{nll:.4f}" for nll in found[0]["base_nlls"]]
    rows.append(["base", *[""] * (len(names) - 1), *nlls])
    for each in found:
        steps = each["paradigm_steps"]
        rows.append(
            [
                str(each["version"]),
                f"{each['path_steps']:,}",
                f"{each['steps_so_far']:,}",
                f"{steps['ptfs']:,}",
                f"{steps['continual']:,}",
                f"{each['formula_steps']['switch']:,.1f}",
                f"{each['tokens_so_far']:,}",
                f"{each['seconds_so_far']:,.0f}",
                *(f"{nll:.4f}" for nll in each["held_out_nlls"]),
            ]
        )
    lines = [format_table(rows)]
    last = found[-1]
    share = last["steps_so_far"] / last["paradigm_steps"]["ptfs"]
    lines += [f"increment {each['version']}: {' '.join(each['stores'])}" for each in found]
    lines.append(f"steps taken / steps of every version from scratch (PTFS): {share:.2f}")
    return "\n".join(lines)
