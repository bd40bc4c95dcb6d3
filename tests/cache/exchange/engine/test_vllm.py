"""Extraction by the real vLLM, in its own environment: CARRYON_VLLM_PYTHON names its Python."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_bases import make_tiny_base
from support.tiny_stores import write_corpus
from support.tiny_vllm import HAS_VLLM, VLLM_PYTHON, WITHOUT_VLLM

from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import EngineError, InputError
from carryon.cache.exchange.engine.extraction import run_with_vllm
from carryon.cache.exchange.engine.local import EngineJob, LocalEngine
from carryon.cache.exchange.engine.planning import plan_with_vllm
from carryon.cache.exchange.engine.settings import VllmSettings
from carryon.cache.exchange.engine.vllm_process import find_python
from carryon.cache.extraction.pipeline import extract
from carryon.cache.extraction.report import ExtractReport
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify
from carryon.tools.bench.exchange.engine import relative_errors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not HAS_VLLM, reason=WITHOUT_VLLM),
]
CONTEXT = 128
TAPS = ["final", "prenorm", "layer.0", "layer.1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose heads have a size that vLLM's kernels know."""
    return make_tiny_base(
        tmp_path_factory.mktemp("bases") / "llama",
        context=CONTEXT,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_hidden_layers=3,
        max_position_embeddings=CONTEXT,
    )


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    """The same, loaded in float32."""
    return load_base(str(folder), forward=ForwardSettings(device="cpu", compute_dtype="float32"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts; one fills the context, and eight have 80 tokens at their beginning in common."""
    path = write_corpus(tmp_path_factory.mktemp("texts") / "texts.jsonl", num_samples=16)
    with path.open("a") as file:
        file.write(json.dumps({"id": "long", "text": "0123456789" * 40}) + "\n")
        for number in range(8):
            file.write(json.dumps({"text": "0123456789" * 8 + f" and {number}"}) + "\n")
    return path


Extract = Callable[..., ExtractReport]


@pytest.fixture(scope="module")
def run(base: Base, corpus: Path) -> Extract:
    """Extract with vLLM; options of VllmSettings."""

    def call(out: Path, *, dtype: str = "float32", limit: int | None = None, **vllm: Any) -> Any:  # noqa: ANN401
        plan = plan_with_vllm(
            base=base,
            data=[str(corpus)],
            out=out,
            vllm=VllmSettings(**{"vllm_python": VLLM_PYTHON} | vllm),
            endpoint="",
            corpus=CorpusSettings(),
            store=StoreSettings(taps=TAPS, unit_tokens=CONTEXT, dtype=dtype),  # type: ignore[arg-type]
            forward=ForwardSettings(compute_dtype=dtype),  # type: ignore[arg-type]
            data_settings=DataSettings(),
        )
        return run_with_vllm(plan, max_disk_bytes=limit)

    return call


@pytest.fixture(scope="module")
def store(run: Extract, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that vLLM filled in float32, three requests at a time."""
    root = tmp_path_factory.mktemp("stores") / "store"
    assert run(root, requests=3).is_finished
    return root


def refuse_differences(first: Path, second: Path, *, rtol: float, atol: float) -> None:
    """Compare the states of two stores."""
    both = [Store.open(path) for path in (first, second)]
    for unit in range(both[0].num_units):
        expected, got = (store.read_unit(unit) for store in both)
        assert np.array_equal(expected.tokens, got.tokens)
        for tap in TAPS:
            np.testing.assert_allclose(got.float32(tap), expected.float32(tap), rtol, atol)


def test_states_of_vllm_are_those_of_transformers(
    store: Path, base: Base, corpus: Path, store_tmp: Path
) -> None:
    assert verify(store, depth="full").is_complete
    assert int(Store.open(store).sample_lengths.max()) == CONTEXT
    extract(
        base=base,
        data=[str(corpus)],
        out=store_tmp / "own",
        taps=TAPS,
        unit_tokens=CONTEXT,
        dtype="float32",
    )
    refuse_differences(store_tmp / "own", store, rtol=1e-3, atol=1e-3)


def test_a_stopped_extraction_resumes(run: Extract, store: Path, store_tmp: Path) -> None:
    root = Path(shutil.copytree(store, store_tmp / "store"))
    for unit in (1, 3):
        (root / f"units/{unit}.json").unlink()
    again = run(root)
    assert (again.computed_units, again.is_finished) == (2, True)
    assert verify(root, depth="full").is_complete
    assert not list((root / "units").glob(".states-*"))
    refuse_differences(store, root, rtol=1e-3, atol=1e-3)


def test_a_finished_store_starts_no_engine(run: Extract, store: Path) -> None:
    report = run(store, vllm_python=sys.executable)  # which has no vLLM
    assert (report.computed_units, report.is_finished) == (0, True)


def test_prefix_caching_and_chunked_prefill_are_as_measured(
    run: Extract, store: Path, store_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="carryon")
    words = ["enable_prefix_caching=true", "enable_chunked_prefill=true"]
    words += ["block_size=32", "max_num_batched_tokens=48"]  # smaller than many prompts
    run(store_tmp / "both", vllm_args=words, requests=4)
    assert (Store.open(store).sample_lengths > 48).any()
    cached = re.search(r"vLLM took ([\d,]+) tokens from its prefix cache", caplog.text)
    assert cached is not None, "no prompt was found in the cache"
    assert int(cached[1].replace(",", "")) >= 32
    refuse_differences(store, store_tmp / "both", rtol=1e-3, atol=1e-3)


def test_bfloat16_is_within_two_roundings(
    run: Extract, folder: Path, corpus: Path, store: Path, store_tmp: Path
) -> None:
    """That of vLLM's pass and that of transformers', against one of transformers' alone."""
    run(store_tmp / "vllm", dtype="bfloat16")
    manifest = Store.open(store_tmp / "vllm").manifest
    assert manifest.forward["compute_dtype"] == "bfloat16"
    assert verify(store_tmp / "vllm", depth="full").is_complete
    own = {"taps": TAPS, "unit_tokens": CONTEXT, "compute_dtype": "bfloat16", "device": "cpu"}
    extract(base=str(folder), data=[str(corpus)], out=store_tmp / "own", **own)
    theirs, ours = (errors_against(store, store_tmp / name) for name in ("vllm", "own"))
    assert theirs["final"] > 0
    for tap in TAPS:
        assert theirs[tap] <= 1.5 * ours[tap], (theirs, ours)
        assert manifest.profile_error[tap]["channel_relative_error"] < 0.15


def errors_against(expected: Path, other: Path) -> dict[str, float]:
    """Return the median relative error of a token at each tap."""
    errors = relative_errors(Store.open(expected), Store.open(other))
    return {tap: float(np.median(each)) for tap, each in errors.items()}


def test_an_argument_that_vllm_refuses_is_named(run: Extract, store_tmp: Path) -> None:
    with pytest.raises(EngineError, match="no_such_argument") as caught:
        run(store_tmp / "store", vllm_args=["no_such_argument=1"])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="--vllm-args"):
        run(store_tmp / "store", vllm_args=["dtype=float16"])


@pytest.mark.parametrize("layers", [[1, 4], [2, 1]])
def test_the_connector_refuses_layers_that_vllm_takes(
    folder: Path, tmp_path: Path, layers: list[int]
) -> None:
    job = EngineJob(
        model=str(folder),
        revision=None,
        layers=layers,
        dtype="float32",
        longest=20,
        batch_tokens=64,
        requests=4,
        more={},
    )
    python = find_python("")
    with (
        pytest.raises(EngineError, match="expected ascending ids from 0 to 3, each once, got"),
        LocalEngine(job, python=python, folder=tmp_path, timeout_s=10),
    ):
        pass
