"""`carryon score`: right answers of base, carry-on and other models, on tasks or data."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings
from carryon.tools.cli.output import print_result
from carryon.tools.cli.table import format_table
from carryon.train.inference.generate_settings import GenerateSettings

if TYPE_CHECKING:
    from carryon.train.inference.scoring.counts import ArmScore

logger = logging.getLogger(__name__)


def score(
    *,
    tasks: list[str],
    carryon: str = "",
    base: str | None = None,
    arms: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    rule: str = "auto",
    num: int = 100,
    task_seed: int = 1_000_001,
    samples: int = 1,
    examples: str = "",
    store: list[str] = [],  # noqa: B006
    drop_known: bool = False,
    engine: Literal["auto", "transformers", "vllm"] = "auto",
    batch_rows: int = 64,
    mix: list[str] = [],  # noqa: B006
    mix_device: list[str] = [],  # noqa: B006
    out: str = "",
    html: str = "",
    settings: GenerateSettings,
    forward: ForwardSettings,
) -> list[dict[str, Any]]:
    """Count right answers of base, carry-on and other models side by side.

    Arms: base, carryon, carryon@ALPHA, carryon=FOLDER@ALPHA, merged=FOLDER, lora=FOLDER, each
    also with +instruct:TEXT (behind the question) or +few-shot:K. Fractions have 95 % intervals;
    each arm is compared with the first one by a sign test. The same command resumes. stdout gets
    a JSON line for each task.

    Example:
        carryon score --carryon run/carryon --tasks leg_counting --arms base few-shot:4 carryon

    Args:
        tasks: Tasks of reasoning-gym, each NAME or NAME:SETTING=VALUE,...; or files of questions
            with right answers.
        carryon: Folder of the carry-on, or its id on the hub. Empty: none.
        base: The base: hub id, folder or .gguf file. Omitted: where it was at extraction.
        arms: Models and ways to ask them; the first is what the others are compared with. Empty:
            base, and carryon.
        rule: Which answers are right: last-number, boxed, after:MARKER, regex:PATTERN, exact, end,
            task (its own verifier) or module:function. `auto`: task, or for data a rule that fits
            the right answers.
        num: Problems of each task; of data at most this number, drawn with --task-seed.
        task_seed: Seed of the problems; take one far from the seed of the training problems.
        samples: Answers to each problem, for pass@k. More than 1 needs --temperature.
        examples: Task or data whose solved problems few-shot shows, such as --examples-out of
            carryon sample; few records in their order, of many a draw. Empty: other problems of
            the task.
        store: Stores that models were trained on; problems whose question is in them are refused.
        drop_known: Leave out the problems found in --store.
        engine: What generates. `auto`: vLLM, for ordinary checkpoints, where CARRYON_VLLM_PYTHON
            names the Python of its environment.
        batch_rows: Problems answered at a time by transformers; fewer need less memory.
        mix: The other bases of a mixture, in the order of its card. Omitted: where they were at
            extraction.
        mix_device: Device of each of them, or one for all. Omitted: that of the base.
        out: File for all answers, as JSON lines; it is resumed. Empty: a file in the cache.
        html: Page with all questions, answers and verdicts. Empty: none.
        settings: How text is generated.
        forward: How the base is run.
    """
    from carryon.tools.cli.places import check_page, write_page
    from carryon.tools.commands.pages.answers import make_answer_page
    from carryon.train.inference.scoring.measure import measure
    from carryon.train.inference.scoring.problems import read_problems

    for name, value in (("--num", num), ("--batch-rows", batch_rows), ("--samples", samples)):
        if value < 1:
            raise InputError(f"{name}: expected 1 or more, got {value}")
    if samples > 1 and not settings.temperature:
        raise InputError(
            f"--samples: expected 1 for greedy answers, got {samples}. Fix: --temperature 0.8"
        )
    if html:
        check_page(html, name="--html")
    if drop_known and not store:
        raise InputError("--drop-known: expected with --store, got none. Fix: --store FOLDER")
    problems = {
        task: read_problems(task, num=num, seed=task_seed, rule=rule)
        for task in dict.fromkeys(tasks)
    }
    measured = measure(
        problems,
        arms=arms,
        base=base,
        carryon=carryon,
        examples=examples,
        stores=store,
        drop_known=drop_known,
        seed=task_seed,
        samples=samples,
        settings=settings,
        forward=forward,
        engine=engine,
        batch_rows=batch_rows,
        mix=mix,
        mix_device=mix_device,
        out=Path(out) if out else None,
    )
    documents, tables = [], []
    for task, result in measured.results.items():
        table = format_table(table_of(result.scores))
        tables.append(
            f"{task} ({result.scores[0].problems:,} problems, rule {result.rule})\n{table}"
        )
        document = {"task": task, "num": result.scores[0].problems, "task_seed": task_seed}
        document |= {"rule": result.rule, "samples": samples, "known": result.known}
        document |= {"max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature}
        document |= {"top_p": settings.top_p, "seed": settings.seed, "alpha": measured.alpha}
        document["arms"] = [each.to_dict() for each in result.scores]
        documents.append(print_result(document, tables[-1]))
    logger.info(f"answers: {measured.path}")
    if html:
        title = f"Answers of {', '.join(measured.arms)}"
        page = make_answer_page(measured.answers, title=title, table="\n\n".join(tables))
        write_page(html, page, name="--html")
        logger.info(f"page: {html}")
    for error in measured.unmeasured[1:]:
        logger.warning(str(error))
    if measured.unmeasured:
        raise measured.unmeasured[0]
    return documents


def table_of(scores: Sequence["ArmScore"]) -> list[list[str]]:
    """Return the rows of a table of arms, its heading first."""
    ks = [k for k in scores[0].pass_at if k != "1"]
    heading = ["arm", "right", "accuracy", "95 %", "won", "lost", "p", "cut", "tokens/s"]
    rows = [[*heading, *(f"pass@{k}" for k in ks)]]
    for index, each in enumerate(scores):
        paired = [str(each.won), str(each.lost), f"{each.p:.2g}"] if index else ["-"] * 3
        rows.append(
            [
                each.arm if len(each.arm) <= 40 else f"{each.arm[:37]}...",
                f"{each.right:g}",
                f"{each.accuracy:.1%}",
                f"{each.low:.1%} to {each.high:.1%}",
                *paired,
                f"{each.cut:.0%}",
                f"{each.tokens_per_s:,.0f}",
                *(f"{each.pass_at[k]:.1%}" for k in ks),
            ]
        )
    return rows
