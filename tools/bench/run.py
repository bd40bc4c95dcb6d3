"""Running benchmarks by name: each in its own folder, each figure printed at once."""

import importlib
import inspect
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.tools.bench.job import Job, check_labels
from carryon.tools.bench.registry import BENCHMARKS, list_groups
from carryon.tools.cli.table import format_table
from carryon.tools.compare.figure import Figure, print_json

logger = logging.getLogger(__name__)


def run_named(
    name: str,
    /,
    *,
    base: str = "",
    store: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    corpus: list[str] = [],  # noqa: B006
    sizes: list[str] = [],  # noqa: B006
    quick: bool = False,
    out: str = "",
    work: str = "",
) -> list[dict[str, Any]]:
    """Run one benchmark, or all of a group.

    Each figure is a JSON line on stdout as soon as it is measured, with its target; a table on
    stderr lists all of them at the end. A missed target has "met": false; the exit code is 0.
    Speeds are medians of rounds in which the ways that are compared take turns in one process.

    A benchmark without its input is skipped with a line on stderr.

    Example:
        python -m carryon.tools.bench store --base demo/base --corpus gsm

    Args:
        name: A group (store, train, gpu, mixing, compose, merge, paths) or one of its benchmarks
            (train.loss).
        base: Hub id, folder or .gguf file.
        store: Extracted stores of that base, PATH or LABEL=PATH. The labels gsm and python have
            targets. Without one, benchmarks that need a store extract text with the base.
        corpus: Text to extract: gsm, python, pydoc, manpages, or LABEL=PATH of your own files.
            Default: what suits the benchmark.
        sizes: Sizes of one benchmark, NAME=NUMBER, such as rounds=3; lists as 1,2.
        quick: Use tiny sizes, which show in seconds that everything runs.
        out: Folder for figures.jsonl. Empty: none.
        work: Folder for temporary files, on the disk to measure. Empty: the system's.
    """
    check_labels("--store", store)
    names = list_groups().get(name, [name])
    chosen = [each for each in names if not _is_missing_input(each, base, store)]
    values = {each: read_sizes(each, sizes, is_quick=quick) for each in chosen}
    figures: list[Figure] = []

    def report(figure: Figure) -> None:
        figures.append(figure)
        print_json(figure)

    if work:
        Path(work).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="carryon-bench-", dir=work or None) as shared:
        for each in chosen:
            with tempfile.TemporaryDirectory(prefix="run-", dir=shared) as scratch:
                job = Job(
                    work=Path(scratch),
                    add=report,
                    base=base,
                    given_stores=store,
                    corpora=corpus,
                    shared=Path(shared),
                    is_quick=quick,
                )
                run(each, job, values[each])
    print_table(figures)
    documents = [figure.to_dict() for figure in figures]
    if out:
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        write_file(Path(out) / "figures.jsonl", lines.encode())
    return documents


def run(name: str, job: Job, sizes: Mapping[str, Any]) -> None:
    """Run a benchmark."""
    _function_of(name)(job, **sizes)


def describe(name: str) -> str:
    """Return what a benchmark measures and the sizes that --sizes changes, with their defaults."""
    function, each = _function_of(name), BENCHMARKS[name]
    about = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    sizes = [f"  {key}={_text(value)}" for key, value in _defaults(name).items()]
    return "\n".join(
        [
            f"{name}: {each.about}. It needs {each.needs or 'nothing'}.",
            "",
            about,
            *(["", "sizes, as of --sizes NAME=NUMBER ...:", *sizes] if sizes else []),
            "",
        ]
    )


def read_sizes(name: str, given: Sequence[str], *, is_quick: bool) -> dict[str, Any]:
    """Return the sizes of a benchmark that differ from its defaults.

    Args:
        name: of the benchmark.
        given: NAME=NUMBER each, which win over the quick sizes.
        is_quick: start from the quick sizes.

    Raises:
        InputError: the benchmark has no such size, or a value is not a positive number.
    """
    defaults = _defaults(name)
    sizes = dict(BENCHMARKS[name].quick) if is_quick else {}
    for text in given:
        key, _, value = text.partition("=")
        if key not in defaults:
            known = " ".join(f"{key}={_text(value)}" for key, value in defaults.items())
            raise InputError(f"--sizes: expected some of {known} for {name}, got {text}")
        sizes[key] = _parse(key, value, defaults[key])
    return sizes


def _defaults(name: str) -> dict[str, Any]:
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(_function_of(name)).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _parse(key: str, value: str, default: object) -> object:
    kind = type(default[0] if isinstance(default, tuple) else default)
    try:
        values = tuple(map(kind, value.split(",")))
    except ValueError:
        values = ()
    is_wrong = not values or (kind is not str and min(values) <= 0)
    if is_wrong or (len(values) > 1 and not isinstance(default, tuple)):
        raise InputError(f"--sizes: expected {key} more than 0, such as {_text(default)}")
    return values if isinstance(default, tuple) else values[0]


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _is_missing_input(name: str, base: str, store: Sequence[str]) -> bool:
    needs = BENCHMARKS[name].needs
    wanted, is_there = {
        "": ("", True),
        "base": ("--base", bool(base)),
        "store": ("--store or --base", bool(store or base)),
        "stores": ("--store twice", len(store) > 1),
        "gpu": ("an accelerator", _has_gpu()),
        "gpu and base": ("an accelerator and --base", bool(base) and _has_gpu()),
    }[needs]
    if not is_there:
        logger.warning(f"{name}: skipped, it needs {wanted}")
    return not is_there


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def print_table(figures: Sequence[Figure]) -> None:
    """Print all figures as a table to stderr, those with a target first."""
    ordered = sorted(figures, key=lambda figure: figure.target is None)
    rows = [("figure", "value", "target", "unit", "met")]
    rows += [
        (item.figure, _shown(item.value), _target(item), item.unit, _answer(item.met))
        for item in ordered
    ]
    for line in format_table(rows).splitlines():
        logger.info(line)


def _target(figure: Figure) -> str:
    if figure.target is None:
        return ""
    return f"{'<=' if figure.sense == 'at most' else '>='} {_shown(figure.target)}"


def _answer(met: bool | None) -> str:
    return {None: "", True: "yes", False: "NO"}[met]


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _function_of(name: str) -> Any:  # noqa: ANN401 -- each has its own sizes
    file, _, function = BENCHMARKS[name].place.partition(":")
    return getattr(importlib.import_module(f"carryon.tools.bench.{file}"), function)
