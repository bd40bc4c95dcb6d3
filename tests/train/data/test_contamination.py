"""Text in both halves counts as contamination, and nothing else."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny_runs import train_tiny
from support.tiny_train_stores import make_store

from carryon.cache.base.lm_head import FinalNorm, Head
from carryon.cache.corpus.samples import Sample
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.train.data.contamination import NGRAM, hash_ngrams, measure_contamination
from carryon.train.data.split import split_samples
from carryon.train.modules.serialization import load_carryon
from carryon.train.trainer import finish

RANDOM = np.random.default_rng(0)
LONG = RANDOM.integers(0, 1000, 300).astype(np.int32)
OTHER = RANDOM.integers(0, 1000, 300).astype(np.int32)


def _store(root: Path, texts: list[tuple[NDArray[np.int32], int, bool]]) -> Store:
    """Write a store of texts: tokens, first target, whether it is held out."""
    samples = [
        Sample(
            id=f"text-{index}",
            tokens=tokens,
            loss_mask=(np.arange(len(tokens)) >= first_target).astype(np.uint8),
            char_end=np.arange(1, len(tokens) + 1, dtype=np.int32),
            is_held_out=is_held_out,
        )
        for index, (tokens, first_target, is_held_out) in enumerate(texts)
    ]
    norm = FinalNorm(
        kind="rms", eps=1e-6, weight_offset=0.0, weight=np.ones(4, np.float32), bias=None
    )
    weight = bfloat16_bits(RANDOM.normal(size=(1000, 4)).astype(np.float32))
    head = Head(weight=weight, bias=None, logit_scale=1.0, softcap=None, norm=norm)
    states = [
        {"final": RANDOM.normal(size=(len(tokens), 4)).astype(np.float32)} for tokens, _, _ in texts
    ]
    make_store(root, samples, states, head, settings=StoreSettings(taps=["final"], unit_tokens=512))
    return Store.open(root)


def _share(store: Store) -> float:
    split = split_samples(store.sample_held_out, share=0.1, seed=0, digest=store.samples_digest)
    return measure_contamination(store, split).share


def test_equal_runs_have_equal_hashes_and_others_do_not() -> None:
    tokens = np.concatenate([LONG[:100], LONG[:100]])

    hashes = hash_ngrams(tokens)

    assert len(hashes) == 200 - NGRAM + 1
    np.testing.assert_array_equal(hashes[: 100 - NGRAM + 1], hashes[100:])
    assert len(np.unique(hashes)) == 100
    swapped = LONG[:NGRAM].copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert hash_ngrams(swapped) != hashes[0]


def test_halves_without_a_common_run_do_not_overlap(tmp_path: Path) -> None:
    assert _share(_store(tmp_path / "store", [(LONG, 0, False), (OTHER, 0, True)])) == 0.0


def test_the_share_is_that_of_held_out_targets_in_a_common_run(tmp_path: Path) -> None:
    # 131 tokens of the held-out text stand in the other: runs that end at 100 of its 269 targets.
    copied = np.concatenate([OTHER[:100], LONG[50:181], OTHER[100:169]]).astype(np.int32)

    share = _share(_store(tmp_path / "store", [(LONG, 0, False), (copied, 0, True)]))

    assert share == pytest.approx(100 / (300 - NGRAM + 1))


def test_what_is_no_target_does_not_count(tmp_path: Path) -> None:
    # The same prompt before other answers.
    first = np.concatenate([LONG[:100], LONG[200:300]])
    second = np.concatenate([LONG[:100], OTHER[200:300]])

    assert _share(_store(tmp_path / "store", [(first, 100, False), (second, 100, True)])) == 0.0


def test_runs_do_not_reach_over_the_end_of_a_sample(tmp_path: Path) -> None:
    parts = [(LONG[first : first + 20], 0, False) for first in range(0, 300, 20)]

    assert _share(_store(tmp_path / "store", [*parts, (LONG, 0, True)])) == 0.0


def test_short_samples_are_compared_whole(tmp_path: Path) -> None:
    texts = [(LONG[:20], 5, False), (LONG[:19], 5, False), (OTHER[:20], 5, True)]
    assert _share(_store(tmp_path / "other", texts)) == 0.0
    store = _store(tmp_path / "store", [*texts, (LONG[:20], 10, True), (OTHER[:100], 40, True)])
    split = split_samples(store.sample_held_out, share=0.1, seed=0, digest=store.samples_digest)
    found = measure_contamination(store, split)
    assert (found.shared, found.ngrams, found.held_out_targets) == (10, 15 + 10 + 60, 85)


def test_a_run_warns_and_records_how_much_is_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(finish, "plot_curves", lambda metrics, path: False)
    _store(tmp_path / "store", [(LONG, 0, False), (OTHER, 0, False), (LONG[:200], 0, True)])

    report = train_tiny(tmp_path / "store", tmp_path / "run")

    assert report.held_out_contamination == 1.0
    assert " held-out targets that can be compared, with the" in caplog.text
    assert load_carryon(report.carryon)[1].figures["held_out_contamination"] == 1.0
