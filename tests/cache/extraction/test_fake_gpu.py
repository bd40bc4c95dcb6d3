"""Extraction on a fake GPU: states are copied to the host while later batches are computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.fake_gpu import CUDA, FakeGpu, move_base, on_fake_gpu
from support.tiny_stores import make_given, plan_given

from carryon.cache.base.hooks import base_logits, capture
from carryon.cache.base.model import Base, load_base
from carryon.cache.extraction.aligned_forward import tree_inputs
from carryon.cache.extraction.forward import compute_states, run_units
from carryon.cache.extraction.packing import plan_batches
from carryon.cache.format.receipt import units_with_receipt
from carryon.cache.lock import write_lock
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.shard_writer import UnitInput

FORWARD = ForwardSettings(device="cpu", compute_dtype="bfloat16")
WAIT = "device.py:wait"
_AHEAD = 2  # batches
TAPS = ["final", "prenorm", "layer.1", "layer.0"]
LENGTHS = np.array([5, 3, 7, 2, 6, 4], dtype=np.int32)


def _unit() -> UnitInput:
    """Return six samples, which are four batches of at most 8 tokens."""
    num_rows = int(LENGTHS.sum())
    return UnitInput(
        unit=0,
        first_sample=0,
        starts=np.cumsum(LENGTHS, dtype=np.int64) - LENGTHS,
        lengths=LENGTHS,
        tokens=np.ones(num_rows, dtype=np.int32),
        sha256="",
    )


def _base(gpu: FakeGpu, folder: Path) -> Base:
    base = load_base(str(folder), forward=FORWARD)
    with gpu.setup():
        return move_base(base)


@on_fake_gpu
def test_hidden_states_at_every_tap(gpu: FakeGpu, tiny_base_folder: Path) -> None:
    base = _base(gpu, tiny_base_folder)

    states = capture(base, TAPS, torch.ones(2, 5, dtype=torch.int64))
    logits = base_logits(base, torch.ones(2, 5, dtype=torch.int64))

    assert {each.device for each in (*states.values(), logits)} == {CUDA}
    assert gpu.waits == []


@pytest.mark.parametrize("keeps_bits", [False, True])
@on_fake_gpu
def test_states_are_waited_for_two_batches_late(
    gpu: FakeGpu, tiny_base_folder: Path, keeps_bits: bool
) -> None:
    base, unit = _base(gpu, tiny_base_folder), _unit()
    num_batches = len(list(plan_batches(unit.lengths, batch_tokens=8)))

    with gpu.allowing(WAIT):
        hidden = compute_states(base, TAPS, unit, keeps_bits=keeps_bits, batch_tokens=8)

    assert {tap: states.shape for tap, states in hidden.items()} == dict.fromkeys(TAPS, (27, 16))
    assert num_batches > _AHEAD
    # For all taps together; once more for each when the unit is whole.
    assert gpu.waits == [WAIT] * (num_batches - _AHEAD + num_batches)


@on_fake_gpu
def test_a_batch_begins_before_the_two_before_it_are_waited_for(
    gpu: FakeGpu, tiny_base_folder: Path
) -> None:
    base = _base(gpu, tiny_base_folder)
    begun: list[int] = []
    base.model.register_forward_pre_hook(lambda *_: begun.append(len(gpu.waits)))
    base.architecture.decoder.register_forward_pre_hook(lambda *_: begun.append(len(gpu.waits)))

    with gpu.allowing(WAIT):
        compute_states(base, ["final"], _unit(), keeps_bits=True, batch_tokens=8)

    assert begun == [max(0, number - _AHEAD) for number in range(len(begun))]


@on_fake_gpu
def test_a_whole_extraction_waits_for_copies_alone(
    gpu: FakeGpu, tiny_base_folder: Path, tmp_path: Path
) -> None:
    """All stages: batches read ahead, copies beside, chunks encoded and written by threads."""
    root = tmp_path / "store"
    manifest = plan_given(root, make_given())
    base = _base(gpu, tiny_base_folder)

    with gpu.allowing(WAIT), write_lock(root):
        report = run_units(root, manifest, base, batch_tokens=32, max_disk_bytes=None)

    assert report.computed_units == manifest.num_units > _AHEAD
    assert report.limit in ("read", "forward", "encode", "write")
    assert set(gpu.waits) == {WAIT}
    assert units_with_receipt(root) == set(range(manifest.num_units))


@on_fake_gpu
def test_trees_of_tokens(gpu: FakeGpu, tiny_base_folder: Path) -> None:
    base = _base(gpu, tiny_base_folder)
    parents = [np.array([-1, 0, 1, 0], dtype=np.int32), np.array([-1, 0], dtype=np.int32)]

    inputs = tree_inputs(base, parents)
    states = capture(base, ["final"], torch.ones(2, 4, dtype=torch.int64), inputs)

    assert states["final"].device == CUDA
    assert gpu.waits == []
