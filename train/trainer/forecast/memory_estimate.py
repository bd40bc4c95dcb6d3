"""Estimate the peak memory of a run by part, without running it. Pure arithmetic.

Counted are the bytes of the process beyond an interpreter that has imported torch. On an
accelerator they are those of its own memory, except the imports. Letters: N tokens of a
micro-batch, M of them supervised, D base width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from carryon.cache.device import DEFAULT_CHUNK
from carryon.train.config import CarryOnSettings, LossSettings, MemorySettings
from carryon.train.kinds import get_kind
from carryon.train.losses.calibration import SMALLEST_HEAD
from carryon.train.losses.frozen_head import (
    CPU_BLOCK_ROWS,
    STREAMED_BLOCK_BYTES,
    WIDE,
    WIDE_BLOCK_ROWS,
    FrozenHead,
)
from carryon.train.losses.gradient_filter import POSITIONS_AT_ONCE
from carryon.train.losses.ways import way_of, ways_of
from carryon.train.mixing.gate import Gate
from carryon.train.mixing.projection import CHUNK_BYTES, FEATURES
from carryon.train.modules.bottleneck import Bottleneck
from carryon.train.modules.taps import source_tap
from carryon.train.optim.lowbit_adamw import WORKING_BYTES

IMPORT_BYTES = 10_000_000
"""Imports of the trainer of a `bottleneck`."""
COMPILER_BYTES = 70_000_000
"""Further imports of torch's own optimizers."""
INDUCTOR_BYTES = 130_000_000
"""Further imports of compiled steps, and what the compiler keeps."""
TRANSFORMERS_BYTES = 130_000_000
"""Further imports of the kinds made of the base's own blocks."""
_ROOM = 1.25  # a batch takes the memory of the longest, so that its memory can be reused


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCase:
    """The properties of another base in a mixture."""

    width: int
    vocab_size: int
    taps: Sequence[str]
    """Taps of its store that the carry-on reads; empty: it reads none."""
    num_targets: int
    """Targets of the store, at which its distribution is projected."""
    head_bytes: int
    """Bytes of each number of its head in its store: 2 or 4."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryCase:
    """The properties of a run that decide its memory."""

    base_width: int
    vocab_size: int
    micro_batch_tokens: int
    supervised_ratio: float
    """M / N."""
    window_tokens: int
    """Tokens of a window of units; two windows are in memory."""
    head_bytes: int
    """Bytes of each number in the products with the LM head: 2 or 4."""
    carryon: CarryOnSettings
    loss: LossSettings
    memory: MemorySettings
    weights: Sequence[int] | None = None
    """Numbers of each trained weight of the carry-on. None: those of a bottleneck."""
    frozen_bytes: int = 0
    """Bytes of weights of the carry-on that are not trained."""
    is_compiled: bool = False
    """Whether steps are compiled. Memory of CUDA graphs is not counted."""
    sources: Sequence[SourceCase] = ()
    """Other bases that are mixed in."""
    has_gate: bool = False
    """Whether a gate mixes their distributions."""

    @property
    def is_wide(self) -> bool:
        """Whether plain products multiply the head, as in FrozenHead.is_wide."""
        return self.head_bytes == 4 and self.base_width >= WIDE


def plan_memory(case: MemoryCase) -> dict[str, int]:
    """Return the bytes of each part of a run's peak."""
    sizes = _weights(case)
    item = 2 if case.memory.weights_dtype == "bfloat16" else 4
    num_weights, largest = sum(sizes), max(sizes, default=0)
    is_lean = item == 2 or case.memory.optimizer_bits == 8
    state_bytes = 2 + 8 / 256 if case.memory.optimizer_bits == 8 else 8
    moved = largest if case.memory.step_in_backward else num_weights
    positions = int(case.micro_batch_tokens * case.supervised_ratio)
    # States in float32 and in the head's type, their gradient, a mean of rows for each block, and
    # the gradient in the backward pass. For a wide head only states and gradient.
    a_channel = 8 if case.is_wide else 4 + case.head_bytes + 4 + case.head_bytes + 8
    states = positions * case.base_width * a_channel
    copies, logits = _products(case, positions)
    parts = {
        "imports": IMPORT_BYTES
        + (0 if is_lean else COMPILER_BYTES)
        + (INDUCTOR_BYTES if case.is_compiled else 0)
        + (TRANSFORMERS_BYTES if get_kind(case.carryon.kind).needs_blocks else 0),
        "weights": num_weights * item + case.frozen_bytes,
        "gradients": moved * item,
        "optimizer": int(num_weights * state_bytes) + (WORKING_BYTES if is_lean else 0),
        "head": _placed_head(case) + copies,
        "logits": logits,
        "states": states,
        "activations": _activations(case, positions, item=item, loss_bytes=states + logits),
        "batches": int(_ROOM * 2 * case.window_tokens * 2 * _channels(case)),
    }
    return parts | _mixture(case, parts) if case.has_gate else parts


def _weights(case: MemoryCase) -> list[int]:
    """Return the numbers of each trained weight of the carry-on."""
    if case.weights is not None:
        return list(case.weights)
    if case.carryon.kind == "none":
        return []
    with torch.device("meta"):
        carryon = Bottleneck(
            case.carryon,
            base_width=case.base_width,
            sources={
                source_tap(number, tap): source.width
                for number, source in enumerate(case.sources, 1)
                for tap in source.taps
            },
        )
    return [weight.numel() for weight in carryon.parameters()]


def _channels(case: MemoryCase) -> int:
    """Return the channels that are read of a token, over all taps."""
    others = sum(source.width * len(source.taps) for source in case.sources)
    return case.base_width * len(case.carryon.taps) + others


def _mixture(case: MemoryCase, parts: Mapping[str, int]) -> dict[str, int]:
    """Return the parts of a gate; distributions are projected before there is a carry-on."""
    count = len(case.sources)
    with torch.device("meta"):
        gate = Gate(
            anchor_width=case.base_width,
            source_widths=(),
            num_sources=count,
            shares=torch.ones(1 + count),
            seed=0,
        )
    a_target = 8 + 4 + 4 * count * (1 + len(FEATURES))  # its row, and float32 numbers
    kept = case.sources[0].num_targets * a_target
    is_mapped = case.loss.head_place == "mapped"
    phases = [
        (0 if is_mapped else _head_bytes(case, each)) + _distributions(case, each)
        for each in case.sources
    ]
    own = {"imports", "batches"}
    step = sum(size for name, size in parts.items() if name not in own)
    return {
        "gate": 16 * sum(weight.numel() for weight in gate.parameters()),
        "projections": kept,
        "projecting": max(0, max(phases) - step),
    }


def _head_bytes(case: MemoryCase, source: SourceCase) -> int:
    """Return the bytes of the heads of the base and of another, which are in one type."""
    numbers = case.vocab_size * case.base_width + source.vocab_size * source.width
    return numbers * source.head_bytes


def _distributions(case: MemoryCase, source: SourceCase) -> int:
    """Return the bytes of the distributions that are held at one time."""
    a_position = 4 * (case.vocab_size + 2 * source.vocab_size)
    targets = min(source.num_targets, CHUNK_BYTES // a_position)
    return max(1, targets) * a_position


def leaner_settings(case: MemoryCase, *, limit: int) -> Iterator[tuple[str, MemoryCase]]:
    """Yield the case, then with one more memory setting each, those first that cost little time.

    The last case fits `limit` bytes, or has all of the settings.
    """
    yield "as given", case
    changes: dict[str, Callable[[MemoryCase], MemoryCase]] = {
        "--head-place mapped": lambda c: replace(c, loss=replace(c.loss, head_place="mapped")),
        "--recompute": lambda c: replace(c, memory=replace(c.memory, recompute=True)),
        "--weights-dtype bfloat16": lambda c: replace(
            c, memory=replace(c.memory, weights_dtype="bfloat16")
        ),
        "--optimizer-bits 8": lambda c: replace(c, memory=replace(c.memory, optimizer_bits=8)),
        "--step-in-backward": lambda c: replace(c, memory=replace(c.memory, step_in_backward=True)),
    }
    added = ""
    for option, change in changes.items():
        if sum(plan_memory(case).values()) <= limit:
            return
        changed = change(case)
        if changed == case:
            continue
        case, added = changed, f"{added} {option}".strip()
        yield added, case


def _placed_head(case: MemoryCase) -> int:
    item = {"device": case.head_bytes, "host": 2, "mapped": 0}[case.loss.head_place]
    return case.vocab_size * case.base_width * item


def _products(case: MemoryCase, positions: int) -> tuple[int, int]:
    """Return the bytes of the copies of a block of the head, and of its logits.

    Of the ways that a run may choose by timing them, the one with the most bytes counts.
    """
    item, rows = case.head_bytes, min(_rows(case), case.vocab_size)
    block = rows * case.base_width
    chunk = min(case.loss.chunk_tokens or DEFAULT_CHUNK, positions)
    if case.is_wide:
        return block * item, chunk * rows * 8  # logits and their exponentials
    few = min(chunk, POSITIONS_AT_ONCE)
    # Logits in float32, and as rounded before or after the exponentials.
    plain = block * item, few * rows * (4 if item == 4 else 4 + item)
    sizes = {
        # The kernel rearranges a block twice, as keys and as values, and computes 512 columns of
        # logits at a time, in float32.
        "attention": (2 * block * item, chunk * 512 * 4),
        "float32": (block * 4, few * (rows + 2 * case.base_width) * 4),  # also states and means
        "shifted": plain,
        "rounded": (block * item, few * rows * item),
        "plain": plain,
    }
    return max((sizes[way] for way in _possible_ways(case)), key=sum)


def _possible_ways(case: MemoryCase) -> Sequence[str]:
    """Return the ways in which a run may compute the loss (losses/ways.py)."""
    loss = case.loss
    head = FrozenHead(
        weight=torch.empty(case.vocab_size, case.base_width, device="meta"),
        bias=None,
        logit_scale=1.0,
        softcap=None,
        dtype=torch.bfloat16 if case.head_bytes == 2 else torch.float32,
        device=torch.device("cpu"),
        block_rows=_rows(case),
        gradient_filter=loss.gradient_filter,
        way=loss.loss_way,
    )
    if loss.loss_way != "auto" or loss.sampled_softmax or head.weight.numel() < SMALLEST_HEAD:
        return [way_of(head)]
    return ways_of(head)


def _rows(case: MemoryCase) -> int:
    if case.loss.chunk_vocabulary:
        return case.loss.chunk_vocabulary
    if case.is_wide:
        return WIDE_BLOCK_ROWS
    if case.loss.head_place == "device":
        return CPU_BLOCK_ROWS
    return STREAMED_BLOCK_BYTES // (2 * case.base_width)


def _activations(case: MemoryCase, positions: int, *, item: int, loss_bytes: int) -> int:
    shape = case.carryon
    if shape.kind == "none":
        return 0
    # Kept for the backward pass of a block: two norms, queries, keys, values, the output of
    # attention and its copies, the MLP's two halves, their activation and product.
    a_channel = case.micro_batch_tokens * item
    attention, mlp = 14 * shape.width * a_channel, 4 * shape.intermediate_size * a_channel
    entrance = 3 * _channels(case) * a_channel
    gates = {"channel": case.base_width, "token": 1, "none": 0}[shape.gate]
    exit_ = (case.base_width + 3 * gates) * positions * item
    if item == 2 and case.head_bytes == 4:  # linear.py widens a part at a time, and keeps none
        entrance, exit_ = 0, shape.width * positions * item
    if case.memory.recompute:
        kept = (2 * shape.blocks + 2) * shape.width * a_channel
        # Half a block at a time is recomputed, after the memory of the loss is freed.
        return kept + max(0, max(attention, mlp) - loss_bytes) + entrance + exit_
    return shape.blocks * (attention + mlp) + entrance + exit_
