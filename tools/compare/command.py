"""`carryon compare`: carry-ons, LoRA and full fine-tuning against the clock, on the same text."""

import json
import logging
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.tools.compare.settings import (
    CompareSettings,
    Method,
    Row,
    get_methods,
    list_rows,
    row_command,
)
from carryon.train.config import setting_of

logger = logging.getLogger(__name__)


def compare(*, base: str, out: str, settings: CompareSettings) -> list[dict[str, Any]]:
    """Train carry-ons, LoRA and the whole base in the same time on the same text, and compare.

    Every row is a training of its own, in a process of its own: a method, a budget in seconds, a
    seed. Held-out NLL is measured on windows that do not stand in the training text. The clock
    counts extraction (first runs) and training, and nothing else. Let nothing else run meanwhile.

    The same command goes on where it was stopped: a row whose file is in OUT/rows is not made
    again; remove the file to repeat it. Tables, plots and figures are of all rows that are there,
    of this corpus. The exact command of each row is printed before it.

    Example:
        carryon compare --base demo/base --out compare --methods lora top --seeds 0 1 2

    Args:
        base: The base: hub id, folder or .gguf file.
        out: Folder of the comparison; made if missing.
        settings: What is compared.
    """
    from carryon.tools.compare.data import prepare_material
    from carryon.tools.compare.report import report

    folder = Path(out)
    facts = _base_facts(base, folder)
    shape = {name: int(facts[name]) for name in ("num_layers", "width")}
    methods = get_methods(settings, **shape)
    _refuse_other_data(settings, folder)
    prepare_material(settings, base=base, out=folder)
    rows = list_rows(settings, methods)
    todo = [row for row in rows if not _file(folder, row).exists()]
    minutes = sum(row.seconds for row in todo) / 60
    logger.info(
        f"{len(rows)} rows, {len(rows) - len(todo)} of them done; {minutes:,.0f} minutes on their "
        "clocks are left, and as long again for loading, extracting and evaluating"
    )
    for number, row in enumerate(todo):
        _make(settings, row, methods[row.method], base=base, folder=folder, shape=shape)
        logger.info(f"{number + 1} of {len(todo)} rows")
    return report(folder, read_rows(folder))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return all rows of a comparison that are done."""
    return [json.loads(path.read_text()) for path in sorted((folder / "rows").glob("*.json"))]


def _make(
    settings: CompareSettings,
    row: Row,
    method: Method,
    *,
    base: str,
    folder: Path,
    shape: dict[str, int],
) -> None:
    """Make a row in a process of its own, so that its memory is its own."""
    from carryon.tools.compare.row import best_rate

    command = row_command(settings, row, base=base, out=str(folder))
    logger.info(f"\n$ {command}")
    request = {
        "settings": settings.to_dict(),
        "row": asdict(row),
        "base": base,
        "out": str(folder),
        "learning_rate": best_rate(method, settings, read_rows(folder)),
        "command": command,
        "log_level": logging.getLevelName(logger.getEffectiveLevel()).lower(),
        **shape,
    }
    words = [sys.executable, "-m", "carryon.tools.compare.row", json.dumps(request)]
    done = subprocess.run(words, check=False)
    if done.returncode != 0:
        raise InputError(
            f"row {row.name}: ended with exit code {done.returncode}, see above; the rows before "
            "it are kept"
        )
    document = json.loads(_file(folder, row).read_text())
    logger.info(
        f"{row.name}: held-out NLL {document['base_nll']:.4f} -> {document['nll']:.4f}, "
        f"{document['tokens']:,} tokens at {document['tokens_per_second']:,.0f} a second"
    )


def _file(folder: Path, row: Row) -> Path:
    return folder / "rows" / f"{row.name}.json"


def _base_facts(source: str, folder: Path) -> dict[str, Any]:
    """Return who the base is; read once, then from a file."""
    from carryon.cache.files import write_json

    path = folder / "base.json"
    if path.exists():
        facts: dict[str, Any] = json.loads(path.read_text())
        if facts["source"] != source:
            raise InputError(
                f"{folder}: expected the base {facts['source']}, got {source}: give another --out"
            )
        return facts
    from carryon.cache.base.model import load_base
    from carryon.cache.settings import ForwardSettings

    identity = load_base(source, forward=ForwardSettings()).identity
    facts = {"source": source, **identity.to_dict()}
    (folder / "rows").mkdir(parents=True, exist_ok=True)  # not before the base is there
    write_json(path, facts)
    return facts


def _refuse_other_data(settings: CompareSettings, folder: Path) -> None:
    path = folder / "data.json"
    if not path.exists():
        return
    found = json.loads(path.read_text())
    for name, value in settings.data_facts().items():
        begun = setting_of(found, name)
        if begun != value:
            raise InputError(
                f"{folder}: expected {name} {begun}, with which it was begun, got {value}: give "
                "another --out"
            )
