"""`carryon score`: exact match of base and customized model on generated answers."""

import json
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings
from carryon.tools.cli.output import print_result
from carryon.train.config import GenerateSettings


def score(
    *,
    carryon: str,
    tasks: list[str],
    base: str | None = None,
    num: int = 100,
    task_seed: int = 1_000_001,
    alpha: float | None = None,
    batch_rows: int = 16,
    out: str = "",
    settings: GenerateSettings,
    forward: ForwardSettings,
) -> list[dict[str, Any]]:
    """Count the right answers of base and customized model.

    Problems come from reasoning-gym, each posed as a user turn. `exact` counts answers that equal
    the right one; `generous` counts answers whose last number is the right one, which suits a
    base that was not told the format. stdout gets a JSON line for each task.

    Example:
        carryon score --carryon run/carryon --tasks chain_sum:min_terms=2,max_terms=2

    Args:
        carryon: Folder of the carry-on, or its id on the hub.
        tasks: Tasks of reasoning-gym, each NAME or NAME:SETTING=VALUE,...
        base: The base: hub id, folder or .gguf file. Omitted: where it was at extraction.
        num: Problems of each task.
        task_seed: Seed of the problems; take one far from the seed of the training problems.
        alpha: Strength of the correction: 0 is the base, 1 the carry-on as trained. Omitted: the
            alpha in the carry-on's card.
        batch_rows: Problems answered at a time.
        out: File for all questions and answers, as JSON lines. Empty: no file.
        settings: How text is generated.
        forward: How the base is run.
    """
    from carryon.cache.files.atomic import write_file
    from carryon.train.inference.accuracy import make_problems
    from carryon.train.inference.accuracy import score as score_model
    from carryon.train.inference.modeling import CarryOnForCausalLM

    for name, value in (("--num", num), ("--batch-rows", batch_rows)):
        if value < 1:
            raise InputError(f"{name}: expected 1 or more, got {value}")
    posed = {task: make_problems(task, num=num, seed=task_seed) for task in tasks}
    model = CarryOnForCausalLM.from_pretrained(carryon, base=base, forward=forward)
    documents, lines = [], []
    for task, problems in posed.items():
        before, after = (
            score_model(model, problems, settings=settings, batch_rows=batch_rows, alpha=each)
            for each in (0.0, alpha)
        )
        document: dict[str, Any] = {"task": task, "num": num, "task_seed": task_seed}
        document["alpha"] = model.alpha if alpha is None else alpha
        for name, scores in (("base", before), ("customized", after)):
            document |= {f"{name}_exact": scores.exact, f"{name}_generous": scores.generous}
        summary = (
            f"{task}: generous: base {before.generous:.1%}, customized {after.generous:.1%}; "
            f"exact: base {before.exact:.1%}, customized {after.exact:.1%}"
        )
        documents.append(print_result(document, summary))
        for problem, old, new in zip(problems, before.texts, after.texts, strict=True):
            line = {"task": task, "question": problem.question, "right": problem.answer}
            lines.append(json.dumps({**line, "base": old, "customized": new}) + "\n")
    if out:
        write_file(Path(out), "".join(lines).encode())
    return documents
