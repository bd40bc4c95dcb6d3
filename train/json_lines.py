"""Files of JSON lines that grow.

A line that is written stays, whatever happens; a last one that a kill cut short is left out.
"""

import json
from pathlib import Path
from typing import Any

from carryon.cache.atomic import disk_full_named


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one line to `path`; a kill afterwards does not take it back."""
    with disk_full_named(path), path.open("a", encoding="ascii") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `path`; none where there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="ascii").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
