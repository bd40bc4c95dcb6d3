"""`experiment-improve`: whether rounds of a base's own verified answers raise accuracy, by seed.

Each seed is one `carryon improve` with training problems of its own and the same test problems.
"""

import io
import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import write_json
from carryon.cache.lock import folder_lock
from carryon.cache.settings import ForwardSettings
from carryon.tools.cli.main import call_command, check_command
from carryon.tools.cli.table import format_table
from carryon.tools.compare.figure import Figure, describe_core, print_json
from carryon.tools.improve.plan import TEST_SEED, forward_argv
from carryon.train.plots import Line, draw, lines

logger = logging.getLogger(__name__)

RISE_TARGET = 0.05
APART = 10_000
"""Between the training problems of two seeds, each of which draws --rounds times --num of them."""
_SUMS = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2"
_SEEDS = (TEST_SEED - 1) // APART
"""Beyond stand the test problems."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Accuracies of one seed on the test problems."""

    seed: int
    base: float
    instructed: float | None
    """None: no instruction was given."""
    rounds: Sequence[float]
    """After each round."""
    records: Sequence[int]
    """Texts trained on in each round, those of earlier rounds among them."""
    problems: int
    """Of the test."""

    @property
    def rise(self) -> float:
        """Accuracy after the last round above that after the first."""
        return self.rounds[-1] - self.rounds[0]


def experiment_improve(
    *,
    base: str,
    out: str,
    tasks: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    instruction: str = "Be brief.",
    rounds: int = 3,
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    num: int = 200,
    samples: int = 8,
    max_new_tokens: int = 32,
    test_num: int = 200,
    improve_config: str = "",
    engine: Literal["auto", "transformers", "vllm"] = "auto",
    batch_rows: int = 64,
    forward: ForwardSettings,
) -> list[dict[str, Any]]:
    """Run `carryon improve` with several seeds, and compare its rounds with each other.

    Each seed has training problems of its own from --tasks; all answer the same test problems. The
    command is logged as typed; the same one resumes, and more --seeds or --rounds go further.

    OUT/table.md, table.json and accuracy.png hold the result, and each figure is a JSON line on
    stdout.

    Example:
        python -m carryon.tools.bench experiment-improve --base HuggingFaceTB/SmolLM2-135M-Instruct
        --out rounds

    Args:
        base: The base: hub id, folder or .gguf file.
        out: Folder of the experiment, with a folder for each seed.
        tasks: Tasks of reasoning-gym, each NAME or NAME:SETTING=VALUE,... Empty: what
            --improve-config names; without that, sums of two numbers of one or two digits.
        instruction: Text behind each question where the base answers; not stored. Empty: none.
        rounds: Number of rounds.
        seeds: Each has other training problems.
        num: Problems of each task in a round.
        samples: Answers to each problem.
        max_new_tokens: Maximum length of an answer, in tokens.
        test_num: Test problems of each task.
        improve_config: YAML file with more options of carryon improve. Empty: none.
        engine: What generates answers. `auto`: vLLM where it is installed.
        batch_rows: Answers that transformers generates at a time; fewer need less memory.
        forward: How the base is run.
    """
    if rounds < 2:
        raise InputError(f"--rounds: expected 2 or more, which are compared, got {rounds}")
    if not seeds or len(set(seeds)) < len(seeds) or not 0 <= min(seeds) <= max(seeds) < _SEEDS:
        raise InputError(f"--seeds: expected different ones from 0 to {_SEEDS - 1}, got {seeds}")
    if rounds * num > APART:
        raise InputError(
            f"--num: expected {APART // rounds} or fewer for {rounds} rounds, so that no two seeds "
            f"have the same problems, got {num}"
        )
    root = Path(out)
    tasks = tasks or [_SUMS] * (not improve_config)
    shared = ["--base", base, *(["--tasks", *tasks] if tasks else [])]
    shared += ["--instruction", instruction, "--rounds", str(rounds), "--num", str(num)]
    shared += ["--samples", str(samples), "--max-new-tokens", str(max_new_tokens)]
    shared += ["--test-num", str(test_num), "--engine", engine, "--batch-rows", str(batch_rows)]
    shared += ["--config", improve_config] if improve_config else []
    shared += forward_argv(forward)
    plan = {
        seed: [
            *("improve", "--out", str(root / f"seed-{seed}")),
            *("--task-seed", str(1 + APART * seed), *shared),
        ]
        for seed in seeds
    }
    for argv in plan.values():
        check_command(argv[0], argv[1:])  # not first after the hours of another seed
    facts = {"base": base, "tasks": tasks, "instruction": instruction, "core": describe_core()}
    curves = list[Curve]()
    with folder_lock(root, kind="experiment"):
        for seed, argv in plan.items():
            logger.info(f"\n$ carryon {shlex.join(argv)}")
            with redirect_stdout(io.StringIO()):
                result = call_command(argv[0], argv[1:])  # what is done it checks, and skips
            curves.append(read_curve(seed, result["rounds"]))
            write_report(root, curves, facts)  # a stopped experiment has its finished seeds
    figures = figures_of(curves)
    for figure in figures:
        print_json(figure)
    logger.info(f"\n{format_table(table_of(curves))}\n{root / 'table.md'}")
    return [figure.to_dict() for figure in figures]


def read_curve(seed: int, rows: Sequence[Mapping[str, Any]]) -> Curve:
    """Return the accuracies in the result of `carryon improve`."""
    before = [row["accuracy"] for row in rows if not row["round"]]
    after = [row for row in rows if row["round"]]
    return Curve(
        seed=seed,
        base=before[0],
        instructed=before[1] if len(before) > 1 else None,
        rounds=[row["accuracy"] for row in after],
        records=[row["records"] for row in after],
        problems=rows[0]["problems"],
    )


def figures_of(curves: Sequence[Curve]) -> list[Figure]:
    """Return the least rise of the seeds, and the least gains over the base."""
    details = {
        "seeds": [curve.seed for curve in curves],
        "base": [curve.base for curve in curves],
        "instructed": [curve.instructed for curve in curves],
        "rounds": [list(curve.rounds) for curve in curves],
        "records": [list(curve.records) for curve in curves],
        "problems": curves[0].problems,
    }
    figures = [
        Figure(
            figure="improve.rise",
            value=min(curve.rise for curve in curves),
            target=RISE_TARGET,
            sense="at least",
            unit="of the answers more are right after the last round than after the first, "
            "least of the seeds",
            details=details,
        ),
        Figure(
            figure="improve.over_base",
            value=min(curve.rounds[-1] - curve.base for curve in curves),
            sense="at least",
            unit="of the answers more are right than of the plain base, least of the seeds",
        ),
    ]
    gains = [
        curve.rounds[-1] - curve.instructed for curve in curves if curve.instructed is not None
    ]
    if gains:
        figures.append(
            Figure(
                figure="improve.over_prompt",
                value=min(gains),
                sense="at least",
                unit="of the answers more are right than of the instructed base, least of the "
                "seeds",
            )
        )
    return figures


def table_of(curves: Sequence[Curve]) -> list[list[str]]:
    """Return the heading and a line for each model: accuracies by seed, their mean, the texts."""
    values: dict[str, list[float]] = {"base": [curve.base for curve in curves]}
    if curves[0].instructed is not None:
        values["base, instructed"] = [curve.instructed or 0.0 for curve in curves]
    texts = dict[str, str]()
    for at in range(max(len(curve.rounds) for curve in curves)):
        going = [curve for curve in curves if at < len(curve.rounds)]
        values[f"round {at + 1}"] = [curve.rounds[at] for curve in going]
        texts[f"round {at + 1}"] = ", ".join(f"{curve.records[at]:,}" for curve in going)
    heading = ["model", "right, each seed", "mean", "texts"]
    return [heading] + [
        [name, ", ".join(f"{each:.1%}" for each in of), f"{mean(of):.1%}", texts.get(name, "-")]
        for name, of in values.items()
    ]


def write_report(folder: Path, curves: Sequence[Curve], facts: Mapping[str, Any]) -> bool:
    """Write table.md, table.json and accuracy.png; return whether the plot was drawn."""
    heading, *rows = table_of(curves)
    told = [f"- {name}: {value}" for name, value in facts.items()]
    cells = [heading, ["---"] * len(heading), *rows]
    text = "\n".join([*(f"| {' | '.join(row)} |" for row in cells), "", *told, ""])
    write_file(folder / "table.md", text.encode())
    figures = [figure.to_dict() for figure in figures_of(curves)]
    write_json(folder / "table.json", {**facts, "figures": figures})
    series = [
        Line(
            xs=range(1, len(curve.rounds) + 1),
            ys=list(curve.rounds),
            label=f"seed {curve.seed}",
            color=f"C{number}",
        )
        for number, curve in enumerate(curves)
    ]
    levels = {"base": curves[0].base}
    if curves[0].instructed is not None:
        levels["base, instructed"] = curves[0].instructed
    return draw(
        folder / "accuracy.png",
        lambda axes: lines(
            axes, series, x_label="round", y_label="accuracy", levels=levels, is_from_zero=True
        ),
    )
