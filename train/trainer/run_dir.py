"""What a run leaves behind, and whether a folder may be used for it.

config.yaml      every setting, flat: `carryon train --config RUN/config.yaml` repeats the run
run.json         identity: fingerprint of the store, settings that decide the result, versions
sessions.jsonl   one JSON line each time the run was begun or gone on with: step, versions, threads
contamination.json     what the two halves of the data have in common
metrics.jsonl    one JSON line for every few steps and for each evaluation
curves.png       loss and learning rate
checkpoints/     step folders
carryon/         the finished carry-on
result.json      the report, written last: a run with it is finished
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from carryon.cache.errors import InputError
from carryon.cache.files import append_line, read_lines, write_file, write_json
from carryon.train.trainer.checkpoint import refuse_other_identity

logger = logging.getLogger(__name__)

FORMAT = "carryon-run"
FORMAT_VERSION = 1
FREE_SETTINGS = (
    "device",
    "evaluate_every",
    "evaluate_tokens",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "reader_threads",
    "host_memory_gb",
    "tracker",
)
"""Settings that a resumed run may change: they do not decide the result. (What is evaluated when
does, where it decides which weights the run ends with.)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """The paths of a run."""

    root: Path

    @property
    def config(self) -> Path:
        """Every setting, flat."""
        return self.root / "config.yaml"

    @property
    def identity(self) -> Path:
        """What a resumed run must have too."""
        return self.root / "run.json"

    @property
    def sessions(self) -> Path:
        """JSON lines."""
        return self.root / "sessions.jsonl"

    @property
    def contamination(self) -> Path:
        """What the two halves of the data have in common."""
        return self.root / "contamination.json"

    @property
    def metrics(self) -> Path:
        """JSON lines."""
        return self.root / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """The plot."""
        return self.root / "curves.png"

    @property
    def checkpoints(self) -> Path:
        """Step folders."""
        return self.root / "checkpoints"

    @property
    def carryon(self) -> Path:
        """The finished carry-on."""
        return self.root / "carryon"

    @property
    def result(self) -> Path:
        """The report; a run with it is finished."""
        return self.root / "result.json"


def open_run_folder(
    out: str | Path, *, identity: Mapping[str, Any], config: Mapping[str, Any]
) -> RunFolder:
    """Begin a run in `out`, or go on with the one that is there.

    Args:
        out: made if missing; must be empty or hold a run of the same identity.
        identity: see `run_identity`.
        config: every setting, flat.

    Raises:
        InputError: the folder holds something else, or a run with other settings.
    """
    folder = RunFolder(root=Path(out))
    if folder.root.exists() and not folder.root.is_dir():
        raise InputError(f"{out}: expected a folder for the run, got a file")
    if folder.identity.exists():
        document = json.loads(folder.identity.read_text(encoding="ascii"))
        if document.get("format") != FORMAT or document.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{folder.identity}: expected {FORMAT} {FORMAT_VERSION}, got "
                f"{document.get('format')} {document.get('format_version')}"
            )
        refuse_other_identity(document["identity"], identity, name=str(out))
    elif folder.root.exists() and any(folder.root.iterdir()):
        raise InputError(f"{out}: holds something that is not a run: give an empty or a new folder")
    else:
        write_json(
            folder.identity,
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "identity": dict(identity),
                "versions": library_versions(),
            },
        )
    text = yaml.safe_dump(dict(config), sort_keys=False)
    write_file(folder.config, text.encode())
    return folder


def run_identity(
    *, store_fingerprint: str, config: Mapping[str, Any], is_decided_by_evaluations: bool
) -> dict[str, Any]:
    """Return what decides a run's result: the store and the settings, paths left out."""
    left_out = {"store", "out", *FREE_SETTINGS}
    if is_decided_by_evaluations:
        left_out -= {"evaluate_every", "evaluate_tokens"}
    settings = {key: value for key, value in config.items() if key not in left_out}
    return {"store_fingerprint": store_fingerprint, **settings}


def record_session(folder: RunFolder, *, step: int, processes: int) -> None:
    """Note what computes the run from `step` on, and say if it was something else before.

    The bits of a run are those of one set of versions, threads and processes.
    """
    found = {**library_versions(), "processes": str(processes)}
    before = read_lines(folder.sessions)
    append_line(folder.sessions, {"step": step, **found})
    changes = [
        f"{name} {before[-1].get(name)} -> {value}"
        for name, value in found.items()
        if before and before[-1].get(name) != value
    ]
    if changes:
        logger.warning(
            f"{folder.root}: goes on with other versions ({', '.join(changes)}): the result may "
            "differ in its last bits"
        )


def library_versions() -> dict[str, str]:
    """Return the versions of what computes a run."""
    names = ("gpt-carry-on", "torch", "transformers", "numpy")
    return {name: version(name) for name in names} | {"threads": str(torch.get_num_threads())}
