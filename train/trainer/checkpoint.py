"""Write checkpoints atomically, and load them.

A step folder such as `step-00000120` holds the carry-on's weights and the optimizer state as
safetensors, and one JSON: position, best evaluation, and the identity of the run. It needs no
random state: the order of samples, dropout and rounding are functions of seed, epoch and step.
The JSON is written last, with the SHA-256 of the other files and of itself: a folder with a changed
byte is skipped for the newest one that is sound.

`last.json` names the newest step folder, `best.json` that of the best held-out loss, which is kept
however old it gets.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from carryon.cache.errors import DamagedFileError, InputError
from carryon.cache.files.atomic import recover_folders, remove_folder, whole_folder
from carryon.cache.files.documents import FILES, read_sealed, sealed, write_json
from carryon.cache.files.tensor_files import digest_tensors
from carryon.train.modules.carryon import CarryOn
from carryon.train.saved_settings import refuse_other_settings, with_current_names

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
UNSIGNED_VERSION = 1
"""Of checkpoints from before digests were recorded."""
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
    line_tokens: int = 0
    """Tokens since the last line of metrics, as are the following."""
    line_targets: int = 0
    line_elapsed_s: float = 0.0
    line_wait_s: float = 0.0
    line_loss_sum: float = 0.0
    """Sum of the losses of the targets."""
    line_grad_norm: float = 0.0
    """Largest norm of a gradient."""
    evaluate_s: float = 0.0
    """Seconds of evaluations during the run, that of the base included."""
    metrics_sha256: str = ""
    """Of the lines of metrics so far. Empty: not known."""


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
        state[FILES] = {name: digest_tensors(partial / name) for name in (WEIGHTS, OPTIMIZER)}
        write_json(partial / STATE, sealed(state), is_synced=False)
    best = best_checkpoint(folder, progress)
    _name(folder / LAST, path, progress)
    if best is not None:
        _name(folder / BEST, best, progress)
    folders = _step_folders(folder)
    newer = [each for each in folders if each > path]  # skipped as damaged when the run resumed
    for old in newer + [each for each in folders if each <= path][:-keep]:
        if old != best:
            remove_folder(old)
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole step folder in `folder`, or None."""
    steps = _step_folders(folder)
    return steps[-1] if steps else None


def checkpoint_at(folder: Path, step: int) -> Path:
    """Return the step folder of a step, compared with its digests.

    Raises:
        DamagedFileError: it is missing, or not as it was written.
    """
    recover_folders(folder)
    path = _step_folder(folder, step)
    check_checkpoint(path)
    return path


def saved_identity(folder: Path) -> dict[str, Any] | None:
    """Return the identity of the run in its newest sound checkpoint, or None without any."""
    for path in reversed(_step_folders(folder)):
        with suppress(DamagedFileError):
            return dict(with_current_names(_read_state(path)["identity"]))
    return None


def best_checkpoint(folder: Path, progress: Progress) -> Path | None:
    """Return the step folder of the best evaluation so far, or None."""
    path = _step_folder(folder, progress.best_step)
    recover_folders(folder)
    return path if progress.best_nll is not None and (path / STATE).is_file() else None


def load_newest(
    folder: Path,
    *,
    carryon: CarryOn,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    needs_best: bool = False,
) -> Progress | None:
    """Load the newest sound checkpoint in `folder`; returns its position, or None without any.

    A damaged one is skipped with a warning: the same steps, taken again, end with the same bits.

    Args:
        folder: of the run's checkpoints.
        carryon: gets the weights.
        optimizer: gets the state.
        identity: fingerprint of the store and settings that the run must share.
        needs_best: whether the best checkpoint so far must be sound too.

    Raises:
        InputError: another format, store or setting, or none of the checkpoints is sound.
    """
    problems: list[str] = []
    for path in reversed(_step_folders(folder)):
        try:
            progress = load_checkpoint(
                path, carryon=carryon, optimizer=optimizer, identity=identity
            )
            best = best_checkpoint(folder, progress) if needs_best else None
            if best is not None:
                _read_state(best)
        except DamagedFileError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning(f"{problem}. The run resumes from {path.name}")
        return progress
    if problems:
        raise InputError(
            f"{folder}: expected a sound checkpoint, got {len(problems)} damaged ones: "
            f"{problems[0]}. Fix: delete {folder}; the same command then trains from the start"
        )
    return None


def load_weights(path: Path, carryon: CarryOn) -> None:
    """Load the weights of a step folder, without the optimizer state.

    Raises:
        DamagedFileError: a file is not as it was written.
    """
    _read_state(path)
    with _damage_named(path):
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
        DamagedFileError: a file is not as it was written, or the folder has another step's name.
        InputError: another format, store or setting; names both values.
    """
    state = _read_state(path)
    with _damage_named(path):
        progress, saved = _progress(state["progress"]), with_current_names(state["identity"])
        if path.name != _step_folder(path.parent, progress.step).name:
            raise DamagedFileError(f"{path}: expected the state of this step, got {progress.step}")
    refuse_other_settings(saved, identity, name=str(path))
    _load(path, state, carryon=carryon, optimizer=optimizer)
    return progress


def load_state(path: Path, *, carryon: CarryOn, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer state of a step folder of any run.

    Raises:
        InputError: a file is not as it was written.
    """
    try:
        _load(path, _read_state(path), carryon=carryon, optimizer=optimizer)
    except DamagedFileError as error:
        raise InputError(
            f"{error}. Fix: delete {path.parent.parent}, and run the command that trained it again"
        ) from error


def _load(
    path: Path, state: Mapping[str, Any], *, carryon: CarryOn, optimizer: torch.optim.Optimizer
) -> None:
    with _damage_named(path):
        carryon.load_state_dict(load_file(path / WEIGHTS))
        tensors = load_file(path / OPTIMIZER)
        optimizer.load_state_dict(_unflatten(optimizer, tensors, state["optimizer"]))


def check_checkpoint(path: Path) -> None:
    """Compare a step folder with its digests and its name.

    Raises:
        InputError: a file is not as it was written, or another format.
    """
    with _damage_named(path):
        step = _read_state(path)["progress"]["step"]
        if path.name != _step_folder(path.parent, step).name:
            raise DamagedFileError(f"{path}: expected the state of this step, got {step}")


def _read_state(path: Path) -> dict[str, Any]:
    """Return the state of a step folder, its files compared with their digests.

    Raises:
        DamagedFileError: a file is not as it was written.
        InputError: another format.
    """
    state = read_sealed(path / STATE)
    version = state.get("format_version")
    if version == UNSIGNED_VERSION:
        return state
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: expected checkpoint format {FORMAT_VERSION}, got {version}")
    files = state.get(FILES)
    for name in (WEIGHTS, OPTIMIZER):
        if not isinstance(files, dict) or digest_tensors(path / name) != files.get(name):
            raise DamagedFileError(
                f"{path / name}: the content differs from its SHA-256 in {STATE}"
            )
    return state


def _progress(values: Mapping[str, Any]) -> Progress:
    """Build from plain values; raises TypeError where a number is something else."""
    progress = Progress(**values)
    for item in fields(Progress):
        value = getattr(progress, item.name)
        is_number = type(value) is int or (type(value) is float and math.isfinite(value))
        if item.name == "metrics_sha256":
            is_number = isinstance(value, str)
        if not is_number and not (item.name == "best_nll" and value is None):
            raise TypeError(f"{item.name}: expected a number, got {value!a:.80}")
    return progress


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Name a step folder without digests whose content does not fit."""
    try:
        yield
    except InputError:
        raise
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise DamagedFileError(
            f"{path}: expected a checkpoint of this run: {error!s:.200}"
        ) from error


def _name(pointer: Path, path: Path, progress: Progress) -> None:
    write_json(pointer, sealed({"folder": path.name, "best_nll": progress.best_nll}))


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
