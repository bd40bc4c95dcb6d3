"""`cot-corpus`: worked answers as a corpus, for training problems that no test poses."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.tools.bench.accuracy.chains import write_chain
from carryon.tools.bench.accuracy.recipes import TEST_SEED, TRAIN_SEED
from carryon.tools.cli.output import print_result
from carryon.train.inference.sampling.records import choose_held_out, make_record, to_lines
from carryon.train.inference.scoring.problems import Problem, is_data, read_problems

logger = logging.getLogger(__name__)


def make_corpus(
    *,
    task: str,
    out: str,
    samples: int = 760,
    task_seed: int = TRAIN_SEED,
    test_num: int = 200,
    test_seed: int = TEST_SEED,
    held_out_ratio: float = 0.05,
    wording: str = "",
) -> dict[str, Any]:
    """Write worked answers to problems of a task as a corpus; a step of experiment-cot.

    Each answer is judged by the task's own verifier, and problems that are equal to another one or
    to a test problem are left out. The last line on stdout is a JSON line with the counts.

    Example:
        python -m carryon.tools.bench cot-corpus --task leg_counting --out corpus.jsonl

    Args:
        task: A task of reasoning-gym with a writer of chains, NAME or NAME:SETTING=VALUE,...; or a
            file of its problems, as cot-templates writes it.
        out: File of the corpus, as JSON lines.
        samples: Training problems.
        task_seed: Seed of the training problems.
        test_num: Problems of the task that carryon score will pose; of a file none are posed.
        test_seed: Seed of those.
        held_out_ratio: Fraction of problems, or of their groups, whose records are marked held out.
        wording: Another wording of the task's chains. Empty: the task's own.
    """
    wording = wording or task.partition(":")[0]
    problems = read_problems(task, num=samples, seed=task_seed, is_training=True)
    is_posed = test_num and not is_data(task)
    tests = read_problems(task, num=test_num, seed=test_seed) if is_posed else []
    kept, dropped = _drop_equal(problems, tests)
    pairs = [(each, write_chain(each, wording=wording)) for each in kept]
    right = [(problem, text) for problem, text in pairs if problem.is_right(text)]
    if not right:
        raise InputError(
            f"{task}: expected problems whose chain is right and that no test poses, got none of "
            f"{len(problems):,}. Fix: more --samples, or other settings of the task"
        )
    halves = choose_held_out((problem for problem, _ in right), ratio=held_out_ratio)
    held_out = sum(problem.half in halves for problem, _ in right)
    provenance = {"task": task, "task_seed": task_seed, "source": "chains"}
    write_file(Path(out), to_lines(_records(right, halves, provenance)))
    document = {"out": out, "kept": len(right), "held_out": held_out, "equal": dropped}
    document["wrong"] = len(pairs) - len(right)
    return print_result(
        document,
        f"{out}: {len(right):,} worked answers, {held_out:,} of them held out; left out: "
        f"{dropped:,} equal questions, {document['wrong']:,} chains that the verifier refuses",
    )


def _drop_equal(problems: Sequence[Problem], tests: Sequence[Problem]) -> tuple[list[Problem], int]:
    """Return the problems with each question once and none of a test, and how many others."""
    seen = {problem.folded for problem in tests}
    kept = list[Problem]()
    for problem in problems:
        if problem.folded not in seen:
            seen.add(problem.folded)
            kept.append(problem)
    return kept, len(problems) - len(kept)


def _records(
    answers: Sequence[tuple[Problem, str]],
    halves: Collection[str],
    provenance: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return worked answers as records of a chat; `halves` are `half` of the held-out problems."""
    return [
        make_record(
            problem,
            problem.question,
            text,
            is_chat=True,
            is_held_out=problem.half in halves,
            provenance=provenance,
        )
        for problem, text in answers
    ]
