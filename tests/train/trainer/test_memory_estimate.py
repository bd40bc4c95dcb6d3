"""Planned memory: what is counted once, what settings save, and where the plan ends."""

from dataclasses import replace

import pytest
import torch

from carryon.tools.cli.main import main
from carryon.train.config import CarryOnSettings, LossSettings, MemorySettings
from carryon.train.losses.ways import WAYS
from carryon.train.mixing.gate import Gate
from carryon.train.modules.bottleneck import Bottleneck, build_bottleneck
from carryon.train.modules.carryon import num_parameters
from carryon.train.trainer.forecast.memory_estimate import (
    INDUCTOR_BYTES,
    MemoryCase,
    SourceCase,
    leaner_settings,
    plan_memory,
)

SMALL = CarryOnSettings(width=16, heads=2, intermediate_size=24)
CASE = MemoryCase(
    base_width=64,
    vocab_size=1000,
    micro_batch_tokens=128,
    supervised_ratio=1.0,
    window_tokens=512,
    head_bytes=4,
    carryon=SMALL,
    loss=LossSettings(),
    memory=MemorySettings(),
)
LARGE = replace(
    CASE,
    base_width=5120,
    vocab_size=152_064,
    micro_batch_tokens=2048,
    window_tokens=2048,
    head_bytes=2,
    carryon=CarryOnSettings(width=1760, heads=16, intermediate_size=4576),
)


def test_weights_are_counted_as_the_module_has_them() -> None:
    parts = plan_memory(CASE)
    count = num_parameters(build_bottleneck(SMALL, base_width=64, seed=0))
    assert (parts["weights"], parts["gradients"]) == (4 * count, 4 * count)
    assert parts["optimizer"] == 8 * count


def test_a_block_computed_again_takes_no_room_beside_the_loss() -> None:
    kept = plan_memory(LARGE)["activations"]
    again = plan_memory(replace(LARGE, memory=MemorySettings(recompute=True)))["activations"]
    assert again < 0.6 * kept


def test_a_wide_head_in_float32_takes_less_than_the_kernels_copies_of_it() -> None:
    loss = LossSettings(head_place="mapped")
    kernels, plain = (plan_memory(replace(LARGE, loss=loss, head_bytes=size)) for size in (2, 4))
    assert plain["head"] == 1024 * 5120 * 4
    assert plain["head"] + plain["logits"] < kernels["head"] + kernels["logits"]
    assert plain["states"] == 2048 * 5120 * 8 < kernels["states"]


def _of_loss(case: MemoryCase, way: str = "auto", **options: object) -> int:
    loss = replace(case.loss, loss_way=way, **options)  # type: ignore[arg-type]
    parts = plan_memory(replace(case, loss=loss))
    return parts["head"] + parts["logits"]


@pytest.mark.parametrize("width", [576, 5120])
@pytest.mark.parametrize("head_bytes", [2, 4])
def test_the_dearest_way_that_a_run_may_choose_is_counted(width: int, head_bytes: int) -> None:
    case = replace(LARGE, base_width=width, head_bytes=head_bytes)
    each = {way: _of_loss(case, way) for way in WAYS}

    assert _of_loss(case) == max(each.values())
    assert (len(set(each.values())) == 1) == case.is_wide
    assert _of_loss(case, sampled_softmax=2048) == each["attention"]
    assert _of_loss(case, "rounded") == each["rounded" if head_bytes == 2 else "attention"]


def test_a_small_head_is_counted_in_the_way_that_it_has() -> None:
    assert _of_loss(CASE) == _of_loss(CASE, "attention") != _of_loss(CASE, "shifted")


def test_compiled_steps_take_a_compiler() -> None:
    plain, compiled = (plan_memory(replace(CASE, is_compiled=each)) for each in (False, True))
    assert compiled == plain | {"imports": plain["imports"] + INDUCTOR_BYTES}


def test_settings_are_added_until_the_limit_is_kept() -> None:
    *before, (added, last) = leaner_settings(LARGE, limit=1_000_000_000)
    assert sum(plan_memory(last).values()) <= 1_000_000_000
    assert all(sum(plan_memory(case).values()) > 1_000_000_000 for _, case in before)
    assert added.startswith("--head-place mapped --recompute")
    assert last.memory.optimizer_bits == 8


def test_a_mixture_counts_the_taps_the_gate_and_the_projections_of_other_bases() -> None:
    source = SourceCase(
        width=96, vocab_size=2000, taps=["final", "layer.1"], num_targets=5000, head_bytes=2
    )
    alone = plan_memory(CASE)
    by_state = plan_memory(replace(CASE, sources=[source]))
    both = plan_memory(replace(CASE, sources=[source] * 2, has_gate=True))
    taps = {"1:final": 96, "1:layer.1": 96}
    count = num_parameters(Bottleneck(SMALL, base_width=64, sources=taps))
    assert by_state["weights"] == by_state["gradients"] == 4 * count
    assert by_state["batches"] == alone["batches"] * (64 + 2 * 96) / 64
    assert by_state.keys() == alone.keys()
    gate = Gate(
        anchor_width=64, source_widths=(), num_sources=2, shares=torch.full((3,), 1 / 3), seed=0
    )
    assert both["gate"] == 16 * num_parameters(gate)  # float32, its gradient, and AdamW
    assert both["projections"] == 5000 * (8 + 4 + 2 * 6 * 4)
    # Before the first step both heads and the distributions are in memory, and no step yet.
    step = sum(both.values()) - sum(
        both[name] for name in ("imports", "batches", "gate", "projections", "projecting")
    )
    heads, chunk = (1000 * 64 + 2000 * 96) * 2, 5000 * 4 * (1000 + 2 * 2000)
    assert step + both["projecting"] == heads + chunk
    large = replace(source, num_targets=10**9)
    most = plan_memory(replace(CASE, sources=[large], has_gate=True))
    assert most["projecting"] < 256 << 20  # in chunks


def test_a_gate_alone_has_no_weights_of_a_carry_on() -> None:
    source = SourceCase(width=96, vocab_size=2000, taps=(), num_targets=50, head_bytes=2)
    none = replace(CASE, carryon=replace(SMALL, kind="none"), sources=[source], has_gate=True)
    parts = plan_memory(none)
    assert (parts["weights"], parts["activations"]) == (0, 0)
    assert parts["gate"] > 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--base-width 0", "--base-width: expected 1 to 1048576, got 0"),
        ("--vocab-size -3", "--vocab-size: expected 1 to"),
        ("--tokens-per-step -5", "--tokens-per-step: expected 1 to"),
        ("--supervised-ratio nan", "--supervised-ratio: expected 0 to 1, got nan"),
        ("--supervised-ratio inf", "--supervised-ratio: expected a finite number, got inf"),
        ("--window-tokens -1", "--window-tokens: expected 0 to"),
        ("--head-bytes 3", "--head-bytes: expected 2 or 4, got 3"),
        ("--kind top", "--kind: expected bottleneck or none, got top"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], words: str, text: str
) -> None:
    argv = ["plan-memory", "--base-width", "64", "--vocab-size", "1000"]
    assert main([*argv, *words.split()]) == 2
    assert f"carryon plan-memory: error: {text}" in capsys.readouterr().err
