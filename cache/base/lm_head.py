"""The frozen head and final norm, which turn hidden states into logits.

Plain numpy, so that a store can be opened and checked without torch. Letters: P rows, D width
of the base, V vocabulary, K chosen tokens.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalNorm:
    """The base's final norm, between tap `prenorm` and tap `final`."""

    kind: Literal["rms", "layer"]
    """`rms`: x / rms(x) * weight; `layer`: LayerNorm with weight and bias."""
    eps: float
    """Added to the mean square (or variance) before the root."""
    weight_offset: float
    """Added to the stored weight before use: 1.0 for Gemma's (1 + weight), else 0.0."""
    weight: NDArray[np.float32]
    """[D] float32."""
    bias: NDArray[np.float32] | None
    """[D] float32, or None where the norm has none."""

    def apply(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the normed states, [P, D] float32, of `prenorm` states [P, D] float32."""
        states = states.astype(np.float32)
        if self.kind == "layer":
            states = states - states.mean(axis=-1, keepdims=True)
        scale = 1.0 / np.sqrt(np.mean(states * states, axis=-1, keepdims=True) + self.eps)
        normed = states * scale * (self.weight + self.weight_offset)
        return np.asarray(normed if self.bias is None else normed + self.bias, dtype=np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """logits = cap(scale * (W x + bias)), with cap(z) = softcap * tanh(z / softcap)."""

    weight: NDArray[np.uint16] | NDArray[np.float16] | NDArray[np.float32]
    """W, [V, D]: uint16 holds bfloat16 bits."""
    bias: NDArray[np.float32] | None
    """[V] float32, or None where the head has none."""
    logit_scale: float
    """Multiplies the logits before the cap: 1.0 for most bases."""
    softcap: float | None
    """Soft limit of the logits (Gemma), or None."""
    norm: FinalNorm
    """The base's final norm."""

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.weight.shape[0])

    @property
    def width(self) -> int:
        """D."""
        return int(self.weight.shape[1])

    def logits(
        self, states: NDArray[np.float32], token_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Return the logits of chosen tokens, computed in float32.

        Args:
            states: `final` states [P, D] float32.
            token_ids: [P, K] int32, the tokens chosen for each state.

        Returns:
            [P, K] float32.
        """
        rows = widen(self.weight[token_ids])  # [P, K, D]
        logits = np.einsum("pkd,pd->pk", rows, states.astype(np.float32))
        if self.bias is not None:
            logits = logits + self.bias[token_ids]
        logits = logits * np.float32(self.logit_scale)
        if self.softcap is not None:
            logits = self.softcap * np.tanh(logits / self.softcap)
        return np.asarray(logits, dtype=np.float32)


def widen(
    values: NDArray[np.uint16] | NDArray[np.float16] | NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return `values` as float32; uint16 is read as bfloat16 bits. Exact."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)
