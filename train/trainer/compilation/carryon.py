"""The correction of a run's steps, compiled by torch for a few sizes that batches are padded to.

On a GPU each compiled function is also captured as CUDA graphs, one launch in place of hundreds.
Everything is compiled before the first step and compared with the carry-on as it is; what cannot
be compiled, or is not the same, runs as it is, after one warning. Nothing is compiled in a step.

Letters: N tokens of a batch, M supervised pairs, D base width.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carryon.cache.device import attention_of_any_shape
from carryon.cache.progress import show_seconds
from carryon.train.data.batch import Batch
from carryon.train.data.padding import PaddedInput, PaddedSize, fitting_size, pad
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.mixing.mixture import inner_carryon
from carryon.train.modules.carryon import CarryOn, taps_of
from carryon.train.modules.packed_attention import Packing
from carryon.train.trainer.step import pair_delta, products_of

logger = logging.getLogger(__name__)

BACKEND = "inductor"
"""Compiler of torch that writes kernels."""
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest relative distance of corrections and of gradients, by the dtype of products. In bfloat16
each of the two ways is up to 2 % off."""
_CALLS = 3
"""Of a function before it is compared: the second records CUDA graphs, the third replays them."""
Correct = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor], Tensor]
"""From states [N', D] by tap, the packing's two tensors and positions [M'] to delta [M', D]."""


class CompiledCarryOn:
    """Computes what `pair_delta` does, by a compiled function where a batch fits a size."""

    def __init__(
        self,
        carryon: CarryOn,
        head: FrozenHead,
        sizes: Sequence[PaddedSize],
        *,
        backend: str = "",
    ) -> None:
        """Compile nothing yet.

        Args:
            carryon: to train, on its device.
            head: of the run.
            sizes: to pad to.
            backend: torch's compiler. Empty: BACKEND.
        """
        self._carryon = inner_carryon(carryon)
        self._head = head
        self._sizes = tuple(sizes)
        self._backend = backend or BACKEND
        self._functions: dict[PaddedSize, Correct] = {}
        self.compile_s = 0.0
        """Seconds that compiling took."""

    @property
    def is_compiled(self) -> bool:
        """Whether batches are padded: `compile` was called, and worked."""
        return bool(self._functions)

    def compile(self, like: Mapping[str, Tensor]) -> None:
        """Compile for every size; what fails leaves the carry-on as it is, with a warning.

        Weights and torch's generators are as before. A second call does nothing.

        Args:
            like: [0, D] at each tap that the carry-on reads, in the dtype of the states.
        """
        if self._functions:
            return
        started_at = time.perf_counter()
        try:
            with _quiet(), _seeds_kept(self._head.device), _without_zeros(self._carryon):
                for size in self._sizes:
                    self._functions[size] = self._make(size)
                    self._try(size, like)
        except Exception as error:  # whatever a compiler lacks on a machine
            self._give_up(str(error))
            return
        self.compile_s = time.perf_counter() - started_at
        sizes = ", ".join(
            f"{each.tokens:,} tokens in {each.rows} rows of {each.longest:,}"
            for each in self._sizes
        )
        logger.info(f"steps are compiled in {show_seconds(self.compile_s)}, padded to {sizes}")

    def __call__(self, batch: Batch) -> Tensor:
        """Return the correction at each supervised pair of a batch on the device, [M, D]."""
        size = fitting_size(self._functions, batch.lengths, pairs=batch.num_targets)
        if size is None or batch.num_targets == 0:
            return pair_delta(self._carryon, batch, head=self._head)
        padded = pad(batch, size, taps=taps_of(self._carryon))
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                return self._run(size, padded)[: batch.num_targets]
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._give_up(str(error))
            return pair_delta(self._carryon, batch, head=self._head)

    def _give_up(self, reason: str) -> None:
        self._functions = {}
        first = next(iter(reason.strip().splitlines()), "no reason given")
        logger.warning(
            f"steps are not compiled: {first:.300}. They run as they are, in the same steps up to "
            "rounding. Fix: install a compiler (g++; on a GPU triton), or leave out --compile"
        )

    def _make(self, size: PaddedSize) -> Correct:
        function = partial(_correct, self._carryon, size.rows, size.longest)
        is_captured = self._head.device.type == "cuda" and self._backend == "inductor"
        # Isolated, as else the sizes of other runs would count as recompilations of this one.
        make: Any = torch.compile  # whose overloads lack an argument
        made: Correct = make(
            function,
            fullgraph=True,
            dynamic=False,
            backend=self._backend,
            mode="reduce-overhead" if is_captured else None,
            isolate_recompiles=True,
        )
        return made

    def _run(self, size: PaddedSize, padded: PaddedInput) -> Tensor:
        weights = [each for each in self._carryon.parameters() if each.requires_grad]
        if self._head.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        inputs = (
            padded.states,
            padded.packing.place,
            padded.packing.position_ids,
            padded.positions,
        )
        with products_of(self._carryon, self._head), attention_of_any_shape():
            out: Tensor = _Apart.apply(self._functions[size], inputs, *weights)  # type: ignore[no-untyped-call]
        return out

    def _try(self, size: PaddedSize, like: Mapping[str, Tensor]) -> None:
        """Compile by calls; compare corrections and gradients of another batch with those as it is.

        Raises:
            ArithmeticError: they differ.
        """
        taps, limit = taps_of(self._carryon), _LIMITS[self._head.dtype]
        weights = [each for each in self._carryon.parameters() if each.requires_grad]
        for number in range(_CALLS):
            batch = _example(like, size, is_full=number % 2 == 0).to(self._head.device)
            found = self._run(size, pad(batch, size, taps=taps))[: batch.num_targets]
            right = pair_delta(self._carryon, batch, head=self._head)
            # A gradient of all directions, as that of a loss.
            slope = torch.randn_like(right)
            ours, theirs = (
                [each, *torch.autograd.grad(each, weights, slope.to(each.dtype))]
                for each in (found, right)
            )
        distance = max(map(_distance, ours, theirs))
        if not distance <= limit:
            raise ArithmeticError(
                f"compiled for {size}, it is {distance:.2g} off, of at most {limit:g}"
            )


class _Apart(torch.autograd.Function):
    """A function whose result and gradients are in memory of their own.

    Those of a CUDA graph are overwritten by its next replay: by the next batch of a step, while
    the gradients of the first still wait for it.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        function: Correct,
        inputs: tuple[dict[str, Tensor], Tensor, Tensor, Tensor],
        *weights: Tensor,
    ) -> Tensor:
        with torch.enable_grad():
            ctx.out = function(*inputs)
        ctx.weights = weights
        return _copied(ctx.out.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        found = torch.autograd.grad(ctx.out, ctx.weights, grads[0], allow_unused=True)
        del ctx.out, ctx.weights
        return None, None, *(None if each is None else _copied(each) for each in found)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.device.type == "cuda" else tensor


def _correct(
    carryon: CarryOn,
    num_rows: int,
    longest: int,
    states: Mapping[str, Tensor],
    place: Tensor,
    position_ids: Tensor,
    positions: Tensor,
) -> Tensor:
    packing = Packing(place=place, position_ids=position_ids, num_rows=num_rows, longest=longest)
    return carryon.correct_packed(states, packing, positions)


def _example(like: Mapping[str, Tensor], size: PaddedSize, *, is_full: bool) -> Batch:
    """Return a batch of random states that fits a size: with all of its tokens, or with fewer."""
    full, rest = divmod(size.tokens, size.longest)
    lengths = np.array([size.longest] * full + [rest] * (rest > 0), dtype=np.int64)
    fewer = np.concatenate([lengths[:1] // 2, lengths[1:]])
    if not is_full and fewer[0] and size.holds(fewer, pairs=0):
        lengths = fewer
    num_tokens = int(lengths.sum())
    pairs = min(num_tokens, size.pairs if is_full else max(1, size.pairs // 2))
    return Batch(
        samples=np.arange(len(lengths), dtype=np.int64),
        lengths=lengths,
        states={
            tap: torch.randn(num_tokens, each.shape[1]).to(each.dtype) for tap, each in like.items()
        },
        tokens=torch.zeros(num_tokens, dtype=torch.int32),
        positions=torch.randperm(num_tokens)[:pairs].sort().values,
        targets=torch.zeros(pairs, dtype=torch.int64),
    )


def _distance(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm().clamp_(min=1e-20))


@contextmanager
def _without_zeros(carryon: CarryOn) -> Iterator[None]:
    """Put random numbers for weights that are all zero, as those of a new carry-on's output."""
    zeros = [(each, each.detach().clone()) for each in carryon.parameters() if not bool(each.any())]
    with torch.no_grad():
        for weight, _ in zeros:
            weight.copy_(torch.randn_like(weight) * 0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zeros:
                weight.copy_(before)


@contextmanager
def _seeds_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the warnings of the compiler's own imports, which are nothing to act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
