"""Held-out losses with their standard errors, and modules left in the mode they were in."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_runs import train_tiny
from support.tiny_train_stores import make_tiny_store

from carryon.cache.base.lm_head import widen
from carryon.cache.store.reader import Store
from carryon.train.config import CarryOnSettings, LossSettings, StreamSettings
from carryon.train.losses import ways
from carryon.train.losses.frozen_head import place_head
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.trainer.held_out import sums
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.held_out.nll import (
    FEW_TARGETS,
    Nll,
    in_eval_mode,
    measure_nlls,
    warn_if_few,
)
from carryon.train.trainer.metrics import read_metrics

SETTINGS = CarryOnSettings(width=8, blocks=1, heads=2, intermediate_size=8)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(make_tiny_store(tmp_path_factory.mktemp("nll") / "store"))


def measure(store: Store, samples: list[int]) -> list[Nll]:
    carryon = build_bottleneck(SETTINGS, base_width=store.width, seed=0)
    with torch.no_grad():
        carryon.up.weight.normal_(generator=torch.Generator().manual_seed(1))
    head = place_head(store, LossSettings(head_dtype="float32"), device=torch.device("cpu"))
    jobs = [
        EvalJob(carryon=carryon, head=head, chunk=64, with_base=True),
        EvalJob(carryon=carryon, head=head, chunk=64, alpha=0.0),
        EvalJob(carryon=None, head=head, chunk=64, with_base=True),
    ]
    return measure_nlls(store, np.array(samples), jobs, stream=StreamSettings())


def base_losses(store: Store, sample: int) -> list[float]:
    """Return the base's loss at each target of a sample, by the plain formula."""
    rows, weight = store.read_sample(sample), widen(store.head().weight)
    logits = widen(rows.hidden["final"]) @ weight.T
    log_sums = np.log(np.exp(logits).sum(1))
    at = np.flatnonzero(rows.loss_mask[1:])
    return [float(log_sums[row] - logits[row, rows.tokens[row + 1]]) for row in at]


def test_a_standard_error_is_clustered_by_sample(store: Store) -> None:
    samples = list(range(12))
    both, none, base = measure(store, samples)
    losses = [base_losses(store, sample) for sample in samples]
    n = np.array([len(each) for each in losses])
    totals = np.array([sum(each) for each in losses])
    mean = totals.sum() / n.sum()
    expected = math.sqrt(12 / 11 * ((totals - mean * n) ** 2).sum()) / n.sum()

    assert both.targets == n.sum()
    assert both.base == pytest.approx(mean, rel=1e-5)
    for se in (both.base_se, none.carryon_se, base.base_se):
        assert se == pytest.approx(expected, rel=1e-4)
    assert both.carryon_se > 0
    assert math.isnan(none.base)
    assert math.isnan(base.carryon_se)


def test_the_difference_has_the_error_of_its_own_losses(store: Store) -> None:
    both, _, _ = measure(store, list(range(12)))

    low, high = sorted([both.base_se, both.carryon_se])
    assert high - low <= both.difference_se <= high + low


def test_more_samples_make_the_error_smaller(store: Store) -> None:
    few, *_ = measure(store, list(range(6)))
    many, *_ = measure(store, list(range(24)))

    assert many.base_se < few.base_se


def test_one_sample_has_no_standard_error(store: Store) -> None:
    one, *_ = measure(store, [3])

    assert math.isnan(one.base_se)
    assert one.to_line(of_base=True)["held_out_nll_se"] is None


def test_an_interrupted_evaluation_leaves_modules_in_their_modes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def interrupted(module: torch.nn.Module, *args: object, **options: object) -> None:
        seen.append(module)
        assert not module.training
        raise KeyboardInterrupt

    monkeypatch.setattr(sums, "pair_delta", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(store, [0, 1])

    assert seen[0].training
    assert all(part.training for part in seen[0].modules())


def test_each_part_of_a_module_gets_its_own_mode_back() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    module[1].eval()

    with in_eval_mode([module, None, module]):
        assert not any(part.training for part in module.modules())

    assert [part.training for part in module.modules()] == [True, True, False]


def test_few_targets_draw_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="carryon"):
        warn_if_few(FEW_TARGETS)
        assert not caplog.records
        warn_if_few(77)

    assert "77 held-out targets: expected 2,000 or more" in caplog.text


def test_evaluations_on_the_way_may_be_rough_and_the_last_one_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_tiny_store(tmp_path / "store")
    reports = {}
    for name, large in (("exact", 1 << 30), ("rough", 1)):
        monkeypatch.setattr(ways, "_LARGE", large)
        reports[name] = train_tiny(store, tmp_path / name, head_dtype="bfloat16")
    on_the_way = {
        name: [
            line["held_out_nll"]
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
            if "held_out_nll" in line
        ]
        for name in reports
    }
    assert on_the_way["rough"][0] != on_the_way["exact"][0]
    assert on_the_way["rough"][:-1] == pytest.approx(on_the_way["exact"][:-1], abs=2e-3)
    assert on_the_way["rough"][-1] == on_the_way["exact"][-1]
    assert reports["rough"].base_nll == reports["exact"].base_nll
    assert reports["rough"].carryon_nll == reports["exact"].carryon_nll
