"""`carryon compare`: carry-ons, LoRA and full fine-tuning on the same text in the same time."""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.files.documents import read_object, write_json
from carryon.cache.settings import ForwardSettings
from carryon.tools.cli.places import check_folder
from carryon.tools.compare.figure import Figure, print_json
from carryon.tools.compare.settings import CompareSettings, Method, Row, get_methods, list_rows

logger = logging.getLogger(__name__)


def compare(
    *, base: str, data: list[str], out: str, settings: CompareSettings
) -> list[dict[str, Any]]:
    """Compare carry-ons and LoRA on your text in the same time.

    Each run is a training in its own process: a method, a budget in seconds, a seed. The clock
    counts extraction and training. The held-out loss is measured on texts that do not stand in the
    training half. Nothing else should run on the machine meanwhile.

    OUT/report.md says which method to take and holds a table; curves.png and pareto.png show it.
    The same command resumes: finished runs in OUT/rows are kept. Delete a file there to repeat
    its run.

    Example:
        carryon compare --base demo/base --data chats.jsonl --out compare --seconds 300

    Args:
        base: The base: hub id, folder or .gguf file.
        data: Files or folders of texts, as for carryon extract. If no record is marked held-out,
            every eighth is held out.
        out: Folder of the comparison.
        settings: What is compared, and for how long.
    """
    figures = run_comparison(base=base, data=data, out=out, settings=settings)
    for figure in figures:
        print_json(figure)
    return [figure.to_dict() for figure in figures]


def run_comparison(
    *, base: str, data: list[str], out: str, settings: CompareSettings
) -> list[Figure]:
    """Make all missing rows and the report; see `compare`."""
    from carryon.tools.compare.data import prepare_material
    from carryon.tools.compare.report import report
    from carryon.tools.compare.row import best_rate

    check_folder(out, name="--out")
    folder = Path(out)
    facts = read_base_facts(
        base, folder, forward=ForwardSettings(allow_pickle=settings.allow_pickle)
    )
    shape = {name: int(facts[name]) for name in ("num_layers", "width")}
    methods = get_methods(settings, **shape)
    refuse_other_data(folder, {"data": data, **settings.shared()})
    prepare_material(settings, base=base, out=folder, data=data)
    (folder / "rows").mkdir(exist_ok=True)
    rows = list_rows(settings, methods)
    refuse_other_rates(folder, rows, methods)
    todo = [row for row in rows if not (folder / "rows" / f"{row.name}.json").exists()]
    minutes = sum(row.seconds for row in todo) / 60
    logger.info(
        f"{len(todo)} of {len(rows)} runs to do: {minutes:,.0f} minutes on the clock, about twice "
        "that with loading and evaluation"
    )
    for number, row in enumerate(todo, 1):
        request = {
            "settings": settings.to_dict(),
            "row": asdict(row),
            "base": base,
            "out": str(folder),
            "learning_rate": best_rate(methods[row.method], settings, read_rows(folder)),
            "log_level": logging.getLevelName(logger.getEffectiveLevel()).lower(),
            **shape,
        }
        # A separate process, so that its memory can be measured.
        words = [sys.executable, "-m", "carryon.tools.compare.row", json.dumps(request)]
        done = subprocess.run(words, check=False)
        if done.returncode != 0:
            raise InputError(
                f"run {row.name}: expected exit code 0, got {done.returncode}, see above. "
                "Fix: run the same command again; finished runs are kept"
            )
        result = read_object(folder / "rows" / f"{row.name}.json")
        logger.info(
            f"run {number} of {len(todo)}, {row.name}: held-out loss {result['base_nll']:.4f} -> "
            f"{result['nll']:.4f}, {result['tokens']:,} tokens at "
            f"{result['tokens_per_second']:,.0f} tokens/s"
        )
    return report(folder, read_rows(folder))


def refuse_other_rates(folder: Path, rows: Sequence[Row], methods: Mapping[str, Method]) -> None:
    """Refuse a folder whose finished runs had learning rates that are not asked for now.

    Raises:
        InputError: the first of them.
    """
    for row in rows:
        path = folder / "rows" / f"{row.name}.json"
        rates = methods[row.method].rates
        if row.run == "sweep" or not path.exists():
            continue
        if (rate := read_object(path)["learning_rate"]) not in rates:
            given = " ".join(f"{each:g}" for each in rates)
            raise InputError(
                f"{path}: expected a run of {row.method} at a learning rate of {given}, got one at "
                f"{rate:g}. Fix: another --out, or --learning-rates {row.method}={rate:g}"
            )


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return all finished runs of a comparison."""
    return [read_object(path) for path in sorted((folder / "rows").glob("*.json"))]


def read_base_facts(source: str, folder: Path, *, forward: ForwardSettings) -> dict[str, Any]:
    """Return the identity of the base, loaded the first time and then read from FOLDER/base.json.

    Raises:
        InputError: the file is of another base.
    """
    path = folder / "base.json"
    if path.exists():
        facts: dict[str, Any] = read_object(path)
        if facts["source"] != source:
            raise InputError(
                f"{folder}: expected the base {facts['source']}, got {source}. Fix: another --out"
            )
        return facts
    from carryon.cache.base.model import load_base

    facts = {"source": source, **load_base(source, forward=forward).identity.to_dict()}
    folder.mkdir(parents=True, exist_ok=True)  # only once the base is known to load
    write_json(path, facts)
    return facts


def refuse_other_data(folder: Path, wanted: dict[str, Any]) -> None:
    """Refuse a folder whose texts were drawn with other settings; one without texts is accepted.

    Raises:
        InputError: the first setting that differs.
    """
    path = folder / "data.json"
    begun = read_object(path) if path.exists() else wanted
    for name, value in wanted.items():
        if begun.get(name) != value:
            raise InputError(
                f"{folder}: expected {name} {begun.get(name)}, as in its first run, got {value}. "
                "Fix: another --out"
            )
