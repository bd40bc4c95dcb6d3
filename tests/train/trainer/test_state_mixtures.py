"""Carry-ons that read the states of other bases: resumed to the bit, and plain arithmetic."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.mixed_stores import ROWS, STORE, make_anchor, make_source
from support.tiny_carryons import resign
from support.tiny_runs import TINY, Killed, assert_same_bits, kill_at

from carryon.cache.base.lm_head import widen
from carryon.cache.errors import InputError, StoreError
from carryon.cache.format.alignment import read_alignment
from carryon.cache.store.reader import Store
from carryon.tools.bench.mixtures.measure import measure_places
from carryon.tools.cli.main import main
from carryon.train.config import CarryOnSettings, MixSettings
from carryon.train.data.datasets import split_store
from carryon.train.data.joined_store import JoinedStore
from carryon.train.inference.evaluate import evaluate
from carryon.train.mixing.mixture import load_mixture
from carryon.train.mixing.source_inputs import source_inputs
from carryon.train.mixing.sources import open_sources, warn_about_sources
from carryon.train.modules.bottleneck import Bottleneck, build_bottleneck
from carryon.train.modules.packed_attention import pack
from carryon.train.modules.serialization import load_carryon, read_card
from carryon.train.trainer import finish
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.sweep import sweep
from carryon.train.trainer.trainer import train
from carryon.train.verify import verify_folder

LACKING = "text-3"
"""A held-out sample that one of the stores lacks."""
CHANGES: dict[str, Any] = {"epochs": 2, "mix_by": "state", "taps": ["final"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An anchor, a wider base that knows the texts at two taps, one that lacks a sample."""
    root = tmp_path_factory.mktemp("mixed")
    anchor = make_anchor(root)
    taps = replace(STORE, taps=["final", "layer.1"])
    make_source(root, anchor, name="good", steps=150, width=32, store=taps)
    rows = [row for row in ROWS if row["id"] != LACKING]
    options: dict[str, Any] = {"rows": rows, "drop_missing": True}
    make_source(root, anchor, name="lacking", kind="metaspace", vocab_size=360, seed=5, **options)
    return root


@pytest.fixture(autouse=True)
def without_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "plot_curves", lambda metrics, path: False)


def mix(folder: Path, out: Path, *names: str, **changes: Any) -> TrainReport:  # noqa: ANN401
    paths = [str(folder / name) for name in names or ("good",)]
    return train(folder / "anchor", out=out, settings=TINY, **{"mix": paths, **CHANGES, **changes})


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport]:
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "plot_curves", lambda metrics, path: False)
        return out, mix(folder, out, "good", "lacking", dropout=0.1)


def test_states_of_a_base_that_knows_the_text_help(
    folder: Path, finished: tuple[Path, TrainReport], tmp_path: Path
) -> None:
    alone = mix(folder, tmp_path / "alone", mix=[], mix_by="probability", dropout=0.1)
    _, report = finished
    assert report.base_nll == alone.base_nll
    assert report.carryon_nll < alone.carryon_nll - 0.05
    assert report.mixture["carryon_nll"] == report.carryon_nll
    assert report.mixture["gate_shares"] == {}
    assert report.mixture["bytes_per_target"] > 1


def test_a_killed_run_ends_with_the_same_bits_and_a_sweep_too(
    folder: Path,
    finished: tuple[Path, TrainReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            mix(folder, tmp_path / "run", "good", "lacking", dropout=0.1)
    report = mix(folder, tmp_path / "run", "good", "lacking", dropout=0.1)
    assert_same_bits(tmp_path / "run", finished[0])
    assert report.mixture == finished[1].mixture
    with pytest.raises(InputError, match="mix_taps is"):
        mix(folder, tmp_path / "run", "good", mix_taps=["final", "layer.1"], dropout=0.1)
    options: dict[str, Any] = {**CHANGES, "mix": [str(folder / x) for x in ("good", "lacking")]}
    runs: dict[str, dict[str, Any]] = {"a": {"dropout": 0.1}, "b": {"seed": 1}}
    sweep(folder / "anchor", out=tmp_path / "sweep", settings=TINY, runs=runs, **options)
    assert_same_bits(tmp_path / "sweep" / "a", finished[0])


def test_a_decoded_cache_keeps_the_states_of_all_bases(
    folder: Path, finished: tuple[Path, TrainReport], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for name in ("one", "two"):
        report = mix(
            folder, tmp_path / name, "good", "lacking", dropout=0.1, decoded_cache=str(cache)
        )
        assert_same_bits(tmp_path / name, finished[0])
    stores = [Store.open(folder / x, allow_aligned=True) for x in ("anchor", "good", "lacking")]
    assert len(list(cache.glob("*.states"))) == sum(store.num_units for store in stores)
    assert report.decoded_cache["misses"] == 0


def test_losses_are_those_of_the_aligned_rows_side_by_side(
    folder: Path, finished: tuple[Path, TrainReport]
) -> None:
    _, report = finished
    module, card = load_mixture(report.carryon)
    assert isinstance(module, Bottleneck)
    assert module.sources == {"1:final": 32, "2:final": 16}
    anchor = Store.open(folder / "anchor")
    others = [Store.open(folder / name, allow_aligned=True) for name in ("good", "lacking")]
    weight = torch.from_numpy(widen(anchor.head().weight))
    total, count = 0.0, 0
    for index in split_store(anchor, TINY.stream).held_out.tolist():
        sample = anchor.read_sample(index)
        at = np.flatnonzero(sample.loss_mask[1:])
        targets = torch.from_numpy(sample.tokens[at + 1].astype(np.int64))
        states = {"final": torch.from_numpy(sample.hidden["final"])}
        for number, store in enumerate(others, 1):
            rows = store.read_sample(index, taps=["final"]).hidden["final"]
            states[f"{number}:final"] = torch.from_numpy(rows)
            if number == 2:
                assert (not rows.any()) == (sample.id == LACKING)
        with torch.no_grad():
            bridged = sum(
                bridge(norm(states[tap]))
                for tap, norm, bridge in zip(
                    ["final", "1:final", "2:final"],
                    [*module.norms, *module.source_norms],
                    [*module.bridges, *module.source_bridges],
                    strict=True,
                )
            )
            packing = pack(torch.tensor([len(sample.tokens)]))
            u = module.body(
                inputs_embeds=bridged[None], position_ids=packing.position_ids, packing=packing
            )[0]
            delta = torch.sigmoid(module.gate(u)) * module.up(u)
            logits = (states["final"] + delta)[at] @ weight.t()
            total -= float(logits.log_softmax(dim=1).gather(1, targets[:, None]).sum())
        count += len(at)
    # A CPU's head in bfloat16 rounds its logits
    assert report.carryon_nll == pytest.approx(total / count, rel=5e-4)
    paths = [folder / "lacking", folder / "good"]
    measured = evaluate(folder / "anchor", carryon=report.carryon, mix=paths, device="cpu")
    assert measured.carryon_nll == report.carryon_nll
    assert measured.mixture == report.mixture


def test_a_card_records_the_bases_that_are_read(
    folder: Path,
    finished: tuple[Path, TrainReport],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    out, report = finished
    _, card = load_mixture(report.carryon)
    assert card.mixture["by"] == "state"
    first = card.mixture["sources"][0]
    good = Store.open(folder / "good", allow_aligned=True)
    assert (first["taps"], first["width"]) == (["final"], 32)
    assert first["weights_sha256"] == good.base["weights_sha256"]
    assert first["tokenizer_sha256"] == good.base["tokenizer_sha256"]
    assert not (Path(report.carryon) / "gate.safetensors").exists()
    assert (
        "The carry-on reads their states, in this order"
        in (Path(report.carryon) / "README.md").read_text()
    )
    assert verify_folder(out).is_sound, verify_folder(out).problems
    for read in (load_carryon, read_card):
        for options in ({}, {"allow_mixture": True}):
            with pytest.raises(InputError, match="one that also reads those of .*good-base"):
                read(report.carryon, **options)
    base = str(folder / "anchor-base")
    for command in (
        ["generate", "--prompt", "x"],
        ["merge", "--out", str(tmp_path / "merged")],
        ["score", "--tasks", "chain_sum", "--arms", f"carryon={report.carryon}"],
    ):
        named = [] if command[0] == "score" else ["--carryon", report.carryon]
        assert main([*command, *named, "--base", base]) == 2
        assert "expected a carry-on that reads the states of one base" in capsys.readouterr().err
    with pytest.raises(InputError, match="also reads those of"):
        evaluate(folder / "anchor", carryon=report.carryon, device="cpu")


def test_states_and_distributions_are_mixed_together(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--mix", str(folder / "good"), "--mix-by", "both", "--mix-taps", "final", "layer.1"]
    argv += ["--width", "8", "--heads", "2", "--blocks", "1", "--intermediate-size", "8"]
    out = tmp_path / "run"
    argv += ["--out", str(out), "--epochs", "2", "--device", "cpu", "--tokens-per-step", "128"]
    assert main(["train", "--store", str(folder / "anchor"), *argv]) == 0
    assert re.search(r"good-base +\d\.\d{4} +\d\.\d{4} +\d\.\d{3}", capsys.readouterr().err)
    report = TrainReport.read(out / "result.json")
    assert set(report.mixture["gate_shares"]) == {"carry-on", "good-base"}
    assert report.carryon_nll < report.base_nll - 0.3
    module, card = load_mixture(out / "carryon")
    assert module.sources == {"1:final": 32, "1:layer.1": 32}
    assert card.mixture["sources"][0]["taps"] == ["final", "layer.1"]
    assert verify_folder(out).is_sound
    measured = evaluate(
        folder / "anchor", carryon=report.carryon, mix=[folder / "good"], device="cpu"
    )
    assert measured.carryon_nll == report.carryon_nll
    places = measure_places(
        store=str(folder / "anchor"), mix=[str(folder / "good")], carryon=report.carryon,
        device="cpu",
    )  # fmt: skip
    parts = [places[name] for name in ("straddled", "elsewhere")]
    total = sum(part["targets"] * part["mixture_nll"] for part in parts)
    assert total / report.held_out_targets == pytest.approx(report.carryon_nll, rel=5e-4)


def test_the_table_of_a_run_by_state_has_no_shares(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--mix", str(folder / "lacking"), "--mix-by", "state", "--epochs", "1"]
    argv += ["--out", str(tmp_path / "run"), "--device", "cpu", "--width", "8", "--heads", "2"]
    assert main(["train", "--store", str(folder / "anchor"), *argv]) == 0
    text = capsys.readouterr().err
    assert re.search(r"\nmixture +\d\.\d{4} +\d\.\d{4}", text)
    assert "gate share" not in text
    assert "1 of 12 samples are not in its store" in text


def test_a_store_that_was_aligned_by_an_earlier_version_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    anchor = Store.open(folder / "anchor")
    sources = open_sources(anchor, [str(folder / "good")])
    warn_about_sources(anchor, sources)
    assert not caplog.records
    manifest = sources[0].store.manifest
    older = {name: fact for name, fact in manifest.alignment.items() if name != "rules"}
    sources[0].store.manifest = replace(manifest, alignment=older)
    warn_about_sources(anchor, sources)
    assert "aligned by an earlier version" in caplog.text
    assert f"--align-to {anchor.root} again" in caplog.text


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for changes, message in (
        ({"kind": "none"}, "kind none: expected one that reads the states of other bases"),
        ({"kind": "top"}, r"kind top: expected one that reads .*\(bottleneck\) with mix_by state"),
        ({"kind": "native", "mix_by": "both"}, "kind native: expected .* with mix_by both"),
        ({"mix_taps": ["layer.1", "layer.2"]}, "mix_taps: .*good: expected the taps layer.1"),
        ({"mix_by": "both", "sampled_softmax": 8}, "sampled_softmax: expected 0 with mix"),
        ({"mix": []}, "mix_by: expected with mix, got state without another base"),
        ({"mix_by": "probability", "mix_taps": ["layer.1"]}, "mix_taps: expected with mix_by"),
    ):
        with pytest.raises(InputError, match=message):
            mix(folder, out, **changes)
    for names, message in (
        (("anchor",), "got the anchor again"),
        (("good", "good"), "mix: expected each once"),
    ):
        with pytest.raises(InputError, match=message):
            mix(folder, out, *names)
    assert not out.exists()
    assert mix(folder, tmp_path / "sampled", sampled_softmax=8, epochs=1).num_steps > 0


def test_a_store_without_head_is_refused_where_its_distribution_is_mixed(
    folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "headless"
    shutil.copytree(folder / "good", copy)
    shutil.rmtree(copy / "head")
    changes: dict[str, Any] = {"mix": [str(copy)], "mix_by": "both", "kind": "bottleneck"}
    with pytest.raises(StoreError, match="headless.*head"):
        mix(folder, tmp_path / "run", **changes)


def test_stores_of_other_texts_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchor = Store.open(folder / "anchor")
    good, lacking = (
        Store.open(folder / name, allow_aligned=True).manifest.alignment
        for name in ("good", "lacking")
    )
    assert good["text_sha256"] != lacking["text_sha256"]  # of other samples
    assert len(open_sources(anchor, [str(folder / name) for name in ("good", "lacking")])) == 2
    opened = Store.open

    def whole(path: Any, **options: Any) -> Store:  # noqa: ANN401
        store = opened(path, **options)
        facts = store.manifest.alignment | {"missing_samples": 0}
        store.manifest = replace(store.manifest, alignment=facts)
        return store

    monkeypatch.setattr(Store, "open", whole)
    with pytest.raises(InputError, match="lacking: expected the texts that .*good was made of"):
        open_sources(anchor, [str(folder / name) for name in ("good", "lacking")])

    def other(path: Any, **options: Any) -> Store:  # noqa: ANN401
        store = opened(path, **options)
        if store.root.name == "lacking-too":
            facts = store.manifest.alignment | {"text_sha256": "0" * 64}
            base = store.base | {"weights_sha256": "0" * 64}
            store.manifest = replace(store.manifest, alignment=facts, base=base)
            store.base = base
        return store

    shutil.copytree(folder / "lacking", tmp_path / "lacking-too")
    both = [str(folder / "lacking"), str(tmp_path / "lacking-too")]
    monkeypatch.setattr(Store, "open", other)
    with pytest.raises(InputError, match="lacking-too: expected the texts that .*lacking was made"):
        open_sources(anchor, both)


def test_stores_of_other_samples_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_anchor(tmp_path, rows=ROWS[:9], seed=3)
    with pytest.raises(InputError, match="aligned to the store .* of .*anchor-base"):
        open_sources(Store.open(other), [str(folder / "good")])
    anchor = Store.open(folder / "anchor")
    opened = Store.open
    for name, value, message in (
        ("samples_digest", "x", "expected the samples and rows of"),
        ("unit_tokens", 7, "expected the samples and rows of"),
        ("finished_units", [0], r"expected \d+ units, got 1"),
    ):

        def changed(path: Any, name: str = name, value: Any = value, **options: Any) -> Store:  # noqa: ANN401
            store = opened(path, **options)
            object.__setattr__(store, name, value)
            return store

        with monkeypatch.context() as patch:
            patch.setattr(Store, "open", changed)
            with pytest.raises(ValueError, match=message):
                open_sources(anchor, [str(folder / "good")])


def test_a_joined_store_is_the_anchor_with_more_taps(folder: Path) -> None:
    anchor = Store.open(folder / "anchor")
    good = Store.open(folder / "good", allow_aligned=True)
    joined = JoinedStore(anchor, [(good, ["final", "layer.1"])])
    assert joined.taps == ["final", "1:final", "1:layer.1"]
    assert joined.fingerprint == anchor.fingerprint
    unit = joined.read_unit(0, taps=["1:layer.1", "final"])
    assert set(unit.hidden) == {"final", "1:layer.1"}
    expected = good.read_unit(0, taps=["layer.1"]).hidden["layer.1"]
    assert np.array_equal(unit.hidden["1:layer.1"], expected)
    sample = joined.read_sample("chat", taps=["1:final"], start=2)
    rows = good.read_sample("chat", taps=["final"], start=2).hidden["final"]
    assert np.array_equal(sample.hidden["1:final"], rows)
    # As the aligned store says: zeros where the base has read nothing
    alignment = read_alignment(good.root, good.manifest, 0)
    final = good.read_unit(0, taps=["final"]).hidden["final"]
    assert not final[alignment.exact < 0].any()
    assert final[alignment.exact >= 0].any(axis=1).all()


# The module and its inputs


def test_weights_of_the_own_base_are_drawn_as_without_others() -> None:
    settings = CarryOnSettings(width=8, heads=2, blocks=1, intermediate_size=8, taps=["final"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixed = Bottleneck(settings, base_width=16, sources={"1:final": 24})
    alone = build_bottleneck(settings, base_width=16, seed=0)
    own = mixed.state_dict()
    assert all(torch.equal(own[name], value) for name, value in alone.state_dict().items())
    assert set(own) - set(alone.state_dict()) == {
        "source_norms.0.weight", "source_bridges.0.weight"
    }  # fmt: skip
    states = {"final": torch.randn(3, 16)}
    packing, at = pack(torch.tensor([3])), torch.arange(3)
    with pytest.raises(InputError, match="states: expected those of another base at 1:final"):
        mixed.correct_packed(states, packing, at)
    torch.nn.init.normal_(mixed.up.weight)
    zeros = mixed.correct_packed({**states, "1:final": torch.zeros(3, 24)}, packing, at)
    alone.up.load_state_dict(mixed.up.state_dict())
    torch.testing.assert_close(zeros, alone.correct_packed(states, packing, at))
    some = mixed.correct_packed({**states, "1:final": torch.randn(3, 24)}, packing, at)
    assert (some - zeros).abs().max() > 1e-3


def test_inputs_are_the_states_at_the_nodes_and_zeros_where_nothing_was_read() -> None:
    first = {"final": torch.randn(4, 3), "layer.1": torch.randn(4, 3)}
    second = {"final": torch.randn(2, 5).bfloat16()}
    nodes = [torch.tensor([-1, 0, 3, 3, 1]), torch.tensor([-1, -1, 0, 1, 1])]
    found = source_inputs([first, second], nodes)
    assert list(found) == ["1:final", "1:layer.1", "2:final"]
    for tap, rows, places in (
        ("1:final", first["final"], nodes[0]),
        ("1:layer.1", first["layer.1"], nodes[0]),
        ("2:final", second["final"], nodes[1]),
    ):
        for index, node in enumerate(places.tolist()):
            expected = rows[node] if node >= 0 else torch.zeros_like(rows[0])
            assert torch.equal(found[tap][index], expected)
        assert found[tap].dtype == rows.dtype


# Cards of strangers


@pytest.mark.parametrize(
    "changes",
    [
        {"taps": []},
        {"taps": ["final", "final"]},
        {"taps": ["../x"]},
        {"taps": "final"},
        {"taps": ["layer.1"] * 65},
        {"width": 0},
        {"width": 1 << 40},
        {"width": 1 << 16},
        {"width": 16},
        {"width": "32"},
        {"more": 1},
    ],
    ids=range(11),
)
def test_wrong_taps_and_widths_in_a_card_are_refused(
    finished: tuple[Path, TrainReport], tmp_path: Path, changes: dict[str, Any]
) -> None:
    copy = tmp_path / "carryon"
    shutil.copytree(finished[1].carryon, copy)
    _, card = load_mixture(copy)
    sources = card.mixture["sources"]
    mixture = {"by": "state", "sources": [sources[0] | changes, *sources[1:]]}
    resign(copy, mixture=mixture)
    with pytest.raises(InputError) as caught:
        load_mixture(copy)
    assert len(str(caught.value)) < 1000
    assert not verify_folder(copy).is_sound


def test_ways_to_mix_read_what_they_say() -> None:
    for way, reads, gates in (
        ("probability", False, True), ("state", True, False), ("both", True, True)
    ):  # fmt: skip
        settings = MixSettings(mix=["x"], mix_by=way)  # type: ignore[arg-type]
        assert (settings.reads_states, settings.has_gate) == (reads, gates)
    assert not MixSettings().has_gate
