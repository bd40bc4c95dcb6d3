"""`carryon train`: a store in, a carry-on out."""

from typing import Any

from carryon.tools.cli.output import print_result
from carryon.train.config import TrainSettings


def train(*, store: list[str], out: str, settings: TrainSettings) -> dict[str, Any]:
    """Train a carry-on from a store, without the base.

    The store holds all that training reads: hidden states, targets and the base's LM head. An
    untrained carry-on equals the base, so the first held-out loss is that of the base. After an
    interruption the same command resumes from the newest checkpoint, with the same weights at
    the end. OUT gets config.yaml, metrics.jsonl, curves.png and the carry-on in carryon/. The
    last line on stdout is a JSON line with the figures.

    Example:
        carryon train --store store --out run

    Args:
        store: Folder of the store. Several stores of one base with the same taps are mixed.
        out: Folder of the run, created if missing. An existing run is resumed.
        settings: All settings of a run.
    """
    from carryon.train.trainer.trainer import train as train_carryon

    report = train_carryon(store, out=out, settings=settings)
    return print_result(report.to_dict(), report.summary())
