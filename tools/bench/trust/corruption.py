"""Damaged folders: `carryon verify` names the file, and no command gives other numbers."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from carryon.tools.bench.job import Job
from carryon.tools.bench.trust.calls import Ended, call
from carryon.tools.bench.trust.damage import Damage, plan_damages, read_folder
from carryon.tools.bench.trust.table import (
    COMMANDS,
    RUN_OPTIONS,
    STORE_OPTIONS,
    Things,
    lasting,
    make_things,
    write_texts,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A thing to damage, and the command that then uses it."""

    name: str
    """Its folder in a trial."""
    thing: Path
    versions: tuple[Path, ...]
    """Other things of the same form."""
    use: str
    """Behind `carryon`, as typed."""
    made: tuple[str, ...] = ()
    """Run folders that the use makes or finishes."""
    unfinished: tuple[str, ...] = ()
    """Runs below the thing that are put back to their checkpoints, so that the use resumes them."""
    verify: str = ""
    """Options of `carryon verify`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a damage."""

    subject: str
    file: str
    fault: str
    is_noticed: bool
    is_wrong: bool
    """Whether the use succeeded with other bits or numbers."""
    has_traceback: bool
    """In one of the two commands; or one hung."""
    verified: str
    """Exit code of the verification, and the end of what it said."""
    used: str
    """The same of the use."""


def measure_corruptions(job: Job, *, trials: int = 300) -> None:
    """Damage carry-ons, runs, sweeps and lineages."""
    things = make_things(job.work / "made")
    outcomes = run_trials(make_subjects(things, job.work), job.work / "trials", trials=trials)
    _report(job, "trust.corruptions", outcomes)


def measure_store_corruptions(job: Job, *, trials: int = 200) -> None:
    """Damage stores."""
    things = make_things(job.work / "made")
    outcomes = run_trials([make_store_subject(things)], job.work / "trials", trials=trials)
    _report(job, "trust.store_corruptions", outcomes)


def make_subjects(things: Things, work: Path) -> list[Subject]:
    """Make other versions of the things, and return what is damaged.

    Raises:
        RuntimeError: a command failed.
    """
    made, others = things.folder, work / "others"
    store = made / "store"
    train, sweep, update = (
        COMMANDS[name].text.replace("--store store", f"--store {store}")
        for name in ("train", "sweep", "update")
    )
    others.mkdir(parents=True)
    shutil.copytree(store, others / "store")
    write_texts(made / "third.jsonl", 2)
    changed = RUN_OPTIONS.replace("0.01", "0.02")
    texts, base = made / "third.jsonl", made / "base"
    for text in (
        f"extract --base {base} --data {texts} --out store --append {STORE_OPTIONS}",
        train.replace("0.01", "0.02"),
        sweep.replace("0.01", "0.02"),
        f"update --lineage lineage --store {store}#1 {changed}",
    ):
        _run(text, others)
    shutil.copytree(others / "lineage", others / "one-version")
    _run(update.replace("0.01", "0.02"), others)
    return [
        Subject(
            name="carryon",
            thing=made / "carryon",
            versions=(others / "run/carryon",),
            use=f"evaluate --store {store} --carryon carryon --device cpu",
        ),
        Subject(
            name="run",
            thing=made / "run",
            versions=(others / "run",),
            use=train,
            made=("run",),
            unfinished=(".",),
        ),
        Subject(
            name="sweep",
            thing=made / "sweep",
            versions=(others / "sweep",),
            use=sweep,
            made=("sweep/seed=1", "sweep/seed=2"),
            unfinished=("seed=1", "seed=2"),
        ),
        Subject(
            name="lineage",
            thing=made / "one-version",
            versions=(others / "one-version",),
            use=update,
            made=("lineage/versions/0002",),
        ),
        Subject(
            name="lineage",
            thing=made / "lineage",
            versions=(made / "one-version", others / "lineage"),
            use=update.replace(f"{store}#2", f"{others}/store#3"),
            made=("lineage/versions/0003",),
        ),
    ]


def make_store_subject(things: Things) -> Subject:
    """Return the store as what is damaged."""
    return Subject(
        name="store",
        thing=things.folder / "store",
        versions=(things.folder / "one-part",),
        use=f"train --store store --out run --taps final layer.1 {RUN_OPTIONS}",
        made=("run",),
        verify="--full",
    )


def run_trials(subjects: Sequence[Subject], folder: Path, *, trials: int) -> list[Outcome]:
    """Damage each subject in its share of the trials."""
    outcomes = []
    for number, subject in enumerate(subjects):
        share = trials // len(subjects) + (number < trials % len(subjects))
        place = folder / f"{number}-{subject.name}"
        _prepare(subject, place)
        expected = _used(subject, place, call(subject.use.split(), cwd=place))
        damages = plan_damages(
            read_folder(subject.thing),
            [read_folder(version) for version in subject.versions],
            trials=share,
            seed=number,
        )
        for trial, damage in enumerate(damages):
            outcomes.append(_try(subject, damage, folder / f"{number}-{trial}", expected))
    return outcomes


def _try(subject: Subject, damage: Damage, place: Path, expected: dict[str, Any]) -> Outcome:
    _prepare(subject, place)
    damage.apply(place / subject.name)
    verified = call(["verify", subject.name, *subject.verify.split()], cwd=place)
    for name in subject.unfinished:
        _unfinish(
            place / subject.name / name, [place / subject.name / each for each in damage.changes]
        )
    used = call(subject.use.split(), cwd=place)
    got = _used(subject, place, used) if used.code == 0 else {}
    shutil.rmtree(place)
    return Outcome(
        subject=subject.name,
        file=damage.file,
        fault=damage.fault,
        is_noticed=verified.code in (1, 2) and _names(verified.err, subject, damage),
        is_wrong=used.code == 0 and not _agrees(got, expected),
        has_traceback=any(each.has_traceback or each.is_hung for each in (verified, used)),
        verified=f"{verified.code}: {verified.err[-300:]}",
        used=f"{used.code}: {used.err[-300:]}" + (_difference(got, expected) if got else ""),
    )


def _prepare(subject: Subject, place: Path) -> None:
    place.mkdir(parents=True)
    shutil.copytree(subject.thing, place / subject.name)


def _unfinish(run: Path, damaged: Sequence[Path]) -> None:
    """Put a run back to its last checkpoint but one, unless that would remove the damage."""
    removed = [run / "carryon", run / "result.json"]
    if any(path.is_relative_to(each) for path in damaged for each in removed):
        return
    newest = max((run / "checkpoints").glob("step-*"))
    if not any(path.is_relative_to(newest) for path in damaged):
        removed.append(newest)
    for path in removed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _used(subject: Subject, place: Path, ended: Ended) -> dict[str, Any]:
    """Return what a use printed and made: bits of carry-ons, and lines of metrics.

    Raises:
        RuntimeError: it failed.
    """
    if ended.code:
        raise RuntimeError(f"{subject.use} ended with code {ended.code}: {ended.err}")
    used: dict[str, Any] = {"printed": lasting(json.loads(ended.out.splitlines()[-1]))}
    for name in subject.made:
        for file in ("carryon.safetensors", "carryon.json"):
            path = place / name / "carryon" / file
            used[f"{name}/{file}"] = path.read_bytes() if path.exists() else None
        lines = (place / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        used[f"{name}/metrics"] = [
            json.dumps(lasting(json.loads(line)), sort_keys=True) for line in lines
        ]
    return used


def _agrees(got: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Compare two uses; lines of metrics may be missing, which `verify` tells."""
    return all(
        set(got[name]) <= set(value) if name.endswith("/metrics") else got[name] == value
        for name, value in expected.items()
    )


def _difference(got: dict[str, Any], expected: dict[str, Any]) -> str:
    names = [name for name in expected if not _agrees({name: got[name]}, {name: expected[name]})]
    return f" other: {', '.join(names)}" if names else ""


def _names(said: str, subject: Subject, damage: Damage) -> bool:
    """Tell whether a changed file or its folder is named; of a unit its number is enough."""
    for name in damage.changes:
        path = PurePosixPath(name)
        if name in said or (
            path.parent.name and re.search(rf"{re.escape(str(path.parent))}[:/]", said)
        ):
            return True
        if name.startswith("units/") and f"unit {path.stem}" in said:
            return True
    return False


def _run(text: str, cwd: Path) -> None:
    ended = call(text.split(), cwd=cwd)
    if ended.code:
        raise RuntimeError(f"carryon {text} ended with code {ended.code}: {ended.err}")


def _report(job: Job, name: str, outcomes: Sequence[Outcome]) -> None:
    figures: dict[str, Callable[[Outcome], bool]] = {
        "wrong": lambda outcome: outcome.is_wrong,
        "tracebacks": lambda outcome: outcome.has_traceback,
    }
    missed = [asdict(outcome) for outcome in outcomes if not outcome.is_noticed]
    noticed, unit = len(outcomes) - len(missed), f"of {len(outcomes)} damages"
    job.report(f"{name}.noticed", noticed, unit, at_least=len(outcomes), missed=missed)
    for each, counts in figures.items():
        found = [asdict(outcome) for outcome in outcomes if counts(outcome)]
        job.report(f"{name}.{each}", len(found), unit, at_most=0, found=found)
