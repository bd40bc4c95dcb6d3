"""The data of `carryon compare`: training samples in one order, and clean held-out ones.

Documents are split first and cut into windows afterwards, so none has windows in both halves. The
training file is shuffled once; its first n records are what a run with little time extracts, and
the start of what every other run reads. Windows that share 5 % or more of their runs of 32 tokens
with the other half are left out.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.model import load_tokenizer
from carryon.cache.corpus.dataset import Sample, read_corpus
from carryon.cache.corpus.files import list_files
from carryon.cache.errors import InputError
from carryon.cache.files import write_file, write_json
from carryon.cache.settings import CorpusSettings
from carryon.tools.compare.corpora import GSM, write_named_corpus
from carryon.tools.compare.settings import CompareSettings
from carryon.train.data.contamination import NGRAM, WARN_ABOVE, hash_ngrams

logger = logging.getLogger(__name__)

_HELD_OUT_EVERY = 8
"""One document in so many is held out where the corpus marks none."""
_SHUFFLED_TOGETHER = 8
"""Samples of the first pass whose order a seed changes: a shorter run sees the same first ones."""


Record = dict[str, Any]
Piece = tuple[Record, Sample]
"""A record as it is written, and the sample that it becomes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What every method is trained and judged on."""

    train_file: Path
    held_out_file: Path
    train: list[Sample]
    """In the order of the file."""
    held_out: list[Sample]
    facts: dict[str, Any]
    """Contamination and counts, plain JSON values."""

    @property
    def train_tokens(self) -> int:
        """Tokens of all training samples."""
        return sum(len(sample.tokens) for sample in self.train)

    def count_samples(self, num_tokens: int) -> int:
        """Return how many of the first training samples have about `num_tokens` tokens."""
        ends = np.cumsum([len(sample.tokens) for sample in self.train])
        return max(2, min(len(ends), int(np.searchsorted(ends, num_tokens)) + 1))


def prepare_material(settings: CompareSettings, *, base: str, out: Path) -> Material:
    """Make the two files, unless they are there, and read them.

    Raises:
        InputError: too little of the held-out half is clean.
    """
    tokenizer = load_tokenizer(base)
    train_file, held_out_file, facts_file = (
        out / name for name in ("train.jsonl", "held-out.jsonl", "data.json")
    )
    if not facts_file.exists():
        (out / "work").mkdir(parents=True, exist_ok=True)
        logger.info(f"{out}: makes the corpus {settings.corpus}")
        records = list(_read_documents(settings, out))
        is_held_out = _mark_held_out(records)
        halves = []
        for held_out in (False, True):
            mine = [x for x, mark in zip(records, is_held_out, strict=True) if mark == held_out]
            halves.append(list(_cut(mine, tokenizer, settings.window_tokens)))
            if not halves[-1]:
                raise InputError(
                    f"corpus {settings.corpus}: expected text to train on and text to hold out, "
                    f"got {len(records)} documents: take more"
                )
        train, judged = (_read_records(_shuffled(half), out, tokenizer) for half in halves)
        train, judged, facts = _separate(train, judged, settings)
        _write(train_file, train)
        _write(held_out_file, judged)
        write_json(facts_file, facts)
    facts = json.loads(facts_file.read_text())
    logger.info(
        f"{facts['train_samples']:,} training samples, {facts['train_tokens']:,} tokens, without "
        f"{facts['dropped_windows']} that repeat held-out text; held out: {facts['windows']} "
        f"samples, {facts['overlap']:.1%} of their runs of {NGRAM} tokens are trained on; looked "
        f"at: {facts['clean_windows']} clean ones, {facts['clean_tokens']:,} tokens, "
        f"{facts['clean_overlap']:.1%}"
    )
    return Material(
        train_file=train_file,
        held_out_file=held_out_file,
        train=_read(train_file, tokenizer),
        held_out=_read(held_out_file, tokenizer),
        facts=facts,
    )


def corpus_settings() -> CorpusSettings:
    """Return how the files are read, by whoever reads them: nothing is cut any more."""
    return CorpusSettings(long="error")


def order_pass(num_samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of a pass over the first `num_samples` samples; pure.

    The first pass goes through the file, shuffled within short stretches, so that runs over more
    or fewer samples see the same ones first; later passes are shuffled as a whole.
    """
    random = np.random.default_rng([seed, epoch])
    if epoch > 0:
        return random.permutation(num_samples)
    stretches = []
    for first in range(0, num_samples, _SHUFFLED_TOGETHER):
        stretches.append(first + random.permutation(_SHUFFLED_TOGETHER))
    order = np.concatenate(stretches)
    return order[order < num_samples]


def iter_steps(
    samples: Sequence[Sample], num_samples: int, *, seed: int, tokens_per_step: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (epoch, samples of the step) without end; a step has at most tokens_per_step."""
    epoch = 0
    while True:
        step: list[int] = []
        used = 0
        for index in order_pass(num_samples, seed=seed, epoch=epoch).tolist():
            length = len(samples[index].tokens)
            if step and used + length > tokens_per_step:
                yield epoch, np.array(step)
                step, used = [], 0
            step.append(index)
            used += length
        yield epoch, np.array(step)
        epoch += 1


def _read_documents(settings: CompareSettings, out: Path) -> Iterator[dict[str, Any]]:
    label, equals, given = settings.corpus.partition("=")
    path = Path(given)
    if not equals:
        path = out / "corpus.jsonl"
        wanted = settings.tokens
        if label != GSM:  # which brings its own held-out half; a third more, as ends are dropped
            wanted = max(wanted, _HELD_OUT_EVERY * settings.held_out_tokens) * 4 // 3
        write_named_corpus(label, path, num_tokens=wanted)
    for file in list_files([path]):
        if file.suffix != ".jsonl":
            yield {"id": file.name, "text": file.read_text(encoding="utf-8", errors="replace")}
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            if line.strip():
                yield {"id": f"{file.stem}-{number}"} | json.loads(line)


def _mark_held_out(records: Sequence[dict[str, Any]]) -> list[bool]:
    marks = [record.get("split") == "held-out" for record in records]
    if any(marks):
        return marks
    return [number % _HELD_OUT_EVERY == 0 for number in range(len(records))]


def _cut(
    records: Sequence[Record],
    tokenizer: Any,  # noqa: ANN401
    window_tokens: int,
) -> Iterator[Record]:
    """Yield the records; texts in windows, whose ends fall between two tokens."""
    for record in records:
        if "text" not in record:
            yield record
            continue
        text = record["text"]
        found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ends = [end for _, end in found["offset_mapping"]]
        cuts = [0, *ends[window_tokens - 1 :: window_tokens]]
        for number, first in enumerate(cuts):
            stop = cuts[number + 1] if number + 1 < len(cuts) else len(text)
            if stop == len(text) and len(ends) % window_tokens < window_tokens // 4:
                continue  # too short to tell what it is about
            yield {"id": f"{record['id']}/{number}", "text": text[first:stop]}


def _shuffled(records: list[Record]) -> list[Record]:
    return [records[index] for index in np.random.default_rng(0).permutation(len(records))]


def _read_records(records: list[Record], out: Path, tokenizer: Any) -> list[Piece]:  # noqa: ANN401
    """Return records beside their samples; one without a target is left out."""
    path = out / "work" / "records.jsonl"
    _write(path, [(record, None) for record in records])
    by_id = {sample.id: sample for sample in _read(path, tokenizer)}
    return [(record, by_id[record["id"]]) for record in records if record["id"] in by_id]


def _separate(
    train: list[Piece], judged: list[Piece], settings: CompareSettings
) -> tuple[list[Piece], list[Piece], dict[str, Any]]:
    """Return a training and a held-out half that have little in common, and what was found.

    First windows of text that share much with the held-out half are kept from training, then
    held-out samples that still do are left out.
    """
    judged = _first(judged, settings.held_out_tokens)
    held_out_runs = _join(_runs(sample, targets_only=True) for _, sample in judged)
    apart = [
        piece
        for piece in train
        if "text" not in piece[0] or _shared(piece[1], held_out_runs) < WARN_ABOVE
    ]
    train, num_dropped = _first(apart, settings.tokens), len(train) - len(apart)
    known = _join(_runs(sample, targets_only=False) for _, sample in train)
    clean = [piece for piece in judged if _shared(piece[1], known) < WARN_ABOVE]
    if len(clean) < 2:
        raise InputError(
            f"corpus {settings.corpus}: expected 2 or more held-out samples with under "
            f"{WARN_ABOVE:.0%} of their runs of {NGRAM} tokens in the training half, got "
            f"{len(clean)} of {len(judged)}: take more or other text"
        )
    facts = settings.data_facts() | {
        "train_samples": len(train),
        "train_tokens": sum(len(sample.tokens) for _, sample in train),
        "dropped_windows": num_dropped,
        "windows": len(judged),
        "overlap": float(np.mean([_shared(sample, known) for _, sample in judged])),
        "clean_windows": len(clean),
        "clean_tokens": sum(len(sample.tokens) for _, sample in clean),
        "clean_overlap": float(np.mean([_shared(sample, known) for _, sample in clean])),
    }
    return train, clean, facts


def _first(pieces: list[Piece], num_tokens: int) -> list[Piece]:
    ends = np.cumsum([len(sample.tokens) for _, sample in pieces])
    return pieces[: int(np.searchsorted(ends, num_tokens)) + 1]


def _shared(sample: Sample, known: NDArray[np.uint64]) -> float:
    """Return the share of a sample's runs, those that end in a target, that are known."""
    runs = _runs(sample, targets_only=True)
    return float(np.isin(runs, known).mean()) if len(runs) else 0.0


def _join(runs: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.unique(np.concatenate(list(runs)))


def _runs(sample: Sample, *, targets_only: bool) -> NDArray[np.uint64]:
    if len(sample.tokens) < NGRAM:
        return np.empty(0, dtype=np.uint64)
    runs = hash_ngrams(sample.tokens)
    return runs[sample.loss_mask[NGRAM - 1 :] == 1] if targets_only else runs


def _write(path: Path, pieces: Sequence[tuple[Record, Sample | None]]) -> None:
    lines = [
        json.dumps({name: value for name, value in record.items() if name != "split"}) + "\n"
        for record, _ in pieces
    ]
    write_file(path, "".join(lines).encode())


def _read(path: Path, tokenizer: Any) -> list[Sample]:  # noqa: ANN401
    return read_corpus(
        [path], tokenizer, settings=corpus_settings(), max_tokens=tokenizer.model_max_length
    ).samples
