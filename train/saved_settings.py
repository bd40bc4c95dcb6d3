"""Settings as runs, carry-ons and lineages saved them, perhaps before one was made or renamed.

Importing this loads neither torch nor numpy.
"""

from collections.abc import Mapping
from typing import Any

from carryon.cache.errors import InputError

LATER_SETTINGS: Mapping[str, Any] = {
    "sampled_softmax": 0,
    "mix": [],
    "mix_by": "probability",
    "mix_taps": ["final"],
    "loss_way": "attention",
    "compile": False,
    "padded_sizes": [],
}
"""Settings that are younger than the first runs -> the value those runs had."""
FORMER_NAMES = {
    "mlp_width": "intermediate_size",
    "batch_tokens": "tokens_per_step",
    "warmup_share": "warmup_ratio",
    "decay_share": "decay_ratio",
    "explore_share": "explore_ratio",
    "final_share": "min_lr_ratio",
    "held_out_share": "held_out_ratio",
}
"""Names in carry-ons, runs and lineages saved before settings were renamed -> those of today."""


def with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved settings under today's names."""
    return {FORMER_NAMES.get(name, name): value for name, value in values.items()}


def setting_of(settings: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401
    """Return a setting of a run or lineage that may be older than the setting."""
    return settings.get(name, LATER_SETTINGS.get(name))


def refuse_other_settings(saved: Mapping[str, Any], now: Mapping[str, Any], *, name: str) -> None:
    """Refuse to resume something that was started with another store or setting.

    Raises:
        InputError: names each setting with both values.
    """
    differences = [
        f"{key} is {saved.get(key)!r} there and {now.get(key)!r} here"
        for key in sorted(set(saved) | set(now))
        if setting_of(saved, key) != setting_of(now, key)
    ]
    if differences:
        raise InputError(
            f"{name}: started with other settings: {'; '.join(differences)}. Fix: give the same "
            "settings, or another --out"
        )
