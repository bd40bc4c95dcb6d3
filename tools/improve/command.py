"""`carryon improve`: rounds of sampling, verifying, extracting, training and scoring.

Each step is a `carryon` command, logged as a user would type it and run in this process.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from carryon.cache.errors import InputError
from carryon.cache.files.documents import json_bytes, parse_json, read_bounded, write_json
from carryon.cache.lock import FOLDER_LOCK, folder_lock
from carryon.cache.settings import ForwardSettings
from carryon.tools.cli.main import check_command
from carryon.tools.cli.output import print_result
from carryon.tools.improve.inputs import Files, digest_inputs
from carryon.tools.improve.plan import HINT, TEST_SEED, Plan
from carryon.tools.improve.report import Row, format_rows, plot_rounds, read_scores
from carryon.tools.improve.sample import check_form_ratio, check_hint, check_numbers, check_shots
from carryon.tools.improve.steps import Step, run_step

logger = logging.getLogger(__name__)

_SETTINGS = "improve.json"
_OLDER = {"max_samples": 0, "form_ratio": 0, "hint": "", "shots": 0, "chat_template_kwargs": []}
"""Settings of folders that were made before there were these."""


def improve(
    *,
    base: str,
    out: str,
    tasks: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    data: list[str] = [],  # noqa: B006
    rule: str = "auto",
    rounds: int = 3,
    num: int = 200,
    samples: int = 8,
    max_samples: int = 32,
    keep: int = 4,
    instruction: str = "Think step by step.",
    shots: int = 0,
    hint: str = HINT,
    temperature: float = 0.8,
    max_new_tokens: int = 256,
    chat_template_kwargs: list[str] = [],  # noqa: B006
    keep_cut: bool = False,
    form_ratio: float = 0.5,
    task_seed: int = 1,
    test_num: int = 200,
    test_seed: int = TEST_SEED,
    taps: list[str] = [],  # noqa: B006
    extract_config: str = "",
    train_config: str = "",
    engine: Literal["auto", "transformers", "vllm"] = "auto",
    batch_rows: int = 64,
    forward: ForwardSettings,
) -> dict[str, Any]:
    """Train carry-ons on their own verified answers, round by round.

    Round 1 samples answers of the base with the instruction; later rounds sample answers of base
    and last carry-on without it. Problems without a right answer get more of them; where there is
    still none, later rounds tell it to the base, which writes an answer. Right answers, less those
    of forms that are seldom right, are extracted and appended to one store, a carry-on
    is trained on all of it, and scored on test problems that no round has seen. Every step is a
    carryon command, logged as typed. The same command resumes, and more --rounds go further. OUT
    gets a folder a round, the store, and accuracy.png. The last line on stdout is a JSON line with
    the rounds.

    Example:
        carryon improve --base HuggingFaceTB/SmolLM2-135M-Instruct --tasks chain_sum --out improved

    Args:
        base: The base: hub id, folder or .gguf file.
        out: Folder of all rounds, created if missing.
        tasks: Tasks of reasoning-gym, each NAME or NAME:SETTING=VALUE,...; each round has other
            problems.
        data: Files of questions with right answers. The test problems are the records marked held
            out; without any, a draw of --test-num records, which are not posed otherwise.
        rule: Which answers are right, as in carryon sample.
        rounds: Number of rounds.
        num: Problems of each task in a round; of data at most this number.
        samples: Answers to each problem.
        max_samples: Answers at most to a problem without a right one, so that hard ones are not
            missing. Below --samples: no more than those.
        keep: Most right answers kept of a problem. 0: all.
        instruction: Text behind each question where the base answers; not stored. Empty: none.
        shots: Own solved problems shown before each question of round 1 in place of the
            instruction, under which they are found first; not stored. 0: none.
        hint: From round 2 on, text that tells the base the right answer in place of {answer} where
            no round has found it, behind the question and those --shots, or 8 solved ones of round
            1; not stored. Empty: such problems are left out.
        temperature: Sampling temperature.
        max_new_tokens: Maximum length of an answer, in tokens.
        chat_template_kwargs: Variables for the chat template, each NAME=VALUE, such as
            enable_thinking=false for a base that thinks at length.
        keep_cut: Keep right answers that were cut at --max-new-tokens too.
        form_ratio: Leave out right answers of a form (the text without its numbers) that is right
            less often than this times the best form. 0: keep any form.
        task_seed: Seed of the training problems.
        test_num: Test problems of each task or data.
        test_seed: Seed of the test problems.
        taps: Hidden states to keep, and to train on without --train-config. Empty: final and two
            middle layers; with --extract-config its own.
        extract_config: YAML file with more options of carryon extract. Empty: none.
        train_config: YAML file or preset with options of carryon train. Empty: 6 epochs of small
            steps against a sampled softmax, for short answers.
        engine: What generates the base's answers. `auto`: vLLM where CARRYON_VLLM_PYTHON names the
            Python of its environment.
        batch_rows: Answers that transformers generates at a time; fewer need less memory.
        forward: How the base is run.
    """
    for name, value in (("--rounds", rounds), ("--test-num", test_num)):
        if value < 1:
            raise InputError(f"{name}: expected 1 or more, got {value}")
    numbers = {
        "num": num,
        "samples": samples,
        "max_samples": max_samples,
        "batch_rows": batch_rows,
        "keep": keep,
    }
    check_numbers({**numbers, "temperature": temperature})
    check_form_ratio(form_ratio)
    check_hint(hint)
    check_shots(shots)
    if shots and len(tasks) + len(data) > 1:
        raise InputError(
            f"--shots: expected one task or data, got {len(tasks) + len(data)}, which have "
            "examples of their own. Fix: improve each by itself"
        )
    if not tasks and not data:
        raise InputError("--tasks: expected a task, or data, got neither. Fix: --tasks or --data")
    if tasks and task_seed < test_seed + test_num and test_seed < task_seed + rounds * num:
        raise InputError(
            f"--test-seed: expected one far from the training problems, which are drawn from "
            f"{task_seed} to {task_seed + rounds * num - 1}, got {test_seed}. "
            f"Fix: --test-seed {task_seed + TEST_SEED - 1}"
        )
    plan = Plan(
        root=Path(out),
        base=base,
        tasks=tasks,
        data=data,
        rule=rule,
        num=num,
        samples=samples,
        max_samples=max_samples,
        keep=keep,
        instruction=instruction.strip(),
        shots=shots,
        hint=hint.strip(),
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        chat_template_kwargs=chat_template_kwargs,
        keep_cut=keep_cut,
        form_ratio=form_ratio,
        task_seed=task_seed,
        test_num=test_num,
        test_seed=test_seed,
        taps=taps or _default_taps(base, extract_config),
        extract_config=extract_config,
        train_config=train_config,
        engine=engine,
        batch_rows=batch_rows,
        forward=forward,
    )
    extract_argv = plan.extract_argv(1, [plan.corpus(1)])
    for argv in (plan.sample_argv(1, []), extract_argv, plan.train_argv(1), plan.score_argv(1)):
        check_command(argv[0], argv[1:])  # not first after hours of sampling
    files = digest_inputs(plan)
    with folder_lock(plan.root, kind="folder of rounds"):
        _record_settings(plan)
        rows = _score_base(plan, files)
        corpora: list[Path] = []
        for number in range(1, rounds + 1):
            before = rows[-1].records if number > 1 else 0
            row = _run_round(plan, number, corpora, before=before, files=files)
            if row is None:
                logger.warning(f"round {number} found no new right answer: stopped")
                break
            rows.append(row)
        plot = plan.root / "accuracy.png"
        has_plot = plot_rounds(rows, plot)
    document = {"out": out, "rounds": [row.to_dict() for row in rows]}
    return print_result(
        {**document, "plot": str(plot) if has_plot else ""}, f"\n{format_rows(rows)}"
    )


def _default_taps(base: str, extract_config: str) -> list[str]:
    """Return `final` and two middle layers, unless a file of settings says what to keep."""
    from carryon.cache.base.facts import read_facts
    from carryon.train.modules.taps import middle_taps

    num_layers = None if extract_config else read_facts(base).num_layers
    return list(dict.fromkeys(["final", *middle_taps(num_layers)])) if num_layers else []


def _score_base(plan: Plan, files: Mapping[str, Files]) -> list[Row]:
    """Return the rows of the base, plain and with the instruction."""
    step = run_step(plan.folder(0) / "score.json", plan.score_argv(0), files=files["score"])
    scores = read_scores(step.result)
    names = {name: f"base, {name}" if name != "base" else name for name in scores}
    return [
        Row(name=names[arm], round=0, records=0, seconds={}, **_ints(each))
        for arm, each in scores.items()
    ]


def _run_round(
    plan: Plan, number: int, corpora: list[Path], *, before: int, files: Mapping[str, Files]
) -> Row | None:
    """Run a round and return its row; None if it finds nothing new. `corpora` gets its own."""
    folder, seconds = plan.folder(number), dict[str, float]()

    def run(name: str, argv: list[str]) -> Step:
        path = folder / f"{name}.json"
        step = run_step(path, argv, files=files[argv[0]], may_be_empty=number > 1)
        seconds[step.name] = seconds.get(step.name, 0.0) + step.seconds
        return step

    found, records = list[Path](), before
    if number == 1 and plan.shots:
        run("examples", plan.examples_argv())
    step = run("sample", plan.sample_argv(number, corpora))
    if step.result:
        found.append(plan.corpus(number))
        records += step.result["kept"]
    if number > 1 and plan.hint:
        step = run("hinted", plan.hinted_argv(number, [*corpora, *found]))
        if step.result:
            found.append(plan.hinted(number))
            records += step.result["kept"]
    if not found:
        return None
    corpora += found
    run("extract", plan.extract_argv(number, found))
    run("train", plan.train_argv(number))
    [score] = read_scores(run("score", plan.score_argv(number)).result).values()
    return Row(name=str(number), round=number, records=records, seconds=seconds, **_ints(score))


def _ints(score: dict[str, float]) -> dict[str, Any]:
    return {**score, "problems": int(score["problems"])}


def _record_settings(plan: Plan) -> None:
    """Write the settings of all rounds, or compare them with those of the steps that are done.

    Raises:
        InputError: the folder was made with other settings, or holds something else.
    """
    path, settings = plan.root / _SETTINGS, plan.to_dict()
    if not path.exists():
        names = sorted(each.name for each in plan.root.iterdir() if each.name != FOLDER_LOCK)
        if names:
            raise InputError(
                f"--out: expected a new or empty folder or that of earlier rounds, got {plan.root} "
                f"with {names[0]}. Fix: give another --out"
            )
    if not any(plan.root.glob("round-*/*.json")):
        write_json(path, settings)
        return
    try:
        before = _OLDER | dict(parse_json(read_bounded(path)))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: expected settings. Fix: give another --out") from error
    for name, value in parse_json(json_bytes(settings)).items():
        if before.get(name) != value:
            raise InputError(
                f"--{name.replace('_', '-')}: expected {before.get(name)!a:.80} as in {path}, got "
                f"{value!a:.80}. Fix: give another --out"
            )
