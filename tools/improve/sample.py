"""`carryon sample`: verified answers of base or carry-on as a corpus."""

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from carryon.cache.errors import InputError, MissingError
from carryon.cache.settings import ForwardSettings
from carryon.tools.cli.output import print_result
from carryon.tools.improve.plan import TEST_SEED
from carryon.train.inference.generate_settings import GenerateSettings

if TYPE_CHECKING:
    from carryon.train.inference.scoring.problems import Problem

logger = logging.getLogger(__name__)


def sample(
    *,
    out: str,
    base: str | None = None,
    carryon: str = "",
    tasks: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    data: list[str] = [],  # noqa: B006
    rule: str = "auto",
    num: int = 200,
    samples: int = 8,
    max_samples: int = 0,
    keep: int = 4,
    instruction: str = "",
    keep_instruction: bool = False,
    shots: int = 0,
    examples: str = "",
    example_sets: int = 1,
    examples_out: str = "",
    hint: str = "",
    temperature: float = 0.8,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    chat_template_kwargs: list[str] = [],  # noqa: B006
    task_seed: int = 1,
    test_num: int = 0,
    test_seed: int = TEST_SEED,
    alpha: float | None = None,
    keep_cut: bool = False,
    form_ratio: float = 0.0,
    known: list[str] = [],  # noqa: B006
    unsolved: bool = False,
    drop_long: bool = False,
    held_out_ratio: float = 0.05,
    engine: Literal["auto", "transformers", "vllm"] = "auto",
    batch_rows: int = 64,
    forward: ForwardSettings,
) -> dict[str, Any]:
    """Sample answers to problems, and keep the right ones as a corpus.

    Each answer is judged by the rule; right ones are kept once each, as conversations for `carryon
    extract --data`. Their field `sampled` tells task, problem, models and settings. All answers,
    also wrong ones, are appended to a hidden file beside OUT (`.NAME.answers`) batch by batch:
    after an interruption the same command resumes. The last line on stdout is a JSON line with
    the counts.

    Example:
        carryon sample --base HuggingFaceTB/SmolLM2-135M-Instruct --tasks chain_sum
        --instruction "Think step by step." --out corpus.jsonl

    Args:
        out: File of the corpus, as JSON lines.
        base: The base: hub id, folder or .gguf file. Omitted: where it was at extraction of
            --carryon.
        carryon: Folder of the carry-on that answers, or its id on the hub. Empty: the base.
        tasks: Tasks of reasoning-gym, each NAME or NAME:SETTING=VALUE,...
        data: Files of questions with right answers; records marked held out are not posed.
        rule: Which answers are right: last-number, boxed, after:MARKER, regex:PATTERN, exact, end,
            task (its own verifier) or module:function. `auto`: task, or for data a rule that fits
            the right answers.
        num: Problems of each task; of data at most this number, drawn with --task-seed.
        samples: Answers to each problem.
        max_samples: Answers at most to a problem without a right one: twice as many, again and
            again. Below --samples: no more than those.
        keep: Most right answers kept of a problem. 0: all.
        instruction: Text behind each question, such as "Think step by step."; it is not stored.
        keep_instruction: Store the instruction with the question.
        shots: Solved problems shown before each question, as far as the base has room; they are
            not stored.
        examples: Task or data of those, such as a corpus of this command. Empty: other problems of
            the task, with bare answers, or records of --data.
        example_sets: Sets of examples to try: each on the first 20 problems of a task, the better
            half on 40, and so on; the last one left asks the rest.
        examples_out: File for the examples that were shown and a spare one, as JSON lines, such as
            for --examples of carryon score. Empty: none.
        hint: Text behind each question, those shown too, that tells the right answer in place of
            {answer}, such as "The answer is {answer}."; it is not stored. With --unsolved,
            --temperature 0 and --examples it adds hard problems, in the form of the examples.
        temperature: Sampling temperature. 0: greedy, with --samples 1.
        top_p: Nucleus sampling: sample from the most probable tokens up to this sum of
            probabilities.
        max_new_tokens: Maximum length of an answer, in tokens.
        seed: Seed of sampling, and of the draw of examples.
        chat_template_kwargs: Variables for the chat template, each NAME=VALUE, such as
            enable_thinking=false; carryon extract wants them too. Empty: those of --carryon, or
            none.
        task_seed: Seed of the problems.
        test_num: Problems of each task or data that carryon score will pose: questions equal to
            one of them are left out. 0: none.
        test_seed: Seed of those, --task-seed of carryon score.
        alpha: Strength of the carry-on. Omitted: the alpha in its card.
        keep_cut: Keep right answers that were cut at --max-new-tokens too.
        form_ratio: Leave out right answers of a form (the text without its numbers) that is right
            less often than this times the best form. 0: keep any form.
        known: Corpora of earlier samplings; answers in them are not kept again.
        unsolved: Pose only the problems that --known has no answer to.
        drop_long: Leave out, and count, problems that are too long for the base.
        held_out_ratio: Fraction of problems, or of their groups (`split_group` of --data), whose
            records are marked held out.
        engine: What generates. `auto`: vLLM, for the base alone, where CARRYON_VLLM_PYTHON names
            the Python of its environment.
        batch_rows: Answers that transformers generates at a time; fewer need less memory.
        forward: How the base is run.
    """
    _check(locals())
    from carryon.train.inference.sampling.asking import Asking
    from carryon.train.inference.sampling.sampler import sample as sample_answers

    problems = read_sources(tasks, data, num=num, seed=task_seed, rule=rule)
    if examples_out and len(problems) > 1:
        raise InputError(
            f"--examples-out: expected one task or data, got {len(problems)}, which have examples "
            "of their own. Fix: sample each by itself"
        )
    if test_num:
        problems = drop_tested(problems, num=test_num, seed=test_seed, rule=rule)
    sampled = sample_answers(
        problems,
        base=base,
        carryon=carryon,
        alpha=alpha,
        asking=Asking(
            samples=samples,
            max_samples=max_samples,
            instruction=instruction.strip(),
            keep_instruction=keep_instruction,
            shots=shots,
            example_sets=example_sets,
            hint=hint.strip(),
            keep=keep,
            keep_cut=keep_cut,
            form_ratio=form_ratio,
            known=known,
            unsolved=unsolved,
            drop_long=drop_long,
            held_out_ratio=held_out_ratio,
        ),
        settings=GenerateSettings(
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            chat_template_kwargs=chat_template_kwargs,
        ),
        forward=forward,
        engine=engine,
        batch_rows=batch_rows,
        examples=examples,
        examples_out=Path(examples_out) if examples_out else None,
        origin={"task_seed": task_seed},
        out=Path(out),
    )
    if chat_template_kwargs:
        words = shlex.join(chat_template_kwargs)
        logger.info(f"extract {out} with --chat-template-kwargs {words}, as it was sampled")
    counts = sampled.counts
    document = {"out": out, "answers": str(sampled.answers_path), **counts.to_dict()}
    document |= {"dropped": sampled.dropped, "new_tokens": sampled.new_tokens}
    document["seconds"] = round(sampled.seconds, 1)
    return print_result(
        document,
        f"{out}: {counts.kept:,} records; of {counts.tried:,} answers {counts.right:,} right "
        f"({counts.right / counts.tried:.0%}), {counts.cut:,} cut at the limit; left out: "
        f"{counts.equal:,} equal ones, {counts.surplus:,} beyond --keep, {counts.poor_form:,} of "
        f"forms that are seldom right, {counts.right_cut:,} cut; "
        f"{counts.unsolved:,} of {counts.problems:,} problems without a right answer",
    )


def read_sources(
    tasks: list[str], data: list[str], *, num: int, seed: int, rule: str
) -> "dict[str, list[Problem]]":
    """Return the training problems of tasks and data.

    Raises:
        InputError: neither is given, or as `read_problems`.
        MissingError: a file is not there.
    """
    from carryon.train.inference.scoring.problems import is_data, read_problems

    if not tasks and not data:
        raise InputError("--tasks: expected a task, or data, got neither. Fix: --tasks or --data")
    for each in data:
        if not is_data(each):
            raise MissingError(f"--data: expected a file with problems, got none at {each}")
    return {
        source: read_problems(source, num=num, seed=seed, rule=rule, is_training=True)
        for source in dict.fromkeys([*tasks, *data])
    }


def drop_tested(
    problems: "dict[str, list[Problem]]", *, num: int, seed: int, rule: str
) -> "dict[str, list[Problem]]":
    """Return the problems whose question is not that of a test problem.

    Raises:
        InputError: none is left.
    """
    from carryon.train.inference.scoring.problems import read_problems

    tested = {
        problem.folded
        for source in problems
        for problem in read_problems(source, num=num, seed=seed, rule=rule)
    }
    left = {
        source: [problem for problem in each if problem.folded not in tested]
        for source, each in problems.items()
    }
    before, after = (sum(map(len, each.values())) for each in (problems, left))
    if not after:
        raise InputError(
            f"--test-num: expected problems that are not in the test set, got {before:,} that all "
            "are. Fix: mark some records as held out, or a smaller --test-num"
        )
    if after < before:
        logger.info(f"{before - after:,} of {before:,} problems are in the test set: left out")
    return {source: each for source, each in left.items() if each}


def check_numbers(given: dict[str, Any]) -> None:
    """Check the numbers of a sampling, by name.

    Raises:
        InputError: one is out of range.
    """
    for name in ("num", "samples", "batch_rows"):
        if given[name] < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected 1 or more, got {given[name]}")
    for name in ("keep", "max_samples"):
        if given[name] < 0:
            raise InputError(f"--{name.replace('_', '-')}: expected 0 or more, got {given[name]}")
    for name in ("samples", "max_samples"):
        if given[name] > 1 and not given["temperature"]:
            raise InputError(
                f"--{name.replace('_', '-')}: expected 1 for greedy answers, got {given[name]}. "
                "Fix: --temperature 0.8"
            )


def check_form_ratio(value: float) -> None:
    """Check a --form-ratio.

    Raises:
        InputError: it is none.
    """
    if not 0 <= value <= 1:
        raise InputError(f"--form-ratio: expected 0 to 1, got {value}")


def check_hint(text: str) -> None:
    """Check a --hint.

    Raises:
        InputError: it has no place for the right answer.
    """
    from carryon.train.inference.scoring.arms import RESULT

    if text.strip() and RESULT not in text:
        raise InputError(
            f"--hint: expected a text with {RESULT}, got {text!a:.80}. "
            f'Fix: --hint "The answer is {RESULT}."'
        )


def check_shots(number: int) -> None:
    """Check a number of --shots.

    Raises:
        InputError: it is out of range.
    """
    from carryon.train.inference.scoring.arms import MAX_SHOTS

    if not 0 <= number <= MAX_SHOTS:
        raise InputError(f"--shots: expected 0 to {MAX_SHOTS}, got {number}")


def _check(given: dict[str, Any]) -> None:
    check_numbers(given)
    check_form_ratio(given["form_ratio"])
    if not 0 <= given["held_out_ratio"] < 1:
        got = given["held_out_ratio"]
        raise InputError(f"--held-out-ratio: expected 0 to below 1, got {got}")
    if given["unsolved"] and not given["known"]:
        raise InputError("--unsolved: expected corpora in --known, got none. Fix: --known FILE")
    if given["keep_instruction"] and not given["instruction"].strip():
        raise InputError("--keep-instruction: expected an --instruction, got none")
    check_shots(given["shots"])
    if given["example_sets"] < 1:
        raise InputError(f"--example-sets: expected 1 or more, got {given['example_sets']}")
    for name, usual in (("examples", ""), ("example_sets", 1), ("examples_out", "")):
        if given[name] != usual and not given["shots"]:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: expected a number of --shots, got none. Fix: --shots 4")
    check_hint(given["hint"])
    if given["alpha"] is not None and not given["carryon"]:
        raise InputError("--alpha: expected a carry-on, got none. Fix: --carryon FOLDER")
    if given["test_seed"] != TEST_SEED and not given["test_num"]:
        raise InputError("--test-seed: expected a --test-num, got none. Fix: --test-num 200")
    if not given["base"] and not given["carryon"]:
        raise InputError("--base: expected a base or a carry-on, got neither. Fix: --base")
