"""Let an arm answer problems, batch by batch, each batch on the disk before the next."""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence

from carryon.cache.errors import InputError
from carryon.cache.progress import Progress
from carryon.train.inference.generate import Generation, check_room
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.scoring.answer_file import Answer, AnswerFile
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.models import Answerer
from carryon.train.inference.scoring.problems import Problem, digest_messages

logger = logging.getLogger(__name__)


def answer_problems(
    arm: Arm,
    model: Answerer,
    problems: Mapping[str, Sequence[Problem]],
    *,
    examples: Mapping[str, Sequence[Problem]],
    file: AnswerFile,
    settings: GenerateSettings,
    samples: int,
) -> None:
    """Answer the problems of all tasks that `file` has no answers to, and append them to it.

    Prompts of about equal length are answered together.

    Args:
        arm: gives the prompts.
        model: of the arm.
        problems: of each task.
        examples: of each task, for few-shot prompts.
        file: of answers.
        settings: of generation.
        samples: answers to each problem.

    Raises:
        InputError: a prompt is too long for the model; nothing was generated. Or `file` has
            answers of another model under the name of this arm. Or a rule of the user failed.
    """
    posed = [(task, problem) for task, each in problems.items() for problem in each]
    prompts = [arm.make_prompt(problem, examples[task]) for task, problem in posed]
    rows = model.encode(prompts)
    check_rooms(arm, posed, rows, settings=settings, context_tokens=model.context_tokens)
    _refuse_other_model(arm, model, file)
    digests = list(map(digest_messages, prompts))
    known = file.answers_to(arm.name, posed, digests)
    order = sorted(range(len(posed)), key=lambda at: len(rows[at]))
    jobs = [(at, sample) for at in order for sample in range(samples)]
    is_missing = {(at, n): (posed[at][0], posed[at][1].id, n) not in known for at, n in jobs}
    num_missing = sum(is_missing.values())
    if num_missing < len(jobs):
        logger.info(f"{arm.name}: {len(jobs) - num_missing:,} of {len(jobs):,} answers are there")
    num_tokens, num_right, num_done, started = 0, 0, 0, time.monotonic()
    with Progress(num_missing, name=f"answer {arm.name:.40}", unit="answers") as progress:
        for first in range(0, len(jobs), model.batch_rows):
            batch = [job for job in jobs[first : first + model.batch_rows] if is_missing[job]]
            if not batch:
                continue
            since = time.monotonic()
            seed = _seed(settings.seed, arm.name, posed[batch[0][0]][1].id, str(batch[0][1]))
            asked = [prompts[at] for at, _ in batch]
            answers = model.answer([rows[at] for at, _ in batch], seed, asked)
            share = (time.monotonic() - since) / len(batch)
            records = [
                _record(
                    arm,
                    model,
                    *posed[at],
                    digests[at],
                    sample=sample,
                    answer=answer,
                    seconds=share,
                )
                for (at, sample), answer in zip(batch, answers, strict=True)
            ]
            file.append(records)  # before any rule of the user may fail
            num_done += len(records)
            for (at, _), record in zip(batch, records, strict=True):
                num_right += posed[at][1].is_right(record.text)
            num_tokens += sum(answer.num_tokens for answer in answers)
            rate = num_tokens / (time.monotonic() - started)
            progress.note = f"{num_right / num_done:.0%} right, {rate:,.0f} tokens/s"
            progress.update(len(batch))


def _record(
    arm: Arm,
    model: Answerer,
    task: str,
    problem: Problem,
    prompt: str,
    *,
    sample: int,
    answer: Generation,
    seconds: float,
) -> Answer:
    try:
        is_right = problem.is_right(answer.text)
    except InputError:  # a function of the user; raised again once the answer is kept
        is_right = False
    return Answer(
        task=task,
        arm=arm.name,
        model=model.digest,
        id=problem.id,
        sample=sample,
        question=problem.question,
        right=problem.answer,
        text=answer.text,
        is_right=is_right,
        tokens=answer.num_tokens,
        is_cut=answer.is_cut,
        seconds=seconds,
        prompt=prompt,
    )


def _refuse_other_model(arm: Arm, model: Answerer, file: AnswerFile) -> None:
    for answer in file.answers.values():
        if answer.arm == arm.name and answer.model != model.digest:
            raise InputError(
                f"{file.path}: {arm.name}: expected answers of this model by this engine, got "
                "other ones. Fix: another --out, or the --engine that they are of"
            )


def check_rooms(
    arm: Arm,
    posed: Sequence[tuple[str, Problem]],
    rows: Sequence[Sequence[int]],
    *,
    settings: GenerateSettings,
    context_tokens: int,
) -> None:
    """Check that all prompts fit into the model's context.

    Raises:
        InputError: some do not; the text has their number and the first one.
    """
    room = context_tokens - settings.max_new_tokens
    long = [problem.id for (_, problem), row in zip(posed, rows, strict=True) if len(row) > room]
    try:
        check_room(rows, settings=settings, context_tokens=context_tokens)
    except InputError as error:
        raise InputError(
            f"{arm.name}: {error}; {len(long):,} of {len(rows):,} prompts are longer, the first is "
            f"{long[0]}. Fix: a smaller --max-new-tokens, or shorter questions"
        ) from error


def _seed(seed: int, *parts: str) -> int:
    """Return a seed of a batch: the same for the same answers, another for each arm and batch."""
    text = "\0".join([str(seed), *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
