"""The table of commands that write, with what each starts from and what it leaves.

A trial is a folder of its own: the things that a command starts from are copied into it, the
command runs there with paths relative to it, and the bits that it left are compared with those of
an undisturbed trial.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carryon.tools.bench.tiny_base import make_tiny_base
from carryon.tools.bench.trust.calls import Ended, call

STORE_OPTIONS = "--unit-tokens 128 --taps final layer.1 --with-blocks 1"
_SHAPE = "--width 8 --blocks 1 --heads 2 --intermediate-size 8 --tokens-per-step 64"
RUN_OPTIONS = f"{_SHAPE} --epochs 2 --learning-rate 0.01 --device cpu"
TIMES = {"tokens_per_second", "targets_per_second", "data_wait_ratio", "elapsed_s", "sha256"}
"""Entries of a line of metrics.jsonl that differ from run to run."""
_REPORTS = ("result.json", "sweep.json", "lineage.json")
_PASSING = TIMES | {"train_s", "evaluate_s", "last_evaluate_s"}
_PASSING |= {"out", "carryon", "files", "stores", "limit", "stage_s", "decoded_cache"}
"""Entries of reports that differ from run to run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command that writes."""

    text: str
    """Behind `carryon`, as typed."""
    starts_from: Mapping[str, str]
    """Name in the trial -> name of the thing among those made."""
    out: str
    """Folder that is made or changed."""
    verified: str = ""
    """What `carryon verify` checks afterwards; nothing for a merged base, which is no folder of
    ours."""
    codes: frozenset[int] = frozenset({0})
    """Exit codes of the same command once more."""
    damages: str = ""
    """File of `out` that is damaged first, which the command mends."""

    @property
    def words(self) -> list[str]:
        """Its words."""
        return self.text.split()


COMMANDS: dict[str, Command] = {
    "extract": Command(
        text=f"extract --base base --data first.jsonl --out store {STORE_OPTIONS}",
        starts_from={"base": "base", "first.jsonl": "first.jsonl"},
        out="store",
        verified="store",
    ),
    "append": Command(
        text=f"extract --base base --data second.jsonl --out store --append {STORE_OPTIONS}",
        starts_from={"base": "base", "second.jsonl": "second.jsonl", "store": "one-part"},
        out="store",
        verified="store",
        codes=frozenset({0, 2}),  # all of it is in the store: it says so
    ),
    "repair": Command(
        text="repair store --base base",
        starts_from={"base": "base", "store": "store"},
        out="store",
        verified="store",
        damages="hidden/final/c/1/0",
    ),
    "train": Command(
        text=f"train --store store --out run {RUN_OPTIONS} --checkpoint-every 4 --evaluate-every 8",
        starts_from={"store": "store"},
        out="run",
        verified="run",
    ),
    "sweep": Command(
        text=f"sweep --store store --out sweep {RUN_OPTIONS} --checkpoint-every 9 --vary seed=1,2",
        starts_from={"store": "store"},
        out="sweep",
        verified="sweep",
    ),
    "update": Command(
        text=f"update --lineage lineage --store store#2 {RUN_OPTIONS}",
        starts_from={"store": "store", "lineage": "one-version"},
        out="lineage",
        verified="lineage",
    ),
    "merge": Command(
        text="merge --carryon carryon --base base --out merged --device cpu",
        starts_from={"base": "base", "carryon": "top"},
        out="merged",
        codes=frozenset({0, 2}),  # it is there: it says so
    ),
}
"""Every command that writes more than a line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Things:
    """What the commands start from and leave, made once by undisturbed commands."""

    folder: Path
    """One entry per thing."""
    results: dict[str, dict[str, str]] = field(default_factory=dict)
    """Command -> what `bits_of` tells of its result."""
    ended: dict[str, Ended] = field(default_factory=dict)
    """Command -> how it ended undisturbed, with its changes to the disk."""

    def start(self, name: str, trial: Path) -> Command:
        """Make the folder `trial` ready for a command and return it."""
        command = COMMANDS[name]
        trial.mkdir(parents=True)
        for target, source in command.starts_from.items():
            place = self.folder / source
            if place.is_dir():
                shutil.copytree(place, trial / target, symlinks=True)
            else:
                shutil.copy(place, trial / target)
        if command.damages:
            path = trial / command.out / command.damages
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        return command


def make_things(folder: Path) -> Things:
    """Make all things in `folder`: a tiny base, texts, stores, runs, lineages, carry-ons.

    Raises:
        RuntimeError: a command failed.
    """
    things = Things(folder=folder / "things")
    things.folder.mkdir(parents=True)
    make_tiny_base(things.folder / "base")
    for number, name in enumerate(("first", "second")):
        write_texts(things.folder / f"{name}.jsonl", number)
    _make(things, "extract", folder)
    _copy(folder, things, {"extract/store": "one-part"})
    _make(things, "append", folder)
    _copy(folder, things, {"append/store": "store"})
    for name in ("repair", "train", "sweep"):
        _make(things, name, folder)
    _copy(folder, things, {"train/run": "run", "train/run/carryon": "carryon"})
    _copy(folder, things, {"sweep/sweep": "sweep"})
    _run(folder / "train", f"update --lineage lineage --store store#1 {RUN_OPTIONS}")
    top = "--kind top --blocks 1 --epochs 1 --tokens-per-step 64 --device cpu"
    _run(folder / "train", f"train --store store --out top {top}")
    _copy(folder, things, {"train/lineage": "one-version", "train/top/carryon": "top"})
    for name in ("update", "merge"):
        _make(things, name, folder)
    _copy(folder, things, {"update/lineage": "lineage", "merge/merged": "merged"})
    return things


def bits_of(root: Path) -> dict[str, str]:
    """Return the digests of what is to be the same to the bit, by path below `root`.

    Left out is what holds times or the place of the folder, and what is kept for a resume: of a
    run counts the carry-on, and its metrics and report but for times; of a store all but the
    receipts, and of its manifest the fingerprint, which leaves out where the base lay.
    """
    bits = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_file():
            continue
        if path.name in _REPORTS:
            document = json.loads(path.read_bytes())
            bits[name] = _digest(json.dumps(lasting(document), sort_keys=True).encode())
        elif path.name == "metrics.jsonl":
            bits[name] = _digest(json.dumps(_without_times(path)).encode())
        elif name in ("zarr.json", "units/copy/zarr.json"):
            bits[name] = json.loads(path.read_bytes())["attributes"]["carryon"]["fingerprint"]
        elif _is_compared(name, path):
            bits[name] = _digest(path.read_bytes())
    return bits


def what_is_wrong(things: Things, name: str, trial: Path, ended: Ended) -> dict[str, Any]:
    """Return in what a trial differs from an undisturbed one, once its command has ended.

    Args:
        things: hold the result of the undisturbed one.
        name: of the command.
        trial: the folder.
        ended: how the last call of the command ended.
    """
    command = COMMANDS[name]
    wrong: dict[str, Any] = {}
    if ended.code not in command.codes or ended.has_traceback or ended.is_hung:
        wrong["ended"] = f"code {ended.code}: {ended.err[-500:]}"
    bits, expected = bits_of(trial / command.out), things.results[name]
    if bits != expected:
        paths = sorted(bits.keys() | expected.keys())
        wrong["bits"] = [path for path in paths if bits.get(path) != expected.get(path)]
    if leftovers := leftovers_in(trial):
        wrong["leftovers"] = leftovers
    if changed := [
        target
        for target, source in command.starts_from.items()
        if target != command.out and _content(trial / target) != _content(things.folder / source)
    ]:
        wrong["changed inputs"] = changed
    if command.verified:
        checked = call(["verify", command.verified, "--full"], cwd=trial)
        if checked.code or json.loads(checked.out.splitlines()[-1]).get("unknown"):
            wrong["verify"] = checked.err[-500:] + checked.out[-500:]
    return wrong


def leftovers_in(trial: Path) -> list[str]:
    """Return the hidden files and folders that a command has left, but the lock of a store."""
    names = [path.relative_to(trial).as_posix() for path in trial.rglob(".*")]
    own = ("home/", "tmp/", "notes/")
    return [name for name in names if not name.startswith(own) and name != "store/units/.lock"]


def _content(place: Path) -> dict[str, bytes]:
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in files}


def _is_compared(name: str, path: Path) -> bool:
    if name.startswith("units/"):
        return name.startswith("units/copy/")
    if path.parent.name == "carryon":
        return True
    in_run = {"checkpoints", "config.yaml", "sessions.jsonl", "curves.png"}
    in_run |= {"run.json", "contamination.json", ".lock"}
    return in_run.isdisjoint(name.split("/"))


def lasting(value: Any) -> Any:  # noqa: ANN401 -- plain JSON values
    """Return a document without times, places, and digests of files that hold them."""
    if isinstance(value, dict):
        return {key: lasting(each) for key, each in value.items() if key not in _PASSING}
    return [lasting(each) for each in value] if isinstance(value, list) else value


def _without_times(path: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _make(things: Things, name: str, folder: Path) -> None:
    command = things.start(name, folder / name)
    things.ended[name] = _run(folder / name, command.text)
    things.results[name] = bits_of(folder / name / command.out)


def _run(cwd: Path, text: str) -> Ended:
    ended = call(text.split(), cwd=cwd)
    if ended.code:
        raise RuntimeError(f"carryon {text} ended with code {ended.code}: {ended.err}")
    return ended


def _copy(folder: Path, things: Things, places: Mapping[str, str]) -> None:
    for source, target in places.items():
        shutil.copytree(folder / source, things.folder / target)


def write_texts(path: Path, number: int) -> None:
    """Write twelve short records, other ones for each number."""
    lines = [
        {
            "id": f"{path.stem}-{index}",
            "prompt": f"the number {7 * index + number} and the thing",
            "completion": " is " + "the king in the ring " * (index % 5 + 2),
            "split": "held-out" if index % 6 == 5 else "train",
        }
        for index in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
