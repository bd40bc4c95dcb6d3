"""Whether the states in files are those of the base and the layers that they are said to be.

The base runs over the beginnings of a few samples. Each column must be nearest to the layer that
its id names, of all layers of the base, and near it. Two computations in bfloat16 differ by 1 to
4 % of a channel's RMS; the layer next to it, in a base of 30 blocks, by 66 % or more.
Letters: T tokens, D base width.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base
from carryon.cache.errors import InputError
from carryon.cache.exchange.layers import tap_of
from carryon.cache.extraction.packing import UnitPlan
from carryon.cache.format.probe import Probe, channel_relative_error, channel_rms

FirstStates = tuple[str, NDArray[np.int32], Mapping[str, NDArray[np.float32]]]
"""Of a sample: the name of its file, its first tokens [T], their states at each tap [T, D]."""
NUM_CHECKED = 8
"""Samples that the base runs over."""
CHECK_TOKENS = 64
"""Tokens of each."""


def check_agreement(
    base: Base,
    checked: Sequence[int],
    read: Callable[[int], FirstStates],
    *,
    max_error: float,
) -> dict[str, float]:
    """Compare the files of some samples with the base.

    Args:
        base: that the states are said to be of.
        checked: numbers of samples.
        read: returns the first states of a sample.
        max_error: largest channel-relative error of a column.

    Returns:
        The largest error of each tap.

    Raises:
        InputError: a column is nearer to another layer, or not near its own; names file and
            layer.
    """
    num_layers = base.identity.num_layers
    layers = [tap_of(layer, num_layers=num_layers) for layer in range(num_layers + 1)]
    found: dict[str, float] = {}
    samples = list(map(read, checked))
    ids = np.zeros((len(samples), max(len(tokens) for _, tokens, _ in samples)), np.int64)
    for row, (_, tokens, _) in enumerate(samples):
        ids[row, : len(tokens)] = tokens
    known = capture(base, [*layers, "final"], torch.from_numpy(ids))
    # The first token's state is often odd.
    owns = [slice(min(1, len(tokens) - 1), len(tokens)) for _, tokens, _ in samples]
    expected = {
        tap: [each[row, own].float().cpu().numpy() for row, own in enumerate(owns)]
        for tap, each in known.items()
    }
    # Of all samples together: over the few tokens of a short one, some channels are near 0.
    channel = {tap: channel_rms(np.concatenate(each)) for tap, each in expected.items()}
    for row, (name, _, states) in enumerate(samples):
        for tap, rows in states.items():
            errors = {
                each: channel_relative_error(
                    rows[owns[row]], expected[each][row], channel=channel[each]
                )
                for each in known
            }
            nearest = min(errors, key=lambda each: errors[each])
            if not errors[tap] <= max_error or errors[nearest] < errors[tap]:
                got = f"{errors[tap]:.3f}"
                if nearest != tap:
                    got += f", and {errors[nearest]:.3f} for {nearest}"
                raise InputError(
                    f"{name}: expected the base's states at {tap} with a relative error up to "
                    f"{max_error:g}, got {got}. Fix: check --base and --layer-ids; --max-error for "
                    "states of a base that was run at low precision"
                )
            found[tap] = max(found.get(tap, 0.0), errors[tap])
    return found


def check_first_states(
    base: Base,
    units: UnitPlan,
    read: Callable[[int, int], FirstStates],
    *,
    probe: Probe | None,
    max_error: float,
) -> dict[str, dict[str, float]]:
    """Compare the files of some samples, and those of the probe's rows, with the base.

    Args:
        base: that the states are said to be of.
        units: places of the samples.
        read: returns the first states of a sample, given its position in `units` and how many.
        probe: of the store that is planned. None: the store exists.
        max_error: as of `check_agreement`.

    Returns:
        The largest error of each tap, as in `Manifest.profile_error`.

    Raises:
        InputError: as of `check_agreement`.
    """
    chosen = checked_positions(len(units.order))
    found = check_agreement(
        base, chosen, lambda position: read(position, CHECK_TOKENS), max_error=max_error
    )
    if probe is not None:
        positions = np.searchsorted(units.start, probe.rows, side="right") - 1
        rows = (probe.rows - units.start[positions]).tolist()
        for tap in found:
            states = [
                read(position, row + 1)[2][tap][row]
                for position, row in zip(positions.tolist(), rows, strict=True)
            ]
            error = channel_relative_error(np.stack(states), probe.states[tap])
            found[tap] = max(found[tap], error)
    return {tap: {"channel_relative_error": error} for tap, error in found.items()}


def checked_positions(num_samples: int) -> list[int]:
    """Return the positions of the samples that are compared, spread over all."""
    spread = np.linspace(0, num_samples - 1, min(NUM_CHECKED, num_samples))
    return sorted(set(spread.astype(int).tolist()))
