"""`carryon versions`: held-out loss and cost of every version of a lineage."""

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from carryon.cache.errors import InputError
from carryon.tools.cli.table import format_table

if TYPE_CHECKING:
    from carryon.train.continual.versions import ReleasedVersion

logger = logging.getLogger(__name__)


def versions(
    *, lineage: str, rebuild: int = 0, out: str = "", device: str = "auto"
) -> list[dict[str, Any]]:
    """Show held-out loss and cost of every version of a lineage.

    Each version is measured on every increment, beside the base, with the number of targets.
    Cost is in steps, tokens and seconds of training, beside the steps that training each version
    from scratch would take. LINEAGE/versions.png shows the losses, LINEAGE/paths.png the learning
    rates. stdout gets a JSON line for each version. With --rebuild a version is trained again
    from the trunk, with the same bits.

    Example:
        carryon versions --lineage lineage

    Args:
        lineage: Folder of the lineage.
        rebuild: Number of a version to train again. 0: none.
        out: Run folder for the rebuilt version.
        device: `auto` (an accelerator if there is one), `cpu`, `cuda`, `cuda:1`, ...
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
    released = list_versions(lineage, device=device)
    documents = [version.to_dict() for version in released]
    for document in documents:
        print(json.dumps(document))
    logger.info(_summary(released))
    return documents


def _summary(released: Sequence["ReleasedVersion"]) -> str:
    """Return a table of losses, a table of costs, and the data of each increment."""
    from carryon.train.trainer.held_out.nll import shown_nll

    first, last = released[0], released[-1]
    losses = [["held-out loss", *(f"increment {each.version}" for each in released)]]
    losses.append(["base", *(shown_nll(each["loss"], each["se"]) for each in first.base)])
    costs = [["cost so far", "steps", "tokens", "seconds", "steps from scratch"]]
    for each in released:
        name = f"version {each.version}"
        losses.append([name, *(shown_nll(one["loss"], one["se"]) for one in each.held_out)])
        total = (each.total_steps, each.total_tokens, round(each.total_seconds))
        costs.append([name, *(f"{value:,}" for value in (*total, each.from_scratch_steps))])
    losses.append(["targets", *(str(each["targets"] or "unknown") for each in last.held_out)])
    data = [f"increment {each.version}: {' '.join(each.stores)}" for each in released]
    ratio = last.total_steps / last.from_scratch_steps
    return "\n".join(
        [
            format_table(losses),
            "",
            format_table(costs),
            "",
            *data,
            f"These versions took {last.total_steps:,} steps; training each from scratch on all "
            f"data so far takes {last.from_scratch_steps:,}: a ratio of {ratio:.2f}",
        ]
    )
