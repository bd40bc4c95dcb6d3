"""Export in the layout of speculators, and back: equal bits; and read by its own reader."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.tiny_stores import SETTINGS, extract_tiny

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.exchange.exporting import export_speculators
from carryon.cache.exchange.importing import plan_import, run_import
from carryon.cache.exchange.recoding import recode
from carryon.cache.exchange.settings import ImportSettings
from carryon.cache.store.reader import Store

TAPS = ["final", "prenorm", "layer.1"]


@pytest.fixture(scope="module")
def store(tiny_base: Base, store_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with prenorm."""
    root = tmp_path_factory.mktemp("stores") / "store"
    extract_tiny(tiny_base, store_data, root, store=replace(SETTINGS, taps=TAPS))
    return root


def import_again(folder: Path, base: Base, out: Path) -> Store:
    """Import an export with the taps that it holds."""
    settings = ImportSettings(taps=["prenorm", "layer.1"], unit_tokens=64)
    run_import(plan_import(folder, base=base, out=out, imports=settings))
    return Store.open(out)


def test_an_export_imports_to_equal_bits(store: Path, tiny_base: Base, store_tmp: Path) -> None:
    report = export_speculators(store, out=store_tmp / "data")
    before, after = Store.open(store), import_again(store_tmp / "data", tiny_base, store_tmp / "s")
    assert report.layer_ids == [1, 2]
    assert report.written_files == before.num_samples == after.num_samples
    held_out = {after.sample_id(i): bool(x) for i, x in enumerate(after.sample_held_out)}
    assert any(held_out.values())
    for index, expected in enumerate(before):
        got = after[expected.id]
        for name in ("tokens", "loss_mask", "char_end"):
            assert np.array_equal(getattr(got, name), getattr(expected, name))
        for tap in ("prenorm", "layer.1"):
            assert got.hidden[tap].dtype == expected.hidden[tap].dtype
            assert np.array_equal(got.hidden[tap], expected.hidden[tap])
        assert held_out[expected.id] == before.sample_held_out[index]
        assert after.sample_groups[got.index] == before.sample_groups[index]
        assert after.sample_roles[got.index] == before.sample_roles[index]


def test_the_last_column_is_before_the_norm(store: Path, store_tmp: Path) -> None:
    export_speculators(store, out=store_tmp / "data")
    rows = datasets.load_from_disk(str(store_tmp / "data"))
    opened = Store.open(store)
    for number, sample in enumerate(opened):
        path = store_tmp / "data" / "hidden_states" / f"hs_{number}.safetensors"
        with safe_open(path, "pt") as file:
            states = file.get_tensor("hidden_states")
            assert file.metadata()["layer_ids"] == "1 2"
            assert torch.equal(file.get_tensor("token_ids"), rows[number]["input_ids"])
        assert states.shape == (len(sample.tokens), 2, opened.width)
        assert np.array_equal(states[:, 1].float().numpy(), sample.float32("prenorm"))
        assert int(rows[number]["seq_len"]) == len(sample.tokens)
        assert rows[number]["loss_mask"].tolist() == sample.loss_mask.tolist()


def test_an_interrupted_export_resumes(
    store: Path, store_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export_speculators(store, out=store_tmp / "whole")
    read, calls = Store.read_unit, [0]

    def fail_at_the_third(*args: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return read(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "read_unit", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        export_speculators(store, out=store_tmp / "data")
    monkeypatch.undo()
    assert not (store_tmp / "data" / "state.json").exists()
    rest = export_speculators(store, out=store_tmp / "data")
    assert 0 < rest.written_files < whole.written_files
    assert _content(store_tmp / "data") == _content(store_tmp / "whole")


def test_a_file_that_was_cut_off_is_written_again(store: Path, store_tmp: Path) -> None:
    export_speculators(store, out=store_tmp / "data")
    before = _content(store_tmp / "data")
    assert export_speculators(store, out=store_tmp / "data").written_files == 0
    os.truncate(store_tmp / "data" / "hidden_states" / "hs_3.safetensors", 300)
    assert export_speculators(store, out=store_tmp / "data").written_files == 1
    assert _content(store_tmp / "data") == before


def _content(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_store_without_prenorm_is_refused(
    store_original: Path, store: Path, store_tmp: Path
) -> None:
    with pytest.raises(InputError, match=r"prenorm, which the last column holds.*--taps prenorm"):
        export_speculators(store_original, out=store_tmp / "data")
    with pytest.raises(InputError, match=r"expected some of prenorm layer.1, got final"):
        export_speculators(store, out=store_tmp / "data", taps=["final"])
    with pytest.raises(InputError, match=r"prenorm among them.*Fix: --taps layer.1 prenorm"):
        export_speculators(store, out=store_tmp / "data", taps=["layer.1"])
    assert not (store_tmp / "data").exists()


def test_a_lossy_store_is_exported_as_it_reads_with_a_warning(
    store: Path, store_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recode(store, out=store_tmp / "near", profile="near")
    export_speculators(store_tmp / "near", out=store_tmp / "data")
    assert "rounded by the profile near" in caplog.text
    for number, sample in enumerate(Store.open(store_tmp / "near")):
        with safe_open(
            store_tmp / "data" / "hidden_states" / f"hs_{number}.safetensors", "pt"
        ) as f:
            states = f.get_tensor("hidden_states").float().numpy()
        assert np.array_equal(states[:, 0], sample.float32("layer.1"))


def test_a_part_of_a_store_is_exported_alone(
    store: Path, tiny_base: Base, store_more_data: Path, store_tmp: Path
) -> None:
    grown = store_tmp / "grown"
    shutil.copytree(store, grown)
    settings = replace(SETTINGS, taps=TAPS)
    extract_tiny(tiny_base, store_more_data, grown, store=settings, append=True)
    export_speculators(f"{grown}#2", out=store_tmp / "data")
    part = Store.open(f"{grown}#2")
    assert part.num_samples < Store.open(grown).num_samples
    rows = datasets.load_from_disk(str(store_tmp / "data")).with_format(None)
    assert rows["input_ids"][:] == [one.tokens.tolist() for one in part]
    assert rows["id"][:] == [one.id for one in part]
    assert rows["is_held_out"][:] == part.sample_held_out.astype(bool).tolist()


def test_other_folders_are_not_touched(store: Path, store_tmp: Path) -> None:
    folder = store_tmp / "data"
    folder.mkdir()
    (folder / "mine").write_text("x")
    with pytest.raises(InputError, match="mine"):
        export_speculators(store, out=folder)
    shutil.rmtree(folder)
    export_speculators(store, out=folder)
    with pytest.raises(SettingMismatchError, match="another one"):
        export_speculators(store, out=folder, taps=["prenorm"])


def test_speculators_reads_it_with_its_own_reader(store: Path, store_tmp: Path) -> None:
    data = pytest.importorskip(
        "speculators.train.data", reason="speculators and hs-connectors are not installed"
    )
    export_speculators(store, out=store_tmp / "data")
    reader = data.ArrowDataset(max_len=256, datapath=store_tmp / "data", on_missing="raise")
    opened = Store.open(store)
    assert len(reader) == opened.num_samples
    for number, sample in enumerate(opened):
        row = reader[number]
        assert row["input_ids"].tolist() == sample.tokens.tolist()
        assert row["loss_mask"].tolist() == sample.loss_mask.tolist()
        for name, tap in (("hidden_states", "layer.1"), ("verifier_last_hidden_states", "prenorm")):
            assert np.array_equal(row[name].float().numpy(), sample.float32(tap))
