"""`carryon experiment cot`: exact match of generated answers, from a store of worked problems."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from carryon.cache.spec import CorpusSettings, ForwardSettings, StoreSettings
from carryon.train.config import (
    CarryOnSettings,
    GenerateSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
)

TARGET = 0.275
"""Of two-term sums, that a prototype reached."""
TRAINING_SEED, HELD_OUT_SEED = 1, 2
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
    batch_tokens: int = 384,
    learning_rate: float = 2e-3,
) -> list[dict[str, Any]]:
    """Teach a base to answer a task of reasoning-gym with a carry-on of one megabyte.

    A bottleneck of two blocks on `final` and the middle layer is trained on problems and their bare
    answers, with each seed; then it answers other problems. The base is judged generously, by the
    last number of what it says, the customized model strictly. Everything stays in OUT, and the
    same command goes on where it was stopped.

    Example:
        carryon experiment cot --base demo/base --out cot

    Args:
        base: The base: hub id, folder or .gguf file.
        out: Folder of the experiment; made if missing.
        task: A task of reasoning-gym, NAME or NAME:SETTING=VALUE,...
        samples: Problems to train on.
        num: Problems to answer.
        seeds: Of first weights and of the order of samples.
        epochs: Passes over the problems.
        batch_tokens: Tokens of a step. Only an answer's few tokens are targets, so that small
            steps, and many of them, are what teaches.
        learning_rate: Highest learning rate.
    """
    from carryon.cache.base import load_base
    from carryon.cache.extract import extract
    from carryon.tools.bench_figure import Figure, print_json
    from carryon.tools.bench_quality import same_size
    from carryon.train.compose import CarryOnForCausalLM
    from carryon.train.exact_match import make_problems, score
    from carryon.train.loop import train

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    held_out = make_problems(task, num=num, seed=HELD_OUT_SEED)
    known = {problem.question for problem in held_out}
    problems = make_problems(task, num=samples, seed=TRAINING_SEED)
    parts = {"train": [x for x in problems if x.question not in known], "held-out": held_out}
    corpus = folder / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        for split, some in parts.items():
            for index, problem in enumerate(some):
                messages = [
                    {"role": "user", "content": problem.question},
                    {"role": "assistant", "content": problem.answer},
                ]
                record = {"id": f"{split}-{index}", "split": split, "messages": messages}
                file.write(json.dumps(record) + "\n")
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
    shape = same_size(CarryOnSettings(), taps=taps, base_width=loaded.identity.width)
    del loaded
    reports = [
        train(
            store=str(folder / "store"),
            out=str(folder / f"seed-{seed}"),
            carryon=shape,
            optimization=OptimizationSettings(
                epochs=epochs, batch_tokens=batch_tokens, learning_rate=learning_rate, seed=seed
            ),
            stream=StreamSettings(),
            loss=LossSettings(),
            memory=MemorySettings(),
            run=RunSettings(),
        )
        for seed in seeds
    ]
    print(f"answers to {num} problems, from the base and with each carry-on", file=sys.stderr)
    settings = GenerateSettings(max_new_tokens=_ANSWER_TOKENS)
    alone, found = None, []
    for report in reports:
        model = CarryOnForCausalLM.from_pretrained(report.carryon, base=base)
        alone = alone or score(model, held_out, settings=settings, batch_rows=16, alpha=0.0)
        found.append(score(model, held_out, settings=settings, batch_rows=16))
    assert alone is not None
    figure = Figure(
        figure=f"cot.{task.partition(':')[0]}.exact",
        value=statistics.mean(result.exact for result in found),
        target=TARGET,
        sense="at least",
        unit="of the answers, mean of the seeds",
        details={
            "seeds": [result.exact for result in found],
            "base_generous": alone.generous,
            "base_exact": alone.exact,
            "left_out_as_held_out": len(problems) - len(parts["train"]),
            "train_s": [report.train_s for report in reports],
            "megabytes": reports[0].carryon_bytes / 1e6,
            "held_out_nll": [report.carryon_nll for report in reports],
            "base_nll": reports[0].base_nll,
        },
    )
    print_json(figure)
    return [figure.to_dict()]
