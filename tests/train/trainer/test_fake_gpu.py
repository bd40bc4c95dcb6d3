"""Steps, evaluations and whole runs on a fake GPU: what the host waits for."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support.fake_gpu import CUDA, FakeGpu, HostWaitError, on_fake_gpu
from support.steps import read_batches, take
from support.tiny_bases import make_tiny_base
from support.tiny_stores import write_corpus

from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
    StreamSettings,
)
from carryon.train.data.batch import Batch
from carryon.train.data.padding import choose_sizes, pad
from carryon.train.losses.base_states import BaseStates, get_base_states
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.endings import Endings
from carryon.train.losses.sampled_softmax import place_training_head
from carryon.train.mixing.gate import Gate
from carryon.train.mixing.mixture import MixedCarryOn
from carryon.train.mixing.projected import ProjectedSources
from carryon.train.mixing.projection import FEATURES
from carryon.train.modules.carryon import CarryOn, build_carryon, taps_of
from carryon.train.optim.optimizer import apply_memory_settings, build_optimizer
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.held_out.nll import measure_nlls
from carryon.train.trainer.step import NotFiniteError, Step, read_steps
from carryon.train.trainer.trainer import train

FORWARD = ForwardSettings(device="cpu", compute_dtype="float32", batch_tokens=256)
TAPS = ["final", "prenorm", "layer.1", "layer.2"]
SMALL: dict[str, Any] = {"width": 8, "heads": 2, "intermediate_size": 8, "blocks": 1}
KINDS: dict[str, dict[str, Any]] = {
    "bottleneck": {"kind": "bottleneck", **SMALL},
    "several taps": {"kind": "bottleneck", **SMALL, "taps": ["layer.1", "final"], "dropout": 0.1},
    "native": {"kind": "native", "blocks": 1},
    "top": {"kind": "top", "blocks": 1},
    "top by LoRA": {"kind": "top", "blocks": 1, "lora_rank": 2},
}
OPTIMIZATION = OptimizationSettings(learning_rate=1e-3)
READ, EVALUATION = "step.py:read_steps", "sums.py:read"
ONCE = ["frozen_head.py:frozen_head", "run.py:prepare_run"]
ONCE += ["checkpoint.py:save_checkpoint", "serialization.py:<dictcomp>"]
ONCE += ["sampled_gain.py:evaluation_seconds", "sampled_gain.py:call"]
"""Where a run waits once, or once for each checkpoint."""
RUN: dict[str, Any] = {"device": "cuda", "head_dtype": "bfloat16", "tokens_per_step": 64}
RUN |= {"epochs": 3, "log_every": 4, "checkpoint_every": 100}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the last block of its base."""
    root = tmp_path_factory.mktemp("fake-gpu")
    extract(
        base=str(make_tiny_base(root / "base")),
        data=[write_corpus(root / "data.jsonl", num_samples=12)],
        out=root / "store",
        corpus=CorpusSettings(mask="all", max_tokens=32),
        store=StoreSettings(taps=TAPS, unit_tokens=64, dtype="float32", with_blocks=1),
        forward=FORWARD,
    )
    return root / "store"


def _take_steps(
    gpu: FakeGpu,
    root: Path,
    kind: dict[str, Any],
    *,
    loss: LossSettings,
    memory: MemorySettings | None = None,
    optimization: OptimizationSettings | None = None,
) -> CarryOn:
    """Take two steps, and read their figures at the end."""
    store, memory = Store.open(root), memory or MemorySettings()
    carryon = build_carryon(CarryOnSettings(**kind), store, seed=0)
    with gpu.setup():
        head = place_training_head(store, loss, device=CUDA)
        carryon = apply_memory_settings(carryon.to(CUDA), memory)
        base = get_base_states(store, device=CUDA)
    optimizer = build_optimizer(carryon, optimization or OptimizationSettings(), memory)
    batches = read_batches(store, [*taps_of(carryon), "final"], is_pinned=True)
    steps = [
        take(
            carryon,
            optimizer,
            batches[2 * number : 2 * number + 2],
            head=head,
            kl_weight=loss.kl_weight,
            base=base,
            is_read=False,
        )
        for number in range(2)
    ]
    assert gpu.waits == []
    with gpu.allowing(READ):
        for step in steps:
            step.read()
    assert gpu.waits == [READ] * len(steps)
    return carryon


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@on_fake_gpu
def test_a_step_of_every_kind(gpu: FakeGpu, store: Path, kind: str, dtype: str) -> None:
    carryon = _take_steps(gpu, store, KINDS[kind], loss=LossSettings(head_dtype=dtype))  # type: ignore[arg-type]

    assert {weight.device for weight in carryon.parameters()} == {CUDA}


@pytest.mark.parametrize(
    "loss",
    [{"sampled_softmax": 16}, {"kl_weight": 0.1}, {"chunk_vocabulary": 100}],
    ids=lambda each: next(iter(each)),
)
@on_fake_gpu
def test_a_step_with_every_loss(gpu: FakeGpu, store: Path, loss: dict[str, Any]) -> None:
    _take_steps(gpu, store, KINDS["bottleneck"], loss=LossSettings(head_dtype="bfloat16", **loss))


@pytest.mark.parametrize("place", ["host", "mapped"])
@on_fake_gpu
def test_a_head_that_is_not_on_the_gpu_waits_for_the_targets_only(
    gpu: FakeGpu, store: Path, place: Literal["host", "mapped"]
) -> None:
    opened = Store.open(store)
    loss = LossSettings(head_dtype="bfloat16", head_place=place, chunk_vocabulary=100)
    with gpu.setup():
        head = place_training_head(opened, loss, device=CUDA)
    states = torch.zeros(40, opened.width, device=CUDA).requires_grad_()
    targets = torch.zeros(40, dtype=torch.int64, device=CUDA)

    with gpu.allowing("frozen_head.py:rows"):
        token_losses(states, targets, head=head, chunk=16).sum().backward()

    assert gpu.waits == ["frozen_head.py:rows"]


@pytest.mark.parametrize(
    "memory",
    [
        {"recompute": True},
        {"weights_dtype": "bfloat16"},
        {"optimizer_bits": 8},
        {"step_in_backward": True},
        {"step_in_backward": True, "optimizer_bits": 8, "weights_dtype": "bfloat16"},
    ],
    ids=lambda each: "-".join(each),
)
@on_fake_gpu
def test_a_step_in_little_memory(gpu: FakeGpu, store: Path, memory: dict[str, Any]) -> None:
    loss = LossSettings(head_dtype="bfloat16")

    _take_steps(gpu, store, KINDS["bottleneck"], loss=loss, memory=MemorySettings(**memory))


@on_fake_gpu
def test_a_padded_step(gpu: FakeGpu, store: Path) -> None:
    opened = Store.open(store)
    carryon = build_carryon(CarryOnSettings(**KINDS["bottleneck"]), opened, seed=0)
    with gpu.setup():
        head = place_training_head(opened, LossSettings(head_dtype="bfloat16"), device=CUDA)
        carryon = carryon.to(CUDA)
    optimizer = build_optimizer(carryon, OPTIMIZATION, MemorySettings())
    batches = read_batches(opened, ["final"], is_pinned=True)[:2]
    [size, *_] = choose_sizes([each.lengths for each in batches], most_tokens=64, density=1.0)

    def correct(batch: Batch) -> torch.Tensor:
        padded = pad(batch, size, taps=["final"])
        assert padded.positions.device == padded.packing.place.device == CUDA
        with head.autocast():
            found = carryon.correct_packed(padded.states, padded.packing, padded.positions)
        return found[: batch.num_targets]

    step = take(carryon, optimizer, batches, head=head, correct=correct, is_read=False)

    assert step.values.device == CUDA
    assert gpu.waits == []


@on_fake_gpu
def test_a_step_of_muon(gpu: FakeGpu, store: Path) -> None:
    settings = OptimizationSettings(optimizer="muon")

    _take_steps(gpu, store, KINDS["bottleneck"], loss=LossSettings(), optimization=settings)


@pytest.mark.parametrize("kind", ["none", "bottleneck"])
@on_fake_gpu
def test_a_step_of_a_mixture(gpu: FakeGpu, store: Path, kind: str) -> None:
    opened = Store.open(store)
    mixed, projected = _mixture(gpu, opened, kind)
    with gpu.setup():
        head = place_training_head(opened, LossSettings(head_dtype="bfloat16"), device=CUDA)
    optimizer = build_optimizer(
        mixed.carryon, OPTIMIZATION, MemorySettings(), gate=mixed.gate, gate_rate=3e-3
    )

    step = take(
        mixed,
        optimizer,
        read_batches(opened, ["final"], is_pinned=True)[:2],
        head=head,
        base=get_base_states(opened, device=CUDA),
        projected=projected,
        is_read=False,
    )

    assert step.values.device == CUDA
    assert gpu.waits == []


@pytest.mark.parametrize("kind", KINDS)
@on_fake_gpu
def test_an_evaluation_of_every_kind(gpu: FakeGpu, store: Path, kind: str) -> None:
    opened = Store.open(store)
    carryon = build_carryon(CarryOnSettings(**KINDS[kind]), opened, seed=0)
    with gpu.setup():
        head = place_training_head(opened, LossSettings(head_dtype="bfloat16"), device=CUDA)
        carryon = carryon.to(CUDA)
    job = EvalJob(carryon=carryon, head=head, chunk=32, with_base=True)

    _evaluate(gpu, opened, [job, replace(job, alpha=0.0, with_base=False)], endings=Endings())

    assert gpu.waits == [EVALUATION] * 2  # the base, and the carry-on: not each batch


@on_fake_gpu
def test_an_evaluation_of_a_mixture(gpu: FakeGpu, store: Path) -> None:
    opened = Store.open(store)
    mixed, projected = _mixture(gpu, opened, "bottleneck")
    with gpu.setup():
        head = place_training_head(opened, LossSettings(head_dtype="bfloat16"), device=CUDA)
    job = EvalJob(carryon=mixed, head=head, chunk=32, with_base=True, projected=projected)

    _evaluate(gpu, opened, [job])

    assert gpu.waits == [EVALUATION] * 2 + ["mixture_nll.py:result"]


@pytest.mark.parametrize("tap", ["final", "prenorm", "layer.1"])
@on_fake_gpu
def test_the_states_of_the_base_from_every_tap(gpu: FakeGpu, store: Path, tap: str) -> None:
    opened = Store.open(store)
    with gpu.setup():
        head = place_training_head(opened, LossSettings(head_dtype="bfloat16"), device=CUDA)
        base = _base_at(opened, tap)
    batch = read_batches(opened, [tap], is_pinned=True)[0].to(CUDA)

    assert base.at_pairs(batch, head).shape == (batch.num_targets, opened.width)
    assert gpu.waits == []


def _base_at(store: Store, tap: str) -> BaseStates:
    if tap == "final":
        return BaseStates(tap=tap)
    if tap == "prenorm":
        return BaseStates(tap=tap, norm=store.head().norm)
    shape = CarryOnSettings(kind="top", blocks=1, taps=[tap])
    return BaseStates(tap=tap, blocks=build_carryon(shape, store, seed=0).to(CUDA).eval())


def _evaluate(
    gpu: FakeGpu, store: Store, jobs: list[EvalJob], endings: Endings | None = None
) -> None:
    samples = np.arange(store.num_samples, dtype=np.int64)
    with gpu.allowing(EVALUATION, "mixture_nll.py:result"):
        measure_nlls(store, samples, jobs, stream=StreamSettings(), endings=endings)


def _mixture(gpu: FakeGpu, store: Store, kind: str) -> tuple[MixedCarryOn, ProjectedSources]:
    """Return a carry-on with a gate on the GPU, and projections of two sources on the host."""
    shape = KINDS.get(kind, {"kind": kind})
    carryon = build_carryon(CarryOnSettings(**shape), store, seed=0)
    shares = torch.tensor([0.5, 0.3, 0.2])
    gate = Gate(anchor_width=store.width, source_widths=(), num_sources=2, shares=shares, seed=2)
    rows = np.arange(store.num_units * store.unit_tokens, dtype=np.int64)
    projected = ProjectedSources(
        sources=[SimpleNamespace(name=name) for name in ("one", "two")],  # type: ignore[misc]
        starts=store.sample_starts,
        rows=rows,
        anchor=torch.zeros(len(rows)),
        log_probs=torch.zeros(len(rows), 2),
        features=torch.zeros(len(rows), 2, len(FEATURES)),
        token_bytes=torch.zeros(store.head().vocab_size, dtype=torch.int64),
    )
    with gpu.setup():
        return MixedCarryOn(carryon, gate).to(CUDA), projected


@on_fake_gpu
def test_a_whole_run(gpu: FakeGpu, store: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []

    with gpu.allowing(READ, EVALUATION, *ONCE):
        train(store, out=tmp_path / "run", callbacks=[lines.append], **KINDS["bottleneck"], **RUN)

    with_loss = [line["step"] for line in lines if "loss" in line]
    assert gpu.waits.count(READ) == len(with_loss) < max(with_loss) / 2
    assert set(gpu.waits) == {READ, EVALUATION, *ONCE}


@on_fake_gpu
def test_a_step_that_waits_is_found(gpu: FakeGpu, store: Path) -> None:
    opened, head = Store.open(store), LossSettings()
    carryon = build_carryon(CarryOnSettings(**KINDS["bottleneck"]), opened, seed=0)
    with gpu.setup():
        placed, carryon = place_training_head(opened, head, device=CUDA), carryon.to(CUDA)
    optimizer = build_optimizer(carryon, OptimizationSettings(), MemorySettings())
    batches = read_batches(opened, ["final"], is_pinned=True)[:1]

    with pytest.raises(HostWaitError, match=f"a copy to the host, at {READ}"):
        take(carryon, optimizer, batches, head=placed)


def test_a_step_that_is_read_later_gives_the_same_bits(store: Path) -> None:
    opened = Store.open(store)
    carryons, losses = [], []
    for is_read in (True, False):
        carryon = build_carryon(CarryOnSettings(**KINDS["bottleneck"]), opened, seed=0)
        steps = _plain_steps(opened, carryon, is_read=is_read)
        assert [step.figures is not None for step in steps] == [is_read] * len(steps)
        losses.append([step.read() for step in steps])
        carryons.append(carryon.state_dict())

    assert losses[0] == losses[1]
    assert all(torch.equal(carryons[0][name], carryons[1][name]) for name in carryons[0])


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_loss_that_is_not_finite_moves_no_weight_though_it_is_read_later(
    store: Path, in_backward: bool
) -> None:
    opened = Store.open(store)
    carryon = build_carryon(CarryOnSettings(**KINDS["bottleneck"]), opened, seed=0)
    before = {name: weight.clone() for name, weight in carryon.state_dict().items()}
    memory = MemorySettings(step_in_backward=in_backward)

    [step, after] = _plain_steps(opened, carryon, is_read=False, memory=memory, spoilt=True)

    with pytest.raises(NotFiniteError):
        read_steps([step, after])
    assert all(torch.equal(before[name], each) for name, each in carryon.state_dict().items())


def _plain_steps(
    store: Store,
    carryon: CarryOn,
    *,
    is_read: bool,
    memory: MemorySettings | None = None,
    spoilt: bool = False,
) -> list[Step]:
    """Take two steps on the CPU; `spoilt` puts a nan into the states of both."""
    cpu = torch.device("cpu")
    head = place_training_head(store, LossSettings(head_dtype="float32"), device=cpu)
    optimizer = build_optimizer(carryon, OptimizationSettings(), memory or MemorySettings())
    batches = read_batches(store, ["final"], is_pinned=False)[:2]
    for batch in batches if spoilt else ():
        batch.states["final"][0] = torch.nan
    return [take(carryon, optimizer, [batch], head=head, is_read=is_read) for batch in batches]
