"""The folder of a run.

config.yaml         every setting, flat: `carryon train --config RUN/config.yaml` repeats the run
run.json            identity: fingerprint of the store and the settings that decide the result
sessions.jsonl      one JSON line per start or resume: step, versions, threads, processes
contamination.json  overlap of the training and the held-out samples
metrics.jsonl       one JSON line for every few steps and for each evaluation
curves.png          loss and learning rate
checkpoints/        step folders
carryon/            the finished carry-on
result.json         the report, written last: a run with it is finished
.lock               while a process trains: its id
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from carryon.cache.device import HEAD_DTYPES
from carryon.cache.errors import CarryOnError, DamagedFileError, InputError
from carryon.cache.files.atomic import PARTIAL, write_file
from carryon.cache.files.documents import read_sealed, sealed, write_json
from carryon.cache.files.regular import digest_file
from carryon.cache.lock import FOLDER_LOCK, folder_lock
from carryon.train.compile_settings import CompileSettings
from carryon.train.losses.ways import WAYS
from carryon.train.modules.card_file import GATE
from carryon.train.saved_settings import refuse_other_settings, setting_of, with_current_names
from carryon.train.settings_file import check_settings, write_settings
from carryon.train.trainer.checkpoint import BEST, LAST, STATE, WEIGHTS, saved_identity
from carryon.train.trainer.run_documents import lines_bytes, read_whole_lines

logger = logging.getLogger(__name__)

FORMAT = {"format": "carryon-run", "format_version": 1}
FREE_SETTINGS = (
    "device",
    "evaluate_every",
    "evaluate_tokens",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "reader_threads",
    "host_memory_gb",
    "decoded_cache",
    "decoded_cache_gb",
    "tracker",
)
"""Settings that a resumed run may change, as they do not decide the result. (When and on what to
evaluate does, if the run ends with its best weights.)"""


class RunFolder:
    """The paths of a run; the module's docstring says what they hold."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.identity = self.root / "run.json"
        self.sessions = self.root / "sessions.jsonl"
        self.contamination = self.root / "contamination.json"
        self.metrics = self.root / "metrics.jsonl"
        self.curves = self.root / "curves.png"
        self.checkpoints = self.root / "checkpoints"
        self.carryon = self.root / "carryon"
        self.result = self.root / "result.json"
        self.files = [
            self.config,
            self.identity,
            self.sessions,
            self.contamination,
            self.metrics,
            self.curves,
            self.result,
        ]


@contextmanager
def open_to_write(root: Path, *, kind: str) -> Iterator[None]:
    """Hold the write lock of a folder, and remove what a killed writer left half written there.

    Args:
        root: of a run or a sweep; made if missing.
        kind: which of them, for errors.

    Raises:
        InputError: it is not a folder.
        StoreBusyError: another process holds the lock.
    """
    with folder_lock(root, kind=kind):
        for folder in (root, root / "checkpoints", root / "carryon"):
            for path in folder.glob(f".*{PARTIAL}"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        yield


def open_run_folder(
    root: str | Path, *, identity: Mapping[str, Any], config: Mapping[str, Any]
) -> RunFolder:
    """Start a run in `root`, or open the run that it holds.

    Args:
        root: locked; must be empty or hold a run of the same identity.
        identity: see `run_identity`.
        config: every setting, flat.

    Raises:
        InputError: the folder holds something else, or a run with other settings.
    """
    folder = RunFolder(root)
    for path in folder.files:
        if path.is_dir() and not path.is_symlink():
            raise InputError(f"{path}: expected a file, got a folder. Fix: move it away")
    saved = _read_identity(folder)
    if saved is None:
        document = FORMAT | {"identity": dict(identity), "versions": library_versions()}
        write_json(folder.identity, sealed(document))
    else:
        refuse_other_settings(saved, identity, name=str(root))
    write_settings(folder.config, config)
    return folder


def _read_identity(folder: RunFolder) -> dict[str, Any] | None:
    """Return the identity in run.json; None if it is to be written.

    A missing or damaged one is written again from the newest sound checkpoint, which has it too.

    Raises:
        InputError: another format, other files in the folder, or a damaged run.json alone.
    """
    path = folder.identity
    if os.path.lexists(path):
        try:
            document = read_sealed(path)
            got = {key: document.get(key) for key in FORMAT}
            if got != FORMAT:
                raise DamagedFileError(f"{path}: expected {FORMAT}, got {got}")
            if not isinstance(document.get("identity"), dict):
                raise DamagedFileError(f"{path}: expected the identity of the run, got none")
            return dict(with_current_names(document["identity"]))
        except DamagedFileError as error:
            problem = str(error)
    elif any(each.name != FOLDER_LOCK for each in folder.root.glob("*")):
        problem = f"{folder.root}: expected an empty folder or a run, got other files"
    else:
        return None
    saved = saved_identity(folder.checkpoints)
    if saved is None:
        raise InputError(f"{problem}. Fix: give another --out, or delete {folder.root}")
    logger.warning(f"{problem}. It is written again, from the newest checkpoint")
    write_json(path, sealed(FORMAT | {"identity": saved, "versions": library_versions()}))
    return saved


def saved_evaluate_tokens(root: str | Path) -> int:
    """Return the `evaluate_tokens` of the run in a folder; 0 without one, or if it chose itself.

    Runs from before it could be chosen have a number, and evaluations that belong together.
    """
    folder = RunFolder(root)
    with suppress(OSError, ValueError, yaml.YAMLError, CarryOnError):
        number = check_settings(folder.config).get("evaluate_tokens")
        return number if type(number) is int and number > 0 else 0
    with suppress(OSError, ValueError, CarryOnError):
        identity = read_sealed(folder.identity).get("identity")
        number = identity.get("evaluate_tokens") if isinstance(identity, dict) else 0
        return number if type(number) is int and number > 0 else 0
    return 0


def saved_choices(root: str | Path) -> dict[str, str]:
    """Return what the run in a folder has chosen by timing; nothing without a run.

    Runs from before there was a choice of `loss_way` have the one way of that time; those from
    before `head_dtype` was kept have `auto`.

    Raises:
        InputError: a choice does not exist.
    """
    identity = _identity_in(root)
    if identity is None:
        return {}
    known = {"loss_way": tuple(WAYS), "head_dtype": ("auto", *HEAD_DTYPES)}
    choices = {}
    for name, values in known.items():
        choice = setting_of(identity, name)
        if not isinstance(choice, str) or choice not in values:
            raise InputError(
                f"{root}: expected a run whose {name} is one of {', '.join(values)}, got "
                f"{choice!a:.80}. Fix: give another --out"
            )
        choices[name] = choice
    return choices


def saved_compilation(root: str | Path) -> CompileSettings | None:
    """Return how the steps of the run in a folder are compiled; None without a run.

    Runs from before that could be chosen are not.

    Raises:
        InputError: such settings do not exist.
    """
    identity = _identity_in(root)
    if identity is None:
        return None
    names = ("compile", "padded_sizes")
    try:
        return CompileSettings.from_dict({name: setting_of(identity, name) for name in names})
    except InputError as error:
        raise InputError(f"{root}: {error}. Fix: give another --out") from error


def _identity_in(root: str | Path) -> dict[str, Any] | None:
    """Return the identity of the run in a folder, from run.json or a checkpoint, if it has one."""
    folder = RunFolder(root)
    with suppress(OSError, ValueError, CarryOnError):
        identity = read_sealed(folder.identity).get("identity")
        if isinstance(identity, dict):
            return identity
    return saved_identity(folder.checkpoints)


def run_identity(
    *, store_fingerprint: str, config: Mapping[str, Any], is_decided_by_evaluations: bool
) -> dict[str, Any]:
    """Return what decides a run's result: the store and the settings, without paths."""
    free = {"store", "mix", "out", *FREE_SETTINGS}
    if is_decided_by_evaluations:
        free -= {"evaluate_every", "evaluate_tokens"}
    settings = {key: value for key, value in config.items() if key not in free}
    return {"store_fingerprint": store_fingerprint, **settings}


def finished_files(folder: RunFolder) -> dict[str, str]:
    """Return the SHA-256 of the files that a finished run leaves unchanged, by path below it.

    Left out are settings, which may be given in another way later, and a carry-on's card, whose
    alpha may be set.
    """
    paths = [folder.sessions, folder.contamination, folder.metrics, folder.curves]
    paths += [folder.checkpoints / LAST, folder.checkpoints / BEST]
    paths += [*folder.checkpoints.glob(f"step-*/{STATE}")]
    paths += [folder.carryon / WEIGHTS, folder.carryon / GATE]
    return {
        path.relative_to(folder.root).as_posix(): digest_file(path)
        for path in sorted(paths)
        if path.is_file()
    }


def record_session(folder: RunFolder, *, step: int, processes: int) -> None:
    """Record what computes the run from `step` on, and warn if it differs from the last session.

    A run repeats to the bit with the same versions and the same number of threads and processes.
    """
    now = {**library_versions(), "processes": str(processes)}
    sessions, damaged = read_whole_lines(folder.sessions)
    if damaged:
        logger.warning(
            f"{folder.sessions}: damaged lines are dropped: {', '.join(map(str, damaged))}"
        )
    lines = [*sessions, {"step": step, **now}]
    write_file(folder.sessions, lines_bytes(lines))
    last = sessions[-1] if sessions else now
    changes = [
        f"{name} {last.get(name)} -> {value}"
        for name, value in now.items()
        if last.get(name) != value
    ]
    if changes:
        logger.warning(
            f"{folder.root}: resumed with other versions ({', '.join(changes)}): the result may "
            "differ in its last bits"
        )


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute a run, and its number of threads."""
    names = ("gpt-carry-on", "torch", "transformers", "numpy")
    return {name: version(name) for name in names} | {"threads": str(torch.get_num_threads())}
