"""`cot-corpus`: worked answers as a corpus, for training problems that no test poses."""

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.cache.optional import require
from carryon.tools.bench.accuracy.chains import write_chain
from carryon.tools.bench.accuracy.recipes import TEST_SEED, TRAIN_SEED
from carryon.tools.cli.output import print_result
from carryon.train.inference.sampling.records import choose_held_out, make_record, to_lines
from carryon.train.inference.scoring.problems import Problem, read_problems

logger = logging.getLogger(__name__)

WITH_TEMPLATES = "gsm_symbolic"
"""The generator that tells which template a problem is from."""
_UNSEEN_EVERY = 5
"""One template in five is for the test."""
_SPARE = 2.0
"""Problems drawn for each one that is wanted, beyond the fraction of templates."""


def make_corpus(
    *,
    task: str,
    out: str,
    samples: int = 760,
    task_seed: int = TRAIN_SEED,
    test_num: int = 200,
    test_seed: int = TEST_SEED,
    held_out_ratio: float = 0.05,
    test_out: str = "",
    wording: str = "",
) -> dict[str, Any]:
    """Write worked answers to problems of a task as a corpus; a step of experiment-cot.

    Each answer is judged by the task's own verifier, and problems that are equal to another one or
    to a test problem are left out. The last line on stdout is a JSON line with the counts.

    Example:
        python -m carryon.tools.bench cot-corpus --task leg_counting --out corpus.jsonl

    Args:
        task: A task of reasoning-gym with a writer of chains, NAME or NAME:SETTING=VALUE,...
        out: File of the corpus, as JSON lines.
        samples: Training problems.
        task_seed: Seed of the training problems.
        test_num: Problems that carryon score will pose.
        test_seed: Seed of those.
        held_out_ratio: Fraction of problems whose records are marked held out.
        test_out: File for the test problems. They are then from templates of gsm_symbolic that no
            training problem is from. Empty: none, and all templates are for training.
        wording: Another wording of the task's chains. Empty: the task's own.
    """
    wording = wording or task.partition(":")[0]
    if test_out:
        problems = _with_templates(task, samples, seed=task_seed, is_unseen=False)
        tests = _with_templates(task, test_num, seed=test_seed, is_unseen=True)
        write_file(Path(test_out), _test_lines(tests))
    else:
        problems = read_problems(task, num=samples, seed=task_seed)
        tests = read_problems(task, num=test_num, seed=test_seed)
    kept, dropped = _drop_equal(problems, tests)
    pairs = [(each, write_chain(each, wording=wording)) for each in kept]
    right = [(problem, text) for problem, text in pairs if problem.is_right(text)]
    if not right:
        raise InputError(
            f"{task}: expected problems whose chain is right and that no test poses, got none of "
            f"{len(problems):,}. Fix: more --samples, or other settings of the task"
        )
    held_out = choose_held_out((problem for problem, _ in right), ratio=held_out_ratio)
    provenance = {"task": task, "task_seed": task_seed, "source": "chains"}
    write_file(Path(out), to_lines(_records(right, held_out, provenance)))
    document = {"out": out, "kept": len(right), "held_out": len(held_out), "equal": dropped}
    document["wrong"] = len(pairs) - len(right)
    return print_result(
        document,
        f"{out}: {len(right):,} worked answers, {len(held_out):,} of them held out; left out: "
        f"{dropped:,} equal questions, {document['wrong']:,} chains that the verifier refuses",
    )


def _with_templates(task: str, num: int, *, seed: int, is_unseen: bool) -> list[Problem]:
    """Return at most `num` problems whose template is one for the test, or one for training.

    Raises:
        InputError: the generator does not tell templates apart.
    """
    if task != WITH_TEMPLATES:
        raise InputError(f"--test-out: expected the task {WITH_TEMPLATES}, got {task}")
    gym = require("reasoning_gym", extra="demo", purpose="the templates of a task")
    drawn = math.ceil(_SPARE * num * (_UNSEEN_EVERY if is_unseen else 1))
    templates = gym.create_dataset(task, size=drawn, seed=seed).task_indices
    problems = read_problems(task, num=drawn, seed=seed)
    fitting = [
        problem
        for template, problem in zip(templates, problems, strict=True)
        if is_unseen_template(template) == is_unseen
    ]
    return fitting[:num]


def is_unseen_template(template: int) -> bool:
    """Return whether a template is for the test."""
    return template % _UNSEEN_EVERY == _UNSEEN_EVERY - 1


def _drop_equal(problems: Sequence[Problem], tests: Sequence[Problem]) -> tuple[list[Problem], int]:
    """Return the problems with each question once and none of a test, and how many others."""
    seen = {problem.question for problem in tests}
    kept = list[Problem]()
    for problem in problems:
        if problem.question not in seen:
            seen.add(problem.question)
            kept.append(problem)
    return kept, len(problems) - len(kept)


def _records(
    answers: Sequence[tuple[Problem, str]],
    held_out: Collection[str],
    provenance: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return worked answers as records of a chat; `held_out` is what the held-out problems ask."""
    return [
        make_record(
            problem,
            problem.question,
            text,
            is_chat=True,
            is_held_out=problem.asked in held_out,
            provenance=provenance,
        )
        for problem, text in answers
    ]


def _test_lines(problems: Sequence[Problem]) -> bytes:
    rows = [
        {"id": each.id, "question": each.question, "answer": each.answer, "split": "held-out"}
        for each in problems
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
