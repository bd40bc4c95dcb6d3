"""`python -m carryon.tools.bench merge`, run once on next to nothing; no speed is asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_bases import make_tiny_base
from support.tiny_stores import write_corpus

from carryon.cache.base.hooks import base_logits
from carryon.cache.base.model import load_base
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.__main__ import BENCH
from carryon.tools.bench.command import get_measurement
from carryon.tools.bench.merge import FIGURES, BenchMergeSettings, BenchMergeSizes
from carryon.tools.bench.merge_job import MergeJob, make_store
from carryon.tools.bench.merged import trained_logits
from carryon.tools.compare.figure import Figure
from carryon.train.modules.base_blocks import BlocksCarryOn
from carryon.train.modules.carryon import build_carryon

PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TINY = BenchMergeSizes(
    native_blocks=1, steps=2, batch_tokens=64, logit_tokens=24, new_tokens=2, rounds=1
)


@pytest.fixture(scope="module")
def store(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store as the command makes it, of texts that are given."""
    root = tmp_path_factory.mktemp("merge")
    data = write_corpus(root / "data.jsonl", num_samples=12)
    settings = BenchMergeSettings(base=str(tiny_base_folder), data=[str(data)])
    return make_store(root, settings, TINY)


def measure(figure: str, base: Path, store: str, work: Path) -> dict[str, Figure]:
    """Return the figures of one measurement, by name."""
    found: list[Figure] = []
    job = MergeJob(base=str(base), store=store, sizes=TINY, work=work, report=found.append)
    get_measurement(FIGURES[figure])(job)
    return {item.figure: item for item in found}


@PEFT_WARNS
@pytest.mark.parametrize(
    ("figure", "names"),
    [
        ("native", ["native.logits"]),
        ("top", ["top.logits"]),
        ("adapter", ["adapter.logits", "top-lora.logits"]),
    ],
)
def test_what_is_written_says_what_the_customized_model_says(
    figure: str, names: list[str], tiny_base_folder: Path, store: str, tmp_path: Path
) -> None:
    """And the base, which a merge that does nothing would leave, misses the target by far."""
    if figure == "adapter":
        pytest.importorskip("peft")
    found = measure(figure, tiny_base_folder, store, tmp_path)
    assert list(found) == names
    for name, item in found.items():
        rounding = item.details["rounding_to_bfloat16"]
        assert item.met, item
        assert 0 < rounding["logits"] < 2**-8 * item.details["largest_logit"]
        assert (rounding["weights"] > 0) == (name == "top-lora.logits")
        assert item.value == max(item.details["against"].values())
        assert item.target == sum(rounding.values())
        assert item.details["moved_by_the_carryon"] > 2 * item.target


@PEFT_WARNS
def test_speeds_are_reported(tiny_base_folder: Path, store: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    found = measure("generate", tiny_base_folder, store, tmp_path)
    found |= measure("speed", tiny_base_folder, store, tmp_path)
    assert list(found) == ["generate.speed", "top.speed", "top-lora.speed"]
    assert all(item.value > 0 for item in found.values())
    assert {name: item.target for name, item in found.items()} == {
        "generate.speed": 1.0,
        "top.speed": 3.0,
        "top-lora.speed": None,
    }
    assert found["top.speed"].details["blocks"] == 1  # fewer than 8: the base has two
    assert set(found["top.speed"].details["tokens_per_second"]) == {"top", "top-lora", "lora"}


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # the second caps its logits
def test_an_untrained_top_has_the_logits_of_its_base(family: str, tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base", family)
    data = [str(write_corpus(tmp_path / "data.jsonl", num_samples=4))]
    store = make_store(tmp_path, BenchMergeSettings(base=str(folder), data=data), TINY)
    job = MergeJob(base=str(folder), store=store, sizes=TINY, work=tmp_path, report=print)
    base = load_base(str(folder), forward=ForwardSettings(device="cpu", compute_dtype="float32"))
    module = build_carryon(job.shape("top"), Store.open(store), seed=0)
    assert isinstance(module, BlocksCarryOn)
    tokens = job.tokens(16)
    with torch.no_grad():
        found = trained_logits(base, module, tokens)
    torch.testing.assert_close(found, base_logits(base, tokens), rtol=1e-4, atol=1e-4)


def test_the_command_makes_a_store_and_prints_json_lines(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["merge", "--base", str(tiny_base_folder), "--figures", "native"]
    argv += ["--batch-tokens", "32", "--native-blocks", "1"]
    assert (
        BENCH.main([*argv, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == 0
    )
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")
    ]
    assert [(line["figure"], line["met"]) for line in lines] == [("native.logits", True)]
    assert (tmp_path / "out" / "figures.jsonl").read_text().count("\n") == 1
    assert list((tmp_path / "work").iterdir()) == []


def test_what_does_not_fit_is_refused(
    tiny_base_folder: Path, store: str, store_original: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="figures: expected some of native"):
        BenchMergeSettings(base="b", figures=["logits"])
    with pytest.raises(InputError, match="rounds: expected more than 0"):
        BenchMergeSizes(rounds=0)
    with pytest.raises(InputError, match="--with-blocks"):
        measure("top", tiny_base_folder, str(store_original), tmp_path)
    other = make_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(SettingMismatchError, match="base"):
        measure("top", other, store, tmp_path)
