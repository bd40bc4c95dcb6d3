"""Write checkpoints atomically, and load them.

A step folder such as `step-00000120` holds the carry-on's weights and the optimizer state as
safetensors, and one JSON: position, best evaluation, and the identity of the run. It needs no
random state: the order of samples, dropout and rounding are functions of seed, epoch and step.
`last.json` names the newest step folder, `best.json` that of the best held-out loss, which is kept
however old it gets.
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
from carryon.train.config import refuse_other_settings, with_current_names
from carryon.train.modules.carryon import CarryOn

FORMAT_VERSION = 1
WEIGHTS = "carryon.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
LAST = "last.json"
BEST = "best.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Position of a run."""

    step: int
    """Steps done, of the whole run."""
    epoch: int
    """Epoch of the next step, counted from 0."""
    step_in_epoch: int
    """Steps done of that epoch."""
    tokens: int
    """Tokens trained on."""
    targets: int
    """Targets trained on."""
    elapsed_s: float
    """Seconds of training, without evaluation."""
    wait_s: float
    """Seconds of it spent waiting for data."""
    best_nll: float | None = None
    """Best held-out loss of the evaluations so far. None: none yet."""
    best_step: int = 0
    """Step of that evaluation."""
    evaluations_since_best: int = 0
    """Evaluations after it."""


START = Progress(step=0, epoch=0, step_in_epoch=0, tokens=0, targets=0, elapsed_s=0.0, wait_s=0.0)


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
        carryon: its weights are saved in their own dtype.
        optimizer: its state is saved in its own dtypes.
        progress: position of the run.
        identity: fingerprint of the store and settings that a resumed run must share.
        keep: newest step folders to keep.
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
    """Load the weights of a step folder, without the optimizer state."""
    carryon.load_state_dict(load_file(path / WEIGHTS))


def load_checkpoint(
    path: Path,
    *,
    carryon: CarryOn,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> Progress:
    """Load weights and optimizer state of a step folder; returns its position.

    Raises:
        InputError: another format, store or setting; names both values.
    """
    state = json.loads((path / STATE).read_text(encoding="ascii"))
    if state["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path}: expected checkpoint format {FORMAT_VERSION}, got {state['format_version']}"
        )
    refuse_other_settings(with_current_names(state["identity"]), identity, name=str(path))
    load_state(path, carryon=carryon, optimizer=optimizer)
    return Progress(**state["progress"])


def load_state(path: Path, *, carryon: CarryOn, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer state of a step folder of any run."""
    state = json.loads((path / STATE).read_text(encoding="ascii"))
    load_weights(path, carryon)
    tensors = load_file(path / OPTIMIZER)
    optimizer.load_state_dict(_unflatten(optimizer, tensors, state["optimizer"]))


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
