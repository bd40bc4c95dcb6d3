"""`carryon verify` on carry-ons, runs and lineages: sound ones pass, changed ones are named."""

import json
import shutil
from pathlib import Path

import pytest
from support.tiny_runs import TINY, train_tiny
from support.tiny_train_stores import make_tiny_store

from carryon.cache.files.documents import read_sealed, sealed, write_json
from carryon.tools.cli.main import main
from carryon.train.continual.lineage import update
from carryon.train.modules.card_file import CARD
from carryon.train.settings_file import check_settings, write_settings
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.sweep import sweep
from carryon.train.verify import folder_kind, verify_folder

SETTINGS = TINY.with_options(min_lr_ratio=0.1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a run and a lineage on it."""
    root = tmp_path_factory.mktemp("made")
    store = make_tiny_store(root / "store")
    train_tiny(store, root / "run")
    update(lineage=str(root / "lineage"), store=[str(store)], settings=SETTINGS)
    return root


def test_the_runs_of_a_sweep_are_verified(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    sweep(made / "store", out=out, vary={"seed": [1, 2]}, settings=SETTINGS)
    assert folder_kind(out) == "sweep"
    assert main(["verify", str(out)]) == 0
    assert f"OK: {out}: a sweep" in capsys.readouterr().err
    assert verify_folder(out).unknown == verify_folder(out).without_digest == []
    flipped = out / "seed=2" / "carryon" / "carryon.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-9] ^= 1
    flipped.write_bytes(content)
    assert main(["verify", str(out)]) == 1
    (out / "sweep.json").unlink()
    assert folder_kind(out) == "sweep"
    assert {each.path for each in verify_folder(out).problems} == {
        "seed=2/carryon/carryon.safetensors",
        "sweep.json",
    }
    (out / "seed=1/result.json").unlink()  # a sweep that was killed
    assert "sweep.json" not in {each.path for each in verify_folder(out).problems}


def test_a_missing_run_of_a_sweep_is_named(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sweep(made / "store", out=out, vary={"seed": [1, 2]}, settings=SETTINGS)
    shutil.rmtree(out / "seed=2")
    [problem] = verify_folder(out).problems
    assert "expected the folder of the run 'seed=2'" in problem.text


PLACES = {"carry-on": "run/carryon", "run": "run", "lineage": "lineage"}


@pytest.mark.parametrize("kind", PLACES)
def test_a_sound_folder_is_told_by_its_files_and_passes(
    made: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made / PLACES[kind]
    assert folder_kind(folder) == kind
    assert main(["verify", str(folder)]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    assert document["problems"] == document["unknown"] == []
    assert set(document["without_digest"]) <= {"lineage.json", "texts.json", "versions.json"}
    assert document["is_sound"]
    assert f"OK: {folder}: a {kind}" in printed.err
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert document["num_files"] >= len(files)


def test_a_store_is_verified_as_a_store(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert folder_kind(made / "store") == "store"
    assert main(["verify", str(made / "store")]) == 0
    assert main(["verify", str(made / "nothing")]) == 2


@pytest.mark.parametrize("kind", PLACES)
def test_a_flipped_bit_in_a_file_with_a_digest_is_named(
    made: Path, tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(made / PLACES[kind], tmp_path / "copy"))
    suffixes = (".safetensors", ".png", ".md", "state.json", "carryon.json", "result.json")
    suffixes += ("run.json", "contamination.json")
    paths = [path for path in sorted(folder.rglob("*")) if path.name.endswith(suffixes)]
    assert paths
    for number, path in enumerate(paths):
        content = path.read_bytes()
        changed = bytearray(content)
        changed[number * 7919 % len(content)] ^= 1 << number % 8
        path.write_bytes(changed)
        problems = verify_folder(folder).problems
        assert any(
            problem.path.startswith(str(path.parent.relative_to(folder)).strip("."))
            for problem in problems
        ), path
        assert all("\n" not in problem.text for problem in problems)
        path.write_bytes(content)
    assert verify_folder(folder).is_sound


@pytest.mark.parametrize("name", ["metrics.jsonl", "sessions.jsonl", "config.yaml", "run.json"])
def test_a_missing_or_mangled_file_of_a_finished_run_is_named(
    made: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(made / "run", tmp_path / "copy"))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2] + b"\0{" + content)
    assert main(["verify", str(folder)]) == 1
    assert f"damaged: {name}: " in capsys.readouterr().err
    (folder / name).unlink()
    assert [problem.path for problem in verify_folder(folder).problems] == [name]
    (folder / name).symlink_to(made / "run" / name)
    assert "a link" in verify_folder(folder).problems[0].text
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name in [problem.path for problem in verify_folder(folder).problems]


def test_unknown_files_are_listed_and_no_damage(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(made / "lineage", tmp_path / "copy"))
    (folder / "note.txt").touch()
    (folder / "versions" / "0001" / "carryon" / "x.py").touch()
    assert main(["verify", str(folder)]) == 0
    assert "unknown: 'note.txt': no file of a lineage" in capsys.readouterr().err
    assert verify_folder(folder).unknown == ["note.txt", "versions/0001/carryon/x.py"]


def test_a_carryon_without_digests_passes_and_is_called_so(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(made / "run" / "carryon", tmp_path / "copy"))
    values = json.loads((folder / CARD).read_text())
    del values["files"], values["sha256"]
    (folder / CARD).write_text(json.dumps(values))
    assert main(["verify", str(folder)]) == 0
    assert "3 files from before digests were recorded" in capsys.readouterr().err


def test_a_setting_that_differs_from_the_runs_identity_is_named(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "run", tmp_path / "copy"))
    text = (folder / "config.yaml").read_text()
    changed = text.replace("epochs: 2", "epochs: 3")
    (folder / "config.yaml").write_text(changed)
    assert "differ from the SHA-256 in its first line" in verify_folder(folder).problems[0].text
    (folder / "config.yaml").write_text(changed.partition("\n")[2])  # as older runs have it
    [problem] = verify_folder(folder).problems
    assert "epochs: expected 2 as in run.json, got 3" in problem.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "sessions.jsonl"])
def test_a_changed_number_in_a_line_of_a_run_is_named(
    made: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(made / "run", tmp_path / "copy"))
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace('"step": 0', '"step": 7', 1))
    [problem] = verify_folder(folder).problems
    assert problem.path == name
    assert "damaged lines: 1" in problem.text


def other_run(made: Path, folder: Path) -> Path:
    """A run of the same shape on the same store, with other weights."""
    train_tiny(made / "store", folder, seed=5)
    return folder


FINISHED = ["sessions.jsonl", "metrics.jsonl", "contamination.json", "curves.png", "run.json"]
FINISHED += ["result.json", "config.yaml", "checkpoints/last.json"]


@pytest.mark.parametrize("name", FINISHED)
def test_a_file_of_a_finished_run_that_is_missing_or_from_another_run_is_named(
    made: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(made / "run", tmp_path / "copy"))
    other = (other_run(made, tmp_path / "other") / name).read_bytes()
    if other != (folder / name).read_bytes():
        (folder / name).write_bytes(other)
        named = {problem.path for problem in verify_folder(folder).problems}
        assert name in named or (name == "result.json" and "metrics.jsonl" in named)
    (folder / name).unlink()
    assert name in {problem.path for problem in verify_folder(folder).problems}


def test_checkpoints_that_were_removed_whole_are_no_damage(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "run", tmp_path / "copy"))
    shutil.rmtree(folder / "checkpoints")
    assert verify_folder(folder).is_sound


def test_settings_changed_in_any_way_are_named(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "lineage", tmp_path / "copy"))
    path = folder / "config.yaml"
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert [problem.path for problem in verify_folder(folder).problems] == ["config.yaml"]
        if place > 100:
            break


def test_settings_of_another_lineage_are_named(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "lineage", tmp_path / "copy"))
    path = folder / "config.yaml"
    write_settings(path, check_settings(path) | {"weight_decay": 0.5})
    [problem] = verify_folder(folder).problems
    assert problem.path == "config.yaml"
    assert "weight_decay: expected" in problem.text


def test_a_lineage_that_is_older_than_its_runs_is_named(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "lineage", tmp_path / "copy"))
    shutil.copytree(folder / "versions/0001", folder / "versions/0002")
    [problem] = verify_folder(folder).problems
    assert problem.path == "lineage.json"
    assert "expected the increment of 0002, got 1 increments" in problem.text


def test_names_in_a_report_that_lead_out_of_the_run_are_not_followed(
    made: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made / "run", tmp_path / "copy"))
    values = read_sealed(folder / "result.json")
    values["files"] |= {"../secret": "0" * 64}
    write_json(folder / "result.json", sealed(values))
    [problem] = verify_folder(folder).problems
    assert problem.path == "result.json"
    assert "expected names of a run's files, got '../secret'" in problem.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json"])
def test_a_run_takes_no_numbers_from_a_file_of_another_run(
    made: Path, tmp_path: Path, name: str
) -> None:
    expected = TrainReport.read(made / "run/result.json")
    folder = Path(shutil.copytree(made / "run", tmp_path / "copy"))
    foreign = (other_run(made, tmp_path / "other") / name).read_bytes()
    if name == "metrics.jsonl":
        (folder / "result.json").unlink()
    (folder / name).write_bytes(foreign)
    report = train_tiny(made / "store", folder)
    assert report.carryon_nll == expected.carryon_nll
    own, other = (
        {line for line in path.read_text().splitlines() if "loss" in line}
        for path in (made / "run/metrics.jsonl", folder / "metrics.jsonl")
    )
    assert other <= own


@pytest.mark.parametrize("name", ["metrics.jsonl", "curves.png", "carryon/carryon.safetensors"])
def test_a_file_of_a_terabyte_of_nothing_is_named_at_once(
    made: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / name).touch()
    with (tmp_path / "run" / name).open("r+b") as file:
        file.truncate(1 << 40)  # takes no room on the disk

    report = verify_folder(tmp_path / "run")

    assert name in {problem.path for problem in report.problems}


def test_settings_of_another_version_are_named(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "lineage", tmp_path / "copy"))
    path = folder / "versions/0001/config.yaml"
    write_settings(path, check_settings(path) | {"out": "lineage/versions/0002"})
    [problem] = verify_folder(folder).problems
    assert problem.path == "versions/0001/config.yaml"
    assert "out: expected a folder named versions/0001, got" in problem.text


def test_settings_of_a_hundred_kilobytes_are_named_at_once(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "lineage", tmp_path / "copy"))
    write_settings(folder / "versions/0001/config.yaml", {"taps": [None] * 40_000})
    [problem] = verify_folder(folder).problems
    assert problem.path == "versions/0001/config.yaml"
