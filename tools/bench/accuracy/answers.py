"""How fast `carryon score` lets a base answer: vLLM against transformers."""

import logging
from pathlib import Path

from carryon.cache.errors import InputError, MissingExtraError
from carryon.cache.settings import ForwardSettings
from carryon.tools.bench.job import Job
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.measure import measure
from carryon.train.inference.scoring.problems import read_problems
from carryon.train.inference.scoring.vllm_engine import Engine, uses_vllm

logger = logging.getLogger(__name__)

TARGET = 5.0
_TASK = "leg_counting"
_SEED = 1_000_001


def measure_answers(
    job: Job, *, answers: int = 500, max_new_tokens: int = 60, batch_rows: int = 64
) -> None:
    """Report the tokens/s of answers through vLLM against those through transformers."""
    try:
        uses_vllm(Arm(name="base", model="base"), job.base, engine="vllm")
    except (MissingExtraError, InputError) as error:
        logger.warning(f"accuracy.answers: skipped, {error}")
        return
    speeds = {
        engine: answer_speed(
            job.base, job.work / f"{engine}.jsonl", engine=engine, answers=answers,
            max_new_tokens=max_new_tokens, batch_rows=batch_rows,
        )
        for engine in ("transformers", "vllm")
    }  # fmt: skip
    job.report(
        "accuracy.answers",
        speeds["vllm"] / speeds["transformers"],
        "of the tokens/s of transformers",
        at_least=TARGET,
        tokens_per_second=speeds,
        answers=answers,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
    )


def answer_speed(
    base: str,
    out: Path,
    *,
    engine: Engine,
    answers: int,
    max_new_tokens: int,
    batch_rows: int,
) -> float:
    """Return the new tokens per second of a base's answers, loading left out.

    Answers are of any number of tokens up to the limit, so tokens are what is compared.
    """
    measured = measure(
        {_TASK: read_problems(_TASK, num=answers, seed=_SEED)},
        arms=["base"],
        base=base,
        settings=GenerateSettings(max_new_tokens=max_new_tokens),
        forward=ForwardSettings(),
        engine=engine,
        batch_rows=batch_rows,
        out=out,
    )
    rows = measured.answers[_TASK]["base"]
    given = [answer for row in rows for answer in row]
    return sum(answer.tokens for answer in given) / sum(answer.seconds for answer in given)
