"""What a carry-on that is mixed by state reads of other bases, from states at their own tokens.

In training these rows come from aligned stores, which were written in the same way. Letters: N
positions of the anchor, n tokens of a source, D_s its width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from carryon.train.modules.taps import source_tap


def source_inputs(
    states: Sequence[Mapping[str, Tensor]], nodes: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the states of other bases at positions of the anchor, by the names of their taps.

    Args:
        states: of each base, in the order of the card: tap -> [n, D_s], at its own tokens.
        nodes: of each, [N] int64: the token at which it has read exactly the text that is known at
            a position; -1 where it has read nothing.

    Returns:
        [N, D_s] for each tap, `1:final` and so on; zeros where a base has read nothing.
    """
    found: dict[str, Tensor] = {}
    for number, (by_tap, places) in enumerate(zip(states, nodes, strict=True), 1):
        is_read = (places >= 0).unsqueeze(1)
        for tap, rows in by_tap.items():
            padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # -1 is the last row
            found[source_tap(number, tap)] = torch.where(is_read, padded[places], 0)
    return found
