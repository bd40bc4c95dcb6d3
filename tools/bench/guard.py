"""`guard`: headline ratios in minutes, beside those recorded on the same kind of core.

Sizes are smaller than those of the benchmarks themselves, and the base is random in the shape of
SmolLM2-135M, so nothing is downloaded and a value is comparable with recorded ones alone.
"""

import gc
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import parse_json
from carryon.cache.progress import Progress
from carryon.tools.bench.families import make_family_base
from carryon.tools.bench.job import Job
from carryon.tools.bench.registry import BENCHMARKS
from carryon.tools.bench.run import print_table, run
from carryon.tools.bench.tiny_base import make_tiny_tokenizer
from carryon.tools.compare.figure import Figure, print_json

logger = logging.getLogger(__name__)

RECORDED = "docs/guard.json"
SECONDS_TARGET = 300.0
FALL = 0.1
"""Part of a recorded value that may be lost before it is named."""
_CONTEXT = 2048
_TOKENS = 1024
"""Of the one store of text that all share. The base's own are bytes, four times as many."""
_UNITS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """Figures of one benchmark, measured at a small size."""

    benchmark: str
    figures: Sequence[str]
    sizes: Mapping[str, Any] = field(default_factory=dict)


HEADLINES = (
    Headline(
        benchmark="store.stream",
        figures=(
            "stream.synthetic.warm",
            "stream.synthetic.warm_raw",
            "stream.synthetic.slow_disk",
        ),
        sizes={"samples": 12, "threads": (1,), "rounds": 2},
    ),
    Headline(benchmark="store.dataset", figures=("dataset.speed",), sizes={"samples": 64}),
    Headline(
        benchmark="train.units",
        figures=("units.speed",),
        sizes={"units": 5, "tokens": 100_000, "rounds": 2},
    ),
    Headline(
        benchmark="train.loss", figures=("loss.speed",), sizes={"tokens": 512, "rounds": 2}
    ),
    Headline(
        benchmark="train.step", figures=("step.speed",), sizes={"tokens": 1024, "rounds": 5}
    ),
    Headline(
        benchmark="store.extract",
        figures=("extract.speed",),
        sizes={"tokens": 3072, "unit_tokens": 1536},
    ),
    Headline(
        benchmark="train.lora",
        figures=("lora.speed",),
        sizes={"steps": 2, "rounds": 1, "ways": ("lora",)},
    ),
    Headline(
        benchmark="compose.generate",
        figures=("generate.batch-8",),
        sizes={"batch_sizes": (8,), "new_tokens": 16, "rounds": 3},
    ),
)  # fmt: skip
"""Ten ratios, each of ways that take turns in one process."""


def guard(
    *, recorded: str = RECORDED, record: bool = False, work: str = ""
) -> list[dict[str, Any]]:
    """Measure the ten headline ratios, and name those that fell.

    Each is a JSON line on stdout with the value recorded on the same kind of core and whether it
    fell by more than a tenth; a table on stderr lists them, and what fell is named below it. The
    last figure is the seconds that all took. Needs no input.

    Example:
        python -m carryon.tools.bench guard

    Args:
        recorded: JSON file of the values last recorded, by kind of core.
        record: Write the values of this run there, for this kind of core.
        work: Folder for temporary files, on the disk to measure. Empty: the system's.
    """
    known = read_recorded(Path(recorded))
    kind = kind_of_core()
    started_at = time.perf_counter()
    if work:
        Path(work).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="carryon-guard-", dir=work or None) as folder:
        figures = _measure(Path(folder))
    compared = [compare(figure, known.get(kind, {})) for figure in figures]
    compared.append(
        Figure(
            figure="guard.seconds",
            value=time.perf_counter() - started_at,
            target=SECONDS_TARGET,
            unit="s",
        )
    )
    for figure in compared:
        print_json(figure)
    print_table(compared)
    for line in report_lines(compared, kind=kind, is_known=kind in known):
        logger.info(line)
    if record:
        values = {figure.figure: float(f"{figure.value:.4g}") for figure in figures}
        document = json.dumps(dict(sorted({**known, kind: values}.items())), indent=1)
        write_file(Path(recorded), (document + "\n").encode())
    return [figure.to_dict() for figure in compared]


def _measure(folder: Path) -> list[Figure]:
    """Return the headline figures, in order."""
    base = make_guard_base(folder / "base")
    found = dict[str, Figure]()
    with Progress(len(HEADLINES), name="guard", unit="benchmarks") as progress:
        for headline in HEADLINES:
            progress.note = headline.benchmark
            with tempfile.TemporaryDirectory(prefix="run-", dir=folder) as scratch:
                job = Job(
                    work=Path(scratch),
                    add=lambda figure: found.update({figure.figure: figure}),
                    base=str(base) if "base" in BENCHMARKS[headline.benchmark].needs else "",
                    shared=folder,
                    is_quick=True,
                    quick_tokens=_TOKENS,
                )
                run(headline.benchmark, job, headline.sizes)
            gc.collect()
            progress.update(1)
    return [found[name] for headline in HEADLINES for name in headline.figures]


def make_guard_base(folder: Path) -> Path:
    """Save a random base in the shape of SmolLM2-135M, with a tokenizer of bytes."""
    return make_family_base(
        folder,
        "llama",
        tokenizer=make_tiny_tokenizer(_CONTEXT),
        vocab_size=49_152,
        special_ids={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        dtype=torch.bfloat16,
        seed=0,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=_CONTEXT,
    )


def kind_of_core() -> str:
    """Return what decides which way is fast: the GPU, or the units of the CPU and their number."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    has = torch.cpu.get_capabilities()
    units = [name for name in _UNITS if has.get(name)]
    architecture = str(has.get("architecture", "unknown"))
    return f"{architecture} {' '.join(units) or 'plain'}, {os.cpu_count()} cores"


def read_recorded(path: Path) -> dict[str, dict[str, float]]:
    """Return recorded values: kind of core -> figure -> value; none if there is no such file.

    Raises:
        InputError: the file is something else.
    """
    if not path.exists():
        return {}
    try:
        document = parse_json(path.read_bytes())
        return {
            str(kind): {str(name): float(value) for name, value in values.items()}
            for kind, values in document.items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: expected figures by kind of core, got something else. Fix: git checkout it"
        ) from error


def compare(figure: Figure, recorded: Mapping[str, float]) -> Figure:
    """Return a figure beside its recorded value, with its part of it and whether it fell."""
    before = recorded.get(figure.figure)
    part = None
    if before and figure.sense == "at least":
        part = figure.value / before
    elif before and figure.value:
        part = before / figure.value
    details = {"recorded": before, "of_recorded": part}
    details["fell"] = part is not None and part < 1 - FALL
    return replace(figure, details=details)


def report_lines(figures: Sequence[Figure], *, kind: str, is_known: bool) -> list[str]:
    """Return the closing lines: what fell, what there is to compare with, and what there is not."""
    if not is_known:
        return [f"{kind}: nothing recorded on this kind of core yet; --record keeps these values"]
    fell = [figure for figure in figures if figure.details.get("fell")]
    lines = [
        f"{figure.figure} fell to {figure.details['of_recorded']:.0%} of what was recorded: "
        f"{figure.value:.3g} against {figure.details['recorded']:.3g}"
        for figure in fell
    ]
    known = [figure for figure in figures if figure.details.get("recorded") is not None]
    if not lines:
        lines = [f"{kind}: none of {len(known)} recorded ratios fell by more than {FALL:.0%}"]
    ratios = [figure for figure in figures if figure.unit != "s"]
    new = [figure.figure for figure in ratios if figure not in known]
    return [*lines, *([f"not recorded yet: {', '.join(new)}; --record keeps them"] if new else [])]
