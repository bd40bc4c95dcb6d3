"""The dtype that a base is computed in where none is given: measured on one of its blocks."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_bases import FAMILIES, make_tiny_base
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from carryon.cache.base.calibration import compute_dtype
from carryon.cache.base.calibration.compute_dtype import Work, choose_dtype, fastest_dtype
from carryon.cache.base.calibration.few_blocks import empty_block, make_up_weights_
from carryon.cache.base.model import load_base
from carryon.cache.device import multiplies_bfloat16
from carryon.cache.settings import ForwardSettings

CPU = torch.device("cpu")
NEVER, ALWAYS = 1e9, 0.0
"""How much faster float32 has to be to be taken."""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Blocks of tiny bases are timed, each again."""
    monkeypatch.setattr(compute_dtype, "SMALLEST_BLOCK", 1)
    monkeypatch.setattr(compute_dtype, "_known", {})
    return monkeypatch


def work_of(config: PreTrainedConfig, **changes: Any) -> Work:  # noqa: ANN401
    how = {"device": CPU, "attention": "sdpa", "batch_tokens": 64} | changes
    return Work(config=config, **how)


def load_auto(folder: Path) -> torch.dtype:
    return load_base(str(folder), forward=ForwardSettings(device="cpu")).compute_dtype


@pytest.mark.parametrize(
    ("bfloat16", "float32", "expected"),
    [
        (1.0, 4.0, "bfloat16"),
        (5.0, 1.0, "float32"),
        (1.05, 1.0, "bfloat16"),  # which needs half the memory
        (1.2, 1.0, "float32"),
        (float("inf"), 1.0, "float32"),
        (1.0, float("inf"), "bfloat16"),
    ],
)
def test_float32_is_taken_where_it_is_clearly_faster(
    bfloat16: float, float32: float, expected: str
) -> None:
    assert choose_dtype({"bfloat16": bfloat16, "float32": float32}) == expected


def test_a_small_base_is_not_timed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_tiny_base(tmp_path / "base")
    with caplog.at_level(logging.INFO, logger="carryon"):
        assert load_auto(folder) == torch.float32
    assert caplog.messages == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_of_every_family_is_timed_in_both_dtypes(
    family: str,
    tmp_path: Path,
    measured: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = AutoConfig.from_pretrained(make_tiny_base(tmp_path / "base", family))
    with caplog.at_level(logging.INFO, logger="carryon"):
        dtype = fastest_dtype(work_of(config), name="some")
    [line] = caplog.messages
    [other] = {"bfloat16", "float32"} - {str(dtype).removeprefix("torch.")}
    assert line.startswith(f"base some: compute dtype {str(dtype).removeprefix('torch.')}: {other}")
    assert line.endswith("times as long here")


@pytest.mark.parametrize(("clearly", "expected"), [(NEVER, "bfloat16"), (ALWAYS, "float32")])
def test_a_base_is_loaded_in_what_was_measured(
    clearly: float, expected: str, tmp_path: Path, measured: pytest.MonkeyPatch
) -> None:
    measured.setattr(compute_dtype, "_CLEARLY", clearly)
    assert load_auto(make_tiny_base(tmp_path / "base")) == getattr(torch, expected)


def test_a_base_has_one_dtype_in_a_process(tmp_path: Path, measured: pytest.MonkeyPatch) -> None:
    first = make_tiny_base(tmp_path / "first")
    other = make_tiny_base(tmp_path / "other", num_hidden_layers=3)
    measured.setattr(compute_dtype, "_CLEARLY", ALWAYS)
    assert load_auto(first) == torch.float32
    measured.setattr(compute_dtype, "_CLEARLY", NEVER)
    assert load_auto(first) == torch.float32
    assert load_auto(other) == torch.bfloat16


def test_a_dtype_that_is_given_is_not_measured(
    tmp_path: Path, measured: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_base(tmp_path / "base")
    with caplog.at_level(logging.INFO, logger="carryon"):
        for name in ("float32", "bfloat16", "float16"):
            forward = ForwardSettings(device="cpu", compute_dtype=name)  # type: ignore[arg-type]
            base = load_base(str(folder), forward=forward)
            assert base.compute_dtype == getattr(torch, name)
    assert caplog.messages == []


def test_what_cannot_be_made_from_a_config_is_judged_by_products(
    measured: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A class of its own, and, on a CPU, blocks that a config only says are huge."""
    expected = torch.bfloat16 if multiplies_bfloat16(CPU) else torch.float32
    huge = LlamaConfig(hidden_size=1 << 20, intermediate_size=1 << 20, num_attention_heads=8)
    with caplog.at_level(logging.INFO, logger="carryon"):
        for config in (PreTrainedConfig(), huge):
            assert fastest_dtype(work_of(config), name="some") == expected
    assert len(caplog.messages) == 2
    for line in caplog.messages:
        assert line.startswith(f"base some: compute dtype {str(expected).removeprefix('torch.')},")
        assert "no block could be timed" in line


def test_an_attention_backend_of_one_dtype_leaves_that_dtype(
    measured: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = compute_dtype._run

    def bfloat16_only(model: Any, states: torch.Tensor) -> None:  # noqa: ANN401
        if states.dtype == torch.float32:
            raise RuntimeError("only bfloat16")
        plain(model, states)

    measured.setattr(compute_dtype, "_run", bfloat16_only)
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    with caplog.at_level(logging.INFO, logger="carryon"):
        assert fastest_dtype(work_of(config), name="some") == torch.bfloat16
    assert caplog.messages == ["base some: compute dtype bfloat16: float32 does not run here"]


@pytest.mark.parametrize(
    ("sizes", "batch_tokens", "context", "expected"),
    [
        ([(1000, 1000)], 4096, 2048, (1, 512)),  # 750 positions are affordable
        ([(3000, 1000)], 4096, 2048, (1, 250)),
        ([(3000, 1000)], 4096, 100, (2, 100)),
        ([(3000, 1000)], 60, 2048, (1, 60)),
        ([(100_000, 10_000)], 4096, None, (1, 32)),
        ([(128, 2048, 768)], 4096, 2048, (1, 512)),  # so that each expert has some
    ],
)
def test_a_cpu_is_timed_with_some_tens_of_milliseconds(
    sizes: list[tuple[int, ...]],
    batch_tokens: int,
    context: int | None,
    expected: tuple[int, int],
) -> None:
    shapes = [torch.Size(size) for size in sizes]
    work = work_of(LlamaConfig(), batch_tokens=batch_tokens)
    assert compute_dtype._shape(work, shapes, context) == expected


def test_an_accelerator_is_timed_with_a_whole_batch() -> None:
    work = work_of(LlamaConfig(), device=torch.device("cuda", 0), batch_tokens=4096)
    assert compute_dtype._shape(work, [torch.Size((10, 10))], 2048) == (8, 512)


def test_made_up_weights_are_small_numbers_of_the_blocks_own_shapes() -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=1536, num_attention_heads=4)
    values = config.to_dict() | {"model_type": "llama"}
    model = empty_block(values, torch.bfloat16, attention="sdpa")
    assert all(weight.is_meta for weight in model.parameters())
    make_up_weights_(model, CPU)
    weights = dict(model.named_parameters())
    assert weights["layers.0.mlp.up_proj.weight"].shape == (1536, 64)
    assert len(model.layers) == 1
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert 0 < float(weight.float().abs().max()) < 0.2, name
        assert weight.numel() < 100 or float(weight.float().std()) > 0.01, name
