"""A run's metrics in a tracker as well: TensorBoard, trackio or wandb, through accelerate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carryon.cache.extras import require

MODULES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
"""Tracker -> the module that it needs; each is an extra of its own name."""


class Tracker:
    """Passes lines of metrics on; the tracker `none` passes nothing."""

    def __init__(self, name: str, *, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin a record of the run in `folder`.

        Args:
            name: as in RunSettings.
            folder: of the run.
            config: every setting, flat.

        Raises:
            MissingExtraError: the tracker's package is not installed.
        """
        self._tracker: Any = None
        if name == "none":
            return
        require(MODULES[name], extra=name, purpose=f"the tracker {name}")
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's trackers ask it which process writes
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": folder} if kind.requires_logging_directory else {}
        self._tracker = kind(name if place else folder.name, **place)
        if hasattr(self._tracker, "start"):
            self._tracker.start()
        self._tracker.store_init_configuration(
            {
                key: value if isinstance(value, (int, float)) else str(value)
                for key, value in config.items()
            }
        )

    def log(self, line: Mapping[str, Any]) -> None:
        """Pass on the numbers of a line of `metrics.jsonl`."""
        if self._tracker is None:
            return
        values = {key: value for key, value in line.items() if isinstance(value, (int, float))}
        shares = line.get("tap_shares", {})
        values |= {f"tap_share/{tap}": share for tap, share in shares.items()}
        self._tracker.log(values, step=values.pop("step"))

    def close(self) -> None:
        """End the record."""
        if self._tracker is not None:
            self._tracker.finish()
