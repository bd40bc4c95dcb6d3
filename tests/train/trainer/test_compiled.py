"""Compiled steps: the same as others, chosen when a run begins, kept when it is resumed.

Most tests take a backend of torch that traces as the real one does but writes no kernels: a tiny
carry-on takes the real one a minute.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.steps import read_batches, take
from support.tiny_runs import TINY, Killed, assert_same_bits, kill_at, saved_weights, train_tiny
from support.tiny_train_stores import make_tiny_store
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.files.documents import read_sealed, sealed, write_json
from carryon.cache.store.reader import Store
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
)
from carryon.train.data import padding
from carryon.train.data.batch import no_states
from carryon.train.data.padding import PaddedSize
from carryon.train.losses.sampled_softmax import place_training_head
from carryon.train.modules.carryon import CarryOn, build_carryon
from carryon.train.modules.packed_attention import Packing
from carryon.train.optim.optimizer import build_optimizer
from carryon.train.trainer.compilation import carryon as compiled
from carryon.train.trainer.compilation import choice as compile_choice
from carryon.train.trainer.compilation.carryon import CompiledCarryOn
from carryon.train.trainer.forecast.memory_estimate import INDUCTOR_BYTES
from carryon.train.trainer.forecast.preview import preview_run

TRACED = "eager"
SIZE = PaddedSize(tokens=72, rows=16, longest=16, pairs=56)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny store."""
    return make_tiny_store(tmp_path_factory.mktemp("compiled") / "store")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without kernels."""
    monkeypatch.setattr(compiled, "BACKEND", TRACED)


def _compiled(store: Store, size: PaddedSize, backend: str) -> tuple[CarryOn, CompiledCarryOn]:
    shape = CarryOnSettings(width=8, heads=2, intermediate_size=8, blocks=1)
    carryon = build_carryon(shape, store, seed=0)
    settings = LossSettings(head_dtype="float32")
    head = place_training_head(store, settings, device=torch.device("cpu"))
    return carryon, CompiledCarryOn(carryon, head, [size], backend=backend)


def _losses(store: Store, carryon: CarryOn, function: CompiledCarryOn | None) -> list[float]:
    """Return the losses of ten steps of two batches each."""
    optimizer = build_optimizer(carryon, OptimizationSettings(), MemorySettings())
    settings = LossSettings(head_dtype="float32")
    head = place_training_head(store, settings, device=torch.device("cpu"))
    batches = read_batches(store, ["final"], is_pinned=False)
    steps = [[batches[step % len(batches)], batches[0]] for step in range(10)]
    taken = [take(carryon, optimizer, each, head=head, correct=function) for each in steps]
    return [step.read().loss for step in taken]


def test_compiled_steps_are_those_of_the_carryon_as_it_is(store: Path) -> None:
    opened = Store.open(store)
    plain, _ = _compiled(opened, SIZE, "")
    carryon, function = _compiled(opened, SIZE, TRACED)
    random = torch.random.get_rng_state()

    function.compile(no_states(opened, ["final"]))

    assert function.is_compiled
    assert torch.equal(torch.random.get_rng_state(), random)
    before = plain.state_dict()
    assert all(torch.equal(before[name], each) for name, each in carryon.state_dict().items())
    right, found = _losses(opened, plain, None), _losses(opened, carryon, function)
    assert function.is_compiled  # no step was other than what was compiled
    assert right[-1] < right[0]
    np.testing.assert_allclose(found, right, atol=1e-4)


def test_a_batch_that_no_size_holds_is_computed_as_it_is(store: Path) -> None:
    opened = Store.open(store)
    tiny = PaddedSize(tokens=8, rows=1, longest=8, pairs=8)
    carryon, function = _compiled(opened, tiny, TRACED)
    function.compile(no_states(opened, ["final"]))
    batch = read_batches(opened, ["final"], is_pinned=False)[0]
    plain = carryon.correct_packed(batch.states, batch.packing(), batch.positions)
    assert function.is_compiled
    assert torch.equal(function(batch), plain)


class OneMatrix(CarryOn):
    """Few kernels, as each takes seconds to compile."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.settings = CarryOnSettings()
        self.up = torch.nn.Linear(width, width, bias=False)

    def correct_packed(
        self, states: Mapping[str, Tensor], packing: Packing, positions_M: Tensor
    ) -> Tensor:
        delta: Tensor = self.up(states["final"].float())[positions_M]
        return delta


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile for a CPU")
def test_kernels_are_compiled_where_there_is_a_compiler(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    caplog.set_level(logging.INFO)
    opened = Store.open(store)
    settings = LossSettings(head_dtype="float32")  # the result has the type of the head
    head = place_training_head(opened, settings, device=torch.device("cpu"))
    carryon = OneMatrix(opened.width)
    function = CompiledCarryOn(carryon, head, [SIZE], backend="inductor")

    function.compile(no_states(opened, ["final"]))

    assert function.is_compiled, caplog.text
    assert "padded to 72 tokens in 16 rows of 16" in caplog.text
    batch = read_batches(opened, ["final"], is_pinned=False)[0]
    found = function(batch)
    torch.testing.assert_close(found, carryon.up(batch.states["final"].float())[batch.positions])
    assert function.is_compiled


def _recorded(run: Path) -> tuple[Any, Any]:
    config = yaml.safe_load((run / "config.yaml").read_text())
    identity = read_sealed(run / "run.json")["identity"]
    names = ("compile", "padded_sizes")
    assert all(config[name] == identity[name] for name in names)
    return config["compile"], config["padded_sizes"]


@pytest.mark.usefixtures("traced")
def test_a_compiled_run_is_recorded_and_a_resumed_one_keeps_its_bits(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(padding, "MOST_SIZES", 1)
    whole, run, plain = (tmp_path / name for name in ("whole", "run", "plain"))
    train_tiny(store, whole, compile=True, epochs=3)
    is_compiled, sizes = _recorded(whole)
    assert is_compiled is True
    assert [str(PaddedSize.parse(size)) for size in sizes] == sizes != []
    assert caplog.text.count("steps are compiled in ") == 1
    with monkeypatch.context() as patch:
        kill_at(patch, 9)
        with pytest.raises(Killed):
            train_tiny(store, run, compile=True, epochs=3)
    monkeypatch.setattr(compile_choice, "choose_sizes", lambda *_, **__: ())

    train_tiny(store, run, epochs=3)

    assert _recorded(run) == (is_compiled, sizes)
    assert_same_bits(run, whole)
    with pytest.raises(InputError, match="compile is True there and False here"):
        train_tiny(store, run, epochs=3, compile=False)
    train_tiny(store, plain, epochs=3)
    assert _recorded(plain) == (False, [])  # a CPU is not compiled for by itself
    ours, theirs = (saved_weights(each) for each in (whole, plain))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0.1, atol=0.01)


@pytest.mark.usefixtures("traced")
def test_what_cannot_be_compiled_runs_as_it_is_with_one_warning(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("no compiler found\nin any place")

    monkeypatch.setattr(CompiledCarryOn, "_make", refuse)
    train_tiny(store, tmp_path / "run", compile=True)
    train_tiny(store, tmp_path / "plain")

    lines = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    [line] = [each for each in lines if "compile" in each]
    assert line.startswith("steps are not compiled: no compiler found. They run as they are")
    assert_same_bits(tmp_path / "run", tmp_path / "plain")


@pytest.mark.usefixtures("traced")
def test_what_is_compiled_wrongly_is_not_used(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    correct = compiled._correct

    def wrong(*args: Any) -> Tensor:  # noqa: ANN401
        return correct(*args) * 1.01

    monkeypatch.setattr(compiled, "_correct", wrong)
    opened = Store.open(store)
    _, function = _compiled(opened, SIZE, TRACED)
    function.compile(no_states(opened, ["final"]))

    assert not function.is_compiled
    assert "steps are not compiled: compiled for 72x16x16x56, it is 0.01 off" in caplog.text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dropout": 0.1}, "compile: expected false with dropout"),
        ({"recompute": True}, "compile: expected false with settings that save memory"),
        ({"weights_dtype": "bfloat16"}, "compile: expected false with settings that save memory"),
        ({"padded_sizes": ["8x1x4x4"]}, "padded_sizes: expected sizes TOKENSxROWSx"),
        ({"padded_sizes": ["4096x64x64x4"]}, "padded_sizes: expected at most .* of a step, got 4"),
        ({"padded_sizes": ["64x4096x64x4"]}, "padded_sizes: expected at most .* of a step, got 6"),
        ({"padded_sizes": ["many"]}, "padded_sizes: expected TOKENSxROWSx.* got 'many'"),
        ({"compile": False, "padded_sizes": ["8x2x4x4"]}, "Fix: --compile true"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_does_not_fit_is_refused(
    store: Path, tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        train_tiny(store, tmp_path / "run", **{"compile": True, **options})
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_from_before_resumes_as_it_was(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, 9)
        with pytest.raises(Killed):
            train_tiny(store, run, epochs=3)
    document = read_sealed(run / "run.json")
    del document["identity"]["compile"], document["identity"]["padded_sizes"]
    write_json(run / "run.json", sealed(document))

    train_tiny(store, run, epochs=3)

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["compile"], config["padded_sizes"]) == (False, [])
    assert "compile" not in read_sealed(run / "run.json")["identity"]


def test_a_choice_that_does_not_exist_is_refused(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_tiny(store, run, epochs=1)
    document = read_sealed(run / "run.json")
    wrong: list[tuple[str, object]] = [("compile", "yes"), ("compile", 1), ("compile", None)]
    for name, value in [*wrong, ("padded_sizes", ["x"]), ("padded_sizes", 3)]:
        identity = document["identity"] | {name: value}
        write_json(run / "run.json", sealed(document | {"identity": identity}))
        with pytest.raises(InputError, match=f"run: {name}: expected .*. Fix: give another --out"):
            train_tiny(store, run, epochs=1)


@pytest.mark.usefixtures("traced")
def test_a_preview_says_for_what_a_run_would_be_compiled(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padding, "MOST_SIZES", 1)
    settings = TINY.with_options(compile=True)

    seen = preview_run([str(store)], out=tmp_path / "run", settings=settings)

    assert seen.compile is True
    assert seen.compile_s > 0
    [size] = seen.padded_sizes
    assert f"which come on top, for batches of {size}\n" in seen.summary()
    plain = preview_run([str(store)], out=tmp_path / "run", settings=TINY)
    assert (plain.compile, plain.padded_sizes, plain.compile_s) == (False, [], 0.0)
    assert seen.memory["imports"] - plain.memory["imports"] == INDUCTOR_BYTES
    assert "compiled" not in plain.summary()
