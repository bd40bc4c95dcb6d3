"""What the trainer calls on a carry-on of any kind, and how one is built.

Letters: N tokens of a flat batch, D base width, M chosen positions.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from carryon.cache.device import rows_at_once
from carryon.cache.errors import InputError
from carryon.cache.store.top_blocks import Blocks
from carryon.cache.store.view import StoreLike
from carryon.train.config import CarryOnSettings
from carryon.train.kinds import get_kind
from carryon.train.modules.card_checks import check_memory
from carryon.train.modules.packed_attention import Packing
from carryon.train.modules.taps import resolve_taps, stream_taps

NO_SOURCES: Mapping[str, int] = {}
"""Of a carry-on of one base alone."""


class CarryOn(nn.Module):
    """The trained part of a customized model.

    The trainer calls two methods: `correct_packed`, then `customize` on its result. Any nn.Module
    that has both can be trained; inheriting from this class is not required.
    """

    settings: CarryOnSettings
    """Its shape. `as_carryon` sets it on a module that has none."""
    sources: Mapping[str, int] = NO_SOURCES
    """Taps of other bases that it reads beside those of the settings -> their widths."""

    def correct_packed(
        self, states: Mapping[str, Tensor], packing: Packing, positions_M: Tensor
    ) -> Tensor:
        """Return the correction delta at chosen tokens of samples that lie one after another.

        Args:
            states: [N, D] for each tap of the settings, in the type of the store.
            packing: which token belongs to which sample.
            positions_M: [M] int64, the tokens at which delta is wanted.

        Returns:
            [M, D] in any float type, differentiable in the module's parameters.
        """
        raise NotImplementedError

    def customize(
        self, states: Mapping[str, Tensor], positions_M: Tensor, delta_MD: Tensor, *, alpha: float
    ) -> Tensor:
        """Return the states that the base's head reads, [M, D] float32; here x + alpha * delta.

        Args:
            states: as in `correct_packed`, and at `final`.
            positions_M: as in `correct_packed`.
            delta_MD: the result of `correct_packed`.
            alpha: strength of the correction; 1.0 in training.
        """
        return customized_states(states["final"][positions_M], delta_MD, alpha=alpha)


def build_carryon(
    settings: CarryOnSettings,
    store: StoreLike,
    *,
    seed: int,
    sources: Mapping[str, int] | None = None,
) -> CarryOn:
    """Return an untrained carry-on of any kind for a store; equal arguments give equal bits.

    torch's global generator is left as it was.

    Args:
        settings: kind and shape.
        store: of its base.
        seed: of the weights.
        sources: taps of other bases that it also reads -> their widths.

    Raises:
        InputError: the store lacks the blocks that the kind needs.
    """
    settings = resolve_taps(settings, store.base.get("num_layers", 0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_carryon(
            settings, base_width=store.width, blocks=store.blocks, sources=sources or {}
        )


def taps_of(carryon: CarryOn) -> list[str]:
    """Return the taps to read for a carry-on: its own, and those of other bases."""
    others = carryon.sources if isinstance(carryon, CarryOn) else ()
    return [*stream_taps(carryon.settings), *others]


def make_carryon(
    settings: CarryOnSettings,
    *,
    base_width: int,
    blocks: Callable[[], Blocks],
    sources: Mapping[str, int] = NO_SOURCES,
) -> CarryOn:
    """Return an untrained carry-on, its weights drawn from torch's global generator.

    Args:
        settings: kind and shape.
        base_width: D.
        blocks: reads the base's last blocks; called only for a kind that needs them.
        sources: taps of other bases that it also reads -> their widths.

    Raises:
        InputError: the kind reads no other bases, or the module does not fit the memory.
    """
    kind = get_kind(settings.kind)
    if sources and not kind.reads_sources:
        raise InputError(
            f"kind {settings.kind}: expected one that reads the states of other bases, got one "
            "that does not. Fix: --kind bottleneck"
        )
    own = blocks() if kind.needs_blocks else None
    check_memory(settings, base_width=base_width, blocks=own, source_widths=sources.values())
    facts: dict[str, Any] = {"base_width": base_width} if own is None else {"blocks": own}
    facts |= {"sources": sources} if sources else {}
    return as_carryon(kind.make()(settings, **facts), settings)


def as_carryon(module: object, settings: CarryOnSettings) -> CarryOn:
    """Return `module` as what the trainer trains, with `settings` if it has none.

    Raises:
        InputError: it is no nn.Module, or lacks one of the two methods.
    """
    for name in ("correct_packed", "customize"):
        if not isinstance(module, nn.Module) or not callable(getattr(module, name, None)):
            raise InputError(
                f"module: expected an nn.Module with the methods correct_packed and customize, as "
                f"CarryOn has them, got {type(module).__name__} without {name}"
            )
    carryon = cast(CarryOn, module)
    if not hasattr(carryon, "settings"):
        carryon.settings = settings
    return carryon


def refuse_custom(settings: CarryOnSettings, **facts: Any) -> CarryOn:  # noqa: ANN401
    """Refuse to build a module that only its user can build.

    Raises:
        InputError: always.
    """
    raise InputError(
        "kind custom: expected its module in train(module=...), got none. Fix: pass it, or add its "
        "kind with register_kind before training"
    )


def customized_states(final: Tensor, delta: Tensor, *, alpha: float) -> Tensor:
    """Return x + alpha * delta, float32: the states that the base's head reads.

    Differentiable in delta. Where alpha or delta is zero the result is x, so an untrained carry-on
    is the base; without gradients bit for bit, negative zeros included.

    Args:
        final: [..., D], the base's `final` states.
        delta: [..., D], from the carry-on.
        alpha: strength of the correction; 1.0 in training.
    """
    if alpha == 0:
        return final.float()
    corrected = delta.to(torch.float32, copy=True) if alpha == 1 else alpha * delta.float()
    # In slices: a float32 copy of all is 42 MB for 2,048 tokens of a wide base. The states are
    # constant, so they are added outside of autograd.
    rows = rows_at_once(len(final), final.device)
    parts = (torch.split(x, rows) for x in (corrected.detach(), final, delta.detach()))
    for sum_, state, change in zip(*parts, strict=True):
        exact = state.float()
        sum_.add_(exact)
        if not torch.is_grad_enabled():  # -0.0 + 0.0 is +0.0: another bit
            sum_.copy_(torch.where(change == 0, exact, sum_))
    return corrected


def num_parameters(carryon: nn.Module) -> int:
    """Return the number of trainable values."""
    return sum(weight.numel() for weight in carryon.parameters() if weight.requires_grad)
