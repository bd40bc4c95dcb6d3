"""No command writes outside the folders that it was given, whatever lies in them."""

import os
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from carryon.tools.bench.trust.calls import Call, call
from carryon.tools.bench.trust.signing import name_base, sign_manifest
from carryon.tools.bench.trust.table import COMMANDS, Things, make_things
from carryon.tools.cli.main import CARRYON

CANARY = "of the user"
GIVEN = ["base", "store", "carryon", "top", "run", "sweep", "lineage", "first.jsonl"]
_RUN = COMMANDS["train"].text.partition(" run ")[2]

OTHERS = {
    "demo --out demo --samples 8": "demo",
    "preview --base base --data first.jsonl --html page.html": "page.html",
    "extract --base base --data first.jsonl --out new --dry-run": "new",
    "import vllm store --base base --out new --device cpu": "new",
    "export speculators store --out new": "new",
    "recode store --out new --profile raw": "new",
    "inspect store": "",
    "inspect store --sample 0 --html page.html": "page.html",
    "verify store --full": "",
    "verify carryon": "",
    "verify run": "",
    "verify lineage": "",
    "repair store": "store",
    f"train --store store --out run {_RUN}": "run",
    COMMANDS["sweep"].text: "sweep",
    f"update --lineage lineage --store store#2 {_RUN}": "lineage",
    "versions --lineage lineage --device cpu": "lineage",
    "versions --lineage lineage --rebuild 1 --out rebuilt --device cpu": "rebuilt",
    "evaluate --store store --carryon carryon --device cpu": "",
    "evaluate --store store --carryon carryon --alpha 0:1:0.5 --plot plot.png --device cpu": (
        "plot.png"
    ),
    "evaluate --store store --carryon carryon --alpha 0:1:0.5 --write-alpha --device cpu": (
        "carryon"
    ),
    "generate --carryon carryon --base base --prompt x --max-new-tokens 2 --device cpu": "",
    "merge --carryon top --base base --out merged --device cpu": "merged",
    "score --carryon carryon --base base --tasks chain_sum --num 1 --out answers.jsonl": (
        "answers.jsonl"
    ),
    "compare --base base --data first.jsonl --out compare --methods bottleneck --seconds 1": (
        "compare"
    ),
    "sample --base base --data first.jsonl --out corpus.jsonl --num 2 --samples 1 --device cpu "
    "--max-new-tokens 4 --rule operator:is_not --keep-cut": "corpus.jsonl",
    "improve --base base --data first.jsonl --out improved --rounds 1 --num 2 --samples 1 "
    "--device cpu --max-new-tokens 4 --rule operator:is_not --keep-cut": "improved",
    "plan-memory --base-width 64 --vocab-size 256": "",
    "gates --store store --mix store#2 --carryon carryon --sample x": "gates.html",
    "convert base --out folder": "folder",
}
"""Commands beside those of the table: words, and what they may write.

`operator:is_not` is a rule that accepts every answer: the text is not the problem.
"""
NEED_MORE = (
    "demo",
    "score",
    "compare",
    "update",
    "improve",
    "gates",
    "convert",
    "import",
    "export",
)
"""Commands that a tiny base or corpus, or folders of other things, may end with a refusal."""
ALL = {command.text: command.out for command in COMMANDS.values()} | OTHERS


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Things:
    return make_things(tmp_path_factory.mktemp("trust"))


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    """An empty folder among files, folders and links of the user."""
    parent = tmp_path / "parent"
    for name in ("trial", "trial.old", ".trial.partial", "store", "outside", "locked"):
        (parent / name).mkdir(parents=True)
        if name != "trial":
            (parent / name / "zarr.json").write_text(CANARY)
            (parent / name / "canary").write_text(CANARY)
    (parent / "canary").write_text(CANARY)
    (parent / "link").symlink_to("canary")
    (parent / "folder-link").symlink_to("outside")
    (parent / "locked/canary").chmod(0o400)
    (parent / "locked").chmod(0o500)
    return parent / "trial"


def facts_of(path: Path) -> tuple[Any, ...]:
    """Return type, mode, time and content of an entry."""
    facts = path.lstat()
    content: object = None
    if stat.S_ISLNK(facts.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(facts.st_mode):
        content = path.read_bytes()
    return facts.st_mode, facts.st_mtime_ns, content


def outside(trial: Path, out: str) -> dict[str, tuple[Any, ...]]:
    """Return all that no command may change: beside `trial`, and in it but for `out`."""
    kept = {trial / name for name in ("home", "tmp", "notes", out) if name}
    found = {}
    for path in sorted(trial.parent.rglob("*")):
        is_beside = bool(out) and path.parent == trial and path.name.startswith(f".{out}.")
        if path != trial and not is_beside and not any(map(path.is_relative_to, kept)):
            found[str(path)] = facts_of(path)
    return found


def writes_outside(trial: Path, out: str, changes: list[str]) -> list[str]:
    """Return the changes that are neither in `out`, beside it while it is made, nor in home."""
    kept = [str(trial / name) for name in ("home", "tmp")]
    kept += [str(trial / out)] * bool(out)
    beside = str(trial / f".{out}.")
    return [
        change
        for change in changes
        for path in change.split(" ")[1:]
        if not any(path == each or path.startswith(f"{each}/") for each in kept)
        and not (out and path.startswith(beside))
    ]


def assert_changes_only(trial: Path, text: str, out: str) -> int:
    """Run a command, assert that it changes nothing else, and return its exit code."""
    before = outside(trial, out)
    ended = call(text.split(), cwd=trial)
    assert outside(trial, out) == before
    assert writes_outside(trial, out, ended.changes) == []
    assert not ended.has_traceback, ended.err
    assert not ended.is_hung
    return ended.code


def copy_given(things: Things, trial: Path) -> None:
    """Copy all that commands start from."""
    for name in GIVEN:
        place = things.folder / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, trial / name)
    shutil.copytree(things.folder / "base", trial / "demo/base")
    shutil.copy(things.folder / "first.jsonl", trial / "demo/corpus.jsonl")


def test_every_command_of_the_program_is_here() -> None:
    assert {text.split()[0] for text in ALL} == set(CARRYON.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_the_table_changes_only_what_it_was_given(
    name: str, things: Things, trial: Path
) -> None:
    trial.rmdir()
    command = things.start(name, trial)
    assert assert_changes_only(trial, command.text, command.out) == 0


@pytest.mark.parametrize("text", OTHERS)
def test_a_command_changes_only_what_it_was_given(text: str, things: Things, trial: Path) -> None:
    copy_given(things, trial)
    code = assert_changes_only(trial, text, OTHERS[text])
    assert code == 0 or text.startswith(NEED_MORE)


def _link(path: Path, target: str) -> None:
    """Put a link to something of the user in the place of a file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    depth = len(path.parts) - path.parts.index("trial") - 1
    path.symlink_to("../" * depth + target)


def _name_outside(trial: Path) -> None:
    store = trial / "store"
    (store / "units/copy/canary").write_text("of a stranger")
    sign_manifest(store, lambda values: values["files"].update({"../../canary": ["0" * 64]}))


def _name_whole(trial: Path) -> None:
    path = str(trial.parent / "canary")
    sign_manifest(trial / "store", lambda values: values["files"].update({path: ["0" * 64]}))


def _name_lineage(trial: Path) -> None:
    text = (trial / "lineage/lineage.json").read_text()
    values = text.replace(str(trial), "..").replace("/store#", "/../../outside#")
    (trial / "lineage/lineage.json").write_text(values)


HARMS: dict[str, Callable[[Path], object]] = {
    path: lambda trial, path=path, target=target: _link(trial / path, target)
    for path, target in {
        "store/units/.lock": "canary",
        "store/units": "outside",
        "store/hidden/final/c": "outside",
        "store/zarr.json": "canary",
        "store/head": "outside",
        "run/sessions.jsonl": "canary",
        "run/metrics.jsonl": "canary",
        "run/checkpoints": "outside",
        "run/carryon": "outside",
        "run/result.json": "canary",
        "run/curves.png": "canary",
        "run/.lock": "canary",
        "sweep/seed=1": "outside",
        "sweep/curves.png": "canary",
        "sweep/sweep.json": "canary",
        "carryon/README.md": "canary",
        "carryon/carryon.json": "canary",
        "carryon/carryon.safetensors": "canary",
        "lineage/trunk": "outside",
        "lineage/versions": "outside",
        "lineage/versions.png": "canary",
        "lineage/versions.json": "canary",
        "lineage/versions/0002/carryon": "outside",
        "lineage/versions/0001/metrics.jsonl": "canary",
    }.items()
} | {
    "a manifest that names ../../canary": _name_outside,
    "a manifest that names a whole path": _name_whole,
    "a lineage that names a store outside": _name_lineage,
    "a base outside": lambda trial: name_base(trial / "carryon/carryon.json", "../outside"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_links_and_names_that_lead_outside_are_not_followed(
    harm: str, things: Things, trial: Path
) -> None:
    copy_given(things, trial)
    HARMS[harm](trial)
    thing = harm.partition("/")[0] if "/" in harm.partition(" ")[0] else harm.split()[1]
    thing = {"manifest": "store", "base": "carryon"}.get(thing, thing)
    texts = [text for text in OTHERS if thing in text.replace("/", " ").split()]
    texts = [text for text in texts if "compare" not in text]
    assert texts
    for text in texts:
        assert_changes_only(trial, text, OTHERS[text])


@pytest.mark.parametrize("name", ["canary", "new", "trial.old/new", "trial/store/../other"])
def test_a_write_outside_is_noticed(trial: Path, name: str) -> None:
    path = trial.parent / name
    (trial / "store").mkdir()
    before = outside(trial, "store")
    ended = Call([], cwd=trial, function=partial(path.write_text, CANARY)).wait()
    assert ended.code == 0
    assert outside(trial, "store") != before
    assert len(writes_outside(trial, "store", ended.changes)) == 1
