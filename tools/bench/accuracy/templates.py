"""`cot-templates`: problems for training and test that are made from different templates."""

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.cache.optional import require
from carryon.tools.bench.accuracy.recipes import TEST_SEED, TRAIN_SEED
from carryon.tools.cli.output import print_result
from carryon.train.inference.scoring.problems import Problem, read_problems

logger = logging.getLogger(__name__)

WITH_TEMPLATES = "gsm_symbolic"
"""The generator that tells which template a problem is from."""
_CHAIN = "answer_cot"
"""What a chain is written from, in the metadata of its problems."""
_UNSEEN_EVERY = 5
"""One template in five is for the test."""
_SPARE = 2.0
"""Problems drawn for each one that is wanted, beyond the fraction of templates."""


def make_problems(
    *,
    task: str,
    out: str,
    test_out: str,
    samples: int = 1000,
    task_seed: int = TRAIN_SEED,
    test_num: int = 200,
    test_seed: int = TEST_SEED,
) -> dict[str, Any]:
    """Write problems for training and for the test, no template in both; a step of experiment-cot.

    Each problem names its template as `split_group`, so that what is held out of training is of
    templates that are not trained on either. The last line on stdout is a JSON line with counts.

    Example:
        python -m carryon.tools.bench cot-templates --task gsm_symbolic --out problems.jsonl
        --test-out test.jsonl

    Args:
        task: gsm_symbolic, the task of reasoning-gym that tells templates apart.
        out: File of the training problems, as JSON lines.
        test_out: File of the test problems.
        samples: Training problems.
        task_seed: Seed of the training problems.
        test_num: Test problems.
        test_seed: Seed of those.
    """
    if task != WITH_TEMPLATES:
        raise InputError(f"--task: expected {WITH_TEMPLATES}, got {task!a}")
    training = draw_problems(samples, seed=task_seed, is_unseen=False)
    tests = draw_problems(test_num, seed=test_seed, is_unseen=True)
    write_file(Path(out), _to_lines(training))
    write_file(Path(test_out), _to_lines(tests))
    numbers = [len(each) for each in (training, tests)]
    templates = [len({problem.group for problem in each}) for each in (training, tests)]
    document = {"out": out, "problems": numbers[0], "templates": templates[0]}
    document |= {"test_out": test_out, "test_problems": numbers[1], "test_templates": templates[1]}
    return print_result(
        document,
        f"{out}: {numbers[0]:,} problems of {templates[0]} templates; {test_out}: {numbers[1]:,} "
        f"of {templates[1]} others",
    )


def draw_problems(num: int, *, seed: int, is_unseen: bool) -> list[Problem]:
    """Return at most `num` problems whose template is one for the test, or one for training."""
    gym = require("reasoning_gym", extra="demo", purpose="the templates of a task")
    drawn = math.ceil(_SPARE * num * (_UNSEEN_EVERY if is_unseen else 1))
    templates = gym.create_dataset(WITH_TEMPLATES, size=drawn, seed=seed).task_indices
    problems = read_problems(WITH_TEMPLATES, num=drawn, seed=seed)
    fitting = [
        replace(problem, group=f"{WITH_TEMPLATES}-{template}")
        for template, problem in zip(templates, problems, strict=True)
        if is_unseen_template(template) == is_unseen
    ]
    return fitting[:num]


def is_unseen_template(template: int) -> bool:
    """Return whether a template is for the test."""
    return template % _UNSEEN_EVERY == _UNSEEN_EVERY - 1


def _to_lines(problems: Iterable[Problem]) -> bytes:
    rows = [
        {
            "id": each.id,
            "question": each.question,
            "answer": each.answer,
            "split_group": each.group,
            "metadata": {_CHAIN: each.metadata[_CHAIN]},
        }
        for each in problems
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
