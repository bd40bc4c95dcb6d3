"""Benchmarks of kinds that merge, run once on tiny sizes; no speed is asserted."""

from pathlib import Path

import pytest
import torch
from support.benchmarks import measure
from support.tiny_bases import make_tiny_base
from support.tiny_stores import write_corpus

from carryon.cache.base.hooks import base_logits
from carryon.cache.base.model import load_base
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.settings import ForwardSettings
from carryon.tools.bench.job import Job
from carryon.tools.bench.merge_carryons import MergeInput, open_input
from carryon.tools.bench.merged import trained_logits
from carryon.tools.compare.figure import Figure
from carryon.train.modules.base_blocks import BlocksCarryOn
from carryon.train.modules.carryon import build_carryon

PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SIZES = {"tokens_per_step": 64}


def open_tiny(base: Path, work: Path) -> MergeInput:
    """Extract a store as the benchmarks do, of a few texts."""
    data = write_corpus(work / "data.jsonl", num_samples=12)
    job = Job(work=work, add=print, base=str(base), corpora=[f"texts={data}"])
    return open_input(job, **SIZES)


@pytest.fixture(scope="module")
def store(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the taps and blocks of both kinds."""
    return str(open_tiny(tiny_base_folder, tmp_path_factory.mktemp("merge")).store.root)


def measure_merge(name: str, base: Path, store: str, work: Path) -> dict[str, Figure]:
    """Return the figures of a benchmark, by name."""
    sizes = SIZES | ({"new_tokens": 2} if name == "merge.generate" else {})
    figures = measure(name, work, base=str(base), given_stores=[store], sizes=sizes)
    return {figure.figure: figure for figure in figures}


@PEFT_WARNS
@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("merge.native", ["native.logits"]),
        ("merge.top", ["top.logits"]),
        ("merge.adapter", ["adapter.logits", "top-lora.logits"]),
    ],
)
def test_a_written_checkpoint_has_the_logits_of_the_customized_model(
    name: str, figures: list[str], tiny_base_folder: Path, store: str, tmp_path: Path
) -> None:
    """And the base, the result of a merge without effect, misses the target by far."""
    if name == "merge.adapter":
        pytest.importorskip("peft")
    by_name = measure_merge(name, tiny_base_folder, store, tmp_path)
    assert list(by_name) == figures
    for figure_name, figure in by_name.items():
        rounding = figure.details["rounding_to_bfloat16"]
        assert figure.met, figure
        assert 0 < rounding["logits"] < 2**-8 * figure.details["largest_logit"]
        assert (rounding["weights"] > 0) == (figure_name == "top-lora.logits")
        assert figure.value == max(figure.details["against"].values())
        assert figure.target == sum(rounding.values())
        assert figure.details["moved_by_the_carryon"] > 2 * figure.target


@PEFT_WARNS
def test_speeds_are_reported(tiny_base_folder: Path, store: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    by_name = measure_merge("merge.generate", tiny_base_folder, store, tmp_path)
    by_name |= measure_merge("merge.speed", tiny_base_folder, store, tmp_path)
    assert list(by_name) == ["generate.speed", "top.speed", "top-lora.speed"]
    assert all(figure.value > 0 for figure in by_name.values())
    assert {name: figure.target for name, figure in by_name.items()} == {
        "generate.speed": 1.0,
        "top.speed": 3.0,
        "top-lora.speed": None,
    }
    assert by_name["top.speed"].details["blocks"] == 1  # fewer than 8: the base has two
    assert set(by_name["top.speed"].details["tokens_per_second"]) == {"top", "top-lora", "lora"}


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # the second caps its logits
def test_an_untrained_top_has_the_logits_of_its_base(family: str, tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base", family)
    given = open_tiny(folder, tmp_path)
    base = load_base(str(folder), forward=ForwardSettings(device="cpu", compute_dtype="float32"))
    module = build_carryon(given.shape("top"), given.store, seed=0)
    assert isinstance(module, BlocksCarryOn)
    tokens = given.tokens(16)
    with torch.no_grad():
        logits = trained_logits(base, module, tokens)
    torch.testing.assert_close(logits, base_logits(base, tokens), rtol=1e-4, atol=1e-4)


def test_unsuitable_stores_and_bases_are_refused(
    tiny_base_folder: Path, store: str, store_original: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--with-blocks"):
        measure_merge("merge.top", tiny_base_folder, str(store_original), tmp_path)
    other = make_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(SettingMismatchError, match="base"):
        measure_merge("merge.top", other, store, tmp_path)
