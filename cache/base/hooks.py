"""Hooks that read a base's hidden states at its taps.

Batches are padded on the right and run without an attention mask: a causal base ignores later
tokens, so the states of real tokens are those of the sample alone, to rounding. States at pads
are meaningless. Hooks are removed before returning, also after an error.
Letters: B rows, T positions, D width, V vocabulary.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from carryon.cache.base.architecture import Architecture, first_tensor
from carryon.cache.base.model import Base
from carryon.cache.device import attention_of_any_shape, to_device
from carryon.cache.errors import InputError
from carryon.cache.settings import parse_tap, tap_depth


class _DeepestTapReached(Exception):  # noqa: N818 -- a signal, not an error
    """Ends a forward pass whose deeper blocks are not needed."""


def capture(
    base: Base,
    taps: Sequence[str],
    token_ids: Tensor,
    inputs: Mapping[str, object] | None = None,
) -> dict[str, Tensor]:
    """Return the hidden states of `token_ids` at each tap.

    The head and the blocks above the deepest tap are not run.

    Args:
        taps: `final`, `prenorm`, `layer.K` from 0; see `StoreSettings`.
        token_ids: [B, T] int64, padded on the right with any valid token.
        inputs: more arguments of the base, such as a mask.

    Returns:
        For each tap [B, T, D] in the base's compute dtype, on the base's device.

    Raises:
        InputError: the base has no such tap.
    """
    num_layers = base.identity.num_layers
    depths = {tap: tap_depth(tap, num_layers=num_layers) for tap in taps}
    deepest = max(depths.values(), default=num_layers)
    states: dict[str, Tensor] = {}

    def keep(tap: str, values: Tensor) -> None:
        states[tap] = values
        if depths[tap] == deepest < num_layers:
            raise _DeepestTapReached

    token_ids = to_device(token_ids, base.device)
    watching = watch_taps(base.architecture, taps, keep)
    quietly = suppress(_DeepestTapReached)
    with watching, torch.inference_mode(), attention_of_any_shape(), quietly:
        base.architecture.decoder(input_ids=token_ids, use_cache=False, **(inputs or {}))
    return states


def base_logits(
    base: Base, token_ids: Tensor, inputs: Mapping[str, object] | None = None
) -> Tensor:
    """Return the base's own logits, [B, T, V] in its compute dtype, for token ids [B, T] int64.

    `inputs` are more arguments of the base.
    """
    with torch.inference_mode(), attention_of_any_shape():
        untyped: Any = base.model
        ids = to_device(token_ids, base.device)
        logits: Tensor = untyped(input_ids=ids, use_cache=False, **(inputs or {})).logits
    return logits


@contextmanager
def watch_taps(
    architecture: Architecture, taps: Sequence[str], keep: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `keep(tap, states)` whenever this thread's forward passes reach a tap.

    States are [B, T, D], the model's own tensors, not copies.

    Raises:
        InputError: the base has no such tap; no hook was set. Or, in a forward pass, its first
            block is called without a tensor.
    """
    num_layers = len(architecture.blocks)
    layers = {tap: parse_tap(tap, num_layers=num_layers) for tap in taps}
    thread = threading.get_ident()  # other threads may run the same base

    def record(tap: str, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if threading.get_ident() == thread:
            states = first_tensor(args if tap == "prenorm" else output)
            assert states is not None  # get_architecture saw these modules return a tensor
            keep(tap, states)

    def record_entering(
        tap: str, module: nn.Module, args: tuple[object, ...], named: dict[str, object]
    ) -> None:
        if threading.get_ident() == thread:
            states = first_tensor(args or named.get("hidden_states"))
            if states is None:
                raise InputError(
                    f"tap {tap}: expected a first block that is called with hidden states, got "
                    f"{type(module).__name__}, which is not. Fix: leave out {tap}"
                )
            keep(tap, states)

    with ExitStack() as hooks:
        for tap, layer in layers.items():
            if layer == 0:  # what enters block 1: scaled, normed, with positions, as the base does
                hook = architecture.blocks[0].register_forward_pre_hook(
                    partial(record_entering, tap), with_kwargs=True
                )
            else:
                module = architecture.norm if layer is None else architecture.blocks[layer - 1]
                hook = module.register_forward_hook(partial(record, tap))
            hooks.enter_context(hook)
        yield


@contextmanager
def contiguous_head_input(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Copy what the head of a model is given where it is a slice, as the last position of each row.

    torch multiplies a slice [B, 1, D] row by row, and copies the head for each: a minute and 17 GB
    of traffic for 64 rows over 150,000 tokens.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(_contiguous)
    try:
        yield
    finally:
        hook.remove()


def _contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.contiguous() if isinstance(each, Tensor) else each for each in args)
