"""The versions of a lineage: data, cost, and held-out loss of each on every increment.

Losses measured once are kept in LINEAGE/versions.json; plots are versions.png (losses) and
paths.png (learning rates).
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from carryon.cache.device import pick_chunk, pick_device
from carryon.cache.errors import DamagedFileError, MissingError
from carryon.cache.files.documents import read_sealed, sealed, write_json
from carryon.train.continual.increment_data import data_of
from carryon.train.continual.lineage_dir import Lineage, open_lineage, settings_of
from carryon.train.continual.lineage_document import is_loss
from carryon.train.data.datasets import open_data
from carryon.train.losses.frozen_head import place_head
from carryon.train.modules.serialization import load_carryon
from carryon.train.optim.lr_paths import Paradigm, path_rate
from carryon.train.plots import NLL_LABEL, Line, draw, lines, plot_paths
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.held_out.nll import FEW_TARGETS, measure_nlls, null_if_nan, warn_if_few

logger = logging.getLogger(__name__)

Loss = dict[str, Any]
"""A held-out loss: `loss` in nats per target, its standard error `se`, and the number of `targets`
(None where an older versions.json does not have them)."""
_DRAWN_STEPS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedVersion:
    """A released version."""

    version: int
    """Counted from 1."""
    carryon: str
    """Folder of the carry-on."""
    stores: list[str]
    """The new data of this version."""
    steps: int
    """Steps that its weights were trained for."""
    total_steps: int
    """Steps taken for this version and all before it, on the trunk and the branches."""
    total_tokens: int
    """Tokens of those steps."""
    total_seconds: float
    """Seconds of those steps."""
    from_scratch_steps: int
    """Steps if this version and each before it were trained from scratch on all data so far."""
    held_out: list[Loss]
    """Loss on each increment."""
    base: list[Loss]
    """Loss of the base alone on each increment."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def list_versions(root: str | Path, *, device: str = "auto") -> list[ReleasedVersion]:
    """Return every released version, measured on every increment, and draw the plots.

    Raises:
        MissingError: there is no lineage, or it has no version.
    """
    lineage = open_lineage(root)
    released = lineage.released
    if not released:
        raise MissingError(f"{root}: expected a released version, found none. Fix: carryon update")
    losses = _measure(lineage, released, device=device)
    ends, versions = lineage.ends, []
    steps, tokens, seconds = 0, 0, 0.0
    for number in released:
        for report, first in _reports(lineage, number):
            steps += report.num_steps - first
            tokens += report.num_tokens
            seconds += report.train_s
        versions.append(
            ReleasedVersion(
                version=number,
                carryon=str(lineage.version(number).carryon),
                stores=lineage.increments[number - 1].stores,
                steps=ends[number - 1],
                total_steps=steps,
                total_tokens=tokens,
                total_seconds=round(seconds, 3),
                from_scratch_steps=sum(ends[:number]),
                held_out=[losses[f"{number} on {on}"] for on in released],
                base=[losses[f"base on {on}"] for on in released],
            )
        )
    warn_if_few(min(each["targets"] or FEW_TARGETS for each in losses.values()))
    _plot_losses(versions, lineage.root / "versions.png")
    every = 1 + lineage.ends[-1] // _DRAWN_STEPS
    plot_paths(_rates(lineage, released, every), lineage.root / "paths.png", every=every)
    return versions


def _measure(lineage: Lineage, released: Sequence[int], *, device: str) -> dict[str, Loss]:
    """Return a loss for each `VERSION on INCREMENT` and `base on INCREMENT`, measured if new."""
    path, settings = lineage.root / "versions.json", settings_of(lineage)
    losses = _known_losses(path)
    place, chunk = pick_device(device), pick_chunk(settings.loss.chunk_tokens)
    for on in released:
        new = [number for number in released if f"{number} on {on}" not in losses]
        if f"base on {on}" not in losses:
            new = new or [on]
        if not new:
            continue
        data = open_data(data_of(lineage, on), settings)
        head = place_head(data.store, settings.loss, device=place)
        jobs = []
        for number in new:
            folder = lineage.version(number).carryon
            carryon, _ = load_carryon(folder, blocks=data.store.blocks)
            jobs.append(EvalJob(carryon=carryon.to(place), head=head, chunk=chunk, with_base=True))
        nlls = measure_nlls(data.store, data.split.held_out, jobs, stream=data.settings)
        for number, nll in zip(new, nlls, strict=True):
            losses[f"{number} on {on}"] = _loss(nll.carryon, nll.carryon_se, nll.targets)
            losses.setdefault(f"base on {on}", _loss(nll.base, nll.base_se, nll.targets))
        # No lock, as an update may train for days: the file is replaced in one piece, and losses
        # that another process measured in the meantime stay in it.
        write_json(path, sealed(_known_losses(path) | losses))
    return losses


def _known_losses(path: Path) -> dict[str, Loss]:
    if not os.path.lexists(path):
        return {}
    try:
        known = read_sealed(path)
    except DamagedFileError as error:
        logger.warning(f"{error}. The losses are measured again")
        return {}
    return {
        name: loss if isinstance(loss, dict) else {"loss": loss, "se": None, "targets": None}
        for name, loss in known.items()
        if is_loss(name, loss)
    }


def _loss(loss: float, se: float, targets: int) -> Loss:
    return {"loss": loss, "se": null_if_nan(se), "targets": targets}


def _reports(lineage: Lineage, version: int) -> list[tuple[TrainReport, int]]:
    """Return the reports of the runs that a version took, each with its first step."""
    branch = lineage.branch_step(version)
    runs = [(lineage.head(version), 0), (lineage.version(version), branch)]
    if version > 1:
        runs.append((lineage.tail(version - 1), lineage.branch_step(version - 1)))
    return [
        (TrainReport.read(run.result), first)
        for run, first in runs
        if run.result.exists()  # with alpha 1 the trunk has no head
    ]


def _plot_losses(versions: Sequence[ReleasedVersion], path: Path) -> None:
    """Draw the loss on each increment against the version, the base as version 0."""
    numbers = [0, *(each.version for each in versions)]
    columns = zip(versions[0].base, *(each.held_out for each in versions), strict=True)
    series = [
        Line(xs=numbers, ys=[each["loss"] for each in losses], label=f"on increment {number}")
        for number, losses in enumerate(columns, 1)
    ]
    style: dict[str, Any] = {
        "x_label": "version (0: base alone)",
        "y_label": f"held-out loss, {NLL_LABEL}",
    }
    draw(path, lambda axes: lines(axes, series, **style))


def _rates(lineage: Lineage, released: Sequence[int], every: int) -> dict[str, list[float]]:
    paths: list[tuple[str, Paradigm, int]] = [("trunk", "trunk", released[-1])]
    paths += [(f"version {number}", "switch", number) for number in released]
    ends, settings = lineage.ends, settings_of(lineage).optimization
    fixed: dict[str, Any] = {"ends": ends, "alpha": lineage.alpha, "settings": settings}
    return {
        name: [
            path_rate(step, paradigm=paradigm, version=number, **fixed)
            for step in range(0, ends[number - 1], every)
        ]
        for name, paradigm, number in paths
    }
