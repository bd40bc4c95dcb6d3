"""The public call `extract`: rows in memory, options by name, the open store it returns."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_bases import FAMILIES, make_tiny_base
from support.tiny_stores import FORWARD, SETTINGS, error_of, extract_tiny, files_below, receipts_in

from carryon.cache import (
    CarryOnError,
    CorpusSettings,
    Store,
    StoreSettings,
    extract,
    repair,
    verify,
)
from carryon.cache.base.lm_head import widen
from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import InputError, SettingMismatchError, UnfinishedStoreError
from carryon.cache.format.zarr_metadata import receipt_path, shard_path

ROWS: list[dict[str, Any]] = [
    {"text": f"{index} is the thing " + "on an ice " * (index % 4), "split": split}
    for index, split in enumerate(["train", "train", "held-out", "train"] * 3)
]
OPTIONS: dict[str, Any] = {"unit_tokens": 64, "device": "cpu", "compute_dtype": "float32"}


def test_rows_in_memory_become_an_open_store(tiny_base_folder: Path, store_tmp: Path) -> None:
    store = extract(base=str(tiny_base_folder), data=ROWS, out=store_tmp / "store", **OPTIONS)
    assert isinstance(store, Store)
    assert store.num_samples == len(ROWS)
    assert store.taps == ["final"]
    assert store.sample_held_out.sum() == 3
    assert all(re.fullmatch(r"rows?-[0-9a-f]{8}-\d+", store.sample_id(row)) for row in range(12))
    assert len(np.unique(store.sample_groups)) == len(ROWS)
    assert verify(str(store_tmp / "store")).is_complete


def test_rows_make_the_store_that_the_same_json_lines_make(
    tiny_base: Base, store_tmp: Path
) -> None:
    path, named = store_tmp / "row.jsonl", [row | {"id": n} for n, row in enumerate(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    for name, data in (("file", path), ("rows", iter(named))):
        extract(base=tiny_base, data=data, out=store_tmp / name, store=SETTINGS, forward=FORWARD)
    files, rows = (files_below(store_tmp / name) for name in ("file", "rows"))
    arrays = [path for path in files if path.startswith(("hidden", "tokens", "loss_mask", "samp"))]
    assert len(arrays) > 10
    assert {path: rows[path] for path in arrays} == {path: files[path] for path in arrays}


def test_the_same_rows_resume_and_others_are_refused(tiny_base: Base, store_tmp: Path) -> None:
    root = store_tmp / "store"
    extract(base=tiny_base, data=ROWS, out=root, **OPTIONS)
    before = files_below(root)
    (root / receipt_path(1)).unlink()
    kept = receipts_in(root)
    extract(base=tiny_base, data=(dict(row) for row in ROWS), out=root, **OPTIONS)
    after = receipts_in(root)
    assert {name: after[name] for name in kept} == kept
    hidden = [path for path in before if path.startswith("hidden/")]
    now = files_below(root)
    assert {path: now[path] for path in hidden} == {path: before[path] for path in hidden}
    for data in (ROWS[:-1], [*ROWS[:-1], {"text": "another"}]):
        with pytest.raises(SettingMismatchError, match="data: expected those of the store"):
            extract(base=tiny_base, data=data, out=root, **OPTIONS)
    store = extract(
        base=tiny_base, data=[{"text": "another", "id": "x"}], out=root, append=True, **OPTIONS
    )
    assert store.num_samples == len(ROWS) + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedding_is_stored_as_the_base_reads_it(family: str, store_tmp: Path) -> None:
    folder, root = make_tiny_base(store_tmp / "base", family), store_tmp / "store"
    base = load_base(str(folder), forward=FORWARD)
    store = extract(base=base, data=ROWS, out=root, taps=["layer.0", "final"], **OPTIONS)
    for row in range(store.num_samples):
        sample = store.read_sample(row)
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        with torch.inference_mode():
            shown = base.model(input_ids=tokens, output_hidden_states=True).hidden_states
        expected = shown[0][0].bfloat16().float().numpy()
        np.testing.assert_array_equal(widen(sample.hidden["layer.0"]), expected)
    (root / shard_path("layer.0", 1)).unlink()
    before = files_below(root)
    assert repair(root, base=base, forward=FORWARD).computed_units == [1]
    assert {name: files_below(root)[name] for name in before if "hidden" in name} == {
        name: content for name, content in before.items() if "hidden" in name
    }


def test_settings_are_given_as_objects_or_by_field_names(tiny_base: Base, store_tmp: Path) -> None:
    whole = extract(
        base=tiny_base,
        data=ROWS,
        out=store_tmp / "whole",
        corpus=CorpusSettings(mask="all", max_tokens=20),
        store=StoreSettings(taps=["layer.1"], unit_tokens=64),
        forward=FORWARD,
    )
    named = extract(
        base=tiny_base,
        data=ROWS,
        out=store_tmp / "named",
        forward=FORWARD,
        mask="all",
        max_tokens=20,
        taps=["layer.1"],
        unit_tokens=64,
    )
    assert named.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tap": ["final"]}, "no setting tap: did you mean taps?"),
        ({"batch_token": 9}, "no setting batch_token: did you mean batch_tokens?"),
        ({"unit_tokens": 3}, "unit_tokens: expected 16 or more, got 3"),
        (
            {"store": StoreSettings(), "seed": 1},
            "seed: expected it once, got it as an option and in StoreSettings. "
            "Fix: leave one of them out",
        ),
    ],
    ids=["no field", "nearly a field", "out of range", "both ways"],
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(
    options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    call = lambda: extract(base="./none", data=ROWS, out=tmp_path / "store", **options)  # noqa: E731
    assert error_of(call) == f"InputError: {text}"
    assert not (tmp_path / "store").exists()


def test_a_row_that_is_no_record_is_named_and_nothing_is_written(
    tiny_base: Base, tmp_path: Path
) -> None:
    rows = [*ROWS, {"question": "a"}]
    with pytest.raises(InputError, match="^row 13: expected messages, .* got question"):
        extract(base=tiny_base, data=rows, out=tmp_path / "store", **OPTIONS)
    assert not (tmp_path / "store").exists()


def test_a_store_stopped_by_its_limit_is_opened_unfinished_with_a_warning(
    tiny_base: Base, store_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = store_tmp / "store"
    extract(base=tiny_base, data=ROWS, out=root, **OPTIONS)
    for unit in (0, 1):
        (root / receipt_path(unit)).unlink()
        (root / shard_path("final", unit)).unlink()
    limit = sum(map(len, files_below(root).values())) + 100
    with caplog.at_level(logging.WARNING):
        store = extract(base=tiny_base, data=ROWS, out=root, max_disk_bytes=limit, **OPTIONS)
    assert "stopped at max_disk_bytes" in caplog.text
    assert len(store.finished_units) == store.num_units - 2
    with pytest.raises(UnfinishedStoreError):
        Store.open(root)
    extract(base=tiny_base, data=ROWS, out=root, **OPTIONS)
    assert Store.open(root).fingerprint == store.fingerprint


def test_repair_finds_the_base_and_its_settings_in_the_store(
    tiny_base: Base, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    extract(base=tiny_base, data=ROWS, out=root, **OPTIONS)
    before = files_below(root)
    (root / shard_path("final", 1)).unlink()
    assert not verify(root).is_complete
    assert repair(str(root)).computed_units == [1]
    assert files_below(root)[shard_path("final", 1)] == before[shard_path("final", 1)]
    assert issubclass(SettingMismatchError, CarryOnError)


def test_the_summary_counts_what_was_computed(
    tiny_base: Base, store_data: Path, store_tmp: Path
) -> None:
    report = extract_tiny(tiny_base, store_data, store_tmp / "store")
    store = Store.open(store_tmp / "store")
    assert report.computed_tokens == report.num_tokens == store.num_tokens
    assert report.computed_units == report.num_units == store.num_units
    assert report.raw_bytes == store.num_tokens * 16 * 2 * 2  # D = 16, bfloat16, two taps
    shards = [
        (store_tmp / "store" / shard_path(tap, unit)).stat().st_size
        for tap in store.taps
        for unit in range(store.num_units)
    ]
    assert report.stored_bytes == sum(shards)
