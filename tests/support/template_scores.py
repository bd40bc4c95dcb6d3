"""Score of the corpus step over stock templates, cases and kinds of tokenizers.

right    the expected targets, or the expected refusal with its reason
refused  a refusal where targets were expected, or with another reason
wrong    other targets
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from carryon.cache.corpus.dataset import Corpus, read_corpus
from carryon.cache.corpus.samples import Sample
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings, DataSettings
from support.chat_engines import EngineTurn, engine_turns
from support.chat_tokenizers import Kind, make_chat_tokenizer, spell
from support.stock_templates import CASES, STOCK, Refused, StockTemplate, record_of

MAX_TOKENS = 1 << 20
"""Of a sample: none is cut."""
Outcome = Literal["right", "refused", "wrong"]


@dataclass(frozen=True)
class Score:
    """What became of one case of one template."""

    template: str
    case: str
    outcome: Outcome
    is_refusal: bool
    detail: str


def score_templates(
    kind: Kind = "bytes",
    *,
    templates: Iterable[StockTemplate] = STOCK,
    cases: Iterable[str] = tuple(CASES),
) -> dict[str, Any]:
    """Read every case with every template and return the counts, as `summarize` does."""
    chosen = tuple(cases)
    return summarize(
        [score_cell(template, case, kind) for template in templates for case in chosen]
    )


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """Count outcomes.

    Returns:
        `templates`, `cells`; `right` (of them `true_refusals`), `refused`, `wrong`;
        `right_share`; `plain_refused`, two-turn chats that are refused; `faults`, one line each.
    """
    counts = Counter(score.outcome for score in scores)
    return {
        "templates": len({score.template for score in scores}),
        "cells": len(scores),
        **{name: counts[name] for name in ("right", "refused", "wrong")},
        "true_refusals": sum(score.is_refusal and score.outcome == "right" for score in scores),
        "right_share": counts["right"] / len(scores),
        "plain_refused": sum(score.is_refusal and score.case == "two" for score in scores),
        "faults": [
            f"{score.template} / {score.case}: {score.outcome}: {score.detail}"
            for score in scores
            if score.outcome != "right"
        ],
    }


def score_cell(
    template: StockTemplate,
    case: str,
    kind: Kind,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Score:
    """Return what becomes of one case of one template.

    Args:
        template: of STOCK.
        case: of CASES.
        kind: of tiny tokenizer.
        tokenizer: used in place of a tiny one.
    """
    expected = template.expected(case)
    tokenizer = tokenizer or tokenizer_of(template, kind)

    def score(outcome: Outcome, detail: str, *, is_refusal: bool = False) -> Score:
        return Score(template.name, case, outcome, is_refusal, detail)

    try:
        corpus = read_case(template, case, tokenizer)
    except InputError as error:
        is_right = isinstance(expected, Refused) and re.search(expected.reason, str(error))
        return score("right" if is_right else "refused", str(error), is_refusal=True)
    found = targets_of(tokenizer, corpus.samples)
    if isinstance(expected, Refused):
        return score("wrong", f"expected a refusal, got {found}")
    if kind not in ("bytes", "gpt2", "llama3"):
        found, expected = _without_own_blanks(found), _without_own_blanks(expected)
    if found != expected:
        return score("wrong", f"expected {expected}, got {found}")
    problem = compare_with_engine(corpus.samples, engine_of(template, case, tokenizer))
    return score("wrong" if problem else "right", problem)


def faults_of(template: StockTemplate, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return what is wrong with the targets of each case, all read at once; empty for nothing.

    Cases that are to be refused are left out, and `last`, which is another setting.
    """
    cases = [
        case
        for case in CASES
        if case != "last" and not isinstance(template.expected(case), Refused)
    ]
    corpus = read_rows(template, [{**record_of(case), "id": case} for case in cases], tokenizer)
    faults = {}
    for case in cases:
        samples = [sample for sample in corpus.samples if sample.id.partition("@")[0] == case]
        found, expected = targets_of(tokenizer, samples), template.expected(case)
        assert not isinstance(expected, Refused)
        if _without_own_blanks(found) != _without_own_blanks(expected):
            faults[case] = f"expected {expected}, got {found}"
        elif problem := compare_with_engine(samples, engine_of(template, case, tokenizer)):
            faults[case] = problem
    return faults


def tokenizer_of(template: StockTemplate, kind: Kind) -> PreTrainedTokenizerFast:
    """Return a tiny tokenizer with the tokens of a template."""
    eos = template.eos or template.stop
    names = [template.bos, eos, template.stop, *template.special.split(), *template.end_tokens]
    return make_chat_tokenizer(
        kind,
        template.text,
        special=[name for name in names if name],
        added=template.added.split(),
        bos=template.bos or None,
        eos=eos or None,
        is_rstrip=template.is_rstrip,
    )


def read_case(template: StockTemplate, case: str, tokenizer: PreTrainedTokenizerFast) -> Corpus:
    """Return the corpus of one record."""
    return read_rows(template, [record_of(case)], tokenizer, only_last=case == "last")


def read_rows(
    template: StockTemplate,
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    only_last: bool = False,
    drop_unfit: bool = False,
    has_ends: bool = True,
) -> Corpus:
    """Return the corpus of records with a template's settings.

    Args:
        template: of STOCK.
        rows: records.
        tokenizer: with the template.
        only_last: learn the last turn only.
        drop_unfit: leave out what the template drops or refuses.
        has_ends: whether the base's end tokens are known.
    """
    settings = CorpusSettings(
        turns="last" if only_last else "all",
        chat_template_kwargs=[
            f"{name}={str(value).lower()}" for name, value in template.kwargs.items()
        ],
        template_date=date.today().isoformat(),  # the engine prints today
    )
    ends = tokenizer.convert_tokens_to_ids(template.end_tokens)
    assert isinstance(ends, list)
    return read_corpus(
        rows,
        tokenizer,
        settings=settings,
        max_tokens=MAX_TOKENS,
        data_settings=DataSettings(drop_unfit=drop_unfit),
        end_tokens=ends if has_ends else (),
    )


def engine_of(
    template: StockTemplate, case: str, tokenizer: PreTrainedTokenizerFast
) -> list[EngineTurn]:
    """Return the turns of a case as an engine would produce them."""
    return engine_turns(
        tokenizer,
        record_of(case),
        stops=template.end_tokens,
        only_last=case == "last",
        variables=template.kwargs,
    )


def spans_of(loss_mask: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Return (start, stop) of each run of ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss_mask, [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def targets_of(tokenizer: PreTrainedTokenizerFast, samples: Iterable[Sample]) -> list[str]:
    """Return the text of each target, in order."""
    return [
        spell(tokenizer, sample.tokens[start:stop])
        for sample in samples
        for start, stop in spans_of(sample.loss_mask)
    ]


def _without_own_blanks(texts: Sequence[str]) -> list[str]:
    """Return texts without the blank that SentencePiece puts before a text or a piece of one."""
    return [re.sub(r"(^|[>\]]) *", r"\1", text) for text in texts]


def compare_with_engine(samples: Iterable[Sample], turns: Sequence[EngineTurn]) -> str:
    """Return how samples differ from what an engine produces; empty if they do not.

    A sample of several turns has the earlier replies as they were produced, where an engine that
    starts again from text tokenizes them with what follows: such a prompt is compared as text.
    """
    found = [
        (sample, start, stop, number)
        for sample in samples
        for number, (start, stop) in enumerate(spans_of(sample.loss_mask))
    ]
    if len(found) != len(turns):
        return f"{len(found)} targets, an engine has {len(turns)}"
    for (sample, start, stop, number), turn in zip(found, turns, strict=True):
        reply = sample.tokens[start:stop].tolist()
        is_right = reply == turn.reply_tokens
        if not turn.is_ended:  # its last tokens depend on what follows
            num_sure = min(len(reply), len(turn.reply_tokens)) - 2
            is_right = reply[:num_sure] == turn.reply_tokens[:num_sure]
        if not is_right:
            return f"messages[{turn.index}]: reply {reply}, an engine has {turn.reply_tokens}"
        prompt = sample.tokens[:start].tolist()
        if prompt != turn.prompt_tokens and number == 0:
            return f"messages[{turn.index}]: prompt {prompt}, an engine has {turn.prompt_tokens}"
    return ""
