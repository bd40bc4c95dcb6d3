"""Import of hidden states from files: the store that comes out, resume, corpus, data sets."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from carryon.cache.base.lm_head import widen
from carryon.cache.base.model import Base
from carryon.cache.corpus.dataset import read_corpus
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.exchange.importing import plan_import, run_import
from carryon.cache.exchange.settings import ImportSettings
from carryon.cache.exchange.units import ImportReport
from carryon.cache.extraction.repair import repair
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.format.zarr_metadata import receipt_path
from carryon.cache.settings import CorpusSettings, DataSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify
from carryon.tools.bench.exchange.state_files import (
    LAYERS,
    make_states,
    make_tokens,
    write_data_set,
    write_states,
)

ALL_TAPS = ["final", "prenorm", "layer.0", "layer.1"]
NUM_FILES = 12


def import_files(
    folder: Path,
    base: Base,
    out: Path,
    *,
    limit: int | None = None,
    **options: Any,  # noqa: ANN401
) -> ImportReport:
    """Import files with the tiny base's layers; options of ImportSettings and `plan_import`."""
    names = ImportSettings.__dataclass_fields__
    settings = {"layer_ids": list(LAYERS), "unit_tokens": 64}
    settings |= {name: options.pop(name) for name in list(options) if name in names}
    append = options.pop("append", False)
    plan = plan_import(folder, base=base, out=out, imports=ImportSettings(**settings), **options)
    return run_import(plan, append=append, max_disk_bytes=limit)


def content(root: Path) -> dict[str, bytes]:
    """Return the files of a store but its receipts, which hold seconds."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.parent.name != "units"
    }


@pytest.fixture
def files(tiny_base: Base, store_tmp: Path) -> Path:
    """Files of twelve samples."""
    return write_states(store_tmp / "files", tiny_base, make_tokens(NUM_FILES))


def reference(states: torch.Tensor, base: Base) -> dict[str, NDArray[np.float32]]:
    """Return the states at each tap from those of a file, in plain float32."""
    columns = states.float().numpy()
    norm: Any = base.model.model.norm
    x = torch.from_numpy(columns[:, 2])
    weight = norm.weight.detach().float()
    final = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon) * weight
    rounded = widen(bfloat16_bits(final.numpy()))
    return {
        "final": rounded,
        "prenorm": columns[:, 2],
        "layer.0": columns[:, 0],
        "layer.1": columns[:, 1],
    }


def test_a_store_of_files_holds_their_states_and_verifies(
    files: Path, tiny_base: Base, store_tmp: Path
) -> None:
    report = import_files(files, tiny_base, store_tmp / "store", taps=ALL_TAPS)
    assert report.is_finished
    assert report.imported_files == NUM_FILES
    store = Store.open(store_tmp / "store")
    assert store.num_samples == NUM_FILES
    assert verify(store_tmp / "store", depth="full").is_complete
    assert store.num_units > 3
    for sample in store:
        tensors = load_file(files / f"{sample.id}.safetensors")
        assert sample.tokens.tolist() == tensors["token_ids"].tolist()
        assert sample.loss_mask.all()
        for tap, expected in reference(tensors["hidden_states"], tiny_base).items():
            rtol = 2**-8 if tap == "final" else 0  # the last bit of bfloat16
            np.testing.assert_allclose(sample.float32(tap), expected, rtol=rtol, atol=1e-6)


def test_the_manifest_says_what_made_it(files: Path, tiny_base: Base, store_tmp: Path) -> None:
    import_files(files, tiny_base, store_tmp / "store")
    store = Store.open(store_tmp / "store")
    assert store.taps == ["final", "layer.0", "layer.1"]
    assert store.manifest.forward == {
        "compute_dtype": "bfloat16",
        "attention": "vllm",
        "engine": "vllm",
        "layer_ids": "0 1 2",
        "final": "computed from prenorm with the stored norm",
    }
    errors = store.manifest.profile_error
    assert all(0 < errors[tap]["channel_relative_error"] < 0.01 for tap in ("final", "layer.1"))


def test_ends_of_tokens_are_those_of_the_text_they_spell(tiny_base: Base, store_tmp: Path) -> None:
    text = "the thing on \u00e9t\u00e9 \U0001f600 in the end"
    encoded = tiny_base.tokenizer(text, return_offsets_mapping=True)
    tokens = np.array(encoded["input_ids"])
    folder = write_states(store_tmp / "files", tiny_base, [np.array([1, *tokens])])
    import_files(folder, tiny_base, store_tmp / "store")
    [sample] = Store.open(store_tmp / "store")
    start = len("<|im_start|>")
    ends = [end for _, end in encoded["offset_mapping"]]
    assert sample.char_end.tolist() == [start, *(start + end for end in ends)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_type_of_the_files_is_kept(tiny_base: Base, store_tmp: Path, dtype: str) -> None:
    folder = write_states(store_tmp / "files", tiny_base, make_tokens(4))
    for path in folder.iterdir():
        tensors = load_file(path)
        tensors["hidden_states"] = tensors["hidden_states"].to(getattr(torch, dtype))
        save_file(tensors, path)
    import_files(folder, tiny_base, store_tmp / "store", taps=["prenorm"])
    store = Store.open(store_tmp / "store")
    assert store.manifest.settings["dtype"] == store.manifest.forward["compute_dtype"] == dtype
    for sample in store:
        expected = load_file(folder / f"{sample.id}.safetensors")["hidden_states"][:, 2]
        assert np.array_equal(sample.hidden["prenorm"], expected.numpy())


def test_a_lossy_profile_adds_its_error(files: Path, tiny_base: Base, store_tmp: Path) -> None:
    import_files(files, tiny_base, store_tmp / "exact")
    report = import_files(files, tiny_base, store_tmp / "near", profile="near")
    folders = [store_tmp / "near" / "hidden", store_tmp / "near" / "scale"]
    written = [path for folder in folders for path in folder.rglob("c/**/*") if path.is_file()]
    assert report.stored_bytes == sum(path.stat().st_size for path in written)
    exact, near = (Store.open(store_tmp / name).manifest for name in ("exact", "near"))
    error = "channel_relative_error"
    assert near.profile_error["final"][error] > exact.profile_error["final"][error] + 0.01
    assert "kl" in near.profile_error["final"]


def test_an_import_resumes_to_the_same_bits(files: Path, tiny_base: Base, store_tmp: Path) -> None:
    whole = import_files(files, tiny_base, store_tmp / "whole")
    out = store_tmp / "store"
    sizes = content(store_tmp / "whole").values()
    part = import_files(files, tiny_base, out, limit=sum(map(len, sizes)) + 2000)
    assert not part.is_finished
    assert 0 < part.imported_units < whole.num_units
    rest = import_files(files, tiny_base, out)
    assert rest.imported_units == whole.num_units - part.imported_units
    assert content(out) == content(store_tmp / "whole")
    assert import_files(files, tiny_base, out).imported_units == 0


def test_other_names_are_passed_over_with_a_word(
    files: Path, tiny_base: Base, store_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (files / "request-99.safetensors.part").touch()
    assert import_files(files, tiny_base, store_tmp / "store").imported_files == NUM_FILES
    assert "passed over 1 names" in caplog.text
    assert "request-99.safetensors.part" in caplog.text


def test_a_resumed_import_checks_states_again(
    files: Path, tiny_base: Base, store_tmp: Path
) -> None:
    import_files(files, tiny_base, store_tmp / "whole")
    sizes = content(store_tmp / "whole").values()
    part = import_files(files, tiny_base, store_tmp / "store", limit=sum(map(len, sizes)) + 2000)
    assert not part.is_finished
    for path in files.iterdir():
        tensors = load_file(path)
        save_file(tensors | {"hidden_states": tensors["hidden_states"].roll(1, dims=1)}, path)
    with pytest.raises(InputError, match="expected the base's states"):
        import_files(files, tiny_base, store_tmp / "store")


def test_a_wrong_file_stops_it_and_a_right_one_lets_it_resume(
    files: Path, tiny_base: Base, store_tmp: Path
) -> None:
    path = files / "request-7.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    tensors["hidden_states"][1, 1, 1] = float("nan")
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"request-7.*token 1 in column 1"):
        import_files(files, tiny_base, store_tmp / "store")
    path.write_bytes(before)
    assert import_files(files, tiny_base, store_tmp / "store").is_finished
    Store.open(store_tmp / "store")


def test_a_file_that_is_being_written_is_refused(
    files: Path, tiny_base: Base, store_tmp: Path
) -> None:
    lock = files / "request-2.safetensors.lock"
    with lock.open("w") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"request-2.*another process is writing"):
            import_files(files, tiny_base, store_tmp / "store")
    assert import_files(files, tiny_base, store_tmp / "store").is_finished


def test_a_file_that_changes_meanwhile_is_refused(
    files: Path, tiny_base: Base, store_tmp: Path
) -> None:
    settings = ImportSettings(layer_ids=list(LAYERS), unit_tokens=64)
    plan = plan_import(files, base=tiny_base, out=store_tmp / "store", imports=settings)
    path = files / "request-5.safetensors"
    tensors = load_file(path)
    tensors["token_ids"][0] += 1
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"request-5.*as it was when the import began"):
        run_import(plan)
    path.unlink()
    with pytest.raises(InputError, match=r"request-5.*got none"):
        run_import(plan)


def test_other_files_and_other_options_do_not_resume(
    files: Path, tiny_base: Base, store_tmp: Path
) -> None:
    import_files(files, tiny_base, store_tmp / "store")
    with pytest.raises(SettingMismatchError, match="taps"):
        import_files(files, tiny_base, store_tmp / "store", taps=["prenorm"])
    os.rename(files / "request-1.safetensors", files / "renamed.safetensors")
    with pytest.raises(SettingMismatchError, match="data"):
        import_files(files, tiny_base, store_tmp / "store")


def test_another_base_is_refused(files: Path, tiny_base: Base, tmp_path: Path) -> None:
    from carryon.cache.base.model import load_base
    from carryon.cache.settings import ForwardSettings
    from carryon.tools.bench.tiny_base import make_tiny_base

    other = make_tiny_base(tmp_path / "other", seed=1)
    base = load_base(str(other), forward=ForwardSettings(device="cpu", compute_dtype="float32"))
    with pytest.raises(
        InputError, match=r"request-\d+.*expected the base's states.*Fix: check --b"
    ):
        import_files(files, base, tmp_path / "store")
    assert not (tmp_path / "store" / "zarr.json").exists()


def test_more_files_are_appended(files: Path, tiny_base: Base, store_tmp: Path) -> None:
    out = store_tmp / "store"
    import_files(files, tiny_base, out)
    before = content(out / "hidden")
    more = write_states(store_tmp / "more", tiny_base, make_tokens(5, seed=1), name="more-{}")
    report = import_files(more, tiny_base, out, append=True)
    assert report.imported_files == 5
    assert import_files(more, tiny_base, out, append=False).imported_units == 0
    store = Store.open(out)
    assert store.num_samples == NUM_FILES + 5
    assert {path: content(out / "hidden")[path] for path in before if "/c/" in path} == {
        path: value for path, value in before.items() if "/c/" in path
    }
    tensors = load_file(more / "more-3.safetensors")
    expected = reference(tensors["hidden_states"], tiny_base)["layer.1"]
    assert np.array_equal(store["more-3"].float32("layer.1"), expected)


def test_a_damaged_unit_names_the_way_to_repair_it(
    files: Path, tiny_base: Base, store_tmp: Path
) -> None:
    out = store_tmp / "store"
    import_files(files, tiny_base, out)
    before = content(out)
    shard = out / "hidden" / "final" / "c" / "1" / "0"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    with pytest.raises(InputError, match="carryon import"):
        repair(out, base=tiny_base)
    (out / receipt_path(1)).unlink()
    assert import_files(files, tiny_base, out).imported_units == 1
    assert content(out) == before


# With the corpus that the nodes were given


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Prompts with completions; some held out, two of one text."""
    rows = [
        {"id": f"r{i}", "prompt": "the " * (i % 7 + 1), "completion": "thing on"}
        | ({"split": "held-out"} if i % 4 == 0 else {})
        for i in range(9)
    ]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def answered(corpus: Path, tiny_base: Base, store_tmp: Path) -> Path:
    """Files of the corpus, in another order."""
    texts = read_corpus(
        [str(corpus)], tiny_base.tokenizer, settings=CorpusSettings(), max_tokens=64
    )
    samples = [sample.tokens.astype(np.int64) for sample in texts.samples]
    return write_states(store_tmp / "answered", tiny_base, samples[::-1])


def test_samples_of_the_corpus_find_their_files(
    answered: Path, corpus: Path, tiny_base: Base, store_tmp: Path
) -> None:
    import_files(answered, tiny_base, store_tmp / "store", data=[str(corpus)])
    store = Store.open(store_tmp / "store")
    assert {sample.id for sample in store} == {f"r{i}" for i in range(9)}
    assert store.sample_held_out.sum() == 3
    for sample in store:
        assert 0 < sample.loss_mask.sum() < len(sample.tokens)
        expected = make_states(tiny_base, sample.tokens.astype(np.int64), LAYERS)[:, 1]
        assert np.array_equal(sample.float32("layer.1"), expected.float().numpy())


def test_a_sample_without_a_file_is_an_error_or_counted(
    answered: Path, corpus: Path, tiny_base: Base, store_tmp: Path
) -> None:
    (answered / "request-4.safetensors").unlink()  # of r4; those of r0 and r7 are equal
    with pytest.raises(InputError, match=r"'r4', got none"):
        import_files(answered, tiny_base, store_tmp / "store", data=[str(corpus)])
    import_files(answered, tiny_base, store_tmp / "store", data=[str(corpus)], drop_missing=True)
    store = Store.open(store_tmp / "store")
    assert store.num_samples == 8
    [loss] = store.manifest.parts[0].report["losses"]
    assert (loss["reason"], loss["records"], loss["first"]) == ("no file of states", 1, "r4")


def test_what_reading_the_corpus_lost_is_reported_beside_missing_files(
    answered: Path, corpus: Path, tiny_base: Base, store_tmp: Path
) -> None:
    with corpus.open("a") as file:
        file.write('{"id": "bad", "prompt": 5}\n')
    (answered / "request-4.safetensors").unlink()
    reading = DataSettings(bad_rows="skip")
    options: dict[str, Any] = {"data": [str(corpus)], "data_settings": reading}
    import_files(answered, tiny_base, store_tmp / "store", drop_missing=True, **options)
    [part] = Store.open(store_tmp / "store").manifest.parts
    losses = {loss["reason"]: loss["records"] for loss in part.report["losses"]}
    assert losses == {"bad row": 1, "no file of states": 1}
    assert [part.report[name] for name in ("records", "kept")] == [10, 8]
    assert part.counts["records"] == 10
    skipped = (store_tmp / "store" / "skipped.jsonl").read_text().splitlines()
    assert ["corpus.jsonl:10" in skipped[0], "r4" in skipped[1]] == [True, True]


def test_records_of_one_split_group_are_counted_one_by_one(
    answered: Path, corpus: Path, tiny_base: Base, store_tmp: Path
) -> None:
    rows = [json.loads(line) | {"split_group": "all"} for line in corpus.read_text().splitlines()]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (answered / "request-4.safetensors").unlink()
    import_files(answered, tiny_base, store_tmp / "store", data=[str(corpus)], drop_missing=True)
    store = Store.open(store_tmp / "store")
    assert len(set(store.sample_groups.tolist())) == 1
    assert store.manifest.parts[0].report["kept"] == 8


def test_a_file_without_a_sample_is_an_error(
    answered: Path, corpus: Path, tiny_base: Base, store_tmp: Path
) -> None:
    write_states(store_tmp / "x", tiny_base, make_tokens(1), name="extra")
    os.rename(store_tmp / "x" / "extra.safetensors", answered / "extra.safetensors")
    with pytest.raises(InputError, match=r"extra.*a sample of the data"):
        import_files(answered, tiny_base, store_tmp / "store", data=[str(corpus)])


def test_another_loss_mask_than_the_corpus_has_is_an_error(
    answered: Path, corpus: Path, tiny_base: Base, store_tmp: Path
) -> None:
    path = answered / "request-0.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"loss_mask": torch.ones_like(tensors["token_ids"])}, path)
    with pytest.raises(InputError, match=r"request-0.*loss mask of the sample 'r1'"):
        import_files(answered, tiny_base, store_tmp / "store", data=[str(corpus)])


def test_files_of_other_names_do_not_resume(
    answered: Path, corpus: Path, tiny_base: Base, store_tmp: Path
) -> None:
    import_files(answered, tiny_base, store_tmp / "store", data=[str(corpus)])
    os.rename(answered / "request-1.safetensors", answered / "renamed.safetensors")
    with pytest.raises(SettingMismatchError, match="files: expected those that the import began"):
        import_files(answered, tiny_base, store_tmp / "store", data=[str(corpus)])


def test_of_samples_with_equal_tokens_each_finds_the_file_of_its_mask(
    tiny_base: Base, store_tmp: Path
) -> None:
    rows = [
        {"id": "short", "prompt": "the thing", "completion": " on"},
        {"id": "long", "prompt": "the", "completion": " thing on"},
    ]
    path = store_tmp / "equal.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = read_corpus([str(path)], tiny_base.tokenizer, settings=CorpusSettings(), max_tokens=64)
    first, second = texts.samples
    assert first.tokens.tolist() == second.tokens.tolist()
    tokens = [sample.tokens.astype(np.int64) for sample in (first, second)]
    folder = write_states(store_tmp / "answered", tiny_base, tokens)
    for number, sample in enumerate((first, second)):
        name = folder / f"request-{number}.safetensors"
        mask = torch.from_numpy(sample.loss_mask.copy())
        save_file(load_file(name) | {"loss_mask": mask}, name)
    import_files(folder, tiny_base, store_tmp / "store", data=[str(path)])
    store = Store.open(store_tmp / "store")
    for sample in (first, second):
        assert store[sample.id].loss_mask.tolist() == sample.loss_mask.tolist()


# A data set of speculators


def test_masks_are_those_of_the_data_set(tiny_base: Base, store_tmp: Path) -> None:
    folder = write_data_set(store_tmp / "data", tiny_base, make_tokens(NUM_FILES))
    import_files(folder, tiny_base, store_tmp / "store")
    rows = datasets.load_from_disk(str(folder))
    store = Store.open(store_tmp / "store")
    for number in range(NUM_FILES):
        sample = store[f"row-{number}"]
        assert sample.tokens.tolist() == rows[number]["input_ids"].tolist()
        assert sample.loss_mask.tolist() == rows[number]["loss_mask"].tolist()


def test_files_of_a_data_set_may_lie_elsewhere(tiny_base: Base, store_tmp: Path) -> None:
    folder = write_data_set(store_tmp / "data", tiny_base, make_tokens(3))
    os.rename(folder / "hidden_states", store_tmp / "elsewhere")
    report = import_files(folder, tiny_base, store_tmp / "store", states=store_tmp / "elsewhere")
    assert report.imported_files == 3


def test_rows_without_a_file_are_counted(tiny_base: Base, store_tmp: Path) -> None:
    folder = write_data_set(store_tmp / "data", tiny_base, make_tokens(5))
    (folder / "hidden_states" / "hs_2.safetensors").unlink()
    import_files(folder, tiny_base, store_tmp / "store", drop_missing=True)
    store = Store.open(store_tmp / "store")
    assert {sample.id for sample in store} == {"row-0", "row-1", "row-3", "row-4"}
    assert (store_tmp / "store" / "skipped.jsonl").read_text().count("hs_2") == 1
