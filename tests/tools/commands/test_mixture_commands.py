"""Every command with several stores: it works, or it says in one line what it needs."""

import json
import shutil
from pathlib import Path

import pytest
from support.mixed_stores import make_anchor, make_source, write_data

from carryon.tools.cli.main import main
from carryon.train.trainer import finish

SHAPE = "--width 8 --heads 2 --blocks 1 --intermediate-size 8 --epochs 1 --device cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, two that are aligned to it, and a run that mixes the first."""
    root = tmp_path_factory.mktemp("commands")
    anchor = make_anchor(root)
    make_source(root, anchor, name="good")
    make_source(root, anchor, name="other", kind="metaspace", vocab_size=360, seed=5)
    (root / "again").symlink_to(root / "good")
    shutil.copytree(root / "good", root / "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(finish, "plot_curves", lambda metrics, path: False)
        assert main(f"train --store anchor --mix good --out run {SHAPE}".split()) == 0
    return root


def said(
    words: str, folder: Path, capsys: pytest.CaptureFixture[str], *, code: int
) -> tuple[str, str]:
    """Run a command in `folder`; return its last lines on stdout and stderr."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = main(words.split())
    shown = capsys.readouterr()
    assert ended == code, shown.err
    out, err = ((text.strip().splitlines() or [""])[-1] for text in (shown.out, shown.err))
    return out, err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("train --store anchor --mix anchor --out new", "got the anchor again"),
        ("train --store anchor --mix good good --out new", "--mix: expected each once"),
        ("train --store anchor --mix good ./good --out new", "which are one store"),
        ("train --store anchor --mix good again --out new", "which are one store"),
        ("train --store anchor --mix good copy --out new", "which are one store"),
        ("train --store anchor --mix nowhere --out new", "expected a store (zarr.json)"),
        ("train --store anchor --mix good-base --out new", "expected a store (zarr.json)"),
        ("train --store good --mix anchor --out new", "Fix: give the anchor with --store"),
        (f"train --store anchor --out run {SHAPE}", "mix_fingerprints is"),
        (f"train --store anchor --mix other --out run {SHAPE}", "mix_fingerprints is"),
        (f"train --store anchor --mix good other --out run {SHAPE}", "mix_fingerprints is"),
        (f"train --store anchor --mix good --mix-by both --out run {SHAPE}", "mix_by is"),
        ("evaluate --store anchor --carryon run/carryon", "evaluate --mix STORE"),
        ("evaluate --store anchor --carryon run/carryon --mix other", "expected stores of"),
        ("evaluate --store anchor --carryon run/carryon --mix good again", "are one store"),
        ("evaluate --store good --carryon run/carryon --mix good", "give the anchor"),
        ("sweep --store anchor --mix good --out new --vary mix=good,other", "one value for all"),
        ("update --lineage new --store anchor --mix good", "mix: expected none in a lineage"),
        ("update --lineage new --store good", "expected a store of its own"),
        ("versions --lineage run", "expected a lineage"),
        ("merge --carryon run/carryon --out new", "a mixture of several bases"),
        ("inspect good --sample 0", "--sample: expected a store of its own"),
        ("extract --base good-base --data data --out good --append", "without --append"),
        ("extract --base good-base --data data --align-to anchor --out new --dry-run", "--dry-run"),
        ("compare --base anchor-base --data data --out new --mix good", "no option --mix"),
        ("plan-memory --base-width 16 --vocab-size 600 --mix anchor", "got a store alone"),
        ("plan-memory --base-width 16 --vocab-size 9 --mix good", "--vocab-size: expected 600"),
        (
            "plan-memory --base-width 16 --vocab-size 600 --mix good --mix-by both --mix-taps x",
            "--mix-taps: good: expected final, stable, got x",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, text: str
) -> None:
    _, err = said(words, folder, capsys, code=2)
    assert ": error: " in err
    assert text in err
    assert not (folder / "new").exists()


def test_an_aligned_store_is_shown_checked_and_mended(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "good", tmp_path / "good")
    said("inspect good", tmp_path, capsys, code=0)
    out, _ = said("verify good --full", tmp_path, capsys, code=0)
    assert json.loads(out)["is_sound"]
    path = tmp_path / "good/hidden/final/c/0/0"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    shutil.rmtree(tmp_path / "good/aligned")
    said("verify good --full", tmp_path, capsys, code=1)
    _, err = said(f"repair good --base {folder / 'other-base'}", tmp_path, capsys, code=2)
    assert "base.config_sha256: expected" in err
    said(f"repair good --base {folder / 'good-base'}", tmp_path, capsys, code=0)
    said("verify good --full", tmp_path, capsys, code=0)


def test_a_plan_of_memory_reads_the_sizes_of_other_bases(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "plan-memory --base-width 16 --vocab-size 600"
    one, gate, both = (
        json.loads(said(f"{words} {more}", folder, capsys, code=0)[0])["parts"]
        for more in ("", "--mix good", "--mix good other --mix-by both")
    )
    assert "gate" not in one
    assert gate["weights"] == one["weights"] < both["weights"]
    assert one["batches"] * 3 == both["batches"]
    assert 0 < gate["projections"] < both["projections"]


def test_a_preset_and_saved_settings_name_other_bases(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "plot_curves", lambda metrics, path: False)
    words = "--config 1mb --epochs 1 --width 8 --heads 2 --intermediate-size 8 --device cpu"
    first, _ = said(f"train --store anchor --mix good --out one {words}", folder, capsys, code=0)
    again = "train --config one/config.yaml --store anchor --out one --device cpu"
    assert json.loads(said(again, folder, capsys, code=0)[0]) == json.loads(first)
    assert json.loads(first)["mixture"]["gate_shares"].keys() == {"carry-on", "good-base"}


def test_the_texts_of_another_corpus_are_not_aligned(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path, [{"id": "text-0", "text": "another text under an equal id"}])
    words = f"extract --base good-base --data {tmp_path}/text.jsonl --align-to anchor --out new"
    _, err = said(f"{words} --drop-missing --device cpu", folder, capsys, code=2)
    assert "sample 'text-0': expected the text that anchor was made of" in err
