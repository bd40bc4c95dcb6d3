"""`carryon train`: a store in, a carry-on out."""

import logging
from typing import TYPE_CHECKING, Any

from carryon.cache.errors import InputError
from carryon.cache.progress import is_main_process
from carryon.tools.cli.output import print_result
from carryon.tools.cli.table import format_table
from carryon.train.config import TrainSettings

if TYPE_CHECKING:
    from carryon.train.trainer.metrics import Scoring

logger = logging.getLogger(__name__)

_UNSCORED = {
    "--score-every": 0,
    "--score-base": "",
    "--score-tasks": [],
    "--score-rule": "auto",
    "--score-num": 40,
    "--score-seed": 1_000_001,
    "--score-new-tokens": 256,
}
"""The defaults: without --score-every other values would say nothing."""


def train(
    *,
    store: list[str],
    out: str,
    score_every: int = 0,
    score_base: str = "",
    score_tasks: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    score_rule: str = "auto",
    score_num: int = 40,
    score_seed: int = 1_000_001,
    score_new_tokens: int = 256,
    dry_run: bool = False,
    settings: TrainSettings,
) -> dict[str, Any]:
    """Train a carry-on from a store, without the base.

    The store holds all that training reads: hidden states, targets and the base's LM head. An
    untrained carry-on equals the base, so the first held-out loss is that of the base. After an
    interruption the same command resumes from the newest checkpoint, with the same weights at
    the end. OUT gets config.yaml, metrics.jsonl, curves.png and the carry-on in carryon/. The
    last line on stdout is a JSON line with the figures.

    Example:
        carryon train --store store --out run

    Args:
        store: Folder of the store. Several stores of one base with the same taps are mixed.
        out: Folder of the run, created if missing. An existing run is resumed.
        score_every: Steps between scores: the base answers problems with the carry-on as it is. The
            base alone and the finished carry-on are scored too. The weights stay the same bit for
            bit. 0: never.
        score_base: The base that answers: hub id, folder or .gguf file. Empty: where it was at
            extraction.
        score_tasks: Tasks or files of questions to score on, as --tasks of carryon score. Questions
            of the training half of the store are refused.
        score_rule: Which answers are right, as --rule of carryon score.
        score_num: Problems of each task.
        score_seed: Seed of the problems; take one far from the seed of the training problems.
        score_new_tokens: Maximum length of an answer, in tokens.
        dry_run: Write nothing: take some steps, and say what the run would be: its data and steps,
            the way of the loss that is the fastest here, memory and time.
        settings: All settings of a run.
    """
    given = {
        "--score-every": score_every,
        "--score-base": score_base,
        "--score-tasks": score_tasks,
        "--score-rule": score_rule,
        "--score-num": score_num,
        "--score-seed": score_seed,
        "--score-new-tokens": score_new_tokens,
    }
    settings.check_mix(is_scored=score_every > 0)  # before the base is loaded to score
    if dry_run:
        if score_every:
            raise InputError("--dry-run: expected no --score-every, which it does not time")
        _is_scored(given)
        return _preview(store, out, settings)
    scoring = _open_scoring(store, given, settings) if _is_scored(given) else None
    from carryon.train.trainer.trainer import train as train_carryon

    report = train_carryon(store, out=out, settings=settings, scoring=scoring)
    if report.mixture:
        from carryon.train.mixing.mixture_nll import mixture_rows

        rows = mixture_rows(report.base_nll, report.carryon_nll, report.mixture)
        logger.info(format_table(rows))
    return print_result(report.to_dict(), report.summary())


def _preview(store: list[str], out: str, settings: TrainSettings) -> dict[str, Any]:
    from carryon.train.trainer.forecast.preview import preview_run
    from carryon.train.trainer.step import NotFiniteError

    try:
        preview = preview_run(store, out=out, settings=settings)
    except NotFiniteError as error:
        raise InputError(
            f"the loss of a step is {error}. Fix: carryon verify of the store"
        ) from error
    return print_result(preview.to_dict(), preview.summary())


def _is_scored(given: dict[str, Any]) -> bool:
    """Check the options of scoring; return whether a run is to be scored by this process.

    Raises:
        InputError: one is out of range, or given without --score-every.
    """
    for name, least in (("--score-every", 0), ("--score-num", 1), ("--score-new-tokens", 1)):
        if given[name] < least:
            raise InputError(f"{name}: expected {least} or more, got {given[name]}")
    if not given["--score-every"]:
        if named := next((name for name in given if given[name] != _UNSCORED[name]), ""):
            raise InputError(f"{named}: expected with --score-every, got 0. Fix: --score-every 100")
        return False
    return is_main_process()


def _open_scoring(store: list[str], given: dict[str, Any], settings: TrainSettings) -> "Scoring":
    from carryon.cache.settings import ForwardSettings
    from carryon.train.inference.generate_settings import GenerateSettings
    from carryon.train.inference.scoring.scorer import open_scorer
    from carryon.train.trainer.metrics import Scoring

    scorer = open_scorer(
        store,
        given["--score-tasks"],
        base=given["--score-base"],
        rule=given["--score-rule"],
        num=given["--score-num"],
        seed=given["--score-seed"],
        carryon=settings.carryon,
        stream=settings.stream,
        settings=GenerateSettings(max_new_tokens=given["--score-new-tokens"]),
        forward=ForwardSettings(device=settings.run.device),
    )
    return Scoring(every=given["--score-every"], score=scorer)
