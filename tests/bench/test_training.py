"""Benchmarks of training, run once on tiny sizes; no speed is asserted."""

from pathlib import Path
from typing import Any

import pytest
from support.benchmarks import measure, names_of
from support.tiny_train_stores import make_tiny_store

from carryon.cache import extract

CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "train.step": (["step.speed"], {}),
    "gpu.ahead": (["gpu.ahead"], {"steps": 2}),
    "train.compiled": (["train.compiled"], {}),
    "train.memory": (["memory.peak", "memory.plan"], {}),
    "train.data_wait": (["data_wait.share"], {}),
    "train.padding": (["padding.share"], {}),
    "accuracy.evaluation": (["evaluation.ratio"], {}),
    "train.resume": (["resume.first_batch"], {}),
    "train.sweep": (["sweep.bytes", "sweep.wall"], {"mb_per_second": 300.0}),
    "train.profiles": (["trained_on.near", "trained_on.compact"], {}),
    "train.taps": (["taps.seeds_better"], {}),
}
"""Names of the figures, and sizes besides the quick ones. kills and units take a minute."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_benchmark_reports_its_figures(name: str, store_tmp: Path) -> None:
    names, sizes = CASES[name]
    store = make_tiny_store(store_tmp / "store", taps=("layer.1", "layer.2", "final"))
    (store_tmp / "work").mkdir()
    figures = measure(name, store_tmp / "work", given_stores=[str(store)], sizes=sizes)
    assert names_of(figures) == names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_steps_are_compared_with_lora_and_full_fine_tuning(
    tiny_base_folder: Path, store_tmp: Path
) -> None:
    pytest.importorskip("peft")
    rows = [{"text": f"{index} is the thing " * 4} for index in range(20)]
    extract(base=tiny_base_folder, data=rows, out=store_tmp / "store", unit_tokens=64)
    figures = measure(
        "train.lora",
        store_tmp,
        base=str(tiny_base_folder),
        given_stores=[str(store_tmp / "store")],
        sizes={"tokens_per_step": 64, "sampled": 100},
    )
    assert names_of(figures) == ["lora.speed", "lora.speed_sampled", "full.speed"]


@pytest.mark.slow
def test_releases_leave_the_trunk_alone_and_cost_the_formula(store_tmp: Path) -> None:
    figures = {figure.figure: figure for figure in measure("paths.switching", store_tmp)}
    assert figures["paths.cosine.steps.switch"].value == 0.58
    assert figures["paths.cosine.trunk.same_bits"].met
    assert all(figure.met for figure in figures.values())
