"""Which samples are evaluated, and that the losses are right."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_runs import train_tiny
from support.tiny_stores import extract_tiny
from support.tiny_train_stores import make_tiny_store
from torch import nn

from carryon.cache.base.lm_head import widen
from carryon.cache.base.model import Base
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.exchange.recoding import recode
from carryon.cache.store.reader import Store
from carryon.train.config import CarryOnSettings, LossSettings, StreamSettings
from carryon.train.inference import evaluate as evaluate_module
from carryon.train.inference.evaluate import AlphaChoice, evaluate, plot_alphas
from carryon.train.losses.frozen_head import place_head
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.decoder import Decoder
from carryon.train.modules.linear import Product
from carryon.train.modules.serialization import load_carryon, save_carryon
from carryon.train.trainer.held_out import nll

SETTINGS = CarryOnSettings(width=8, blocks=1, heads=2, intermediate_size=8)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("evaluate") / "store")


def _save(folder: Path, store: Path, *, base: dict[str, str] | None = None) -> str:
    opened = Store.open(store)
    carryon = build_bottleneck(SETTINGS, base_width=opened.width, seed=0)
    with torch.no_grad():
        carryon.up.weight.normal_(generator=torch.Generator().manual_seed(1))
    card = CarryOnCard(
        settings=SETTINGS.to_dict(),
        base_width=opened.width,
        base=base or opened.manifest.base,
        store_fingerprint=opened.fingerprint,
        split={"held_out_ratio": 0.25, "seed": 0},
        alpha=1.0,
        figures={},
        versions={},
    )
    save_carryon(folder, carryon, card, dtype=torch.float32)
    return str(folder)


def test_options_are_given_by_name(store: Path, tmp_path: Path) -> None:
    carryon = _save(tmp_path / "c", store)
    report = evaluate(store, carryon=carryon, device="cpu", chunk_tokens=3)
    expected = evaluate(store, carryon=carryon, device="cpu")
    assert report.carryon_nll == pytest.approx(expected.carryon_nll, rel=1e-4)
    with pytest.raises(InputError, match="no setting chunk_token: did you mean chunk_tokens"):
        evaluate(store, carryon=carryon, chunk_token=3)


def _base_nll(store: Path, samples: list[int]) -> float:
    """The plain formula in numpy, sample by sample."""
    opened = Store.open(store)
    weight = widen(opened.head().weight)
    losses = []
    for sample in samples:
        rows = opened.read_sample(sample)
        logits = widen(rows.hidden["final"]) @ weight.T
        log_sums = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        for token in np.flatnonzero(rows.loss_mask[1:]) + 1:
            losses.append(log_sums[token - 1] - logits[token - 1, rows.tokens[token]])
    return float(np.mean(losses))


def test_the_loss_of_the_base_is_that_of_the_plain_formula(store: Path, tmp_path: Path) -> None:
    held_out = np.flatnonzero(Store.open(store).sample_held_out).tolist()

    report = evaluate(store=str(store), carryon=_save(tmp_path / "c", store), device="cpu")

    assert (report.samples, report.num_samples) == ("held-out", len(held_out))
    assert report.base_nll == pytest.approx(_base_nll(store, held_out), rel=1e-5)
    assert report.carryon_nll != report.base_nll
    assert report.base_perplexity == pytest.approx(np.exp(report.base_nll))


def test_a_wide_base_is_evaluated_in_smaller_batches_with_the_same_result(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carryon, sizes = _save(tmp_path / "c", store), []
    reports = []
    for limit in (nll.BATCH_BYTES, 20 * 2 * 16):  # 20 tokens of width 16
        monkeypatch.setattr(nll, "BATCH_BYTES", limit)
        lengths: list[int] = []
        hook = nn.modules.module.register_module_forward_pre_hook(
            lambda module, args, lengths=lengths: (
                lengths.append(len(args[0].flatten(0, -2)))
                if isinstance(module, Product) and module.in_features == 16
                else None
            )
        )
        with hook:
            reports.append(evaluate(store=str(store), carryon=carryon, device="cpu"))
        sizes.append(max(lengths))

    assert sizes[0] > 20 >= sizes[1]
    assert reports[1].carryon_nll == pytest.approx(reports[0].carryon_nll, rel=1e-6)


def test_alpha_zero_is_the_base(store: Path, tmp_path: Path) -> None:
    report = evaluate(
        store=str(store), carryon=_save(tmp_path / "c", store), alphas=[0.0], device="cpu"
    )

    assert report.carryon_nll == report.base_nll


def test_all_samples_of_another_store_are_evaluated(store: Path, tmp_path: Path) -> None:
    other = make_tiny_store(tmp_path / "other", num_samples=10, num_held_out=0, seed=1)

    report = evaluate(store=str(other), carryon=_save(tmp_path / "c", store), device="cpu")

    assert (report.samples, report.num_samples) == ("all", 10)


def test_a_store_without_marks_is_split_as_it_was_in_training(tmp_path: Path) -> None:
    unmarked = make_tiny_store(tmp_path / "unmarked", num_held_out=0)

    report = evaluate(store=str(unmarked), carryon=_save(tmp_path / "c", unmarked), device="cpu")

    assert (report.samples, report.num_samples) == ("held-out", 6)  # a quarter of 24


def _texts(path: Path, start: int, *, marks: bool) -> str:
    """Write 20 texts, every fifth of them marked as held out."""
    rows = [
        {"id": f"t{at}", "text": f"{at} the an on in {at * 7} thing"}
        | ({"split": "held-out"} if marks and at % 5 == 0 else {})
        for at in range(start, start + 20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("marks", [True, False])
def test_no_part_copy_or_later_state_of_a_store_is_taken_for_another(
    marks: bool, tiny_base: Base, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    extract_tiny(tiny_base, _texts(tmp_path / "a.jsonl", 0, marks=marks), root)
    extract_tiny(tiny_base, _texts(tmp_path / "b.jsonl", 20, marks=marks), root, append=True)
    carryon = train_tiny(root, tmp_path / "run", held_out_ratio=0.2).carryon

    recode(root, out=tmp_path / "raw", profile="raw")
    own, copy = (evaluate(each, carryon=carryon, device="cpu") for each in (root, tmp_path / "raw"))
    assert (own.samples, own.num_samples) == (copy.samples, copy.num_samples) == ("held-out", 8)
    assert copy.carryon_nll == pytest.approx(own.carryon_nll, rel=1e-3)

    extract_tiny(tiny_base, _texts(tmp_path / "c.jsonl", 40, marks=marks), root, append=True)
    for place, number in ((f"{root}#1", 4), (root, 12)):
        if marks:
            report = evaluate(place, carryon=carryon, device="cpu")
            assert (report.samples, report.num_samples) == ("held-out", number)
        else:
            with pytest.raises(InputError, match=r"trained on #1.*, which mark no sample as held"):
                evaluate(place, carryon=carryon, device="cpu")
            assert evaluate(place, carryon=carryon, samples="all", device="cpu").num_samples >= 20
    report = evaluate(f"{root}#3", carryon=carryon, device="cpu")
    assert (report.samples, report.num_samples) == ("all", 20)


def test_held_out_samples_of_an_unmarked_foreign_store_are_refused(
    store: Path, tmp_path: Path
) -> None:
    other = make_tiny_store(tmp_path / "other", num_held_out=0, seed=1)

    with pytest.raises(InputError, match="marks no sample as held out"):
        evaluate(
            store=str(other),
            carryon=_save(tmp_path / "c", store),
            samples="held-out",
            device="cpu",
        )


def test_a_carryon_of_another_base_is_refused(store: Path, tmp_path: Path) -> None:
    folder = _save(tmp_path / "c", store, base={"id": "other", "weights_sha256": "ff" * 32})

    with pytest.raises(SettingMismatchError, match="expected the weights of other"):
        evaluate(store=str(store), carryon=folder, device="cpu")


def test_the_loss_of_a_chosen_alpha_is_not_of_the_samples_that_chose_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carryon, alphas = _save(tmp_path / "c", store), [0.0, 0.1, 0.4]
    passes: list[tuple[list[int], list[nll.Nll]]] = []
    real = evaluate_module.measure_nlls

    def record(opened: Store, rows: Any, jobs: Any, **stream: Any) -> list[nll.Nll]:  # noqa: ANN401
        passes.append((rows.tolist(), real(opened, rows, jobs, **stream)))
        return passes[-1][1]

    monkeypatch.setattr(evaluate_module, "measure_nlls", record)
    report = evaluate(store, carryon=carryon, alphas=alphas, device="cpu")

    (choosing, at_each), (reported, [measured]) = passes
    assert not set(choosing) & set(reported)
    assert sorted(choosing + reported) == np.flatnonzero(Store.open(store).sample_held_out).tolist()
    assert abs(len(choosing) - len(reported)) <= 1
    assert report.choice is not None
    assert report.choice.alphas == alphas
    assert report.choice.nlls == [each.carryon for each in at_each]
    assert report.alpha == alphas[int(np.argmin(report.choice.nlls))]
    assert (report.carryon_nll, report.num_samples) == (measured.carryon, len(reported))
    assert report.num_targets == measured.targets


def test_a_single_sample_cannot_both_choose_and_measure_an_alpha(tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store", num_held_out=1)
    carryon = _save(tmp_path / "c", store)
    assert evaluate(store, carryon=carryon, device="cpu").carryon_nll_se is None
    with pytest.raises(InputError, match="expected 2 samples or more, to choose one of 2 alphas"):
        evaluate(store, carryon=carryon, alphas=[0.5, 1.0], device="cpu")


def test_few_targets_draw_a_warning(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = evaluate(store, carryon=_save(tmp_path / "c", store), device="cpu")
    assert report.carryon_nll_se is not None
    assert report.carryon_nll_se > 0
    assert f"{report.num_targets:,} held-out targets: expected 2,000 or more" in caplog.text


def test_each_alpha_gives_the_same_loss_among_others_as_alone(store: Path, tmp_path: Path) -> None:
    carryon, alphas = _save(tmp_path / "c", store), [0.0, 0.4, 1.0]
    opened = Store.open(store)
    module, _ = load_carryon(carryon)
    head = place_head(opened, LossSettings(), device=torch.device("cpu"))
    jobs = [nll.EvalJob(carryon=module, head=head, chunk=64, alpha=alpha) for alpha in alphas]
    rows = np.arange(opened.num_samples)

    together = nll.measure_nlls(opened, rows, jobs, stream=StreamSettings())

    for job, among_others in zip(jobs, together, strict=True):
        [alone] = nll.measure_nlls(opened, rows, [job], stream=StreamSettings())
        assert alone.carryon == among_others.carryon


def test_several_alphas_run_the_carryon_once_for_each_batch(store: Path, tmp_path: Path) -> None:
    calls: list[nn.Module] = []
    carryon = _save(tmp_path / "c", store)
    counts = []
    for alphas in ([0.5, 1.0], [0.25, 0.5, 1.0, 1.5]):
        calls.clear()
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: calls.append(module)
        )
        with hook:
            evaluate(store=str(store), carryon=carryon, alphas=alphas, device="cpu")
        counts.append(sum(isinstance(module, Decoder) for module in calls))
    assert counts[0] == counts[1] > 0


def test_an_alpha_out_of_range_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="alpha: expected 0 to 10, got 11"):
        evaluate(store=str(store), carryon=_save(tmp_path / "c", store), alphas=[1.0, 11.0])


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    choice = AlphaChoice(
        num_samples=3,
        num_targets=9,
        base_nll=1.2,
        alphas=[0.0, 0.5, 1.0],
        nlls=[1.2, 0.9, 1.0],
        nll_ses=[0.1, 0.1, None],
    )
    assert plot_alphas(choice, tmp_path / "new" / "alpha.png")
    assert (tmp_path / "new" / "alpha.png").read_bytes().startswith(b"\x89PNG")


def test_the_perplexity_of_a_diverged_run_is_a_number() -> None:
    assert nll.perplexity_of(2.0) == pytest.approx(np.exp(2.0))
    assert nll.perplexity_of(1e6) == np.finfo(np.float64).max
    assert np.isnan(nll.perplexity_of(float("nan")))
