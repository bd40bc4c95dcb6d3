"""Learning rates by kind: shown in the help, in force and recorded unless another is given."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_runs import TINY, without_plots
from support.tiny_stores import write_corpus

from carryon.cache.errors import InputError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.tools.bench.experiment_paths import experiment_paths
from carryon.tools.cli.options import options_of
from carryon.tools.commands.sweep import sweep
from carryon.tools.commands.train import train
from carryon.tools.commands.update import update
from carryon.tools.compare.settings import CompareSettings, get_methods
from carryon.train.config import (
    CarryOnSettings,
    OptimizationSettings,
    rate_warning,
)
from carryon.train.kinds import KINDS as ENTRIES
from carryon.train.trainer.metrics import read_metrics

TOP = {"kind": "top", "blocks": 1}
UNSAID = replace(TINY, optimization=replace(TINY.optimization, learning_rate=0.0))
KINDS: dict[str, dict[str, Any]] = {
    "bottleneck": {},
    "native": {"kind": "native"},
    "top": TOP,
    "top by LoRA": TOP | {"lora_rank": 2},
}
RATES = {name: ENTRIES[name].learning_rates for name in ("bottleneck", "native", "top")}
RATES["top by LoRA"] = ENTRIES["top"].lora_rates
WARN_ABOVE = ENTRIES["top"].max_rate_factor


@pytest.fixture(scope="module")
def store(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store from which a `top` of one block is trained."""
    root = tmp_path_factory.mktemp("rates")
    extract(
        base=str(tiny_base_folder),
        data=[write_corpus(root / "data.jsonl", num_samples=12)],
        out=root / "store",
        corpus=CorpusSettings(mask="all", max_tokens=32),
        store=StoreSettings(taps=["layer.1"], unit_tokens=64, with_blocks=1),
        forward=ForwardSettings(device="cpu"),
    )
    return str(root / "store")


def run_command(command: Any, changes: dict[str, Any], **options: Any) -> None:  # noqa: ANN401
    """Call a subcommand with tiny settings, some of them changed."""
    settings = UNSAID.with_options(**changes)
    with without_plots():
        command(**{name: getattr(settings, name) for name in settings.__slots__}, **options)


def config_of(folder: Path) -> dict[str, Any]:
    """Return the settings that a run or a lineage has recorded."""
    found: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return found


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_has_its_own_rate_and_another_wins(name: str) -> None:
    own = UNSAID.with_options(**KINDS[name])
    assert own.to_flat()["learning_rate"] == RATES[name][0]
    assert own.resolved().optimization.learning_rate == RATES[name][0]
    given = UNSAID.with_options(**KINDS[name] | {"learning_rate": 0.5})
    assert given.to_flat()["learning_rate"] == 0.5


def test_the_help_tells_the_rate_of_each_kind() -> None:
    [option] = [each for each in options_of(train) if each.name == "learning_rate"]
    text = " ".join(option.help.split())
    shown = {"top by LoRA": "`top` by LoRA"} | {
        name: f"`{name}`" for name in KINDS if " " not in name
    }
    for name, (own, *_) in RATES.items():
        assert any(f"{own:g} for a {shown[name]}{end}" in text for end in (",", ".")), name


def test_the_comparison_tries_the_same_rates() -> None:
    names = ["bottleneck", "native", "top", "top-lora"]
    methods = get_methods(CompareSettings(methods=names), num_layers=4, width=16)
    assert [methods[name].rates for name in names] == list(RATES.values())


def test_a_run_trains_with_its_kinds_rate_and_says_so(store: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_command(train, TOP | {"log_every": 1}, store=[store], out=str(out))
    own = RATES["top"][0]
    assert config_of(out)["learning_rate"] == own
    rates = [
        line["learning_rate"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line
    ]
    assert 0.9 * own < max(rates) <= own
    run_command(train, TOP | {"learning_rate": own}, store=[store], out=str(out))  # the same run
    with pytest.raises(InputError, match=f"learning_rate is {own} there and 0.5 here"):
        run_command(train, TOP | {"learning_rate": 0.5}, store=[store], out=str(out))


def test_a_run_begun_with_a_rate_goes_on_with_it(store: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = TOP | {"learning_rate": 3e-4}
    run_command(train, given, store=[store], out=str(out))
    recorded = {name: config_of(out)[name] for name in UNSAID.to_flat()}
    run_command(train, recorded, store=[store], out=str(out))
    assert config_of(out)["learning_rate"] == 3e-4


def test_runs_of_a_sweep_have_rates_of_their_own(store: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run_command(
        sweep, TOP | {"epochs": 1}, store=[store], out=str(tmp_path), vary=["lora_rank=0,2"]
    )
    found = [config_of(tmp_path / f"lora_rank={rank}")["learning_rate"] for rank in (0, 2)]
    assert found == [RATES["top"][0], RATES["top by LoRA"][0]]


def test_a_lineage_keeps_its_kinds_rate(store: str, tmp_path: Path) -> None:
    lineage = tmp_path / "lineage"
    changes = TOP | {"epochs": 1, "tokens_per_step": 32, "min_lr_ratio": 0.1}
    run_command(update, changes, lineage=str(lineage), store=[store])
    assert config_of(lineage)["learning_rate"] == RATES["top"][0]
    document = json.loads((lineage / "lineage.json").read_text())
    assert document["settings"]["learning_rate"] == RATES["top"][0]
    with pytest.raises(InputError, match="got only what the lineage has seen"):  # not: another rate
        run_command(update, changes, lineage=str(lineage), store=[store])


def test_paths_are_planned_with_the_kinds_rate(store: str, tmp_path: Path) -> None:
    changes = TOP | {"taps": ["layer.1"], "epochs": 1, "tokens_per_step": 32, "min_lr_ratio": 0.1}
    chosen: dict[str, Any] = {"paradigms": ["switch"], "seeds": [0]}
    stores, out = [store, str(shutil.copytree(store, tmp_path / "store"))], tmp_path / "out"
    run_command(experiment_paths, changes, stores=stores, out=str(out), **chosen)
    recorded = json.loads((out / "experiment.json").read_text())
    assert recorded["learning_rate"] == RATES["top"][0]
    metrics = [read_metrics(path) for path in out.glob("runs/s0/trunk-*/metrics.jsonl")]
    assert (
        max(line.get("learning_rate", 0) for lines in metrics for line in lines) == RATES["top"][0]
    )


@pytest.mark.parametrize("name", ["top", "top by LoRA"])
def test_a_rate_that_wrecks_a_top_is_warned_of(name: str) -> None:
    shape, own = UNSAID.with_options(**KINDS[name]).carryon, RATES[name][0]
    assert not rate_warning(OptimizationSettings(learning_rate=WARN_ABOVE * own), shape)
    text = rate_warning(OptimizationSettings(learning_rate=2 * WARN_ABOVE * own), shape)
    assert f"20 times what suits a {name} ({own:g})" in text
    assert "\n" not in text
    assert not rate_warning(OptimizationSettings(learning_rate=9.0), CarryOnSettings())


def test_training_prints_the_warning_once(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rate in (0.0, 3e-3):  # the second suits a bottleneck
        caplog.clear()
        out = str(tmp_path / f"{rate}")
        run_command(train, TOP | {"learning_rate": rate, "epochs": 1}, store=[store], out=out)
        assert caplog.text.count(" learning_rate") == (rate > 0)
