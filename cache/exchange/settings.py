"""Settings of an import; loads nothing large."""

from dataclasses import dataclass
from typing import Literal

from carryon.cache.checked_settings import Settings, bounded


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSettings(Settings):
    """What the files hold, and what of it the store keeps."""

    layer_ids: list[int] = bounded([])
    """Layer of each column of the files, in their order: the eagle_aux_hidden_state_layer_ids that
    vLLM was given, ascending. 0: the embedding; K: the output of block K; the number of blocks:
    prenorm. Empty: those that the files name, which carryon export wrote."""
    taps: list[str] = bounded([], is_unique=True)
    """Hidden states to keep: prenorm, layer.K, and `final`, which is computed from prenorm with
    the base's norm. Empty: final and every layer.K of the files."""
    profile: Literal["exact", "raw", "near", "compact"] = "exact"
    """`exact` keeps every bit; `raw` too, not compressed: larger, faster to read; `near` and
    `compact` are smaller and record their error."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the stored states. `auto`: the files' own."""
    unit_tokens: int = bounded(32768, at_least=16)
    """Tokens in a unit, the piece of work that is written, checked, resumed and read as one."""
    seed: int = bounded(0, at_least=0)
    """Seed of the shuffle of samples into units."""
    max_error: float = bounded(0.15, above=0.0, at_most=0.45)
    """Largest relative error of a column against this base, of 8 samples, each channel by its RMS.
    bfloat16 on both sides gives 0.01 to 0.06. Raise it for nodes that computed at low precision."""
