"""Predictions of an extraction against what it then writes."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny_stores import FORWARD, READING, files_below

from carryon.cache.base.model import Base
from carryon.cache.extraction.estimate import estimate
from carryon.cache.extraction.forward import run_units
from carryon.cache.extraction.pipeline import run_extraction
from carryon.cache.extraction.plan import ExtractionPlan, plan_extraction
from carryon.cache.extraction.prediction import (
    PILOT_BATCHES,
    Pilot,
    TimedBatch,
    Totals,
    batch_seconds,
    fit_seconds,
    spread,
)
from carryon.cache.extraction.report import ExtractReport
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.zarr_metadata import receipt_path, shard_path
from carryon.cache.settings import CorpusSettings, StoreSettings
from carryon.cache.store.sizes import bytes_by_folder, receipt_bytes
from carryon.tools.cli.main import main

BYTES = 0.03  # relative error


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 texts of 5 to 100 tokens."""
    random = np.random.default_rng(0)
    words = [
        "the",
        "thing",
        "ran",
        "and",
        "then",
        "another",
        "owl",
        "in",
        "the",
        "barn",
        "sang",
        "of",
        "an",
        "ice",
        "age",
    ]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = (" ".join(random.choice(words, random.integers(2, 26))) for _ in range(160))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def plan_of(base: Base, texts: Path, root: Path, **settings: object) -> ExtractionPlan:
    """Return a plan with units of 1,024 tokens and batches of 128."""
    return plan_extraction(
        base=base,
        data=[texts],
        out=root,
        corpus=CorpusSettings(),
        store=StoreSettings.from_dict({"unit_tokens": 1024, **settings}),
        forward=replace(FORWARD, batch_tokens=128),
        data_settings=READING,
    )


def run(plan: ExtractionPlan) -> tuple[ExtractReport, Totals]:
    """Return the report of an extraction and its prediction."""
    report = run_extraction(plan)
    assert report.predicted is not None
    return report, report.predicted


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"taps": ["final", "layer.1"], "with_blocks": 1},
        {"profile": "near"},
        {"profile": "raw"},
        {"dtype": "float16"},
    ],
    ids=lambda settings: "-".join(settings) or "exact",
)
def test_predicted_bytes_are_those_written(
    tiny_base: Base, texts: Path, store_tmp: Path, settings: dict[str, object]
) -> None:
    """By the run itself and by a dry run, of all parts."""
    plan = plan_of(tiny_base, texts, store_tmp / "store", **settings)
    expected = estimate(plan)
    assert not (store_tmp / "store").exists()
    report, predicted = run(plan)
    sizes = bytes_by_folder(store_tmp / "store")
    assert sum(sizes.values()) == sum(map(len, files_below(store_tmp / "store").values()))
    states = sizes["hidden"] + sizes.get("scale", 0)
    documents = sum(
        len(content)
        for path, content in files_below(store_tmp / "store").items()
        if path.startswith(("hidden", "scale")) and path.endswith("zarr.json")
    )
    assert report.stored_bytes == states - documents
    assert report.store_bytes == sum(sizes.values())
    assert report.head_bytes == sizes["head"] == predicted.head_bytes == expected.head_bytes
    assert report.blocks_bytes == sizes.get("blocks", 0) == predicted.blocks_bytes
    assert expected.blocks_bytes == report.blocks_bytes
    assert report.raw_bytes == predicted.raw_bytes == expected.raw_bytes
    profile = expected.profiles[plan.manifest.settings["profile"]]
    for made in (predicted, profile):
        assert made.stored_bytes == pytest.approx(report.stored_bytes, rel=BYTES)
        assert made.store_bytes == pytest.approx(report.store_bytes, rel=BYTES)


def test_the_log_says_before_and_after_the_same_quantities(
    tiny_base_folder: Path,
    texts: Path,
    store_tmp: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--base", str(tiny_base_folder), "--data", str(texts), "--device", "cpu"]
    words += [
        "--out",
        str(store_tmp / "store"),
        "--unit-tokens",
        "1024",
        "--tokenizer-workers",
        "1",
    ]
    assert main(["extract", *words, "--batch-tokens", "128"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out.splitlines()[-1])
    assert set(facts["predicted"]) <= set(facts)
    lines = captured.err.splitlines()
    before, after = (
        next(number for number, line in enumerate(lines) if line.startswith(word))
        for word in ("predicted: states", "written: states")
    )
    assert before < after
    for word in ("raw, head", "blocks", "store", "in all; "):
        assert word in lines[before]
        assert word in lines[after]
    known = next(line for line in lines if line.startswith("before the states: head"))
    assert f"after {PILOT_BATCHES} or more of " in known


def test_batches_in_another_order_give_the_same_bits(
    tiny_base: Base, texts: Path, store_tmp: Path
) -> None:
    plan = plan_of(tiny_base, texts, store_tmp / "store")
    run_extraction(plan)
    paths = [shard_path("final", unit) for unit in range(plan.manifest.num_units)]
    before = files_below(store_tmp / "store")
    manifest = read_manifest(store_tmp / "store")
    report = run_units(
        store_tmp / "store",
        manifest,
        tiny_base,
        batch_tokens=128,
        max_disk_bytes=None,
        units=range(manifest.num_units),
    )
    assert report.predicted is None
    after = files_below(store_tmp / "store")
    assert [after[path] for path in paths] == [before[path] for path in paths]


def test_a_resumed_extraction_predicts_what_is_left(
    tiny_base: Base, texts: Path, store_tmp: Path
) -> None:
    """States of the missing units; the store as a whole. A shard without a receipt counts once."""
    root = store_tmp / "store"
    plan = plan_of(tiny_base, texts, root)
    first = run_extraction(plan)
    (root / receipt_path(1)).unlink()
    (root / receipt_path(2)).write_bytes(b"damaged" * 5000)  # does not count either
    report, predicted = run(plan_of(tiny_base, texts, root))
    assert report.computed_units == 2
    assert 0 < report.raw_bytes < first.raw_bytes
    assert predicted.raw_bytes == report.raw_bytes
    assert predicted.stored_bytes == pytest.approx(report.stored_bytes, rel=BYTES)
    assert predicted.store_bytes == pytest.approx(first.store_bytes, rel=0.01)
    again = run_extraction(plan_of(tiny_base, texts, root))
    assert again.predicted is None
    assert again.store_bytes == report.store_bytes


def test_the_size_of_a_receipt_is_known_before_it_is_written(
    tiny_base: Base, texts: Path, store_tmp: Path
) -> None:
    for profile in ("exact", "raw", "near"):
        root = store_tmp / profile
        run_extraction(plan_of(tiny_base, texts, root, profile=profile))
        made = (root / receipt_path(0)).stat().st_size
        assert receipt_bytes(read_manifest(root), 0) == pytest.approx(made, rel=0.01)


def test_the_seconds_of_batches_follow_from_tokens_lengths_and_their_number() -> None:
    """And the first batch, which sets up memory, does not count."""
    factors = np.array([1e-3, 2e-6, 0.05])
    shapes = [(4, 1024), (1, 40), (8, 512), (60, 64), (16, 256)]
    timed = [
        TimedBatch(rows=rows, length=length, seconds=batch_seconds(factors, [(rows, length)]))
        for rows, length in shapes
    ]
    timed[0] = replace(timed[0], seconds=100.0)
    np.testing.assert_allclose(fit_seconds(timed), factors, rtol=1e-6)
    assert batch_seconds(fit_seconds(timed), [(2, 800)]) == pytest.approx(4.21, rel=1e-6)


def test_no_factor_of_seconds_is_below_zero() -> None:
    """Noise must not make long texts free: where a term does not show, it is left out."""
    random = np.random.default_rng(0)
    for _ in range(50):
        shapes = [(4, 1024), (4, 1000), (1, 40), (60, 64), (16, 256)]
        timed = [
            TimedBatch(rows=n, length=size, seconds=n * size * 1e-3 * random.uniform(0.6, 1.4))
            for n, size in shapes
        ]
        factors = fit_seconds(timed)
        assert (factors >= 0).all()
        assert 0.5 < batch_seconds(factors, [(8, 512)]) / 4.096 < 1.5


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9])
def test_a_spread_order_has_every_batch_once_and_the_longest_first(count: int) -> None:
    batches = list(range(count))
    order = spread(batches)
    assert sorted(order) == batches
    assert order[:1] == batches[:1]
    if count == 9:
        assert order[:5] == [0, 8, 4, 7, 2]


def test_a_single_batch_is_predicted_after_it(tiny_base: Base, store_tmp: Path) -> None:
    data = store_tmp / "one.jsonl"
    data.write_text(json.dumps({"text": "the owl in the barn"}) + "\n")
    report, predicted = run(plan_of(tiny_base, data, store_tmp / "store"))
    assert predicted.store_bytes == pytest.approx(report.store_bytes, rel=BYTES)


def test_few_rows_are_not_predicted_before_the_batches_that_are_awaited(
    tiny_base: Base, texts: Path, store_tmp: Path
) -> None:
    """Two of three, although they fill no chunk; as the log says."""
    root = store_tmp / "store"
    run_extraction(plan_of(tiny_base, texts, root))
    manifest = read_manifest(root)
    lengths = np.full(3, 100, dtype=np.int32)
    pilot = Pilot(root, manifest, [lengths], units=[0], unit_tokens=[300], batch_tokens=128)
    hidden = {tap: np.zeros((100, manifest.width), np.float32) for tap in manifest.taps}
    for number in range(2):
        assert pilot.prediction is None
        rows = np.arange(100) + 100 * number
        pilot.add(hidden, rows, TimedBatch(rows=1, length=100, seconds=0.01))
    assert pilot.prediction is not None
    assert 0.01 < pilot.prediction.elapsed_s < 1


def test_a_quiet_log_has_the_prediction_in_the_report(
    tiny_base: Base, texts: Path, store_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        report, _ = run(plan_of(tiny_base, texts, store_tmp / "store"))
    assert not caplog.text
    assert report.written.store_bytes == report.store_bytes
