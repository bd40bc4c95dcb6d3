"""Copying: whether the number in an answer's last line is the one that the answer computed.

Answers are a sum, `340 + 815 = 1155`, and a last line, `#### 1155` or a sentence. Sums may be
wrong: what counts is that the last line repeats them, on unseen problems.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from carryon.cache.extraction.pipeline import extract
from carryon.cache.store.reader import Store
from carryon.tools.bench.job import Job
from carryon.tools.demo.corpus import ENDING
from carryon.train.config import TrainSettings
from carryon.train.inference.generate import answer_batch
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.inference.scoring.comparison import wilson_interval
from carryon.train.modules.taps import middle_taps
from carryon.train.trainer.sweep import sweep

ENDINGS = {"marked": "#### {}", "worded": ENDING}
"""Last line of an answer, by the figure that it gives."""
PENALTY = 1.1
"""Repetition penalty that some bases recommend in their generation_config.json."""
_HELD_OUT = 40
_BATCH_ROWS = 50
_FORMS = {
    "marked": re.compile(r"= ?(\d+)\n#### ?(\d+)"),
    "worded": re.compile(r"= ?(\d+)\nTherefore, the final answer is (\d+)"),
}


def measure_copying(
    job: Job,
    *,
    samples: int = 400,
    answers: int = 100,
    epochs: int = 6,
    learning_rate: float = 2e-3,
    max_new_tokens: int = 32,
) -> None:
    """Report the share of answers that copy, for several tap sets and both last lines."""
    base = job.load_base()
    tap_sets = _tap_sets(base.identity.num_layers)
    settings = TrainSettings.from_options(
        epochs=epochs, learning_rate=learning_rate, tokens_per_step=384, sampled_softmax=2048
    )
    for ending in ENDINGS:
        unseen = _problems(ending, answers, seed=1)
        sets = tap_sets if ending == "marked" else tap_sets[:1]
        store = extract(
            base=base,
            data=_rows(ending, samples, unseen),
            out=job.work / ending,
            taps=list(dict.fromkeys(tap for taps in tap_sets for tap in taps)),
        )
        assert isinstance(store, Store)
        runs: dict[str, dict[str, Any]] = {"+".join(taps): {"taps": taps} for taps in sets}
        reports = sweep(store, out=job.work / f"{ending}-runs", settings=settings, runs=runs)
        prompts = [prompt for prompt, _ in unseen]
        shares, details = {}, {}
        for name, report in zip(runs, reports, strict=True):
            model = CarryOnForCausalLM.from_pretrained(report.carryon, base=base)
            pairs = _answer(model, prompts, ending, max_new_tokens)
            shares[name] = _share(pairs)
            details[name] = {
                "copied": shares[name],
                "interval": list(wilson_interval(shares[name] * answers, answers)),
                "well_formed": sum(pair is not None for pair in pairs) / answers,
                "held_out_nll": report.carryon_nll,
                "megabytes": report.carryon_bytes / 1e6,
                "train_s": report.train_s,
            }
            if name == "final":
                penalized = _answer(model, prompts, ending, max_new_tokens, penalty=PENALTY)
                details[name]["copied_with_repetition_penalty"] = _share(penalized)
        best = max(shares, key=lambda name: shares[name])
        job.report(
            f"accuracy.copy.{ending}",
            shares[best],
            "of the answers repeat the number that they computed",
            at_least=0.95,
            taps=best,
            default=shares["final"],
            answers=answers,
            base_nll=reports[0].base_nll,
            sets=details,
        )


def _tap_sets(num_layers: int) -> list[list[str]]:
    """Return sets of taps to compare, that of the defaults first."""
    high, low = middle_taps(num_layers)
    lists = [
        ["final"],
        ["final", "layer.0"],
        ["final", high, low],
        ["final", high, low, "layer.0"],
        ["final", high, low, "layer.1"],
    ]
    return [list(taps) for taps in dict.fromkeys(tuple(dict.fromkeys(taps)) for taps in lists)]


def _rows(ending: str, samples: int, unseen: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    drawn = _problems(ending, len(unseen) + samples, seed=0)
    train = [each for each in drawn if each not in unseen][:samples]
    for split, rows in (("train", train), ("held-out", unseen[:_HELD_OUT])):
        for index, (prompt, completion) in enumerate(rows):
            row_id = f"{split}-{index}"
            yield {"id": row_id, "split": split, "prompt": prompt, "completion": completion}


def _problems(ending: str, number: int, *, seed: int) -> list[tuple[str, str]]:
    """Return different prompts with their completions; fewer are the first of more."""
    generator = np.random.default_rng(seed)
    terms: dict[tuple[int, int], None] = {}
    while len(terms) < number:
        first, second = generator.integers(10, 1000, 2).tolist()
        terms[first, second] = None
    return [
        (f"What is {a} + {b}?\n", f"{a} + {b} = {a + b}\n{ENDINGS[ending].format(a + b)}")
        for a, b in terms
    ]


def _answer(
    model: Any,  # noqa: ANN401
    prompts: Sequence[str],
    ending: str,
    max_new_tokens: int,
    *,
    penalty: float | None = None,
) -> list[tuple[str, str] | None]:
    """Return for each answer the number it computed and the one in its last line, or None."""
    settings = GenerateSettings(max_new_tokens=max_new_tokens, chat=False)
    generation = {} if penalty is None else {"repetition_penalty": penalty}
    texts = [
        text
        for first in range(0, len(prompts), _BATCH_ROWS)
        for text in answer_batch(
            model, prompts[first : first + _BATCH_ROWS], settings=settings, **generation
        )
    ]
    found = [_FORMS[ending].search(text) for text in texts]
    return [None if match is None else (match[1], match[2]) for match in found]


def _share(pairs: Sequence[tuple[str, str] | None]) -> float:
    return sum(pair is not None and pair[0] == pair[1] for pair in pairs) / len(pairs)
