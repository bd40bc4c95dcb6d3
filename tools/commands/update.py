"""`carryon update`: new data in, the next version of a carry-on out."""

from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.settings import DataSettings
from carryon.tools.cli.output import print_result
from carryon.train.config import TrainSettings


def update(
    *,
    lineage: str,
    data: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    base: str = "",
    store: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    alpha: float | None = None,
    new_base: str = "",
    old_lineage: str = "",
    also_from_scratch: bool = False,
    allow_pickle: bool = False,
    settings: TrainSettings,
    data_settings: DataSettings,
) -> dict[str, Any]:
    """Release the next version of a carry-on from new data alone.

    A lineage has a trunk, whose learning rate stays high, and for each version a branch, whose
    learning rate decays (--schedule, --min-lr-ratio). An update trains the trunk on the new data
    and releases a branch, LINEAGE/versions/N/carryon. After an interruption the same command
    resumes. The last line on stdout is a JSON line with the figures of the version.

    New texts (--data) are appended to one store, LINEAGE/store or --store, and only they are
    extracted. Without --data, the parts of --store that the lineage has not seen are the new
    data; STORE#2 is the second part of a store.

    If the base itself changes, --new-base starts a lineage in another folder, from the texts and
    the newest weights of --old-lineage: hidden states are specific to a base, so a new base
    starts a new store and lineage. --also-from-scratch trains an untrained carry-on over the
    same steps, to compare.

    Without training options, later updates take those of the first one.

    Example:
        carryon update --lineage lineage --data march.jsonl --base base
        carryon update --lineage lineage --data april.jsonl --base base
        carryon update --lineage lineage-2 --old-lineage lineage --new-base base-2

    Args:
        lineage: Folder of the lineage, created if missing.
        data: Files of new texts, folders of such files, or hub ids, as for carryon extract.
            With --new-base: the texts of the old lineage, if they have moved.
        base: The base that extracts --data: hub id, folder or .gguf file.
        store: Folder of a store with the new data, or of several. Omitted: LINEAGE/store.
        alpha: Fraction of the new data's steps in which the branch decays. Omitted: as in the
            first update of the lineage, and there 0.6.
        new_base: A new base to start a lineage on: hub id, folder or .gguf file.
        old_lineage: The lineage that --new-base starts from.
        also_from_scratch: With --new-base, also train an untrained carry-on, to compare.
        allow_pickle: Read the base's weights from pickle files, which can run code, if it has no
            safetensors.
        settings: The same in every update of a lineage.
        data_settings: How --data is read.
    """
    given = settings if settings != TrainSettings() else None  # None: those of the lineage
    if not new_base:
        if old_lineage or also_from_scratch:
            raise InputError(
                "--old-lineage and --also-from-scratch: expected with --new-base, got none"
            )
        from carryon.train.continual.lineage import update as update_lineage

        report = update_lineage(
            lineage,
            store=store,
            data=data,
            base=base,
            settings=given,
            alpha=alpha,
            data_settings=data_settings,
            allow_pickle=allow_pickle,
        )
        return print_result(
            report.to_dict(),
            f"{report.carryon}: on the new data, {report.losses()}",
        )
    if base or store or not old_lineage:
        raise InputError("--new-base: expected --old-lineage, and neither --base nor --store")
    from carryon.train.continual.rebase import rebase

    moved = rebase(
        lineage,
        old_lineage=old_lineage,
        base=new_base,
        settings=given,
        data=data,
        data_settings=data_settings,
        alpha=alpha,
        also_from_scratch=also_from_scratch,
        allow_pickle=allow_pickle,
    )
    losses = {
        "new base": moved.base_nll,
        "with the old weights": moved.start_nll,
        f"after {moved.steps:,} steps": moved.from_old_nll,
        "from scratch": moved.from_scratch_nll,
    }
    shown = (f"{name} {nll:.4f}" for name, nll in losses.items() if nll is not None)
    return print_result(moved.to_dict(), f"{moved.carryon}: held-out NLL: {', '.join(shown)}")
