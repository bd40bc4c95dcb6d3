"""Tests of the choice of a way of the loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_heads import VOCABULARY, make_head

from carryon.train.losses import calibration
from carryon.train.losses.calibration import (
    calibrate,
    choose,
    synthetic_input,
    timed_positions,
)
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_softmax import with_sampled_softmax
from carryon.train.losses.ways import ways_of


def _calibrate(head: FrozenHead) -> calibration.Calibration | None:
    return calibrate(head, positions=64, chunk_tokens=0)


@pytest.mark.parametrize(
    ("seconds", "way"),
    [
        ({"attention": 1.0, "shifted": 2.0}, "attention"),
        ({"attention": 1.02, "shifted": 1.0}, "attention"),
        ({"attention": 1.5, "shifted": 1.01, "rounded": 1.0}, "shifted"),
        ({"attention": 1.5, "shifted": 1.2, "rounded": 1.0}, "rounded"),
    ],
)
def test_the_most_exact_of_the_fastest_is_taken(seconds: dict[str, float], way: str) -> None:
    assert choose(seconds) == way


def test_a_small_head_is_not_timed() -> None:
    assert _calibrate(make_head()) is None


def test_a_head_with_one_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SMALLEST_HEAD", 1)
    assert _calibrate(make_head(softcap=6.0)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ways_are_compared_with_float32_and_timed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SMALLEST_HEAD", 1)
    head = make_head()
    head = replace(head, weight=head.weight.to(dtype), dtype=dtype)

    measured = _calibrate(head)

    assert measured is not None
    assert set(measured.gradient_errors) == set(ways_of(head))
    assert measured.way in measured.seconds
    assert all(0 < each < 60 for each in measured.seconds.values())
    assert measured.gradient_errors["shifted"] < calibration.GRADIENT_TOLERANCE
    assert str(measured).startswith(f"loss_way {measured.way}: times ")
    assert "\n" not in str(measured)


def test_an_inexact_way_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SMALLEST_HEAD", 1)
    monkeypatch.setattr(calibration, "GRADIENT_TOLERANCE", 0.0)
    head = make_head(has_bias=True)

    measured = _calibrate(replace(head, weight=head.weight.bfloat16(), dtype=torch.bfloat16))

    assert measured is not None
    assert measured.way == "attention"
    assert list(measured.seconds) == ["attention"]
    assert "too inexact: float32 (" in str(measured)
    assert f"off by {measured.gradient_errors['attention']:.2%} of the gradient" in str(measured)


def test_a_way_with_an_inexact_loss_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SMALLEST_HEAD", 1)
    monkeypatch.setattr(calibration, "LOSS_TOLERANCE", 0.0)
    head = make_head(has_bias=True)

    measured = _calibrate(replace(head, weight=head.weight.bfloat16(), dtype=torch.bfloat16))

    assert measured is not None
    assert list(measured.seconds) == ["attention"]


def test_a_head_that_is_sampled_from_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SMALLEST_HEAD", 1)
    counts = np.maximum(0, 60 - np.arange(VOCABULARY))
    assert _calibrate(make_head()) is not None
    assert _calibrate(with_sampled_softmax(make_head(), counts, 24)) is None


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_blocks_of_few_rows_can_be_timed(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SMALLEST_HEAD", 1)
    measured = _calibrate(replace(make_head(), block_rows=rows))
    assert measured is not None


def test_a_wide_head_is_timed_with_fewer_positions() -> None:
    for width in (64, 5120):
        head = replace(make_head(), weight=torch.zeros(4096, width))
        some, states, _ = synthetic_input(head, positions=timed_positions(head, positions=2048))
        assert some.parts is not None
        assert 4 * len(states) * some.parts[0].weight.numel() <= 1.1 * calibration.CALL_FLOPS
