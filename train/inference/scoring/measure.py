"""From problems and arms to counts: models loaded in turn, known questions refused, answers kept.

Nothing is loaded before the models of all arms are known to be there, and nothing generated before
the prompts of all arms on the base are known to fit.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from carryon.cache.corpus.reading.cache_folder import cache_folder
from carryon.cache.errors import InputError
from carryon.cache.files.documents import digest_of
from carryon.cache.files.locked import held
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.scoring.answer_file import Answer, AnswerFile
from carryon.train.inference.scoring.arms import Arm, parse_arms
from carryon.train.inference.scoring.counts import ArmScore, count, judge
from carryon.train.inference.scoring.known import find_known
from carryon.train.inference.scoring.models import Models, check_arms, free_memory
from carryon.train.inference.scoring.problems import Problem, read_examples
from carryon.train.inference.scoring.run import answer_problems, check_rooms
from carryon.train.inference.scoring.vllm_engine import Engine

logger = logging.getLogger(__name__)

_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """Counts of all arms on a task."""

    rule: str
    known: int
    """Problems left out, as their question is in a store."""
    scores: list[ArmScore]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Counts and answers of all tasks."""

    results: Mapping[str, TaskResult]
    answers: Mapping[str, Mapping[str, Sequence[Sequence[Answer]]]]
    """Task -> arm -> for each problem its answers."""
    arms: Sequence[str]
    alpha: float | None
    """In the carry-on's card."""
    path: Path
    """File of the answers."""
    unmeasured: Sequence[InputError]
    """Why a task has no counts."""


def measure(
    problems: Mapping[str, Sequence[Problem]],
    *,
    arms: Sequence[str] = (),
    base: str | None = None,
    carryon: str = "",
    examples: str = "",
    stores: Sequence[str] = (),
    drop_known: bool = False,
    seed: int = 0,
    samples: int = 1,
    settings: GenerateSettings | None = None,
    forward: ForwardSettings | None = None,
    engine: Engine = "auto",
    batch_rows: int = 16,
    mix: Sequence[str] = (),
    mix_device: Sequence[str] = (),
    out: Path | None = None,
) -> Measured:
    """Let arms answer problems, and count; the same call resumes.

    Args:
        problems: of each task.
        arms: see `arms`; empty: the base, and the carry-on if there is one.
        base: hub id, folder or .gguf file. None: where it was at extraction.
        carryon: folder or hub id; empty: none.
        examples: task or data of few-shot examples; empty: the task itself.
        stores: folders of stores in which questions may not stand.
        drop_known: leave such questions out.
        seed: of the examples.
        samples: answers to each problem.
        settings: of generation. None: the defaults.
        forward: of the base. None: the defaults.
        engine: see `uses_vllm`.
        batch_rows: answers that transformers generates at a time.
        mix: places of the other bases of a mixture. Empty: where they were at extraction.
        mix_device: device of each of them, or one for all. Empty: that of the base.
        out: file of answers. None: a file in the cache, named by all settings.

    Raises:
        InputError: a wrong arm or one that cannot answer, a prompt that is too long, known
            questions, or `out` has other answers.
        MissingError: a model or store is not there.
        SettingMismatchError: the carry-on or store belongs to another base.
        StoreBusyError: another process writes to `out`.
    """
    settings, forward = settings or GenerateSettings(), forward or ForwardSettings()
    parsed = parse_arms(arms, has_carryon=bool(carryon))
    check_arms(parsed, carryon=carryon, mix=mix, mix_device=mix_device)
    shots = max(arm.shots for arm in parsed)
    if examples and not shots:
        raise InputError("examples: expected a few-shot arm, got none. Fix: --arms few-shot:4")
    shown = {
        task: read_examples(examples or task, num=shots, seed=seed, posed=each) if shots else []
        for task, each in problems.items()
    }
    models = Models(
        base=base,
        carryon=carryon,
        forward=forward,
        settings=settings,
        engine=engine,
        batch_rows=batch_rows,
        mix=mix,
        mix_device=mix_device,
        arms=parsed,
    )
    kept = _refuse_known(problems, models, stores, drop_known=drop_known)
    deciding = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed,
        "chat": settings.chat,
        "compute_dtype": str(models.base.compute_dtype).removeprefix("torch."),
        "examples": [[examples, seed]] if shots else [],
        **settings.template_facts,
    }
    places = [base or models.base.source, carryon, *(arm.place for arm in parsed), *mix]
    path = out or _default_path([deciding, list(arms), list(kept), *map(_fingerprint, places)])
    with held(path.with_name(f".{path.name}.lock"), of=path, kind="file of answers"):
        file = AnswerFile(path, deciding)
        _check_prompts(parsed, models, kept, shown, settings)
        for arm in parsed:
            answer_problems(
                arm, models.open(arm), kept, examples=shown, file=file, settings=settings,
                samples=samples,
            )  # fmt: skip
            models.log_costs()
            free_memory()
        judged = judge(kept, parsed, file=file, samples=samples)
    results, unmeasured = dict[str, TaskResult](), list[InputError]()
    for task, posed in kept.items():
        try:
            scores = count(posed, judged[task])
        except InputError as error:
            unmeasured.append(InputError(f"{task}: {error}"))
            continue
        num_known = len(problems[task]) - len(posed)
        results[task] = TaskResult(rule=posed[0].rule.name, known=num_known, scores=scores)
    return Measured(
        results=results,
        answers=judged,
        arms=[arm.name for arm in parsed],
        alpha=models.alpha,
        path=path,
        unmeasured=unmeasured,
    )


def _check_prompts(
    arms: Sequence[Arm],
    models: Models,
    problems: Mapping[str, Sequence[Problem]],
    examples: Mapping[str, Sequence[Problem]],
    settings: GenerateSettings,
) -> None:
    """Check the prompts of all arms on the base, before the first of them answers."""
    posed = [(task, problem) for task, each in problems.items() for problem in each]
    for arm in arms:
        if arm.model != "merged":
            prompts = [arm.make_prompt(problem, examples[task]) for task, problem in posed]
            rows, room = models.encode(arm, prompts), models.base.identity.context_tokens
            check_rooms(arm, posed, rows, settings=settings, context_tokens=room)


def _refuse_known(
    problems: Mapping[str, Sequence[Problem]],
    models: Models,
    stores: Sequence[str],
    *,
    drop_known: bool,
) -> dict[str, Sequence[Problem]]:
    """Return the problems whose question is in no store.

    Raises:
        InputError: a question is in one and may not be dropped, or all of a task are.
    """
    kept = dict(problems)
    for folder in stores:
        store = Store.open(folder)
        for task, posed in problems.items():
            known = find_known(posed, store, tokenizer=models.base.tokenizer, card=models.card)
            if not known:
                continue
            ids = {problem.id for problem in known}
            named = ", ".join(problem.id for problem in known[:_SHOWN])
            line = f"{len(known):,} of {len(posed):,} questions are in {folder}, such as {named}"
            if not drop_known:
                raise InputError(
                    f"{task}: {line}. Fix: --drop-known leaves them out; or another --task-seed"
                )
            logger.warning(f"{task}: {line}: left out")
            kept[task] = [problem for problem in kept[task] if problem.id not in ids]
            if not kept[task]:
                raise InputError(f"{task}: {line}: none is left. Fix: another --task-seed")
    return kept


def _default_path(facts: Any) -> Path:  # noqa: ANN401
    versions = {name: version(name) for name in ("gpt-carry-on", "torch", "transformers")}
    digest = digest_of({"facts": facts, "versions": versions})
    return cache_folder() / "answers" / f"{digest[:32]}.jsonl"


def _fingerprint(place: str) -> list[Any]:
    """Return what changes with the files of a folder; of a hub id its name."""
    path = Path(place)
    if not place or not path.exists():
        return [place]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [str(path.resolve()), *([name, s.st_size, s.st_mtime_ns] for name, s in stats)]
