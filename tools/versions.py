"""`carryon versions`: the versions of a lineage, their cost and their losses."""

import json
import sys
from typing import Any

from carryon.cache.errors import InputError


def versions(
    *, lineage: str, rebuild: int = 0, out: str = "", device: str = "auto"
) -> list[dict[str, Any]]:
    """Show the versions of a lineage: data, steps, cost, and held-out loss on every increment.

    Learning rates are drawn to LINEAGE/paths.png. stdout gets a JSON line for each version,
    stderr a table. With --rebuild a version is trained again from the trunk, to the same bits.

    Example:
        carryon versions --lineage lineage

    Args:
        lineage: Folder of the lineage.
        rebuild: Version to train again. 0: none.
        out: Run folder for it.
        device: `auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ...
    """
    from carryon.train.lineage import release
    from carryon.train.sweep import change
    from carryon.train.versions import list_versions, open_lineage, settings_of

    if rebuild:
        if not out:
            raise InputError(f"--out: expected a folder for version {rebuild}, got none")
        opened = open_lineage(lineage)
        settings = change(settings_of(opened), {"device": device})
        report = release(opened, rebuild, settings=settings, out=out).to_dict()
        print(json.dumps(report))
        return [report]
    found = [version.to_dict() for version in list_versions(lineage, device=device)]
    for version in found:
        print(json.dumps(version))
    for version in found:
        nlls = "  ".join(f"{nll:.4f}" for nll in version["held_out_nlls"])
        share = version["steps_so_far"] / version["scratch_steps"]
        print(
            f"version {version['version']}  {version['path_steps']} steps; so far "
            f"{version['steps_so_far']}, {share:.2f} of those from scratch, "
            f"{version['seconds_so_far']:.0f} s; held-out NLL on each increment {nlls}",
            file=sys.stderr,
        )
    return found
