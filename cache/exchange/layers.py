"""Layer ids of vLLM's hidden states, and the taps that they are.

Of a base with L blocks, id 0 is what enters block 1, id K the output of block K, and id L the
output of the last block, before the final norm: `prenorm`, not `final`. vLLM takes ids that no
block has and repeats another layer's states in their place, and it sorts ids without a word.
"""

from collections.abc import Sequence

from carryon.cache.errors import InputError
from carryon.cache.settings import parse_tap


def tap_of(layer: int, *, num_layers: int) -> str:
    """Return the tap of a layer id in a base of `num_layers` blocks."""
    return "prenorm" if layer == num_layers else f"layer.{layer}"


def layer_of(tap: str, *, num_layers: int) -> int:
    """Return the layer id of a tap other than `final`; the inverse of `tap_of`."""
    if tap == "prenorm":
        return num_layers
    layer = parse_tap(tap, num_layers=num_layers)
    assert layer is not None
    return layer


def column_taps(layers: Sequence[int], *, num_layers: int) -> list[str]:
    """Return the tap of each column of the files.

    Raises:
        InputError: an id is out of range, or ids are not ascending or not unique.
    """
    listed = " ".join(map(str, layers))
    ascending = " ".join(map(str, sorted(set(layers))))
    if not layers:
        raise InputError(
            "--layer-ids: expected the eagle_aux_hidden_state_layer_ids that vLLM was given, got "
            "none, and the files do not name them. Fix: --layer-ids ID ..."
        )
    wrong = [layer for layer in layers if not 0 <= layer <= num_layers]
    if wrong:
        raise InputError(
            f"--layer-ids: expected ids from 0 to {num_layers}, the base's blocks, got {wrong[0]}: "
            "vLLM writes another layer's states in its place. Fix: write the files again with ids "
            "in range"
        )
    if listed != ascending:
        raise InputError(
            f"--layer-ids: expected ascending ids, each once, as vLLM sorts the columns, got "
            f"{listed:.400}. Fix: --layer-ids {ascending:.400}"
        )
    return [tap_of(layer, num_layers=num_layers) for layer in layers]


def stored_taps(asked: Sequence[str], columns: Sequence[str], *, num_layers: int) -> list[str]:
    """Return the taps to store.

    Args:
        asked: by the user. Empty: `final` in place of `prenorm`, and all other columns.
        columns: tap of each column of the files.
        num_layers: blocks of the base.

    Raises:
        InputError: the base has no such tap, or no column gives it.
    """
    given = ["final", *columns] if "prenorm" in columns else list(columns)
    for tap in asked:
        parse_tap(tap, num_layers=num_layers)
        if tap not in given:
            raise InputError(
                f"--taps: expected some of {' '.join(given)}, which the files hold, got {tap}. "
                f"Fix: leave it out, or write files with layer id "
                f"{num_layers if tap == 'final' else layer_of(tap, num_layers=num_layers)}"
            )
    return list(asked) or [tap for tap in given if tap != "prenorm"]
