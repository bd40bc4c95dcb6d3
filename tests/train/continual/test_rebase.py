"""A lineage on another base starts from the newest version of the old one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bases import make_tiny_base, write_tiny_gguf
from support.tiny_runs import TINY, without_plots, write_texts

from carryon.cache.errors import InputError
from carryon.train.continual.lineage import update
from carryon.train.continual.lineage_dir import Lineage, open_lineage
from carryon.train.continual.rebase import rebase
from carryon.train.data.datasets import open_data
from carryon.train.modules.serialization import load_carryon

SETTINGS = TINY.with_options(min_lr_ratio=0.1)


@pytest.fixture(autouse=True, scope="module")
def no_plots() -> Iterator[None]:
    """Drawing takes longer than tiny runs."""
    with without_plots():
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    return [write_texts(folder / f"{number}.jsonl") for number in range(2)]


@pytest.fixture(scope="module")
def old_root(
    texts: list[Path], tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A lineage of two updates."""
    root = tmp_path_factory.mktemp("old") / "lineage"
    for path in texts:
        update(lineage=str(root), data=[str(path)], base=str(tiny_base_folder), settings=SETTINGS)
    return root


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the same width as the tiny one, with other weights."""
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "other", seed=1)


def test_a_lineage_on_a_new_base_starts_from_the_old_version(
    old_root: Path, other_base: Path, tmp_path: Path
) -> None:
    old = open_lineage(old_root)
    given: dict[str, Any] = {
        "lineage": str(tmp_path / "new"),
        "old_lineage": str(old.root),
        "base": str(other_base),
        "settings": SETTINGS,
        "also_from_scratch": True,
    }
    report = rebase(**given)

    new = open_lineage(tmp_path / "new")
    assert report.new_weights == 0
    assert report.start_nll not in (report.base_nll, report.from_old_nll)
    assert report.from_scratch_nll not in (None, report.from_old_nll)
    assert new.predecessor is not None
    assert new.predecessor["from_scratch_nll"] == report.from_scratch_nll
    assert _held_out_ids(new) == _held_out_ids(old)
    assert open_lineage(old.root) == old
    assert rebase(**given) == report


def test_a_base_of_another_width_keeps_the_body_only(old_root: Path, tmp_path: Path) -> None:
    base = write_tiny_gguf(tmp_path / "wide.gguf")
    old = open_lineage(old_root)
    report = rebase(
        lineage=str(tmp_path / "new"),
        old_lineage=str(old.root),
        base=str(base),
        settings=SETTINGS,
    )

    module, _ = load_carryon(old.version(2).carryon)
    assert report.kept_weights == sum(weight.numel() for weight in module.body.parameters())
    assert report.new_weights > 0
    assert report.start_nll == report.base_nll  # the new up-projection starts at zero


def test_moved_or_changed_texts_are_refused(
    old_root: Path, texts: list[Path], other_base: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "lineage": str(tmp_path / "new"),
        "old_lineage": str(old_root),
        "base": str(other_base),
        "settings": SETTINGS,
    }
    before = texts[1].read_text()
    texts[1].write_text(before + "\n")
    with pytest.raises(InputError, match="not found: 1.jsonl. Fix: give them with --data"):
        rebase(**given)
    texts[1].write_text(before)
    with pytest.raises(InputError, match="got width 8 -> 4"):
        rebase(**given | {"settings": SETTINGS.with_options(width=4)})


def test_the_same_base_is_refused(old_root: Path, tiny_base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected another base than that of"):
        rebase(
            lineage=str(tmp_path / "new"),
            old_lineage=str(old_root),
            base=str(tiny_base_folder),
            settings=SETTINGS,
        )


def _held_out_ids(lineage: Lineage) -> set[str]:
    ids = set()
    for store in (store for each in lineage.increments for store in each.stores):
        data = open_data([store], SETTINGS)
        ids |= {data.store.sample_id(sample) for sample in data.split.held_out.tolist()}
    return ids
