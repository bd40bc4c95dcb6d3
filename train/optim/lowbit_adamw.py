"""AdamW in little memory: weights in bfloat16, state in 8 bits, both rounded stochastically.

Rounding to nearest would lose every update smaller than half a step of the type, for good. With
stochastic rounding updates add up on average. The noise is a pure function of the seed, the step
and the weight's index, so a resumed run gives the same bits as an uninterrupted one.

8-bit state is stored in blocks with a scale each: first moments as sign and square root, second
moments as fourth roots, so that small values keep their relative precision. torchao has such
optimizers too, but they need a compiler at run time and draw from the global generator.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.random import SeedSequence
from torch import Tensor

BLOCK = 256
"""Values that share a scale."""
FEWEST_CODED = 4096
"""State of smaller weights stays in float32."""
_CHUNK = 1 << 18  # values in float32 at one time
WORKING_BYTES = 14 * 4 * _CHUNK
"""Approximate memory beside weights and state while one is moved."""
_EPS = 1e-8


class PlainOptimizer(torch.optim.Optimizer):
    """An optimizer without torch's constructor, which imports torch's compiler: 70 MB."""

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        """Take the weights of `groups`; what a group leaves out is that of `defaults`."""
        self.defaults = defaults
        self.state = defaultdict(dict)
        self.param_groups = [{**defaults, **group} for group in groups]

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        assert set_to_none
        for weight in self._weights():
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups, each weight as its index in the list of all."""
        places = {id(weight): index for index, weight in enumerate(self._weights())}
        return {
            "state": {places[id(weight)]: values for weight, values in self.state.items()},
            "param_groups": [
                {**group, "params": [places[id(weight)] for weight in group["params"]]}
                for group in self.param_groups
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state as it is; torch's own would cast 8-bit codes to the weights' type."""
        weights = self._weights()
        for index, values in state_dict["state"].items():
            self.state[weights[index]] = {
                key: value.to(weights[index].device) if isinstance(value, Tensor) else value
                for key, value in values.items()
            }


class LowBitAdamW(PlainOptimizer):
    """AdamW whose weights and state may have fewer bits than it computes in."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        bits: int,
        seed: int,
        first_index: int = 0,
    ) -> None:
        """Take the weights of `groups`.

        Args:
            groups: of weights, each may have its own `weight_decay`.
            lr: learning rate.
            betas: decay of the first and second moments.
            weight_decay: of groups without their own.
            bits: of the state, 32 or 8.
            seed: of the rounding.
            first_index: index of the first weight among all that share the seed.
        """
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self._bits, self._seed, self._first_index = bits, seed, first_index

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        assert closure is None
        index = self._first_index
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group, index)
                index += 1

    def _move(self, weight: Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[weight]
        is_coded = self._bits == 8 and weight.numel() >= FEWEST_CODED
        if not state:
            state.update(step=0, **_empty_state(weight, is_coded=is_coded))
        state["step"] += 1
        [seed] = SeedSequence([self._seed, state["step"], index]).generate_state(1, np.uint64)
        random = torch.Generator(weight.device).manual_seed(int(seed))
        # The same noise for each chunk: distant weights may be rounded alike.
        noise = torch.rand(
            3, min(_CHUNK, _padded(weight.numel())), generator=random, device=weight.device
        )
        flat, gradient = weight.view(-1), weight.grad.reshape(-1)  # type: ignore[union-attr]
        for first in range(0, weight.numel(), _CHUNK):
            part = slice(first, min(first + _CHUNK, weight.numel()))
            m, v = _decode(state, part) if is_coded else (state["m"][part], state["v"][part])
            moved = _adamw(flat[part].float(), gradient[part].float(), m, v, state["step"], group)
            if is_coded:
                _encode_(state, part, m, v, noise)
            if weight.dtype == torch.bfloat16:
                moved = stochastic_round(moved, noise[2])
            flat[part] = moved


def _empty_state(weight: Tensor, *, is_coded: bool) -> dict[str, Tensor]:
    size, device = weight.numel(), weight.device
    if not is_coded:
        return {name: torch.zeros(size, device=device) for name in ("m", "v")}
    return {
        "m": torch.zeros(_padded(size), dtype=torch.int8, device=device),
        "v": torch.zeros(_padded(size), dtype=torch.uint8, device=device),
        "m_scale": torch.zeros(_padded(size) // BLOCK, device=device),
        "v_scale": torch.zeros(_padded(size) // BLOCK, device=device),
    }


def _adamw(
    weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: int, group: dict[str, Any]
) -> Tensor:
    """Return moved weights, all float32; the moments are updated in place."""
    beta1, beta2 = group["betas"]
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    spread = (v / (1 - beta2**step)).sqrt_().add_(_EPS)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    return weight.addcdiv_(m, spread, value=-group["lr"] / (1 - beta1**step))


def stochastic_round(values: Tensor, noise: Tensor) -> Tensor:
    """Return float32 `values` [n] as bfloat16; `noise` [>= n] in [0, 1) decides up or down."""
    bits = values.view(torch.int32)
    # bfloat16 is the upper half of a float32: noise that carries over rounds up.
    raised = bits + (noise[: len(values)] * 65536).to(torch.int32)
    return (raised & -65536).view(torch.float32).bfloat16()


def _decode(state: dict[str, Tensor], part: slice) -> tuple[Tensor, Tensor]:
    blocks = _blocks(part)
    places = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
    m = state["m"][places].float().div_(127)
    m = m.abs().mul_(m).view(-1, BLOCK).mul_(state["m_scale"][blocks].unsqueeze(1))
    v = state["v"][places].float().div_(255).square_().square_()
    v = v.view(-1, BLOCK).mul_(state["v_scale"][blocks].unsqueeze(1))
    length = part.stop - part.start
    return m.view(-1)[:length], v.view(-1)[:length]


def _encode_(state: dict[str, Tensor], part: slice, m: Tensor, v: Tensor, noise: Tensor) -> None:
    blocks = _blocks(part)
    places = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
    pads = (0, places.stop - places.start - len(m))
    m, v = torch.nn.functional.pad(m, pads), torch.nn.functional.pad(v, pads)
    codes, state["m_scale"][blocks] = _codes(m.abs(), noise[0], steps=127, power=2)
    state["m"][places] = codes.mul_(m.sign()).to(torch.int8)
    codes, state["v_scale"][blocks] = _codes(v, noise[1], steps=255, power=4)
    # A second moment of zero would make the weight's next update huge.
    state["v"][places] = codes.clamp_min_(1).to(torch.uint8)


def _codes(values: Tensor, noise: Tensor, *, steps: int, power: int) -> tuple[Tensor, Tensor]:
    """Return codes 0 to `steps` of values >= 0, such that (code / steps) ** power is unbiased."""
    scale = values.view(-1, BLOCK).amax(dim=1)
    ratios = (values.view(-1, BLOCK) / scale.clamp_min(1e-38).unsqueeze(1)).view(-1)
    roots = ratios.sqrt() if power == 2 else ratios.sqrt().sqrt_()
    lower = roots.mul_(steps).floor_().clamp_max_(steps - 1)
    low, high = (lower / steps).pow_(power), ((lower + 1) / steps).pow_(power)
    is_up = noise[: len(values)] < (ratios - low) / (high - low)
    return lower.add_(is_up), scale


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
