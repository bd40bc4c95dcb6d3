"""Exact match of generated answers, from a store of problems and bare answers."""

import json
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryon.cache.corpus.records import refuse_shared_texts
from carryon.cache.files.atomic import write_file
from carryon.tools.compare.figure import Figure, print_json
from carryon.train.config import CarryOnSettings, TrainSettings

if TYPE_CHECKING:
    from carryon.train.inference.scoring.problems import Problem
    from carryon.train.trainer.finish import TrainReport

logger = logging.getLogger(__name__)

TARGET = 0.275
"""Of two-term sums, reached by a prototype."""
TRAINING_SEED, HELD_OUT_SEED = 1, 1_000_001
"""Problem i of reasoning-gym is drawn from seed + i: the two never meet."""
_ANSWER_TOKENS = 48
"""The base answers in sentences."""


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
) -> list[dict[str, Any]]:
    """Teach a base to answer a task of reasoning-gym with a carry-on of one megabyte.

    A bottleneck of two blocks on `final` and the middle layer is trained on problems and bare
    answers with each seed, and then answers other problems. The base counts as right if the last
    number of its answer is, the customized model only if the answer is nothing else. The same
    command resumes.

    Example:
        python -m carryon.tools.bench experiment-cot --base demo/base --out cot

    Args:
        base: Hub id, folder or .gguf file.
        out: Folder of the experiment.
        task: A task of reasoning-gym, NAME or NAME:SETTING=VALUE,...
        samples: Training problems.
        num: Held-out problems.
        seeds: Seeds of weights and sample order.
        epochs: Passes over the problems.
        tokens_per_step: Tokens of a step. Few of them are targets, so small steps learn more.
        learning_rate: Highest learning rate.
    """
    from carryon.train.inference.scoring.problems import read_problems

    folder = Path(out)
    held_out = read_problems(task, num=num, seed=HELD_OUT_SEED, rule="exact")
    known = {problem.question for problem in held_out}
    problems = read_problems(task, num=samples, seed=TRAINING_SEED, rule="exact")
    train = [problem for problem in problems if problem.question not in known]
    halves = {"train": _records("train", train), "held-out": _records("held-out", held_out)}
    refuse_shared_texts(halves["train"], halves["held-out"])
    lines = [json.dumps(record) + "\n" for half in halves.values() for record in half]
    write_file(folder / "corpus.jsonl", "".join(lines).encode())
    shape = _extract(base, folder)
    settings = TrainSettings(carryon=shape).with_options(
        epochs=epochs, tokens_per_step=tokens_per_step, learning_rate=learning_rate
    )
    reports = [_train(folder, settings, seed) for seed in seeds]
    logger.info(f"answers to {num} problems, from the base and with each carry-on")
    alone, texts = _answer(base, [report.carryon for report in reports], held_out)
    scores = [_share(each, held_out, rule="exact") for each in texts]
    figure = Figure(
        figure=f"cot.{task.partition(':')[0]}.exact",
        value=statistics.mean(scores),
        target=TARGET,
        sense="at least",
        unit="of the answers, mean of the seeds",
        details={
            "seeds": scores,
            "base_generous": _share(alone, held_out, rule="end"),
            "base_exact": _share(alone, held_out, rule="exact"),
            "dropped_as_held_out": len(problems) - len(train),
            "train_s": [report.train_s for report in reports],
            "megabytes": reports[0].carryon_bytes / 1e6,
            "held_out_nll": [report.carryon_nll for report in reports],
            "base_nll": reports[0].base_nll,
        },
    )
    print_json(figure)
    return [figure.to_dict()]


def _records(split: str, problems: Sequence["Problem"]) -> list[dict[str, Any]]:
    """Return problems and bare answers as conversations of one half."""
    return [
        {
            "id": f"{split}-{index}",
            "split": split,
            "messages": [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": problem.answer},
            ],
        }
        for index, problem in enumerate(problems)
    ]


def _extract(base: str, folder: Path) -> CarryOnSettings:
    """Extract the corpus to FOLDER/store; return the shape to train from it."""
    from carryon.cache.base.model import load_base
    from carryon.cache.extraction.pipeline import extract
    from carryon.cache.settings import ForwardSettings
    from carryon.tools.compare.methods import same_size

    loaded = load_base(base, forward=ForwardSettings())
    taps = ["final", f"layer.{-(-loaded.identity.num_layers // 2)}"]
    extract(base=loaded, data=[folder / "corpus.jsonl"], out=folder / "store", taps=taps)
    return same_size(CarryOnSettings(), taps=taps, base_width=loaded.identity.width)


def _train(folder: Path, settings: TrainSettings, seed: int) -> "TrainReport":
    from carryon.train.trainer.trainer import train

    return train(folder / "store", out=folder / f"seed-{seed}", settings=settings, seed=seed)


def _answer(
    base: str, carryons: Sequence[str], problems: Sequence["Problem"]
) -> tuple[list[str], list[list[str]]]:
    """Return the answers of the base alone and with each carry-on."""
    from carryon.train.inference.modeling import CarryOnForCausalLM

    questions = [problem.question for problem in problems]
    alone, texts = list[str](), list[list[str]]()
    for carryon in carryons:
        model = CarryOnForCausalLM.from_pretrained(carryon, base=base)
        alone = alone or model.answer(questions, max_new_tokens=_ANSWER_TOKENS, alpha=0.0)
        texts.append(model.answer(questions, max_new_tokens=_ANSWER_TOKENS))
    return alone, texts


def _share(texts: Sequence[str], problems: Sequence["Problem"], *, rule: str) -> float:
    """Return the fraction of answers that are right by a rule."""
    from carryon.train.inference.scoring.rules import parse_rule

    pairs = zip(texts, problems, strict=True)
    return statistics.mean(parse_rule(rule).is_right(text, each) for text, each in pairs)
