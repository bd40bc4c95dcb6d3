"""What the documents of a run, a sweep or a lineage say of the files beside them.

Each of these can be as it was written and yet belong to another folder.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from carryon.cache.errors import DamagedFileError, InputError
from carryon.cache.files.documents import FILES, read_sealed
from carryon.cache.files.regular import digest_file
from carryon.cache.files.tensor_files import digest_tensors
from carryon.train.continual.lineage_dir import Lineage
from carryon.train.modules.card_file import CARD
from carryon.train.saved_settings import setting_of, with_current_names
from carryon.train.settings_file import check_settings
from carryon.train.trainer.checkpoint import STATE
from carryon.train.trainer.run_dir import RunFolder

Found = Iterator[tuple[Path, str]]
"""File and what is wrong with it."""
_FINISHED = re.compile(
    r"(sessions|metrics)\.jsonl|contamination\.json|curves\.png|carryon/(carryon|gate)\.safetensors"
    r"|checkpoints/((last|best)\.json|step-\d+/state\.json)"
)
"""Names of the files of a run whose digests its report holds."""
_REPORTED = ("carryon_nll", "base_nll", "num_steps", "num_targets", "num_parameters")


def check_files_of_run(run: RunFolder) -> Found:
    """Compare the files of a finished run with its report, and its identity with its states.

    A folder that was removed whole, such as that of the checkpoints, is no damage.
    """
    result = _read(run.result)
    if not os.path.lexists(run.result) and os.path.lexists(run.carryon / CARD):
        yield (
            run.result,
            "expected the report of the run, got none. Fix: run the same command again, which "
            "finishes the run",
        )
    files = result.get(FILES)
    for name, digest in files.items() if isinstance(files, dict) else ():
        if not _FINISHED.fullmatch(name):
            yield run.result, f"{FILES}: expected names of a run's files, got {name!a:.80}"
        elif (run.root / name).parent.is_dir():
            yield from _compare(run.root / name, digest, by=run.result.name)
    identity = _identity(run.identity)
    for path in sorted(run.checkpoints.glob(f"step-*/{STATE}")):
        state = _identity(path)
        if name := _difference(identity, state):
            text = f"{name}: expected {state[name]!r:.80} as in {path.parent.name}"
            yield run.identity, f"{text}, got {identity[name]!r:.80}"
            return


def check_runs_of_sweep(root: Path) -> Found:
    """Compare what sums up a sweep with the reports of its runs, and its picture with it.

    It is written when all of them are finished.
    """
    reports = [path.parent / "result.json" for path in sorted(root.glob("*/run.json"))]
    is_ended = all(map(os.path.lexists, reports))
    if is_ended and not os.path.lexists(root / "sweep.json"):
        yield (
            root / "sweep.json",
            "expected the reports of the runs, got none. Fix: run the same command again, which "
            "finishes the sweep",
        )
    summary = _read(root / "sweep.json")
    for row in summary.get("runs", ()):
        report = _read(root / row["run"] / "result.json")
        for name in _REPORTED:
            if report and report.get(name) != row.get(name):
                text = f"{row['run']}: {name}: expected {report.get(name)!r:.80} as in its report"
                yield root / "sweep.json", f"{text}, got {row.get(name)!r:.80}"
                break
    files = summary.get(FILES)
    for name, digest in files.items() if isinstance(files, dict) else ():
        if name == "curves.png":
            yield from _compare(root / name, digest, by="sweep.json")


def check_runs_of_lineage(lineage: Lineage) -> Found:
    """Compare a lineage with the runs in it: their settings, their number, whether they ended."""
    document, count = lineage.root / "lineage.json", len(lineage.increments)
    for folder in sorted([*lineage.root.glob("trunk/*"), *lineage.root.glob("versions/*")]):
        number = folder.name[:4]
        if number.isdecimal() and int(number) > count:
            yield document, f"expected the increment of {folder.name}, got {count} increments"
        elif number.isdecimal():
            expected = lineage.settings | {
                "path_alpha": lineage.alpha,
                "ends": lineage.ends[: int(number)],
            }
            if expected.get("head_dtype") == "auto":  # what each run then chose for itself
                del expected["head_dtype"]
            yield from _check_place(folder)
            identity = _identity(folder / "run.json")
            if name := _difference(expected, identity):
                text = f"{name}: expected {identity[name]!r:.80} as in {folder.name}"
                yield document, f"{text}, got {expected[name]!r:.80}"
    with suppress(InputError, OSError, ValueError, yaml.YAMLError):  # named by another check
        config = check_settings(lineage.root / "config.yaml")
        expected = lineage.settings | {"alpha": lineage.alpha}
        if name := _difference(expected, config):
            text = f"{name}: expected {expected[name]!r:.80} as in {document.name}"
            yield lineage.root / "config.yaml", f"{text}, got {config[name]!r:.80}"
    is_released = count > 0 and lineage.version(count).result.exists()
    for run in _needed_runs(lineage, count if is_released else count - 1):
        if not os.path.lexists(run.result):
            yield run.result, "expected the report of this run, on which later ones build, got none"


def _check_place(folder: Path) -> Found:
    """Compare where a run of a lineage says that it was written with where it lies."""
    with suppress(InputError, OSError, ValueError, yaml.YAMLError):  # named by another check
        out = check_settings(folder / "config.yaml").get("out")
        own = f"{folder.parent.name}/{folder.name}"
        if isinstance(out, str) and not f"/{out}".endswith(f"/{own}"):
            yield folder / "config.yaml", f"out: expected a folder named {own}, got {out!a:.80}"


def _needed_runs(lineage: Lineage, released: int) -> Iterator[RunFolder]:
    """Yield the runs that end before a version is released."""
    for number in range(1, released + 1):
        yield lineage.version(number)
        if lineage.branch_step(number):
            yield lineage.head(number)
        if number < released:
            yield lineage.tail(number)


def _compare(path: Path, digest: object, *, by: str) -> Found:
    try:
        got = digest_tensors(path) if path.suffix == ".safetensors" else digest_file(path)
    except (DamagedFileError, OSError) as error:
        yield path, str(error)
        return
    if got != digest:
        yield path, f"expected the SHA-256 {digest!s:.12} that {by} records, got {got[:12]}"


def _difference(some: Mapping[str, Any], others: Mapping[str, Any]) -> str | None:
    """Return the first name of both whose values differ."""
    names = sorted(some.keys() & others.keys())
    return next(
        (name for name in names if setting_of(some, name) != setting_of(others, name)), None
    )


def _identity(path: Path) -> dict[str, Any]:
    identity = _read(path).get("identity")
    return with_current_names(identity) if isinstance(identity, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """Return a document; of a missing or damaged one, which another check names, nothing."""
    with suppress(DamagedFileError, OSError):
        return read_sealed(path)
    return {}
