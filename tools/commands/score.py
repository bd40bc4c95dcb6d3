"""`carryon score`: exact match of base and customized model on generated answers."""

import json
import logging
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings
from carryon.train.config import GenerateSettings

logger = logging.getLogger(__name__)


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
    """Let base and customized model solve problems, and count right answers.

    The problems are those of reasoning-gym, each posed as a user's turn. `exact` counts answers
    that are the right one and nothing else; `generous` those whose last number is the right one,
    which is how a base is to be judged. One JSON line for each task goes to stdout.

    Example:
        carryon score --carryon run/carryon --tasks chain_sum:min_terms=2,max_terms=2

    Args:
        carryon: Folder of the carry-on, or its id on the hub.
        tasks: Tasks of reasoning-gym, each NAME or NAME:SETTING=VALUE,...
        base: The base: hub id, folder or .gguf file. Default: where it was at extraction.
        num: Problems of each task.
        task_seed: Seed of the problems; another than that of the training problems.
        alpha: Strength of the correction: 0 is the base, 1 what was trained. Default: as the
            carry-on's own file says.
        batch_rows: Problems that are answered together.
        out: File for every question with both answers, as JSON lines. Empty for none.
        settings: How text is generated.
        forward: How the base is run.
    """
    from carryon.cache.files import write_file
    from carryon.train.inference.accuracy import make_problems
    from carryon.train.inference.accuracy import score as score_model
    from carryon.train.inference.modeling import CarryOnForCausalLM

    wrong = [name for name, value in (("num", num), ("batch_rows", batch_rows)) if value < 1] + [
        name for name, value in (("tasks", tasks),) if not value
    ]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: expected at least one")
    posed = {task: make_problems(task, num=num, seed=task_seed) for task in tasks}
    model = CarryOnForCausalLM.from_pretrained(carryon, base=base, forward=forward)
    documents, lines = [], []
    for task, problems in posed.items():
        found = {
            name: score_model(
                model, problems, settings=settings, batch_rows=batch_rows, alpha=strength
            )
            for name, strength in (("base", 0.0), ("customized", alpha))
        }
        document: dict[str, Any] = {"task": task, "num": num, "task_seed": task_seed}
        document["alpha"] = model.alpha if alpha is None else alpha
        for name, result in found.items():
            document |= {f"{name}_exact": result.exact, f"{name}_generous": result.generous}
        print(json.dumps(document), flush=True)
        logger.info(
            f"{task}: the base ends {found['base'].generous:.1%} of its answers with the right "
            f"one; with the carry-on {found['customized'].generous:.1%}, and "
            f"{found['customized'].exact:.1%} are nothing but it"
        )
        documents.append(document)
        texts = zip(problems, found["base"].texts, found["customized"].texts, strict=True)
        for problem, base_text, text in texts:
            line = {"task": task, "question": problem.question, "right": problem.answer}
            lines.append(json.dumps({**line, "base": base_text, "customized": text}) + "\n")
    if out:
        write_file(Path(out), "".join(lines).encode())
    return documents
