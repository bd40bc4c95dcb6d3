"""Score a carry-on in training: the base answers a few verified problems with its present weights.

The base is loaded once. Scoring leaves every global state of torch and Python as it was, so that a
run ends with the same bits with and without it.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.progress import track
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.view import StoreLike
from carryon.train.config import CarryOnSettings, StreamSettings
from carryon.train.data.mixture import MixedStore, open_stores
from carryon.train.inference.adapters import DEFAULT
from carryon.train.inference.generate import generate_rows
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.merge import load_own_base
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.inference.prompts import encode_prompts, with_variables
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.comparison import wilson_interval
from carryon.train.inference.scoring.known import find_known
from carryon.train.inference.scoring.problems import Problem, read_problems
from carryon.train.inference.scoring.run import check_rooms
from carryon.train.modules.card import CarryOnCard

_ARM = Arm(name="carryon", model="carryon")
_SHOWN = 3


class Scorer:
    """A base and problems, ready to score carry-ons; see `open_scorer`."""

    def __init__(
        self,
        model: CarryOnForCausalLM,
        card: CarryOnCard,
        problems: Sequence[Problem],
        rows: Sequence[Sequence[int]],
        settings: GenerateSettings,
        batch_rows: int,
    ) -> None:
        self._model, self._card, self._settings = model, card, settings
        order = sorted(range(len(rows)), key=lambda at: len(rows[at]))  # less padding
        jobs = [(problems[at], rows[at]) for at in order]
        self._batches = [jobs[at : at + batch_rows] for at in range(0, len(jobs), batch_rows)]

    def __call__(
        self, settings: CarryOnSettings, weights: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Return the fraction of right answers with its interval, as a line of metrics has it.

        Args:
            settings: of the carry-on.
            weights: its state, on the CPU in the saved type.

        Raises:
            InputError: a rule of the user failed.
        """
        started_at, right, cut, num = time.perf_counter(), 0, 0, 0
        card = replace(self._card, settings=settings.to_dict())
        with _unchanged():
            self._model.carryons.put(DEFAULT, weights, card, where="--score-every")
            for batch in track(self._batches, total=len(self._batches), name="score", unit="batch"):
                rows = [row for _, row in batch]
                answers = generate_rows(self._model, rows, settings=self._settings)
                for (problem, _), answer in zip(batch, answers, strict=True):
                    right += problem.is_right(answer.text)
                    cut += answer.is_cut
                    num += 1
        low, high = wilson_interval(right, num)
        return {
            "accuracy": right / num,
            "accuracy_low": low,
            "accuracy_high": high,
            "scored": num,
            "cut": cut / num,
            "score_s": time.perf_counter() - started_at,
        }


def open_scorer(
    stores: Sequence[str],
    tasks: Sequence[str],
    *,
    base: str,
    rule: str,
    num: int,
    seed: int,
    carryon: CarryOnSettings,
    stream: StreamSettings,
    settings: GenerateSettings,
    forward: ForwardSettings,
    batch_rows: int = 16,
) -> Scorer:
    """Load the base and the problems, and check all that can be checked before the first answer.

    Args:
        stores: that are trained on.
        tasks: sources of problems; see `read_problems`.
        base: hub id, folder or .gguf file. Empty: where it was at extraction, if it is found there
            with the digests that the store recorded.
        rule: see `read_problems`.
        num: problems of each task.
        seed: of the problems.
        carryon: that is trained.
        stream: how the stores are split.
        settings: of generation.
        forward: of the base.
        batch_rows: answers generated at a time.

    Raises:
        InputError: no task, no such task, a question of the training half of a store, a prompt that
            is too long, or a carry-on that is merged into its base.
        MissingError: a store, file or base is not there.
        SettingMismatchError: the base is not that of the store.
    """
    if not tasks:
        raise InputError("--score-every: expected tasks to score on, got none. Fix: --score-tasks")
    if carryon.kind != "bottleneck":
        raise InputError(
            f"--score-every: expected --kind bottleneck, got {carryon.kind}, which is merged into "
            "its base. Fix: leave it out, and run carryon score after training"
        )
    posed = [
        (task, problem)
        for task in dict.fromkeys(tasks)
        for problem in read_problems(task, num=num, seed=seed, rule=rule)
    ]
    problems = [problem for _, problem in posed]
    store = open_stores(list(stores), stream.store_weights)
    card = _draft_card(store, stream)
    with _unchanged():
        loaded = load_own_base(card, base or None, forward=forward, folder=store.name)
        for part in store.stores if isinstance(store, MixedStore) else [store]:
            known = find_known(problems, part, tokenizer=loaded.tokenizer, card=card)
            if known:
                named = ", ".join(problem.id for problem in known[:_SHOWN])
                raise InputError(
                    f"--score-tasks: {len(known):,} of {len(problems):,} questions are in "
                    f"{part.name}, such as {named}. Fix: another --score-seed, or other data"
                )
        rows = encode_prompts(
            loaded.tokenizer,
            [_ARM.make_prompt(problem, []) for problem in problems],
            framing=with_variables(store.framing, settings),
            chat=settings.chat,
        )
        context = loaded.identity.context_tokens
        check_rooms(_ARM, posed, rows, settings=settings, context_tokens=context)
        model = CarryOnForCausalLM.from_base(loaded)
    return Scorer(model, card, problems, rows, settings, batch_rows)


def _draft_card(store: StoreLike, stream: StreamSettings) -> CarryOnCard:
    """Return the card of a carry-on that is not trained yet."""
    stores = store.stores if isinstance(store, MixedStore) else [store]
    return CarryOnCard(
        settings={},
        base_width=store.width,
        base=store.base,
        store_fingerprint=store.fingerprint,
        split={
            "held_out_ratio": stream.held_out_ratio,
            "seed": stream.data_seed,
            "stores": [each.fingerprint for each in stores],
        },
        alpha=1.0,
        figures={},
        versions={},
        framing=store.framing.to_dict(),
    )


@contextmanager
def _unchanged() -> Iterator[None]:
    """Restore the random states, default type and number of threads that a block may change."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 -- of other libraries
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
