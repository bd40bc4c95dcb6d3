"""Checkpoints: step folders that are either whole or not there.

A folder `step-00000120` holds the carry-on's weights and the optimizer's state as safetensors and
one JSON: the position, what the run has measured so far, and the store and settings it belongs to.
There is no random state in it: the order is a function of seed and epoch, and so is whatever else
a step draws. `last.json` and `best.json` beside the folders name the newest of them and the one
with the best held-out loss, which is kept however old it gets.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.files import recover_folders, whole_folder, write_json
from carryon.train.config import setting_of, with_current_names
from carryon.train.modules.carryon import CarryOn

FORMAT_VERSION = 1
WEIGHTS = "carryon.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
LAST = "last.json"
BEST = "best.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run has come."""

    step: int
    """Steps done, of the whole run."""
    epoch: int
    """Epoch of the next step, counted from 0."""
    step_in_epoch: int
    """Steps done of that epoch."""
    tokens: int
    """Tokens trained on, pads not counted."""
    targets: int
    """Supervised pairs trained on."""
    elapsed_s: float
    """Seconds of training, evaluation not counted."""
    wait_s: float
    """Seconds of it spent waiting for data."""
    best_nll: float | None = None
    """Best held-out loss of the evaluations so far; None: there was none."""
    best_step: int = 0
    """Step of that evaluation."""
    evaluations_since_best: int = 0
    """Evaluations after it."""


def save_checkpoint(
    folder: Path,
    *,
    carryon: CarryOn,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a step folder into `folder`, then remove all but the `keep` newest and the best.

    Args:
        folder: of the run's checkpoints.
        carryon: whose weights to save, in their own type.
        optimizer: whose state to save, in its own types.
        progress: how far the run has come.
        identity: fingerprint of the store and settings that a resumed run must have too.
        keep: step folders to leave.
    """
    path = _step_folder(folder, progress.step)
    tensors, numbers = _flatten(optimizer)
    state = {
        "format_version": FORMAT_VERSION,
        "progress": asdict(progress),
        "optimizer": numbers,
        "identity": dict(identity),
    }
    with whole_folder(path) as partial:
        save_file(dict(carryon.state_dict()), partial / WEIGHTS)
        save_file(tensors, partial / OPTIMIZER)
        write_json(partial / STATE, state, is_synced=False)
    best = best_checkpoint(folder, progress)
    _name(folder / LAST, path, progress)
    if best is not None:
        _name(folder / BEST, best, progress)
    for old in _step_folders(folder)[:-keep]:
        if old != best:
            shutil.rmtree(old)
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole step folder in `folder`, or None."""
    steps = _step_folders(folder)
    return steps[-1] if steps else None


def best_checkpoint(folder: Path, progress: Progress) -> Path | None:
    """Return the step folder of the best evaluation so far, or None."""
    path = _step_folder(folder, progress.best_step)
    recover_folders(folder)
    return path if progress.best_nll is not None and (path / STATE).is_file() else None


def load_weights(path: Path, carryon: CarryOn) -> None:
    """Put the weights of a step folder into place, and nothing else."""
    carryon.load_state_dict(load_file(path / WEIGHTS))


def load_checkpoint(
    path: Path,
    *,
    carryon: CarryOn,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> Progress:
    """Put the weights and the optimizer's state of a step folder into place.

    Raises:
        InputError: the folder is of another format, store or setting; names both values.
    """
    state = json.loads((path / STATE).read_text(encoding="ascii"))
    if state["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path}: expected checkpoint format {FORMAT_VERSION}, got {state['format_version']}"
        )
    refuse_other_identity(state["identity"], identity, name=str(path))
    load_state(path, carryon=carryon, optimizer=optimizer)
    return Progress(**state["progress"])


def load_state(path: Path, *, carryon: CarryOn, optimizer: torch.optim.Optimizer) -> None:
    """Put the weights and the optimizer's state into place, whatever run they are of."""
    state = json.loads((path / STATE).read_text(encoding="ascii"))
    load_weights(path, carryon)
    tensors = load_file(path / OPTIMIZER)
    optimizer.load_state_dict(_unflatten(optimizer, tensors, state["optimizer"]))


def refuse_other_identity(
    found: Mapping[str, Any], expected: Mapping[str, Any], *, name: str
) -> None:
    """Refuse to go on with another store or setting.

    Raises:
        InputError: names each setting with both values.
    """
    found = with_current_names(found)
    differences = [
        f"{key} is {found.get(key)!r} there and {expected.get(key)!r} here"
        for key in sorted(set(found) | set(expected))
        if setting_of(found, key) != setting_of(expected, key)
    ]
    if differences:
        raise InputError(
            f"{name}: begun with other settings: {'; '.join(differences)}: "
            "give the same ones, or another --out"
        )


def _name(pointer: Path, path: Path, progress: Progress) -> None:
    write_json(pointer, {"folder": path.name, "best_nll": progress.best_nll})


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _step_folders(folder: Path) -> list[Path]:
    recover_folders(folder)
    return sorted(
        path
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdecimal() and (path / STATE).is_file()
    )


def _flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            target: dict[str, Any] = tensors if isinstance(value, Tensor) else numbers
            target[f"{index}.{key}"] = value
    return tensors, numbers


def _unflatten(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **numbers}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


START = Progress(step=0, epoch=0, step_in_epoch=0, tokens=0, targets=0, elapsed_s=0.0, wait_s=0.0)
