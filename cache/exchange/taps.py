"""From the columns of a file to the taps of a store, and what the manifest says of it.

Letters: T tokens, L columns, D base width.
"""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from carryon.cache.base.lm_head import Head, widen
from carryon.cache.exchange.layers import layer_of
from carryon.cache.format.manifest import ENGINE


def tap_states(
    states: NDArray[Any], tap: str, layers: Sequence[int], *, num_layers: int, head: Head
) -> NDArray[Any]:
    """Return the states at a tap, [T, D]: a view in the type of the file, `final` as float32.

    Args:
        states: of a file, [T, L, D].
        tap: of the store.
        layers: [L] layer id of each column.
        num_layers: blocks of the base.
        head: of the base: its norm makes `final` of `prenorm`.
    """
    if tap == "final":
        return head.norm.apply(widen(states[:, layers.index(num_layers)]))
    return states[:, layers.index(layer_of(tap, num_layers=num_layers))]


def forward_facts(layers: Sequence[int], *, num_layers: int, dtype: str) -> dict[str, str]:
    """Return what the manifest records of the pass that wrote files of states.

    Args:
        layers: layer id of each column.
        num_layers: blocks of the base.
        dtype: of the states in the files.
    """
    how = {
        "compute_dtype": dtype,
        "attention": "vllm",
        ENGINE: "vllm",
        "layer_ids": " ".join(map(str, layers)),
    }
    if num_layers in layers:
        how["final"] = "computed from prenorm with the stored norm"
    return how
