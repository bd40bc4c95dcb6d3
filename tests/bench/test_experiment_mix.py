"""The experiment of mixtures: sizes, straddled positions, figures, and a run on tiny bases."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.aligned_tokenizers import TEXTS
from support.corpus_files import write_lines
from support.mixed_stores import make_anchor, make_base, make_source

from carryon.cache.errors import InputError
from carryon.cache.format.alignment import UnitAlignment
from carryon.cache.store.reader import Store
from carryon.tools.bench.__main__ import main
from carryon.tools.bench.mixtures import measure, plan, report
from carryon.tools.bench.mixtures.corpus import make_mix_corpus
from carryon.tools.improve import steps
from carryon.train.config import CarryOnSettings
from carryon.train.mixing.gate import Gate
from carryon.train.mixing.sources import Vocabulary
from carryon.train.modules.bottleneck import Bottleneck, build_bottleneck


def make_experiment(folder: Path, **changes: Any) -> plan.MixExperiment:  # noqa: ANN401
    bases = [
        plan.BaseFacts(name="anchor", path="a", num_layers=30, width=576, tokenizer="x"),
        plan.BaseFacts(name="source-1", path="b", num_layers=24, width=896, tokenizer="y"),
    ]
    given: dict[str, Any] = {
        "root": folder, "bases": bases, "data": [], "corpus": "python", "seeds": [0, 1],
        "tokens": 1000, "held_out_tokens": 100, "window_tokens": 64, "width": 128, "epochs": 2,
        "patience": 1, "tokens_per_step": 256,
    }  # fmt: skip
    return plan.MixExperiment(**(given | changes))


# Plan


@pytest.mark.parametrize(("width", "num_taps", "base_width"), [(128, 2, 576), (104, 1, 896)])
def test_bytes_of_a_carryon_are_those_of_its_weights(
    width: int, num_taps: int, base_width: int
) -> None:
    inner = round(width * 248 / 128)
    settings = CarryOnSettings(
        width=width, intermediate_size=inner, taps=["final", "layer.2"][:num_taps]
    )
    module = build_bottleneck(settings, base_width=base_width, seed=0)
    count = sum(weight.numel() for weight in module.state_dict().values())
    assert plan.carryon_bytes(width, num_taps, base_width) == 2 * count


def build_gate_of(width: int) -> int:
    """Return the number of weights of a gate for one source."""
    shares = torch.ones(2)
    gate = Gate(anchor_width=width, source_widths=(), num_sources=1, shares=shares, seed=0)
    return sum(map(torch.numel, gate.state_dict().values()))


def test_own_carryons_have_at_least_the_bytes_of_any_mixture(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path)
    for base in experiment.bases:
        width = experiment.own_width(base)
        assert plan.carryon_bytes(width, 2, base.width) >= experiment.budget
        assert plan.carryon_bytes(width - 8, 2, base.width) < experiment.budget
    assert experiment.budget > plan.carryon_bytes(128, 2, 576)
    runs = plan.plan_mix(experiment).runs
    assert {arm for _, arm in runs} == {
        "carryon", "own-anchor", "own-source-1", "gate", "gate+carryon", "state", "both"
    }  # fmt: skip
    for (seed, arm), run in runs.items():
        assert run.argv[run.argv.index("--seed") + 1] == str(seed)
        own = {f"own-{base.name}": base for base in experiment.bases}.get(arm)
        width = experiment.own_width(own) if own else 128
        assert arm == "gate" or run.argv[run.argv.index("--width") + 1] == str(width)
    argv = runs[1, "own-source-1"].argv
    assert argv[argv.index("--store") + 1].endswith("stores/source-1")
    assert all("--patience" in each.argv for each in runs.values())
    for arm in ("state", "both"):
        argv = runs[0, arm].argv
        at = argv.index("--mix-by")
        assert argv[at : at + 5] == ["--mix-by", arm, "--mix-taps", "final", "layer.16"]
    state = build_bottleneck(
        CarryOnSettings(taps=["final", "layer.20"]), base_width=576, seed=0
    ).state_dict()
    mixed = Bottleneck(
        CarryOnSettings(taps=["final", "layer.20"]), base_width=576, sources={"1:final": 896}
    ).state_dict()
    bridge = sum(map(torch.numel, mixed.values())) - sum(map(torch.numel, state.values()))
    gate = build_gate_of(576)
    assert experiment.budget >= plan.carryon_bytes(128, 2, 576) + 2 * bridge + 4 * gate


def test_an_experiment_that_no_step_could_run_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"bases": make_experiment(tmp_path).bases[:1]}, "--bases: expected 2 or more"),
        ({"seeds": [1, 1]}, "--seeds: expected 1 or more, each once, got '1 1'"),
        ({"data": ["x"]}, "--data: expected either --data or --corpus, got both"),
        ({"corpus": ""}, "got neither"),
        ({"width": 12}, "--width: expected a multiple of 8, got 12"),
        ({"arms": ["gate", "own-b"]}, "--arms: expected carryon, own-anchor, .*, got 'own-b'"),
        ({"arms": ["gate", "carryon"]}, "--arms: expected .* among them, gate.carryon is not"),
    ):
        with pytest.raises(InputError, match=message):
            make_experiment(tmp_path, **changes)


def test_texts_of_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2", vocab_size=300)
    words = np.random.default_rng(0).choice(TEXTS[0].split(), size=(24, 60))
    rows = [{"id": f"d{index}", "text": " ".join(each)} for index, each in enumerate(words)]
    given: dict[str, Any] = {
        "base": str(base), "out": str(tmp_path / "data"), "held_out_tokens": 300,
        "data": [str(write_lines(tmp_path / "data.jsonl", *rows))], "window_tokens": 64,
    }  # fmt: skip
    made = make_mix_corpus(tokens=1000, **given)
    assert make_mix_corpus(tokens=1000, **given) == made
    with pytest.raises(InputError, match="expected tokens 1000, as in its first run, got 2000"):
        make_mix_corpus(tokens=2000, **given)


# Straddled positions


def test_positions_whose_path_leaves_the_trunk_are_straddled() -> None:
    # Two samples: trunk 0-1-2 with a branch 3 off node 0; trunk 4-5.
    alignment = UnitAlignment(
        tokens=np.zeros(6, dtype=np.int32),
        parents=np.array([-1, 0, 1, 0, -1, 4], dtype=np.int32),
        exact=np.array([-1, 0, 3, 2, 5, 4], dtype=np.int32),
        stable=np.full(6, -1, dtype=np.int32),
        covered=np.zeros(6, dtype=np.int32),
        is_whole=np.array([0, 1, 1, 1, 1, 0], dtype=np.uint8),
    )
    found = measure.straddled(alignment, np.array([4, 2], dtype=np.int32))
    assert found.tolist() == [False, False, True, False, False, True]


def test_bytes_and_places_are_those_of_the_held_out_samples(tmp_path: Path) -> None:
    anchor = make_anchor(tmp_path)
    aligned = make_source(tmp_path, anchor)
    store = Store.open(anchor)
    counted = measure.count_bytes(store=str(anchor))
    held_out = [store.read_sample(int(at)) for at in np.flatnonzero(store.sample_held_out)]
    assert counted["targets"] == sum(int(each.loss_mask[1:].sum()) for each in held_out)
    words = Vocabulary.read(store).tokens
    assert counted["bytes"] == sum(
        len(words[token] or b"")
        for each in held_out
        for token, is_target in zip(each.tokens[1:], each.loss_mask[1:], strict=True)
        if is_target
    )
    argv = ["train", "--store", str(anchor), "--mix", str(aligned), "--out", str(tmp_path / "run")]
    from carryon.tools.cli.main import call_command

    run = call_command(argv[0], [*argv[1:], "--kind", "none", "--epochs", "1", "--device", "cpu"])
    found = measure.measure_places(
        store=str(anchor), mix=[str(aligned)], carryon=str(tmp_path / "run" / "carryon")
    )
    parts = [found[name] for name in ("straddled", "elsewhere")]
    assert parts[0]["targets"] > 0
    assert sum(each["targets"] for each in parts) == counted["targets"]
    for name, nll in (("base_nll", run["base_nll"]), ("mixture_nll", run["carryon_nll"])):
        total = sum(each["targets"] * each[name] for each in parts)
        assert total / counted["targets"] == pytest.approx(nll, abs=1e-4)


# Figures


def result(nll: float, *, shares: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    mixture = {} if shares is None else {"gate_shares": shares}
    return {
        "base_nll": 2.0, "carryon_nll": nll, "mixture": mixture, "carryon_bytes": 100,
        "num_parameters": 60, "finished_with_step": 5, "tokens_per_second": 1000.0, **more,
    }  # fmt: skip


def test_figures_take_the_worst_seed(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path)
    shares = {"carry-on": 0.4, "b": 0.6}
    losses = {
        "carryon": (1.8, 1.7), "own-anchor": (1.75, 1.72), "own-source-1": (1.6, 1.5),
        "gate": (1.7, 1.9), "gate+carryon": (1.5, 1.4), "state": (1.65, 1.7), "both": (1.6, 1.6),
    }  # fmt: skip
    runs = {
        (seed, arm): result(
            values[seed],
            shares={} if arm == "state" else shares if arm in plan.MIXTURES else None,
            tokens_per_second=speed,
        )
        for arm, values in losses.items()
        for seed, speed in ((0, 900.0 if "+" in arm else 1000.0), (1, 1000.0))
    }
    place = {"straddled": {"targets": 5, "base_nll": 1.0, "mixture_nll": 0.9}}
    worse = {"straddled": {"targets": 5, "base_nll": 1.0, "mixture_nll": 1.1}}
    places = {(seed, arm): place for seed in (0, 1) for arm in plan.MIXTURES}
    places[1, "gate"] = worse
    sizes = {
        "anchor": {"targets": 10, "bytes": 40}, "source-1": {"targets": 10, "bytes": 20}
    }  # fmt: skip
    rows = report.make_rows(experiment, sizes, runs, places)
    assert [row.arm for row in rows] == ["anchor", "source-1", *losses]
    assert rows[1].per_byte == [1.0]
    by_arm = {row.arm: row for row in rows}
    assert by_arm["gate+carryon"].per_byte == pytest.approx([0.375, 0.35])
    assert by_arm["gate+carryon"].bytes == 100 + 4 * 10
    assert by_arm["state"].bytes == 100
    assert by_arm["state"].is_mixture is True
    figures = report.figures_of(experiment, rows, corpus={"shared_ratio": 0.01})
    by_name = {figure.figure: figure for figure in figures}
    assert by_name["mix.gate_gain"].value == pytest.approx(0.1)
    assert by_name["mix.gate_gain"].met is False
    assert by_name["mix.gain"].details["values"] == pytest.approx([0.25, 0.3])
    assert by_name["mix.gain"].met is True
    assert by_name["mix.gain.state"].value == pytest.approx(0.0)
    assert by_name["mix.gain.state"].details["values"] == pytest.approx([0.1, 0.0])
    assert by_name["mix.straddled.gate"].value == pytest.approx(0.1)
    assert by_name["mix.straddled.gate+carryon"].met is True
    assert by_name["mix.speed"].value == pytest.approx(0.9)
    # 1.5 / 4 and 1.4 / 4 against 1.75 / 4 and 1.72 / 4 of the anchor with its own
    assert by_name["mix.against_best_own"].value == pytest.approx(-0.25 / 4)
    assert "mix.one_tokenizer" not in by_name
    assert report.warnings_of(figures) == []
    assert report.write_report(tmp_path, rows, figures, {"overlap": "1 %"})
    assert "| gate+carryon | 0.3750, 0.3500 | 0.3625 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_large_gain_of_one_tokenizer_is_a_warning(tmp_path: Path) -> None:
    bases = [
        plan.BaseFacts(name=name, path=name, num_layers=8, width=64, tokenizer="x")
        for name in ("anchor", "source-1")
    ]
    experiment = make_experiment(tmp_path, bases=bases, seeds=[0])
    sizes = {name: {"targets": 10, "bytes": 40} for name in ("anchor", "source-1")}
    for nll, is_warned in ((1.49, False), (1.47, True)):
        runs = {
            (0, arm): result(1.5) for arm in ("carryon", "own-anchor", "own-source-1")
        }  # fmt: skip
        runs |= {(0, arm): result(nll, shares={"a": 1.0}) for arm in plan.MIXTURES}
        rows = report.make_rows(experiment, sizes, runs, {})
        figures = report.figures_of(experiment, rows, corpus={"shared_ratio": 0.0})
        [figure] = [each for each in figures if each.figure == "mix.one_tokenizer"]
        assert figure.value == pytest.approx(nll - 1.5)
        assert figure.met is True
        assert bool(report.warnings_of(figures)) is is_warned


# A run


@pytest.mark.slow
def test_arms_that_are_left_out_are_neither_trained_nor_counted(tmp_path: Path) -> None:
    arms = ["gate", "carryon", "gate+carryon"]
    experiment = make_experiment(tmp_path, arms=arms, seeds=[0])
    planned = plan.plan_mix(experiment)
    assert [arm for _, arm in planned.runs] == ["carryon", "gate", "gate+carryon"]
    assert [step.result.name for step in planned.stores] == ["anchor.json", "source-1.aligned.json"]
    assert list(planned.bytes) == ["anchor"]
    with_own = make_experiment(tmp_path, arms=[*arms, "own-source-1"], seeds=[0])
    assert [step.result.name for step in plan.plan_mix(with_own).stores] == [
        "anchor.json", "source-1.json", "source-1.aligned.json"
    ]  # fmt: skip

    nlls = {"carryon": 1.8, "gate": 1.7, "gate+carryon": 1.5}
    shares = {"carry-on": 0.4, "b": 0.6}
    runs = {
        (0, arm): result(nll, shares=shares if "gate" in arm else None) for arm, nll in nlls.items()
    }
    rows = report.make_rows(experiment, {"anchor": {"targets": 10, "bytes": 40}}, runs, {})
    assert [row.arm for row in rows] == ["anchor", *nlls]
    figures = report.figures_of(experiment, rows, corpus={"shared_ratio": 0.01})
    by_name = {figure.figure: figure for figure in figures}
    assert by_name["mix.gain"].details["values"] == pytest.approx([0.3])
    assert not {"mix.against_best_own", "mix.gain.state"} & by_name.keys()


def test_bases_are_mixed_measured_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    anchor = make_base(tmp_path / "a", "gpt2", vocab_size=300)
    source = make_base(tmp_path / "b", "qwen", vocab_size=420, seed=1, steps=30)
    body = "".join(TEXTS[:4])
    random = np.random.default_rng(0)
    words = body.split()
    rows = [
        {"id": f"d{index}", "text": " ".join(random.choice(words, size=60))} for index in range(24)
    ]
    data = write_lines(tmp_path / "data.jsonl", *rows)
    out = tmp_path / "out"
    argv = ["experiment-mix", "--bases", str(anchor), str(source), "--data", str(data)]
    argv += ["--out", str(out), "--tokens", "3000", "--held-out-tokens", "300"]
    argv += ["--window-tokens", "64", "--width", "8", "--epochs", "1", "--tokens-per-step", "256"]
    argv += ["--device", "cpu", "--compute-dtype", "float32"]
    done = list[str]()
    write_json = steps.write_json

    def stop_behind_a_run(path: Path, document: Any) -> None:  # noqa: ANN401
        write_json(path, document)
        done.append(path.name)
        if path.name == "own-anchor.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(steps, "write_json", stop_behind_a_run)
    assert main([*argv, "--seeds", "0"]) == 130
    monkeypatch.setattr(steps, "write_json", write_json)
    assert main([*argv, "--seeds", "0"]) == 0
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [each["figure"] for each in figures]
    assert {"mix.anchor", "mix.gate", "mix.gain", "mix.speed", "mix.against_best_own"} <= set(names)
    assert "mix.straddled.gate" in names
    table = json.loads((out / "table.json").read_text())
    by_arm = {row["arm"]: row for row in table["rows"]}
    assert by_arm["own-anchor"]["bytes"] >= by_arm["gate+carryon"]["bytes"]
    assert by_arm["source-1"]["per_byte"] < by_arm["anchor"]["per_byte"]  # it was trained
    assert done.count("own-anchor.json") == 1
    assert main([*argv, "--seeds", "0", "--width", "16"]) == 2
    assert "expected the result of this command" in capsys.readouterr().err
