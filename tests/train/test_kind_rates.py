"""Learning rates by kind: shown in the help, used and recorded unless another is given."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_runs import TINY, without_plots
from support.tiny_stores import write_corpus

from carryon.cache import extract
from carryon.cache.errors import InputError
from carryon.tools.bench.experiment_paths import experiment_paths
from carryon.tools.cli.options import options_of
from carryon.tools.compare.settings import CompareSettings, get_methods
from carryon.train import sweep, train, update
from carryon.train.config import CarryOnSettings, OptimizationSettings
from carryon.train.kinds import KINDS
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.trainer import rate_warning

TOP = {"kind": "top", "blocks": 1}
DEFAULT = replace(TINY, optimization=replace(TINY.optimization, learning_rate=0.0))
SHAPES: dict[str, dict[str, Any]] = {
    "bottleneck": {},
    "native": {"kind": "native"},
    "top": TOP,
    "top with LoRA": TOP | {"lora_rank": 2},
}
RATES = {name: KINDS[name].learning_rates for name in ("bottleneck", "native", "top")}
RATES["top with LoRA"] = KINDS["top"].lora_rates
MAX_FACTOR = KINDS["top"].max_rate_factor


@pytest.fixture(scope="module")
def store(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store from which a `top` of one block is trained."""
    root = tmp_path_factory.mktemp("rates")
    extract(
        base=tiny_base_folder,
        data=write_corpus(root / "data.jsonl", num_samples=12),
        out=root / "store",
        mask="all",
        max_tokens=32,
        taps=["final", "layer.1"],
        unit_tokens=64,
        with_blocks=1,
        device="cpu",
    )
    return root / "store"


def train_default(store: Path, out: Path, **options: Any) -> None:  # noqa: ANN401
    """Train with tiny settings that leave the learning rate to the kind."""
    with without_plots():
        train(store, out=out, settings=DEFAULT, **options)


def config_of(folder: Path) -> dict[str, Any]:
    """Return the settings that a run or a lineage has recorded."""
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return config


@pytest.mark.parametrize("name", SHAPES)
def test_each_kind_has_a_default_rate_and_a_given_one_wins(name: str) -> None:
    default = DEFAULT.with_options(**SHAPES[name])
    assert default.to_flat()["learning_rate"] == RATES[name][0]
    assert default.resolved().optimization.learning_rate == RATES[name][0]
    given = default.with_options(learning_rate=0.5)
    assert given.to_flat()["learning_rate"] == 0.5


def test_the_help_tells_the_rate_of_each_kind() -> None:
    [text] = [
        item.help for item in options_of(OptimizationSettings) if item.name == "learning_rate"
    ]
    text = " ".join(text.split())
    for name, (default, *_) in RATES.items():
        kind, *more = name.split(" ", 1)
        assert f"{default:g} for {' '.join([f'`{kind}`', *more])}" in text


def test_the_comparison_tries_the_same_rates() -> None:
    names = ["bottleneck", "native", "top", "top-lora"]
    methods = get_methods(CompareSettings(methods=names), num_layers=4, width=16)
    assert [methods[name].rates for name in names] == list(RATES.values())


def test_a_run_uses_and_records_the_rate_of_its_kind(store: Path, tmp_path: Path) -> None:
    out, default = tmp_path / "run", RATES["top"][0]
    train_default(store, out, **TOP, log_every=1)
    assert config_of(out)["learning_rate"] == default
    rates = [
        line["learning_rate"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line
    ]
    assert 0.9 * default < max(rates) <= default
    train_default(store, out, **TOP, learning_rate=default)  # the same run
    with pytest.raises(InputError, match=f"learning_rate is {default} there and 0.5 here"):
        train_default(store, out, **TOP, learning_rate=0.5)


def test_a_recorded_rate_is_given_back_to_the_run(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_default(store, out, **TOP, learning_rate=3e-4)
    recorded = {name: config_of(out)[name] for name in DEFAULT.to_flat()}
    train_default(store, out, **recorded)
    assert config_of(out)["learning_rate"] == 3e-4


def test_each_run_of_a_sweep_has_the_rate_of_its_kind(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with without_plots():
        sweep(store, out=tmp_path, vary=["lora_rank=0,2"], settings=DEFAULT, **TOP, epochs=1)
    rates = [config_of(tmp_path / f"lora_rank={rank}")["learning_rate"] for rank in (0, 2)]
    assert rates == [RATES["top"][0], RATES["top with LoRA"][0]]


def test_a_lineage_keeps_the_rate_of_its_kind(store: Path, tmp_path: Path) -> None:
    lineage = tmp_path / "lineage"
    changes = TOP | {"epochs": 1, "tokens_per_step": 32, "min_lr_ratio": 0.1}
    with without_plots():
        first = update(lineage, store=store, settings=DEFAULT, **changes)
    assert config_of(lineage)["learning_rate"] == RATES["top"][0]
    document = json.loads((lineage / "lineage.json").read_text())
    assert document["settings"]["learning_rate"] == RATES["top"][0]
    # no new data, and no other rate: the same version
    again = update(lineage, store=store, settings=DEFAULT, **changes)
    assert again == first


def test_paths_are_trained_with_the_rate_and_the_tap_of_the_kind(
    store: Path, tmp_path: Path
) -> None:
    settings = DEFAULT.with_options(**TOP, epochs=1, tokens_per_step=32, min_lr_ratio=0.1)
    without = ("mixing", "compilation")  # of which the command has no options
    groups = {name: getattr(settings, name) for name in settings.__slots__ if name not in without}
    stores = [str(store), str(shutil.copytree(store, tmp_path / "store"))]
    out = tmp_path / "out"
    with without_plots():
        experiment_paths(stores=stores, out=str(out), paradigms=["switch"], seeds=[0], **groups)
    recorded = json.loads((out / "experiment.json").read_text())
    assert recorded["learning_rate"] == RATES["top"][0]
    metrics = [read_metrics(path) for path in out.glob("runs/s0/trunk-*/metrics.jsonl")]
    highest = max(line.get("learning_rate", 0) for lines in metrics for line in lines)
    assert highest == RATES["top"][0]
    configs = [config_of(path.parent) for path in out.glob("runs/s0/*/config.yaml")]
    assert configs
    assert all(config["taps"] == ["layer.1"] for config in configs)


@pytest.mark.parametrize("name", ["top", "top with LoRA"])
def test_a_rate_that_is_too_high_for_a_top_draws_a_warning(name: str) -> None:
    shape, default = DEFAULT.with_options(**SHAPES[name]).carryon, RATES[name][0]
    assert not rate_warning(OptimizationSettings(learning_rate=MAX_FACTOR * default), shape)
    text = rate_warning(OptimizationSettings(learning_rate=2 * MAX_FACTOR * default), shape)
    assert f"20 times the default of a {name} ({default:g})" in text
    assert "\n" not in text
    assert not rate_warning(OptimizationSettings(learning_rate=9.0), CarryOnSettings())


def test_training_prints_the_warning_once(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rate in (0.0, 3e-3):  # the second suits a bottleneck
        caplog.clear()
        train_default(store, tmp_path / f"{rate}", **TOP, learning_rate=rate, epochs=1)
        assert caplog.text.count(" learning_rate:") == (rate > 0)
