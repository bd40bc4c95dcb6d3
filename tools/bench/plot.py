"""Plots of what streaming cost and gave, one for each set of states."""

from collections.abc import Sequence
from pathlib import Path

from carryon.cache.optional import require
from carryon.tools.compare.figure import Figure

_SPEEDS = {
    "warm_tokens_per_second": "from memory",
    "cold_tokens_per_second": "not in memory",
    "slow_disk_tokens_per_second": "slow disk",
}
_COLOURS = {"ours": "tab:blue", "peer": "tab:gray", "limit": "lightgray"}


def plot_streaming(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write a PNG for each set of states that was streamed; return their paths.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    sets: dict[str, dict[str, Figure]] = {}
    for figure in figures:
        kind, _, rest = figure.figure.partition(".")
        if kind == "stream" and "role" in figure.details:
            name, _, layout = rest.rpartition(".")
            sets.setdefault(name, {})[layout] = figure
    return [_plot(name, layouts, folder / f"stream-{name}.png") for name, layouts in sets.items()]


def _plot(name: str, layouts: dict[str, Figure], path: Path) -> Path:
    pyplot = require("matplotlib.pyplot", extra="bench", purpose="plotting")
    pyplot.switch_backend("agg")
    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.5 * len(layouts) + 1.5))
    names = list(reversed(layouts))
    details = [layouts[layout].details for layout in names]
    colours = [_COLOURS[item["role"]] for item in details]
    left.barh(names, [item["bytes_per_token"] for item in details], color=colours)
    left.set_xlabel("bytes on disk for each token")
    height = 0.8 / len(_SPEEDS)
    for number, (column, label) in enumerate(_SPEEDS.items()):
        places = [place + 0.4 - (number + 0.5) * height for place in range(len(names))]
        right.barh(places, [item[column] or 0 for item in details], height=height, label=label)
    right.set_yticks(range(len(names)), names)
    right.set_xlabel("tokens/s into ready batches, pads not counted")
    right.legend()
    drawing.suptitle(f"one epoch in random order: {name}")
    drawing.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)
    return path
