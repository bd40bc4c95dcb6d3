"""Extraction, training and inference on a GPU, compared with a CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
)
from carryon.train.data.batch import Batch, no_states
from carryon.train.data.padding import choose_sizes
from carryon.train.inference.evaluate import evaluate
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import frozen_head, with_gradient_filter
from carryon.train.losses.sampled_softmax import place_training_head
from carryon.train.modules.carryon import build_carryon
from carryon.train.optim.optimizer import build_optimizer
from carryon.train.trainer.compilation.carryon import CompiledCarryOn
from carryon.train.trainer.step import Step, read_steps
from carryon.train.trainer.trainer import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FORWARD = ForwardSettings(device="cuda", compute_dtype="bfloat16", batch_tokens=256)
LATE = ["final", "prenorm", "layer.1", "layer.2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base."""
    return make_tiny_base(tmp_path_factory.mktemp("gpu") / "base")


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its store, extracted on the GPU."""
    return _extract(base, tmp_path_factory.mktemp("gpu"), FORWARD)


def _extract(base: Path, root: Path, forward: ForwardSettings) -> Path:
    extract(
        base=str(base),
        data=[write_corpus(root / "data.jsonl", num_samples=12)],
        out=root / "store",
        corpus=CorpusSettings(mask="all", max_tokens=32),
        store=StoreSettings(taps=LATE, unit_tokens=64, dtype="float32", with_blocks=1),
        forward=forward,
    )
    return root / "store"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_those_of_a_cpu(base: Path, tmp_path: Path, dtype: Any) -> None:  # noqa: ANN401
    forward = replace(FORWARD, compute_dtype=dtype)
    stores = []
    for device in ("cuda", "cpu"):
        (tmp_path / device).mkdir()
        root = _extract(base, tmp_path / device, replace(forward, device=device))
        stores.append(Store.open(root))

    for unit in range(stores[0].num_units):
        ours, theirs = (each.read_unit(unit).hidden for each in stores)
        for tap, states in ours.items():
            error = np.linalg.norm(states - theirs[tap]) / np.linalg.norm(theirs[tap])
            assert error < (1e-4 if dtype == "float32" else 0.02), tap


@pytest.mark.parametrize("head_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["bottleneck", "native", "top"])
def test_a_run_ends_as_on_a_cpu(
    store: Path,
    tmp_path: Path,
    kind: str,
    head_dtype: str,
) -> None:
    settings: dict[str, Any] = {"blocks": 1, "epochs": 2, "tokens_per_step": 64}
    settings |= {"kind": kind, "head_dtype": head_dtype, "learning_rate": 1e-2}
    reports = {
        device: train(store, out=tmp_path / device, device=device, **settings)
        for device in ("cuda", "cpu")
    }

    ours, theirs = reports["cuda"], reports["cpu"]
    assert ours.base_nll == pytest.approx(theirs.base_nll, abs=1e-3)
    assert ours.carryon_nll == pytest.approx(theirs.carryon_nll, abs=0.02)
    again = evaluate(store, carryon=ours.carryon, device="cpu", head_dtype="float32")
    assert again.carryon_nll == pytest.approx(ours.carryon_nll, abs=2e-3)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("least", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_a_cpu(
    store: Path, dtype: torch.dtype, least: float, softcap: float | None
) -> None:
    head = replace(Store.open(store).head(), softcap=softcap)
    random = torch.Generator().manual_seed(0)
    states = torch.randn(40, head.width, generator=random).to(dtype).float()
    targets = torch.randint(head.vocab_size, (40,), generator=random)
    found = []
    for device in (CUDA, CPU):
        wide = dtype if device == CUDA else torch.float32
        placed = frozen_head(head, device=device, dtype=wide)
        mine = states.to(device).requires_grad_()
        losses = token_losses(
            mine, targets.to(device), head=with_gradient_filter(placed, least), chunk=16
        )
        (gradient,) = torch.autograd.grad(losses.sum(), mine)
        found.append((losses.detach().cpu(), gradient.cpu()))

    (losses, gradient), (cpu_losses, cpu_gradient) = found
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(losses, cpu_losses, rtol=0, atol=1e-4)
    assert float((gradient - cpu_gradient).norm() / cpu_gradient.norm()) < tolerance


def test_a_step_does_not_wait_for_the_gpu(store: Path) -> None:
    opened = Store.open(store)
    shape = CarryOnSettings(width=8, heads=2, intermediate_size=8, blocks=1)
    carryon = build_carryon(shape, opened, seed=0).to(CUDA)
    optimizer = build_optimizer(carryon, OptimizationSettings(), MemorySettings())
    head = place_training_head(opened, LossSettings(sampled_softmax=16), device=CUDA)
    batches = read_batches(opened, ["final"], is_pinned=True)

    def step(batch: Batch) -> Step:
        return take(carryon, optimizer, [batch], head=head, is_read=False)

    step(batches[0]).read()  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = [step(batch) for batch in batches[:3]]
    finally:
        torch.cuda.set_sync_debug_mode("default")

    read_steps(taken)
    assert all(each.read().loss > 0 for each in taken)


@pytest.mark.filterwarnings("default")  # of the compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_in_cuda_graphs_end_where_others_do(store: Path, dtype: Any) -> None:  # noqa: ANN401
    opened = Store.open(store)
    head = place_training_head(opened, LossSettings(head_dtype=dtype), device=CUDA)
    batches = read_batches(opened, ["final"], is_pinned=True)
    lengths = [batch.lengths for batch in batches]
    sizes = choose_sizes(lengths, most_tokens=64, density=1.0)
    losses = []
    for is_compiled in (False, True):
        shape = CarryOnSettings(width=8, heads=2, intermediate_size=8, blocks=1)
        carryon = build_carryon(shape, opened, seed=0).to(CUDA)
        optimizer = build_optimizer(carryon, OptimizationSettings(), MemorySettings())
        compiled = CompiledCarryOn(carryon, head, sizes)
        more: dict[str, Any] = {}
        if is_compiled:
            compiled.compile(no_states(opened, ["final"]))
            assert compiled.is_compiled
            more = {"correct": compiled}
        # Two batches a step: gradients of the first wait for the second.
        pairs = [[batches[step % len(batches)], batches[0]] for step in range(20)]
        steps = [take(carryon, optimizer, each, head=head, **more) for each in pairs]
        losses.append([step.read().loss for step in steps])
        assert compiled.is_compiled is is_compiled

    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-3 if dtype == "float32" else 0.03)


@pytest.mark.filterwarnings("default")
def test_a_compiled_run_resumes_with_its_choice(store: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "tokens_per_step": 64, "device": "cuda"}
    plain = train(store, out=tmp_path / "plain", **settings)
    report = train(store, out=tmp_path / "run", compile=True, **settings)

    assert report.carryon_nll == pytest.approx(plain.carryon_nll, abs=0.02)
    again = train(store, out=tmp_path / "run", **settings)
    assert again.carryon_nll == report.carryon_nll


def test_the_packing_of_a_batch_does_not_wait_for_the_gpu() -> None:
    lengths = np.array([3, 5], dtype=np.int64)
    batch = Batch(
        samples=np.arange(2),
        lengths=lengths,
        states={},
        tokens=torch.zeros(8, dtype=torch.int32, device=CUDA),
        positions=torch.arange(4, device=CUDA),
        targets=torch.arange(4, device=CUDA),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        packing = batch.packing()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert packing.place.tolist() == [0, 1, 2, 5, 6, 7, 8, 9]


def test_text_is_that_of_a_cpu(base: Path, store: Path, tmp_path: Path) -> None:
    report = train(store, out=tmp_path / "run", device="cuda", epochs=1, tokens_per_step=64)
    tokens = torch.tensor([[1, 5, 9, 20, 33, 7, 60]])
    logits = []
    for device in ("cuda", "cpu"):
        model = CarryOnForCausalLM.from_pretrained(
            report.carryon, base=str(base), device=device, compute_dtype="float32"
        )
        with torch.no_grad():
            logits.append(model(tokens.to(model.device)).logits.float().cpu())

    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
