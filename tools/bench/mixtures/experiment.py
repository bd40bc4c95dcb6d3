"""`experiment-mix`: what a mixture of bases is worth beside each base with its own carry-on.

The steps are commands, planned as data (plan.py) and run once each; the rest is arithmetic.
"""

import logging
from pathlib import Path
from typing import Any, Literal

from carryon.cache.errors import InputError
from carryon.cache.lock import folder_lock
from carryon.cache.settings import ForwardSettings
from carryon.tools.bench.mixtures.plan import BaseFacts, MixExperiment, plan_mix
from carryon.tools.bench.mixtures.report import (
    HEADING,
    cells_of,
    figures_of,
    make_rows,
    warnings_of,
    write_report,
)
from carryon.tools.bench.planned import check_steps, run_steps
from carryon.tools.cli.program import Program
from carryon.tools.cli.table import format_table
from carryon.tools.compare.command import read_base_facts
from carryon.tools.compare.figure import describe_core, print_json

logger = logging.getLogger(__name__)

OWN_STEPS = Program(
    prog="python -m carryon.tools.bench",
    about="Steps of experiment-mix.",
    closing="",
    commands={
        "mix-corpus": "carryon.tools.bench.mixtures.corpus:make_mix_corpus",
        "mix-bytes": "carryon.tools.bench.mixtures.measure:count_bytes",
        "mix-places": "carryon.tools.bench.mixtures.measure:measure_places",
    },
)
"""Besides commands of carryon."""


def experiment_mix(
    *,
    bases: list[str],
    out: str,
    data: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    corpus: Literal["", "gsm", "python", "pydoc", "manpages", "mixed"] = "",
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    arms: list[str] = [],  # noqa: B006
    tokens: int = 120_000,
    held_out_tokens: int = 12_000,
    window_tokens: int = 512,
    width: int = 128,
    epochs: int = 6,
    patience: int = 2,
    tokens_per_step: int = 1024,
    forward: ForwardSettings,
) -> list[dict[str, Any]]:
    """Mix bases, and compare with each base alone and with its own carry-on of equal bytes.

    The first base is the anchor. Documents are split into halves and cut into windows; each base
    gets a store of them, and the others one that is aligned to the anchor's. With each seed are
    trained: the anchor's carry-on, each base's own carry-on that has the bytes of the largest
    mixture or a little more, the gate alone, the gate with the carry-on, a carry-on that reads the
    other bases' states, and that one with the gate. All stop early by the held-out loss. Each step
    is a command, logged as typed; the same command resumes.

    OUT/table.md, table.json and losses.png hold the result, in nats per byte of the same held-out
    text; each figure is a JSON line on stdout.

    Example:
        python -m carryon.tools.bench experiment-mix --corpus python --out mix
        --bases HuggingFaceTB/SmolLM2-135M-Instruct Qwen/Qwen2.5-Coder-0.5B-Instruct

    Args:
        bases: The anchor, then the others: hub ids, folders or .gguf files.
        out: Folder of the experiment.
        data: Files of documents. Those that mark held-out records are split so.
        corpus: Instead of --data: worked problems, Python's library, its reference pages, manual
            pages of this system, or documentation of installed packages, which mixes prose and
            code.
        seeds: Seeds of weights and sample order.
        arms: Which to train, by their names in the table: carryon, gate and gate+carryon, and any
            of own-anchor, own-source-1, ..., state and both. A base without its own carry-on needs
            no store of its own. Empty: all.
        tokens: Training tokens at most, of the anchor.
        held_out_tokens: Held-out tokens at most.
        window_tokens: Tokens of the windows that longer texts are cut into.
        width: Of the carry-on that is mixed; the bases' own are wider for equal bytes.
        epochs: Passes over the training samples at most.
        patience: Evaluations in a row without a lower held-out loss after which a run stops.
        tokens_per_step: Tokens of a step.
        forward: How the bases are run.
    """
    root = Path(out)
    experiment = MixExperiment(
        root=root,
        bases=_read_bases(bases, root, forward=forward),
        data=data,
        corpus=corpus,
        seeds=seeds,
        arms=arms,
        tokens=tokens,
        held_out_tokens=held_out_tokens,
        window_tokens=window_tokens,
        width=width,
        epochs=epochs,
        patience=patience,
        tokens_per_step=tokens_per_step,
        forward=forward,
    )
    plan = plan_mix(experiment)
    check_steps(plan.steps(), own=OWN_STEPS)
    with folder_lock(root, kind="experiment"):
        steps = run_steps(plan.steps(), own=OWN_STEPS)
        done = {path: step.result for path, step in steps.items()}
        rows = make_rows(
            experiment,
            {name: done[step.result] for name, step in plan.bytes.items()},
            {key: done[step.result] for key, step in plan.runs.items()},
            {key: done[step.result] for key, step in plan.places.items()},
        )
        material = done[plan.corpus.result]
        figures = figures_of(experiment, rows, corpus=material)
        facts = {
            "bases": {base.name: base.path for base in experiment.bases},
            "corpus": corpus or data,
            "seeds": seeds,
            "overlap": f"{material['shared_ratio']:.2%} of the runs of 32 held-out tokens",
            "targets": {name: done[step.result] for name, step in plan.bytes.items()},
            "core": describe_core(),
        }
        write_report(root, rows, figures, facts)
    for figure in figures:
        print_json(figure)
    logger.info(f"\n{format_table([HEADING, *map(cells_of, rows)])}\n{root / 'table.md'}")
    logger.info(f"overlap of training and held-out documents: {facts['overlap']}")
    for warning in warnings_of(figures):
        logger.warning(warning)
    return [figure.to_dict() for figure in figures]


def _read_bases(sources: list[str], root: Path, *, forward: ForwardSettings) -> list[BaseFacts]:
    if len(sources) < 2 or len(set(sources)) != len(sources):
        raise InputError(
            f"--bases: expected two or more, each once, got {' '.join(sources)!a:.200}"
        )
    found = []
    for number, source in enumerate(sources):
        name = f"source-{number}" if number else "anchor"
        facts = read_base_facts(source, root / "bases" / name, forward=forward)
        found.append(
            BaseFacts(
                name=name,
                path=source,
                num_layers=int(facts["num_layers"]),
                width=int(facts["width"]),
                tokenizer=str(facts["tokenizer_sha256"]),
            )
        )
    return found
