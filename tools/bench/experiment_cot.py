"""Exact match of generated answers, from a store of worked problems."""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryon.cache.files import write_file
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.train.config import (
    CarryOnSettings,
    GenerateSettings,
    OptimizationSettings,
    TrainSettings,
)

if TYPE_CHECKING:
    from carryon.train.inference.accuracy import Problem, Score
    from carryon.train.trainer.finish import TrainReport

logger = logging.getLogger(__name__)

TARGET = 0.275
"""Of two-term sums, that a prototype reached."""
TRAINING_SEED, HELD_OUT_SEED = 1, 1_000_001
"""Problem i of reasoning-gym is drawn from seed + i: the two never meet."""
_ANSWER_TOKENS = 48
"""The base wraps its answer into sentences."""


def experiment_cot(
    *,
    base: str,
    out: str,
    task: str = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2",
    samples: int = 1000,
    num: int = 200,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 -- shown in the help, never changed
    epochs: int = 6,
    tokens_per_step: int = 384,
    learning_rate: float = 2e-3,
    keep_seen: bool = False,
) -> list[dict[str, Any]]:
    """Teach a base to answer a task of reasoning-gym with a carry-on of one megabyte.

    A bottleneck of two blocks on `final` and the middle layer is trained on problems and their bare
    answers, with each seed; then it answers other problems. The base is judged generously, by the
    last number of what it says, the customized model strictly. Everything stays in OUT, and the
    same command goes on where it was stopped.

    Example:
        python -m carryon.tools.bench experiment-cot --base demo/base --out cot

    Args:
        base: The base: hub id, folder or .gguf file.
        out: Folder of the experiment; made if missing.
        task: A task of reasoning-gym, NAME or NAME:SETTING=VALUE,...
        samples: Problems to train on.
        num: Problems to answer.
        seeds: Of first weights and of the order of samples.
        epochs: Passes over the problems.
        tokens_per_step: Tokens of a step. Only an answer's few tokens are targets, so that small
            steps, and many of them, are what teaches.
        learning_rate: Highest learning rate.
        keep_seen: Train on problems that stand among the held-out ones too, to see what such a
            leak is worth: the figure is another, and tells seen and unseen problems apart.
    """
    from carryon.tools.compare.figure import Figure, print_json
    from carryon.train.inference.accuracy import make_problems

    folder = Path(out)
    held_out = make_problems(task, num=num, seed=HELD_OUT_SEED)
    known = {problem.question for problem in held_out}
    problems = make_problems(task, num=samples, seed=TRAINING_SEED)
    seen = [problem for problem in problems if problem.question in known]
    train = problems if keep_seen else [x for x in problems if x.question not in known]
    parts = {"train": train, "held-out": held_out}
    folder.mkdir(parents=True, exist_ok=True)  # not before the task is known to be one
    shape = _extract(base, folder, _write_corpus(folder / "corpus.jsonl", parts))
    optimization = OptimizationSettings(
        epochs=epochs, tokens_per_step=tokens_per_step, learning_rate=learning_rate
    )
    reports = [_train(folder, shape, replace(optimization, seed=seed)) for seed in seeds]
    logger.info(f"answers to {num} problems, from the base and with each carry-on")
    alone, found = _answer(base, [report.carryon for report in reports], held_out)
    figure = Figure(
        figure=f"cot.{task.partition(':')[0]}.exact{'_with_seen' if keep_seen else ''}",
        value=statistics.mean(result.exact for result in found),
        target=None if keep_seen else TARGET,
        sense="at least",
        unit="of the answers, mean of the seeds",
        details={
            "seeds": [result.exact for result in found],
            "base_generous": alone.generous,
            "base_exact": alone.exact,
            "left_out_as_held_out": len(problems) - len(train),
            **_apart(held_out, {x.question for x in seen} if keep_seen else set(), found),
            "train_s": [report.train_s for report in reports],
            "megabytes": reports[0].carryon_bytes / 1e6,
            "held_out_nll": [report.carryon_nll for report in reports],
            "base_nll": reports[0].base_nll,
        },
    )
    print_json(figure)
    return [figure.to_dict()]


def _apart(
    problems: Sequence["Problem"], seen: set[str], found: Sequence["Score"]
) -> dict[str, float]:
    """Return which part of the answers to seen and to unseen problems is right; {}: none seen."""
    from carryon.train.inference.accuracy import is_exact

    right: dict[bool, list[bool]] = {True: [], False: []}
    for score in found:
        for problem, text in zip(problems, score.texts, strict=True):
            right[problem.question in seen].append(is_exact(text, problem.answer))
    if not right[True]:
        return {}
    unseen = {"exact_unseen": statistics.mean(right[False])} if right[False] else {}
    return {
        "seen_ratio": len(right[True]) / (len(found) * len(problems)),
        "exact_seen": statistics.mean(right[True]),
        **unseen,
    }


def _write_corpus(path: Path, parts: Mapping[str, Sequence["Problem"]]) -> Path:
    """Write problems and bare answers as conversations, each marked with its half."""
    lines = []
    for split, some in parts.items():
        for index, problem in enumerate(some):
            messages = [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": problem.answer},
            ]
            lines.append({"id": f"{split}-{index}", "split": split, "messages": messages})
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return path


def _extract(base: str, folder: Path, corpus: Path) -> CarryOnSettings:
    """Extract the corpus to FOLDER/store; return the shape that is trained from it."""
    from carryon.cache.base.model import load_base
    from carryon.cache.extraction.pipeline import extract
    from carryon.tools.compare.methods import same_size

    loaded = load_base(base, forward=ForwardSettings())
    taps = ["final", f"layer.{-(-loaded.identity.num_layers // 2)}"]
    extract(
        base=loaded,
        data=[corpus],
        out=folder / "store",
        corpus=CorpusSettings(),
        store=StoreSettings(taps=taps),
        forward=ForwardSettings(),
    )
    return same_size(CarryOnSettings(), taps=taps, base_width=loaded.identity.width)


def _train(
    folder: Path, shape: CarryOnSettings, optimization: OptimizationSettings
) -> "TrainReport":
    from carryon.train.trainer.trainer import train

    return train(
        folder / "store",
        out=folder / f"seed-{optimization.seed}",
        settings=TrainSettings(carryon=shape, optimization=optimization),
    )


def _answer(
    base: str, carryons: Sequence[str], problems: Sequence["Problem"]
) -> tuple["Score", list["Score"]]:
    """Return how the base alone answers the problems, and how it does with each carry-on."""
    from carryon.train.inference.accuracy import score
    from carryon.train.inference.modeling import CarryOnForCausalLM

    settings = GenerateSettings(max_new_tokens=_ANSWER_TOKENS)
    alone: list[Score] = []
    found: list[Score] = []
    for carryon in carryons:
        model = CarryOnForCausalLM.from_pretrained(carryon, base=base)
        if not alone:
            alone = [score(model, problems, settings=settings, batch_rows=16, alpha=0.0)]
        found.append(score(model, problems, settings=settings, batch_rows=16))
    return alone[0], found
