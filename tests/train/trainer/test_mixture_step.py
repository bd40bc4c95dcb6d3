"""The loss of a mixture and its gradients against plain code that mixes whole distributions.

Letters: M supervised pairs, D width, V vocabulary, S sources, F features.
"""

import numpy as np
import pytest
import torch
from support.tiny_train_stores import make_tiny_store
from torch import Tensor

from carryon.cache.store.reader import Store
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
)
from carryon.train.data.batch import Batch, make_batch
from carryon.train.losses.base_states import get_base_states
from carryon.train.losses.frozen_head import FrozenHead, place_head
from carryon.train.mixing.gate import Gate
from carryon.train.mixing.mixture import MixedCarryOn
from carryon.train.mixing.projected import PairProjections, ProjectedSources
from carryon.train.mixing.projection import FEATURES
from carryon.train.modules.carryon import CarryOn, build_carryon
from carryon.train.optim.optimizer import LR_FACTOR, build_optimizer
from carryon.train.trainer.step import _objective, take_step

CPU = torch.device("cpu")
SHAPE = CarryOnSettings(width=8, blocks=1, heads=2, intermediate_size=8)
NUM_SOURCES = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(make_tiny_store(tmp_path_factory.mktemp("step") / "store"))


def take_batch(store: Store) -> Batch:
    """Return the samples of the first unit."""
    unit = store.read_unit(0)
    count = int(unit.lengths.sum())
    return make_batch(
        np.array(unit.samples),
        unit.lengths.astype(np.int64),
        tokens=unit.tokens[:count],
        loss_mask=unit.loss_mask[:count],
        states={tap: states[:count] for tap, states in unit.hidden.items()},
        is_pinned=False,
    )


def make_mixture(store: Store, kind: str = "bottleneck") -> MixedCarryOn:
    """Return a carry-on and a gate whose weights are all random."""
    shape = CarryOnSettings(**(SHAPE.to_dict() | {"kind": kind}))
    carryon = build_carryon(shape, store, seed=1)
    shares = torch.tensor([0.5, 0.3, 0.2])
    gate = Gate(anchor_width=store.width, source_widths=(), num_sources=2, shares=shares, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in (*carryon.parameters(), *gate.parameters()):
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return MixedCarryOn(carryon, gate)


def draw_sources(batch: Batch, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return whole distributions, [M, S, V], and features, [M, S, F]."""
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(batch.num_targets, NUM_SOURCES, vocab_size, generator=generator)
    shape = (batch.num_targets, NUM_SOURCES, len(FEATURES))
    return logits.softmax(dim=2), torch.rand(shape, generator=generator)


def reference(
    mixed: MixedCarryOn, batch: Batch, head: FrozenHead, whole: Tensor, features: Tensor
) -> Tensor:
    """Return the sum of the losses from distributions of the whole vocabulary."""
    delta = mixed.carryon.correct_packed(batch.states, batch.packing(), batch.positions)
    base = batch.states["final"].float()[batch.positions]
    own = ((base + delta) @ head.weight.float().t()).softmax(dim=1)
    shares = mixed.gate(base, features).softmax(dim=1)
    every = torch.cat([own.unsqueeze(1), whole], dim=1)
    mixture = (shares.unsqueeze(2) * every).sum(dim=1)
    assert torch.allclose(mixture.sum(dim=1), torch.ones(len(mixture)), atol=1e-5)
    return -mixture.gather(1, batch.targets.unsqueeze(1)).log().sum()


def backward(
    mixed: MixedCarryOn,
    batch: Batch,
    head: FrozenHead,
    whole: Tensor,
    features: Tensor,
    *,
    store: Store,
    chunk: int,
) -> Tensor:
    """Return the losses of a training step, [M], and give the weights their gradients."""
    at = batch.targets[:, None, None].expand(-1, NUM_SOURCES, 1)
    pairs = PairProjections(log_probs=whole.gather(2, at).squeeze(2).log(), features=features)
    losses, objective = _objective(
        mixed,
        batch,
        head=head,
        chunk=chunk,
        kl_weight=0.0,
        base=get_base_states(store, device=CPU),
        pairs=pairs,
        correct=None,
    )
    objective.backward()
    return losses


def test_loss_and_gradients_are_those_of_whole_distributions_mixed_by_the_gate(
    store: Store,
) -> None:
    batch, mixed = take_batch(store), make_mixture(store)
    head = place_head(store, LossSettings(head_dtype="float32"), device=CPU)
    whole, features = draw_sources(batch, head.vocab_size)
    losses = backward(mixed, batch, head, whole, features, store=store, chunk=3)
    found = {name: weight.grad for name, weight in mixed.named_parameters()}
    mixed.zero_grad(set_to_none=True)
    expected = reference(mixed, batch, head, whole, features)
    expected.backward()

    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    for name, weight in mixed.named_parameters():
        gradient = found[name]
        assert gradient is not None, name
        assert weight.grad is not None, name
        assert float(weight.grad.abs().max()) > 0, name
        assert torch.allclose(gradient, weight.grad, rtol=1e-3, atol=1e-4), name


def test_a_step_reads_the_projections_at_the_rows_of_its_targets(store: Store) -> None:
    unit, batch, mixed = store.read_unit(0), take_batch(store), make_mixture(store)
    head = place_head(store, LossSettings(head_dtype="float32"), device=CPU)
    whole, features = draw_sources(batch, head.vocab_size)
    rows = [
        int(store.sample_starts[sample]) + position - 1
        for sample, first, length in zip(unit.samples, unit.starts, unit.lengths, strict=True)
        for position in range(1, length)
        if unit.loss_mask[first + position] == 1
    ]
    at = batch.targets[:, None, None].expand(-1, NUM_SOURCES, 1)
    projected = ProjectedSources(
        sources=[],
        starts=store.sample_starts,
        rows=np.array(rows),
        anchor=torch.zeros(len(rows)),
        log_probs=whole.gather(2, at).squeeze(2).log(),
        features=features,
        token_bytes=torch.zeros(head.vocab_size, dtype=torch.int64),
    )
    expected = reference(mixed, batch, head, whole, features).item()
    figures = take_step(
        mixed,
        torch.optim.SGD(mixed.parameters()),
        [batch],
        head=head,
        learning_rate=0.0,
        chunk=3,
        grad_clip=0.0,
        base=get_base_states(store, device=CPU),
        projected=projected,
    ).read()
    assert figures.loss == pytest.approx(expected / len(rows), rel=1e-5)


def test_without_a_carry_on_only_the_gate_has_weights(store: Store) -> None:
    batch, mixed = take_batch(store), make_mixture(store, "none")
    head = place_head(store, LossSettings(head_dtype="float32"), device=CPU)
    whole, features = draw_sources(batch, head.vocab_size)
    losses = backward(mixed, batch, head, whole, features, store=store, chunk=64)

    expected = reference(mixed, batch, head, whole, features)
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert {name.partition(".")[0] for name, _ in mixed.named_parameters()} == {"gate"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_gate_has_its_own_learning_rate(store: Store, optimizer: str) -> None:
    mixed = make_mixture(store)
    built = build_optimizer(
        mixed.carryon,
        OptimizationSettings(optimizer=optimizer, learning_rate=2e-4),  # type: ignore[arg-type]
        MemorySettings(),
        gate=mixed.gate,
        gate_rate=3e-3,
    )
    factors = {
        id(weight): group.get(LR_FACTOR, 1.0)
        for group in built.param_groups
        for weight in group["params"]
    }
    assert {factors[id(weight)] for weight in mixed.carryon.parameters()} == {1.0}
    assert {round(factors[id(weight)], 6) for weight in mixed.gate.parameters()} == {15.0}


def test_a_carry_on_in_bfloat16_has_a_gate_in_float32(store: Store) -> None:
    mixed: CarryOn = make_mixture(store)
    assert isinstance(mixed, MixedCarryOn)
    lean = MemorySettings(weights_dtype="bfloat16", optimizer_bits=8, step_in_backward=True)
    built = build_optimizer(
        mixed.carryon.bfloat16(),
        OptimizationSettings(learning_rate=3e-3),
        lean,
        gate=mixed.gate,
        gate_rate=3e-3,
    )
    assert all(weight.dtype == torch.float32 for weight in mixed.gate.parameters())
    assert len(built.param_groups) == len(list(mixed.parameters()))
