"""Sample answers, verify them by rules, and write the right ones as a corpus.

All answers lie in a hidden file beside the corpus, appended batch by batch; the corpus is made of
them at the end. So an interrupted sampling resumes, and more samples or another rule cost only the
answers that are missing.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError, NothingRightError
from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import digest_of
from carryon.cache.files.locked import held
from carryon.cache.settings import ForwardSettings
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.prompts import uses_template
from carryon.train.inference.sampling.asking import Asking
from carryon.train.inference.sampling.examples import (
    Examples,
    draw_examples,
    fit_shots,
    make_examples,
)
from carryon.train.inference.sampling.posing import drop_unhinted, fit, pose
from carryon.train.inference.sampling.records import (
    choose_held_out,
    make_record,
    read_known,
    to_lines,
)
from carryon.train.inference.sampling.selection import Counts, Selection, select
from carryon.train.inference.sampling.trial import choose_set
from carryon.train.inference.scoring.answer_file import Answer, AnswerFile
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.counts import judge
from carryon.train.inference.scoring.models import Answerer, Models, check_arms
from carryon.train.inference.scoring.problems import Problem
from carryon.train.inference.scoring.run import answer_problems
from carryon.train.inference.scoring.vllm_engine import Engine

logger = logging.getLogger(__name__)

_SHOWN, _SHOWN_CHARS = 3, 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A corpus that was written."""

    path: Path
    answers_path: Path
    """File of all answers, right and wrong."""
    counts: Counts
    dropped: int
    """Problems left out, as their prompt is too long."""
    new_tokens: int
    seconds: float
    """Of generation, in this and earlier calls."""


def sample(
    problems: Mapping[str, Sequence[Problem]],
    *,
    base: str | None = None,
    carryon: str = "",
    alpha: float | None = None,
    asking: Asking | None = None,
    settings: GenerateSettings | None = None,
    forward: ForwardSettings | None = None,
    engine: Engine = "auto",
    batch_rows: int = 16,
    examples: str = "",
    examples_out: Path | None = None,
    origin: Mapping[str, Any] | None = None,
    out: Path,
) -> Sampled:
    """Sample answers to problems, and write the right ones to `out`; the same call resumes.

    Args:
        problems: of each task.
        base: hub id, folder or .gguf file. None: where it was at extraction of the carry-on.
        carryon: folder or hub id; empty: the base answers.
        alpha: strength of the carry-on. None: its card's.
        asking: None: the defaults.
        settings: of generation. None: the defaults.
        forward: of the base. None: the defaults.
        engine: see `uses_vllm`.
        batch_rows: answers that transformers generates at a time.
        examples: task or data of the solved problems that prompts show; see `draw_examples`.
        examples_out: file for those that were shown, as data. None: none is written.
        origin: facts for the provenance of each record, such as the seed of the problems.
        out: the corpus, as JSON lines.

    Raises:
        NothingRightError: no answer is right, no new one is, or no problem is left to pose.
        InputError: a prompt that is too long, or `out` is of another sampling or none.
        MissingError: a model or corpus is not there.
        SettingMismatchError: the carry-on was trained on another base.
        StoreBusyError: another process samples into `out`.
    """
    asking = asking or Asking()
    settings, forward = settings or GenerateSettings(), forward or ForwardSettings()
    answers_path = out.with_name(f".{out.name}.answers")
    _refuse_foreign(out, answers_path, name="--out")
    if examples_out:
        _refuse_foreign(examples_out, answers_path, name="--examples-out")
        if examples_out.resolve() == out.resolve():
            raise InputError(f"--examples-out: expected another file than --out, got {out} twice")
    known = read_known(asking.known)
    unsolved = drop_unhinted(pose(problems, known, asking), asking.hint)
    sets = draw_examples(
        unsolved,
        source=examples,
        shots=asking.shots,
        sets=asking.example_sets,
        seed=settings.seed,
    )
    arm = Arm(
        name="carryon" if carryon else "base",
        model="carryon" if carryon else "base",
        alpha=alpha if carryon else None,
        instruction=asking.instruction,
        shots=asking.shots,
        hint=asking.hint,
    )
    check_arms([arm], carryon=carryon, mix=(), mix_device=())
    models = Models(
        base=base,
        carryon=carryon or None,
        forward=forward,
        settings=settings,
        engine=engine,
        batch_rows=batch_rows,
    )
    model = models.open(arm)
    fitting: Examples = unsolved
    dropped = 0
    for shown in sets:
        if arm.shots:
            room = model.context_tokens - settings.max_new_tokens
            arm = fit_shots(arm, model, unsolved, shown, room=room)
        fitting, more = fit(fitting, arm, model, shown, asking, settings)
        dropped += more
    facts = _facts(models, asking, settings, carryon=carryon, alpha=alpha)
    facts |= _facts_of_prompt(arm, sets)
    with held(out.with_name(f".{out.name}.lock"), of=out, kind="corpus"):
        file = AnswerFile(answers_path, {**facts, "chat": settings.chat, "model": model.digest})
        arm, shown = choose_set(
            arm, model, fitting, sets, keep_cut=asking.keep_cut, file=file, settings=settings
        )
        if examples_out:
            _write_examples(examples_out, shown)
        rows = _answer(fitting, arm, model, shown, known, asking, file=file, settings=settings)
        posed = [(task, problem) for task, each in fitting.items() for problem in each]
        selection = select(
            [row for each in rows.values() for row in each],
            asked=[problem.asked for _, problem in posed],
            known=known,
            keep=asking.keep,
            keep_cut=asking.keep_cut,
            form_ratio=asking.form_ratio,
            tasks=[task for task, _ in posed],
        )
        counts = selection.counts
        _refuse_nothing(rows, counts, fitting)
        is_chat = uses_template(models.base.tokenizer, models.framing, settings.chat)
        facts = {**(origin or {}), **facts}
        facts |= {"example_set": sets.index(shown) + 1} if len(sets) > 1 else {}
        records = _records(posed, selection, arm, asking, facts, is_chat=is_chat)
        write_file(out, to_lines(records))
    asked = {problem.id for each in fitting.values() for problem in each}
    answers = [answer for answer in file.answers.values() if answer.id in asked]
    return Sampled(
        path=out,
        answers_path=answers_path,
        counts=counts,
        dropped=dropped,
        new_tokens=sum(answer.tokens for answer in answers),
        seconds=sum(answer.seconds for answer in answers),
    )


def _answer(
    problems: Mapping[str, Sequence[Problem]],
    arm: Arm,
    model: Answerer,
    examples: Examples,
    known: Mapping[str, Sequence[str]],
    asking: Asking,
    *,
    file: AnswerFile,
    settings: GenerateSettings,
) -> dict[str, list[list[Answer]]]:
    """Return task -> for each problem its answers, judged; those that are missing are generated.

    Problems without a right answer get twice as many, again and again, up to `max_samples`: else
    hard ones are missing in the corpus (DART-Math, arXiv 2407.13690, section 3).
    """
    rows, left, samples = dict[tuple[str, str], list[Answer]](), dict(problems), asking.samples
    while True:
        answer_problems(
            arm,
            model,
            left,
            examples=examples,
            file=file,
            settings=settings,
            samples=samples,
        )
        for task, arms in judge(left, [arm], file=file, samples=samples).items():
            for problem, row in zip(left[task], arms[arm.name], strict=True):
                rows[task, problem.id] = row
        left = {
            task: [
                problem
                for problem in each
                if problem.question not in known
                and not any(
                    answer.is_right and (asking.keep_cut or not answer.is_cut)
                    for answer in rows[task, problem.id]
                )
            ]
            for task, each in left.items()
        }
        num_left = sum(map(len, left.values()))
        if samples >= asking.max_samples or not num_left:
            break
        samples = min(2 * samples, asking.max_samples)
        logger.info(f"{num_left:,} problems have no right answer: {samples} answers to each")
        left = {task: each for task, each in left.items() if each}
    return {task: [rows[task, problem.id] for problem in each] for task, each in problems.items()}


def _refuse_foreign(path: Path, answers_path: Path, *, name: str) -> None:
    if path.is_dir():
        raise InputError(f"{name}: expected a file, got the folder {path}")
    if path.exists() and not answers_path.exists():
        raise InputError(
            f"{name}: expected a new file, or one that this sampling has made, got {path}. "
            f"Fix: another {name}"
        )


def _write_examples(path: Path, examples: Examples) -> None:
    content = to_lines(make_examples(examples))
    if path.exists() and path.read_bytes() != content:
        raise InputError(
            f"--examples-out: expected the examples of this sampling, got others in {path}. "
            "Fix: another --examples-out"
        )
    write_file(path, content)


def _facts(
    models: Models,
    asking: Asking,
    settings: GenerateSettings,
    *,
    carryon: str,
    alpha: float | None,
) -> dict[str, Any]:
    """Return what decides the answers, as the provenance of each record tells it."""
    identity, card = models.base.identity, models.card
    return {
        "base": identity.id,
        "base_sha256": identity.weights_sha256,
        "carryon": carryon,
        "carryon_sha256": digest_of(card.to_dict()) if card and carryon else "",
        "alpha": alpha if alpha is not None or card is None else card.alpha,
        "instruction": asking.instruction,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_new_tokens": settings.max_new_tokens,
        "sample_seed": settings.seed,
        **settings.template_facts,
    }


def _facts_of_prompt(arm: Arm, sets: Sequence[Examples]) -> dict[str, Any]:
    """Return what the prompts show that is not stored; nothing where they show nothing."""
    facts: dict[str, Any] = {"hint": arm.hint} if arm.hint else {}
    if arm.shots:
        shown = [
            {task: [[one.question, one.answer] for one in each] for task, each in examples.items()}
            for examples in sets
        ]
        facts |= {"shots": arm.shots, "examples_sha256": digest_of({"sets": shown})}
    return facts


def _refuse_nothing(
    rows: Mapping[str, Sequence[Sequence[Answer]]],
    counts: Counts,
    problems: Mapping[str, Sequence[Problem]],
) -> None:
    """Refuse a corpus without records.

    Raises:
        NothingRightError: the text has the number of answers tried, and three of them.
    """
    if counts.kept:
        return
    if 0 < counts.right == counts.right_cut:
        raise NothingRightError(
            f"all {counts.right:,} right answers of {counts.tried:,} were cut at the limit of new "
            "tokens. Fix: raise --max-new-tokens, or --keep-cut"
        )
    if counts.poor_form:
        raise NothingRightError(
            f"{counts.poor_form:,} of {counts.right:,} right answers are of forms that are seldom "
            "right, and the others were cut or are known. Fix: a smaller --form-ratio, or 0"
        )
    if counts.right:
        raise NothingRightError(
            f"all {counts.right:,} right answers of {counts.tried:,} are in --known, or their "
            "problem has enough. Fix: raise --samples, --num or --keep"
        )
    rules = sorted({each.rule.name for row in problems.values() for each in row})
    answers = [row[0] for each in rows.values() for row in each if row]
    shown = "; ".join(
        f"{' '.join(answer.text.split())!a:.{_SHOWN_CHARS}} (right: {answer.right!a:.40})"
        for answer in answers[:_SHOWN]
    )
    raise NothingRightError(
        f"none of {counts.tried:,} answers is right by the rule {', '.join(rules)}, "
        f"{counts.cut:,} were cut at the limit; such as {shown}. Fix: another --instruction, "
        "--rule or --max-new-tokens, or an easier task"
    )


def _records(
    posed: Sequence[tuple[str, Problem]],
    selection: Selection,
    arm: Arm,
    asking: Asking,
    facts: Mapping[str, Any],
    *,
    is_chat: bool,
) -> list[dict[str, Any]]:
    """Return the records of the answers that are kept.

    Args:
        posed: task and problem of each row of the selection.
    """
    pairs = [
        (task, problem, answer)
        for (task, problem), row in zip(posed, selection.kept, strict=True)
        for answer in row
    ]
    held_out = choose_held_out(
        (problem for _, problem, _ in pairs),
        ratio=asking.held_out_ratio,
        is_first=not asking.known,
    )
    return [
        make_record(
            problem,
            replace(arm, hint="").make_prompt(problem, ())[-1]["content"]
            if asking.keep_instruction
            else problem.question,
            answer.text,
            is_chat=is_chat,
            is_held_out=problem.half in held_out,
            provenance={
                "task": task,
                "rule": problem.rule.name,
                "sample": answer.sample,
                **facts,
            },
        )
        for task, problem, answer in pairs
    ]
