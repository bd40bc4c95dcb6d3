"""Benchmarks by name, and those of stores, run once on tiny sizes; no speed is asserted."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from support.benchmarks import measure, names_of

from carryon.cache.base.lm_head import widen
from carryon.cache.base.model import Base
from carryon.cache.errors import InputError
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench import stream
from carryon.tools.bench.__main__ import main
from carryon.tools.bench.disk import SlowDisk, charge_nothing
from carryon.tools.bench.epoch import EPOCHS, run_peer_epoch, run_store_epoch
from carryon.tools.bench.experiments import EXPERIMENTS
from carryon.tools.bench.job import check_labels, in_turn, split_label
from carryon.tools.bench.open import make_large_store
from carryon.tools.bench.peers import Peer, deepspec, retyped_speculators, specforge
from carryon.tools.bench.registry import BENCHMARKS
from carryon.tools.bench.run import describe, print_table, read_sizes
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import StateSet, make_states, samples_of, take_states
from carryon.tools.bench.stream import stream_layouts
from carryon.tools.compare.figure import Figure
from carryon.train.config import StreamSettings

UNIT_TOKENS = 64
PEERS = [
    retyped_speculators(reason="of the test"),
    specforge(has_padding=False),
    specforge(has_padding=True),
    deepspec(is_straight=False),
    deepspec(is_straight=True),
]


@pytest.fixture(scope="module")
def states() -> StateSet:
    """Twelve samples of 8 to 48 tokens, width 16, two taps: several units of 64 rows."""
    return make_states(
        "made-up", num_samples=12, width=16, num_taps=2, mean_tokens=24, max_tokens=48, seed=3
    )


@pytest.fixture(scope="module")
def exact_store(states: StateSet, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Those states in a store."""
    root = tmp_path_factory.mktemp("bench") / "store"
    settings = StoreSettings(taps=states.taps, unit_tokens=UNIT_TOKENS)
    write_scratch_store(root, states, settings=settings)
    return Store.open(root)


# Figures


@pytest.mark.parametrize(
    ("value", "target", "sense", "met"),
    [
        (0.6, 0.64, "at most", True),
        (0.7, 0.64, "at most", False),
        (1.5, 1.5, "at least", True),
        (1.4, 1.5, "at least", False),
        (1.4, None, "at least", None),
    ],
)
def test_a_figure_tells_whether_it_meets_its_target(
    value: float, target: float | None, sense: str, met: bool | None
) -> None:
    figure = Figure(figure="f", value=value, unit="x", target=target)
    figure = replace(figure, sense="at most" if sense == "at most" else "at least")
    assert figure.met is met
    assert json.loads(json.dumps(figure.to_dict()))["met"] is met


def test_a_figure_names_the_core_that_ran_it() -> None:
    line = Figure(figure="f", value=1.0, unit="x").to_dict()
    assert torch.backends.cpu.get_cpu_capability() in line["core"] or torch.cuda.is_available()


def test_details_cannot_overwrite_a_field_of_a_figure() -> None:
    with pytest.raises(ValueError, match=r"other names for the details \['met', 'value'\]"):
        Figure(figure="f", value=1.0, unit="x", details={"value": 2, "met": 3, "other": 4})


def test_the_table_names_missed_targets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="carryon")
    print_table(
        [
            Figure(figure="plain", value=12345.6, unit="tokens/s"),
            Figure(figure="missed", value=2.0, unit="s", target=1.0),
        ]
    )
    lines = caplog.messages
    assert lines[0].split() == ["figure", "value", "target", "unit", "met"]
    assert lines[1].split() == ["missed", "2", "<=", "1", "s", "NO"]
    assert lines[2].split() == ["plain", "12,346", "tokens/s"]


def test_ways_take_turns_and_the_median_counts() -> None:
    called: list[str] = []
    values = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 4.0, 6.0])}

    def way(name: str) -> Callable[[], float]:
        def measure() -> float:
            called.append(name)
            return next(values[name])

        return measure

    assert in_turn({name: way(name) for name in values}, rounds=3) == {"a": 2.0, "b": 5.0}
    assert "".join(called) == "abbaab"


# The registry


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_registered_benchmark_exists_and_has_its_quick_sizes(name: str) -> None:
    sizes = read_sizes(name, [], is_quick=True)
    given = [
        f"{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in sizes.items()
    ]
    assert read_sizes(name, given, is_quick=False) == sizes


def test_help_of_a_benchmark_names_what_it_measures_and_its_sizes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["store.ray", "--help"])
    page = capsys.readouterr().out
    assert all(text in page for text in ("two actors", "unit_tokens=2048", "--sizes"))
    for name in BENCHMARKS:
        assert all(f"{key}=" in describe(name) for key in read_sizes(name, [], is_quick=True))


def test_without_a_name_all_benchmarks_are_listed_without_loading_torch() -> None:
    program = (
        "import sys; from carryon.tools.bench.__main__ import main; main([]);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    first_words = {line.split()[0] for line in done.stdout.splitlines() if line}
    assert {*BENCHMARKS, *EXPERIMENTS} <= first_words


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_benchmarks_of_a_gpu_are_skipped_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--quick"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for name in (name for name in BENCHMARKS if name.startswith("gpu.")):
        assert f"{name}: skipped, it needs an accelerator" in captured.err


def test_a_wrong_name_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stores"]) == 2
    assert "did you mean store?" in capsys.readouterr().err


def test_a_single_benchmark_prints_json_and_a_table_and_leaves_nothing_behind(
    store_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["store.write", "--sizes", "rounds=1", "early_unit=1", "late_unit=2"]
    argv += ["--work", str(store_tmp / "work"), "--out", str(store_tmp / "out")]
    assert main(argv) == 0
    captured = capsys.readouterr()
    [line] = map(json.loads, captured.out.splitlines())
    assert line["figure"] == "write.growth"
    assert {"value", "target", "unit", "met", "core"} <= line.keys()
    assert "write.growth" in captured.err
    assert not list((store_tmp / "work").iterdir())
    assert json.loads((store_tmp / "out/figures.jsonl").read_text()) == line


def test_a_benchmark_without_its_input_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge"]) == 0
    assert main(["store.lossless"]) == 0
    assert main(["mixing.align", "--base", "base", "--store", "one"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "merge.native: skipped, it needs --base" in captured.err
    assert "store.lossless: skipped, it needs --store or --base" in captured.err
    assert "mixing.align: skipped, it needs --store twice" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["store.write", "--sizes", "speed=1"], "expected some of early_unit=10 late_unit=1000"),
        (["store.write", "--sizes", "rounds=0"], "expected rounds more than 0, such as 30"),
        (["store.write", "--sizes", "rounds=1,2"], "expected rounds more than 0, such as 30"),
        (["store", "--store", "a/s", "b/s"], "--store: expected different labels, got s s"),
    ],
)
def test_wrong_options_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_label_is_given_or_the_last_part_of_the_path() -> None:
    assert split_label("gsm=a/b") == ("gsm", "a/b")
    assert split_label("a/b") == ("b", "a/b")
    check_labels("--store", ["gsm=a/b", "a/b"])


# States


def test_synthetic_states_have_the_requested_shape_and_repeat(states: StateSet) -> None:
    assert len(states.lengths) == 12
    assert 8 <= states.lengths.min() <= states.lengths.max() <= 48
    assert states.taps == ["layer.1", "final"]
    assert {rows.shape for rows in states.hidden.values()} == {(states.num_tokens, 16)}
    again = make_states(
        "made-up", num_samples=12, width=16, num_taps=2, mean_tokens=24, max_tokens=48, seed=3
    )
    np.testing.assert_array_equal(again.hidden["final"], states.hidden["final"])


def test_a_scratch_store_holds_its_states(states: StateSet, exact_store: Store) -> None:
    taken = take_states("taken", exact_store, max_tokens=10**6)
    assert taken.num_tokens == states.num_tokens
    originals = {states.tokens[states.rows_of(index)].tobytes(): index for index in range(12)}
    for sample in range(12):
        rows = taken.rows_of(sample)
        same = states.rows_of(originals[taken.tokens[rows].tobytes()])
        for tap in states.taps:
            np.testing.assert_array_equal(taken.hidden[tap][rows], states.hidden[tap][same])


def test_states_are_taken_up_to_a_number_of_tokens(exact_store: Store) -> None:
    taken = take_states("taken", exact_store, max_tokens=100)
    assert 50 < taken.num_tokens <= 100
    assert taken.lengths.sum() == taken.num_tokens == len(taken.hidden["final"])


def test_a_lossy_store_is_refused_as_a_source(states: StateSet, store_tmp: Path) -> None:
    settings = StoreSettings(taps=states.taps, profile="near", unit_tokens=UNIT_TOKENS)
    write_scratch_store(store_tmp / "near", states, settings=settings)
    with pytest.raises(InputError, match="expected a store of exact bfloat16 states"):
        take_states("near", Store.open(store_tmp / "near"), max_tokens=100)
    with pytest.raises(InputError, match="got profile near"):
        measure("store.lossless", store_tmp, given_stores=[str(store_tmp / "near")])


# Sizes and errors


def test_sizes_and_errors_of_a_store_are_measured(exact_store: Store, tmp_path: Path) -> None:
    given = [f"gsm={exact_store.root}"]
    figures = measure("store.lossless", tmp_path, given_stores=given)
    figures += measure("store.profiles", tmp_path, given_stores=given)
    assert names_of(figures) == [
        *("lossless.gsm.layer.1", "lossless.gsm.final"),
        *("near.gsm.layer.1.bytes", "compact.gsm.layer.1.bytes"),
        *("near.gsm.final.bytes", "near.gsm.final.kl"),
        *("compact.gsm.final.bytes", "compact.gsm.final.kl"),
    ]
    by_name = {figure.figure: figure for figure in figures}
    assert by_name["lossless.gsm.final"].target == 0.64
    near, compact = by_name["near.gsm.final.kl"], by_name["compact.gsm.final.kl"]
    assert 0 < near.value < compact.value
    assert near.details["relative_error"] < compact.details["relative_error"]
    assert near.details["top1"] <= 1


# Streaming


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: str(peer.name))
def test_a_peer_delivers_every_token_of_its_layout(
    states: StateSet, tmp_path: Path, peer: Peer
) -> None:
    peer.write(states, tmp_path)
    read: list[int] = []
    epoch = run_peer_epoch(
        peer, states, tmp_path, seed=0, num_threads=2, charge=lambda size: read.append(size)
    )
    assert epoch.num_tokens == EPOCHS * states.num_tokens < epoch.num_rows
    assert sum(read) >= states.raw_bytes
    load = peer.open(states, tmp_path, charge_nothing)
    batch = load(np.array([3]))
    rows = states.rows_of(3)
    is_packed = "verifier_last_hidden_states" in batch
    last = batch["verifier_last_hidden_states" if is_packed else "hidden_state"]
    assert last.dtype == torch.bfloat16
    delivered = last[0, : states.lengths[3]].float().numpy()
    np.testing.assert_array_equal(delivered, widen(states.hidden["final"][rows]))
    lower = batch["hidden_states" if is_packed else "aux_hidden_state"]
    delivered = lower[0, : states.lengths[3]].float().numpy()
    np.testing.assert_array_equal(delivered, widen(states.hidden["layer.1"][rows]))


def test_peers_support_a_single_tap(tmp_path: Path) -> None:
    one = make_states(
        "one", num_samples=3, width=16, num_taps=1, mean_tokens=16, max_tokens=32, seed=0
    )
    for peer in PEERS:
        folder = tmp_path / peer.name
        folder.mkdir()
        peer.write(one, folder)
        load = peer.open(one, folder, charge_nothing)
        batch = load(np.array([0, 2]))
        assert batch["input_ids"].numel() >= one.lengths[[0, 2]].sum()


def test_a_whole_store_is_streamed_and_charged_for_its_files(
    states: StateSet, exact_store: Store
) -> None:
    charged: list[int] = []
    settings = StreamSettings(window_units=2, reader_threads=2)
    epoch = run_store_epoch(exact_store, seed=0, settings=settings, charge=charged.append)
    assert epoch.num_tokens == EPOCHS * states.num_tokens
    assert exact_store.num_units > 1
    files = [exact_store.receipt(unit).files.values() for unit in range(exact_store.num_units)]
    assert sum(charged) == EPOCHS * sum(entry.bytes for entries in files for entry in entries)


def test_a_slow_disk_keeps_its_bandwidth() -> None:
    disk = SlowDisk(1e6)
    started_at = time.perf_counter()
    for _ in range(8):
        disk.charge(5000)
    assert time.perf_counter() - started_at >= 0.0399


def test_streaming_gives_a_figure_per_layout_and_four_against_the_best_peer(
    states: StateSet, store_tmp: Path
) -> None:
    some = [specforge(has_padding=True), deepspec(is_straight=False), deepspec(is_straight=True)]
    figures = stream_layouts(
        states,
        some,
        store_tmp / "work",
        unit_tokens=UNIT_TOKENS,
        rounds=1,
        threads=[1],
        slow_mb_per_second=1e4,
    )
    ours = ["exact", "raw", "near", "compact", "decoded"]
    theirs = [peer.name for peer in some]
    last = ["warm", "warm_raw", "warm_decoded", "slow_disk"]
    expected = [f"stream.made-up.{name}" for name in [*ours, *theirs, *last]]
    assert names_of(figures) == expected
    values = {figure.figure.rpartition(".")[2]: figure.value for figure in figures}
    assert values["warm_raw"] == pytest.approx(values["raw"] / values["torch_save_padded"])
    best = values["torch_save_padded"]
    assert values["warm_decoded"] == pytest.approx(values["decoded"] / best)
    assert values["warm"] == pytest.approx(values["exact"] / values["torch_save_padded"])
    details = {figure.figure.rpartition(".")[2]: figure.details for figure in figures}
    for name in (*ours, *theirs):
        assert details[name]["role"] in ("ours", "peer", "limit")
        assert details[name]["bytes_per_token"] > 0
    stored, decoded = details["exact"]["ratio_to_raw"], details["decoded"]["ratio_to_raw"]
    assert 1 + stored <= decoded < 1.1 + stored  # store and cache
    for name in ("filling", "comparing"):
        assert details["decoded"][f"{name}_tokens_per_second"] > 0
    assert details["torch_save_padded"]["ratio_to_raw"] > details["raw_map"]["ratio_to_raw"] >= 1
    assert details["warm"]["best_peer"] == "torch_save_padded"
    assert set(details["warm"]["to_limit"]) == {"raw_map", "raw_map_straight"}
    assert not list((store_tmp / "work").iterdir())


def test_synthetic_states_and_stores_are_streamed(
    exact_store: Store, store_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "list_peers", lambda: PEERS[1:2])  # speculators takes 10 s
    figures = measure(
        "store.stream",
        store_tmp,
        given_stores=[f"mine={exact_store.root}"],
        sizes={"width": 16, "slow_mb_per_second": 1e4},
    )
    assert {name.split(".")[1] for name in names_of(figures)} == {"synthetic", "mine"}


def test_speculators_is_only_imported_when_it_is_streamed() -> None:
    assert "speculators" not in sys.modules


# Decoding, writing, opening, extracting


def test_decoding_is_measured_with_and_without_reading(exact_store: Store, store_tmp: Path) -> None:
    figures = measure(
        "store.decode",
        store_tmp,
        given_stores=[f"tiny={exact_store.root}"],
        sizes={"width": 16, "rounds": 1},
    )
    assert names_of(figures) == [
        *("decode.synthetic", "decode.synthetic.near", "decode.synthetic.compact", "decode.tiny")
    ]
    assert min(figures[-1].details["gb_per_second"].values()) > 0


def test_write_growth_compares_an_early_with_a_late_unit(store_tmp: Path) -> None:
    sizes = {"early_unit": 1, "late_unit": 4, "rounds": 2}
    figures = measure("store.write", store_tmp, sizes=sizes)
    assert names_of(figures) == ["write.growth"]
    assert len(list((store_tmp / "early/units").glob("[0-9]*.json"))) == 1 + 2
    assert len(list((store_tmp / "late/units").glob("[0-9]*.json"))) == 4 + 2


def test_the_large_store_has_the_requested_units_and_samples(store_tmp: Path) -> None:
    manifest = make_large_store(store_tmp / "large", num_units=5, num_samples=100)
    assert (manifest.num_units, manifest.num_samples) == (5, 100)
    store = Store.open(store_tmp / "large")
    assert len(store.read_sample(99).hidden["final"]) == 4


def test_the_dataset_is_measured_against_the_stream(store_tmp: Path) -> None:
    sizes = {"samples": 8, "width": 16, "unit_tokens": 2048, "rounds": 1}
    figures = measure("store.dataset", store_tmp, sizes=sizes)
    assert names_of(figures) == ["dataset.speed"]
    assert figures[0].target == 0.98


def test_opening_is_measured_in_a_fresh_process(store_tmp: Path) -> None:
    figures = measure("store.open", store_tmp, sizes={"units": 3, "samples": 30})
    assert names_of(figures) == ["open.seconds", "open.memory"]
    assert figures[0].details["samples"] == 30


def test_loading_a_base_is_measured_in_fresh_processes(
    tiny_base: Base, tiny_base_folder: Path, store_tmp: Path
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("an accelerator takes all of a tiny base")
    sizes = {"dtypes": ["bfloat16"], "quantize": ["int8"]}  # float32 is loaded to be offloaded
    figures = measure("base.load", store_tmp, base=str(tiny_base_folder), sizes=sizes)
    assert [(each.figure, each.target) for each in figures] == [
        ("base.load.resident.bfloat16", 1.25),
        ("base.load.anonymous.bfloat16", 1.25),
        ("base.load.offload", 1.25),
        ("base.load.offload.differing", 0.0),
        *([("base.load.int8", None)] if find_spec("torchao") else []),
    ]
    assert figures[3].value == 0.0
    for figure in figures[:3]:
        assert figure.details["weights_sha256"] == tiny_base.identity.weights_sha256
    assert figures[2].details["weight_bytes_in_memory"] < figures[2].details["weight_bytes"]
    for figure in figures[4:]:
        assert figure.details["is_same_head"]


def test_extraction_is_measured_against_bare_passes(
    tiny_base_folder: Path, exact_store: Store, store_tmp: Path
) -> None:
    samples = samples_of(exact_store, max_tokens=150)
    assert 64 < sum(len(sample.tokens) for sample in samples) <= 150
    [figure] = measure(
        "store.extract",
        store_tmp,
        base=str(tiny_base_folder),
        given_stores=[str(exact_store.root)],
        sizes={"tokens": 150, "unit_tokens": UNIT_TOKENS},
    )
    assert len(figure.details["ratios"]) == figure.details["units"] > 1
    Store.open(store_tmp / "extracted")  # finished, and its probe fits


def test_predictions_are_measured_against_what_was_written(store_tmp: Path) -> None:
    """Without a base, on a tiny one."""
    sizes = {"tokens": 4096, "unit_tokens": 1024, "batch_tokens": 128}
    figures = measure("store.predicted", store_tmp, sizes=sizes)
    assert names_of(figures) == ["extract.predicted.bytes", "extract.predicted.seconds"]
    assert [figure.target for figure in figures] == [0.03, 0.15]
    assert figures[0].met
    assert figures[0].details["dry_run_error"] < 0.05
    assert figures[0].details["written"]["store_bytes"] > figures[1].details["tokens"]


# Extracting


def test_a_base_and_text_provide_the_store(tiny_base_folder: Path, store_tmp: Path) -> None:
    data = store_tmp / "mine.jsonl"
    lines = [json.dumps({"text": f"{index} is the thing " * 3}) for index in range(20)]
    data.write_text("\n".join(lines) + "\n")
    (store_tmp / "work").mkdir()
    job = {"base": str(tiny_base_folder), "corpora": [f"mine={data}"], "shared": store_tmp}
    figures = measure("store.lossless", store_tmp / "work", **job)
    figures += measure("store.profiles", store_tmp / "work", **job)
    assert names_of(figures) == [
        "lossless.mine",
        *("near.mine.bytes", "near.mine.kl", "compact.mine.bytes", "compact.mine.kl"),
    ]
    assert len(list(store_tmp.glob("mine-final-*"))) == 1  # extracted once for both
