"""Presets: settings of a run that were found by measurement, as files of options.

`carryon train --config large` reads one by its name; options behind it change single settings.
"""

from pathlib import Path
from typing import Any

import yaml

PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}
"""Name -> file."""


def read_preset(name: str) -> dict[str, Any]:
    """Return the settings of a preset, by name."""
    found: dict[str, Any] = yaml.safe_load(PRESETS[name].read_text(encoding="ascii"))
    return found
