"""Runs of a mixture: they resume to the bit, report their parts, and refuse what does not fit."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.mixed_stores import make_anchor, make_source
from support.tiny_runs import TINY, Killed, assert_same_bits, kill_at, metrics_without_times

from carryon.cache.base.lm_head import widen
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.store.reader import Store
from carryon.tools.cli.main import main
from carryon.train.continual.lineage import update
from carryon.train.data.datasets import split_store
from carryon.train.inference.evaluate import evaluate
from carryon.train.losses.base_states import get_base_states
from carryon.train.mixing.gate import initial_shares
from carryon.train.mixing.mixture import load_mixture
from carryon.train.mixing.mixture_nll import MixtureNll, leak_warning
from carryon.train.mixing.projected import project_sources
from carryon.train.mixing.sources import open_sources
from carryon.train.modules.packed_attention import pack
from carryon.train.modules.serialization import load_carryon, read_card
from carryon.train.plots import plot_curves
from carryon.train.trainer import finish
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.sweep import sweep
from carryon.train.trainer.trainer import train
from carryon.train.verify import verify_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random anchor, a source that knows the texts, and a random one."""
    root = tmp_path_factory.mktemp("mixed")
    anchor = make_anchor(root)
    make_source(root, anchor, name="good", steps=150)
    make_source(root, anchor, name="random", kind="metaspace", vocab_size=360, seed=5)
    return root


@pytest.fixture(autouse=True)
def without_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "plot_curves", lambda metrics, path: False)


def mix(folder: Path, out: Path, *names: str, **changes: Any) -> TrainReport:  # noqa: ANN401
    """Train with the tiny settings and other bases."""
    paths = [str(folder / name) for name in names or ("good",)]
    return train(folder / "anchor", out=out, settings=TINY, **{"mix": paths, **changes})


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport]:
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "plot_curves", lambda metrics, path: False)
        return out, mix(folder, out, "good", "random", epochs=4, dropout=0.1)


def test_a_mixture_is_better_than_the_base_and_leans_on_the_better_source(
    finished: tuple[Path, TrainReport],
) -> None:
    _, report = finished
    parts = report.mixture
    shares = parts["gate_shares"]
    assert report.carryon_nll < report.base_nll - 0.5
    assert report.carryon_nll < parts["source_nlls"]["good-base"] + 0.1
    assert parts["source_nlls"]["good-base"] < parts["source_nlls"]["random-base"] - 0.5
    assert shares["good-base"] > 0.6 > 0.2 > shares["random-base"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert sum(parts["target_shares"].values()) == pytest.approx(1, abs=1e-5)
    assert parts["target_shares"]["good-base"] > 0.5
    assert parts["bytes_per_target"] > 1


def test_a_killed_mixture_ends_with_the_same_bits(
    folder: Path,
    finished: tuple[Path, TrainReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes: dict[str, Any] = {"epochs": 4, "dropout": 0.1}
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        with pytest.raises(Killed):
            mix(folder, tmp_path / "run", "good", "random", **changes)
    assert not (tmp_path / "run" / "carryon").exists()
    report = mix(folder, tmp_path / "run", "good", "random", **changes)

    assert_same_bits(tmp_path / "run", finished[0])
    ours, theirs = (
        load_file(root / "carryon" / "gate.safetensors") for root in (tmp_path / "run", finished[0])
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert report.mixture == finished[1].mixture
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(finished[0])


def test_the_finished_carry_on_has_its_gate_and_names_its_bases(
    folder: Path, finished: tuple[Path, TrainReport]
) -> None:
    out, report = finished
    mixed, card = load_mixture(report.carryon)
    assert mixed.gate.out.weight.abs().max() > 0
    weight = mixed.gate.hidden.weight
    assert not torch.equal(weight, weight.bfloat16().float())  # not rounded as the carry-on is
    good = Store.open(folder / "good", allow_aligned=True)
    first = card.mixture["sources"][0]
    assert first["name"] == "good-base"
    assert first["weights_sha256"] == good.base["weights_sha256"]
    assert first["store_fingerprint"] == good.fingerprint
    assert verify_folder(out).is_sound, verify_folder(out).problems
    path = Path(report.carryon) / "gate.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="gate.safetensors: expected the SHA-256"):
        load_mixture(report.carryon)
    assert not verify_folder(out).is_sound
    path.write_bytes(content)
    for read in (load_carryon, read_card):
        with pytest.raises(InputError, match="a mixture of several bases, which needs .*good-base"):
            read(report.carryon)


def test_the_identity_of_a_run_is_the_stores_not_their_paths(
    folder: Path, finished: tuple[Path, TrainReport]
) -> None:
    out, report = finished
    identity = json.loads((out / "run.json").read_text())["identity"]
    expected = [
        Store.open(folder / name, allow_aligned=True).fingerprint for name in ("good", "random")
    ]
    assert identity["mix_fingerprints"] == expected
    assert "mix" not in identity
    changes: dict[str, Any] = {"epochs": 4, "dropout": 0.1}
    assert mix(folder, out, "good", "random", **changes) == report
    with pytest.raises(InputError, match="mix_fingerprints is .* there and .* here"):
        mix(folder, out, "good", **changes)
    with pytest.raises(InputError, match="mix_fingerprints is .* there and None here"):
        mix(folder, out, mix=[], **changes)


def test_metrics_hold_the_parts_of_each_evaluation(finished: tuple[Path, TrainReport]) -> None:
    lines = [line for line in read_metrics(finished[0] / "metrics.jsonl") if "held_out_nll" in line]
    assert "mixture" not in lines[0]  # the base
    assert all(line["mixture"]["carryon_nll"] > 0 for line in lines[1:])
    assert lines[-1]["mixture"] == finished[1].mixture


def test_runs_of_a_sweep_are_those_of_runs_alone(folder: Path, tmp_path: Path) -> None:
    runs: dict[str, dict[str, Any]] = {"slow": {"learning_rate": 0.01}, "none": {"kind": "none"}}
    options: dict[str, Any] = {"settings": TINY, "mix": [str(folder / "good")]}
    sweep(folder / "anchor", out=tmp_path / "sweep", runs=runs, **options)
    for name, changes in runs.items():
        mix(folder, tmp_path / name, **changes)
        assert_same_bits(tmp_path / "sweep" / name, tmp_path / name)
    parts = TrainReport.read(tmp_path / "none" / "result.json")
    assert parts.mixture["carryon_nll"] == pytest.approx(parts.base_nll)
    assert parts.carryon_nll < parts.base_nll - 0.3
    with pytest.raises(InputError, match="mix: expected one value for all runs"):
        sweep(folder / "anchor", out=tmp_path / "no", runs={"a": {}, "b": {"mix": []}}, **options)


def test_what_does_not_fit_a_mixture_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sampled_softmax: expected 0 with mix"):
        mix(folder, tmp_path / "run", sampled_softmax=8)
    with pytest.raises(InputError, match="kind none: expected other bases to mix with"):
        mix(folder, tmp_path / "run", mix=[], kind="none")
    with pytest.raises(InputError, match="mix: expected each once"):
        mix(folder, tmp_path / "run", "good", "good")
    with pytest.raises(InputError, match="got the anchor again"):
        mix(folder, tmp_path / "run", "anchor")
    with pytest.raises(InputError, match="aligned to the store"):
        train(folder / "good", out=tmp_path / "run", settings=TINY)
    with pytest.raises(InputError, match="mix: expected none in a lineage"):
        update(
            tmp_path / "lineage", store=folder / "anchor", settings=TINY, mix=[str(folder / "good")]
        )
    assert not (tmp_path / "run").exists()


def test_evaluating_gives_the_figures_of_the_run_whatever_the_order_of_the_stores(
    folder: Path, finished: tuple[Path, TrainReport]
) -> None:
    _, report = finished
    paths = [folder / "random", folder / "good"]
    measured = evaluate(folder / "anchor", carryon=report.carryon, mix=paths, device="cpu")
    assert measured.mixture == report.mixture
    assert measured.carryon_nll == report.carryon_nll
    gate_alone = evaluate(
        folder / "anchor", carryon=report.carryon, mix=paths, alphas=[0.0], device="cpu"
    )
    assert gate_alone.mixture["carryon_nll"] == gate_alone.base_nll
    assert gate_alone.carryon_nll < gate_alone.base_nll
    with pytest.raises(InputError, match="Fix: carryon evaluate --mix STORE"):
        evaluate(folder / "anchor", carryon=report.carryon, device="cpu")
    with pytest.raises(SettingMismatchError, match="mix: expected stores of .*good-base"):
        evaluate(folder / "anchor", carryon=report.carryon, mix=paths[:1], device="cpu")


def test_the_mixture_s_loss_is_its_parts_mixed(
    folder: Path, finished: tuple[Path, TrainReport]
) -> None:
    out, report = finished
    mixed, _ = load_mixture(report.carryon)
    anchor = Store.open(folder / "anchor")
    base = get_base_states(anchor, device=torch.device("cpu"))
    projected = project_sources(
        anchor,
        open_sources(anchor, [str(folder / "good"), str(folder / "random")]),
        base=base,
        stream=TINY.stream,
        loss=TINY.loss,
        device=torch.device("cpu"),
    )
    weight = torch.from_numpy(widen(anchor.head().weight))
    total, count, num_bytes = 0.0, 0, 0
    of_gate, of_target = torch.zeros(3), torch.zeros(3)
    words = projected.sources[0].vocabulary_map.anchor
    for index in split_store(anchor, TINY.stream).held_out.tolist():
        sample = anchor.read_sample(index)
        at = np.flatnonzero(sample.loss_mask[1:])
        targets = torch.from_numpy(sample.tokens[at + 1].astype(np.int64))
        states = {"final": torch.from_numpy(sample.hidden["final"])}
        packing = pack(torch.tensor([len(sample.tokens)]))
        with torch.no_grad():
            delta = mixed.correct_packed(states, packing, torch.from_numpy(at))
            logits = (states["final"][at] + delta) @ weight.t()
            own = logits.log_softmax(dim=1).gather(1, targets[:, None])
            places = np.searchsorted(projected.rows, anchor.sample_starts[index] + at)
            shares = mixed.gate(states["final"][at], projected.features[places]).softmax(dim=1)
            every = torch.cat([own, projected.log_probs[places]], dim=1).exp()
            mixture = (shares * every).sum(dim=1, keepdim=True)
            total -= float(mixture.log().sum())
            of_gate += shares.sum(dim=0)
            of_target += (shares * every / mixture).sum(dim=0)
        count += len(at)
        num_bytes += sum(len(words[token] or b"") for token in targets.tolist())
    # A CPU's head in bfloat16 rounds its logits
    assert report.carryon_nll == pytest.approx(total / count, rel=5e-4)
    assert report.mixture["bytes_per_target"] == pytest.approx(num_bytes / count)
    for name, sums in (("gate_shares", of_gate), ("target_shares", of_target)):
        expected = (sums / count).tolist()
        assert list(report.mixture[name].values()) == pytest.approx(expected, rel=5e-3, abs=1e-5)


def test_the_gate_begins_at_the_shares_of_the_training_targets_alone(
    folder: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"kind": "none", "epochs": 1, "learning_rate": 1e-9}
    report = mix(folder, tmp_path / "run", **changes)
    anchor = Store.open(folder / "anchor")
    projected = project_sources(
        anchor,
        open_sources(anchor, [str(folder / "good")]),
        base=get_base_states(anchor, device=torch.device("cpu")),
        stream=TINY.stream,
        loss=TINY.loss,
        device=torch.device("cpu"),
    )
    logs = torch.cat([projected.anchor.unsqueeze(1), projected.log_probs], dim=1)
    split = split_store(anchor, TINY.stream)
    is_trained = projected.of_samples(split.train, anchor.sample_lengths)
    expected, of_all = initial_shares(logs[is_trained]), initial_shares(logs)
    assert (expected - of_all).abs().max() > 1e-3
    gate = load_mixture(report.carryon)[0].gate
    torch.testing.assert_close(gate.out.bias.detach(), expected.log(), atol=1e-6, rtol=0)


def test_reports_and_card_name_the_parts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--mix", str(folder / "good"), "--kind", "none", "--epochs", "1", "--device", "cpu"]
    out = tmp_path / "run"
    assert main(["train", "--store", str(folder / "anchor"), "--out", str(out), *argv]) == 0
    text = capsys.readouterr().err
    assert re.search(r"good-base +\d\.\d{4} +\d\.\d{4} +\d\.\d{3} +\d\.\d{3}", text)
    card = (out / "carryon" / "README.md").read_text()
    assert "## Other bases" in card
    assert "It generates\nwith all of them" in card
    assert re.search(r"\| gate share of good-base \| 0\.\d+ \|", card)
    assert plot_curves(read_metrics(out / "metrics.jsonl"), tmp_path / "curves.png")
    argv = ["--carryon", str(out / "carryon"), "--base", str(folder / "anchor-base")]
    assert main(["merge", "--out", str(tmp_path / "merged"), *argv]) == 2
    assert re.search("got a mixture of several bases, which needs .* too", capsys.readouterr().err)


def test_a_gain_between_bases_of_one_tokenizer_is_suspected() -> None:
    parts = MixtureNll(
        carryon_nll=2.0,
        source_nlls={"other": 2.1},
        gate_shares={},
        target_shares={},
        bytes_per_target=3.0,
    )
    assert "0.050 nats a target better" in leak_warning(1.95, parts, ["other"])
    assert not leak_warning(1.99, parts, ["other"])
    assert not leak_warning(1.5, parts, [])
