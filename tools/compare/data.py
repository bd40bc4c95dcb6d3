"""The data of `carryon compare`: training samples in one order, and clean held-out ones.

Documents are split into halves before they are cut into windows, so none is in both. The training
file is shuffled once; a run with little time extracts its first records only. Training texts that
a held-out sample repeats are dropped, and held-out samples that still share 5 % or more of their
runs of 32 tokens with training.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.loading import read_tokenizer
from carryon.cache.base.source.location import locate_base
from carryon.cache.corpus.dataset import read_corpus
from carryon.cache.corpus.files import plan_shards, read_shard
from carryon.cache.corpus.formats.contents import Chat, Completion, Text
from carryon.cache.corpus.formats.messages import TRAINED_ROLES
from carryon.cache.corpus.reading.cache_folder import cache_folder
from carryon.cache.corpus.records import Record, read_record
from carryon.cache.corpus.rows import BadRow, Data
from carryon.cache.corpus.samples import Sample, hash_id
from carryon.cache.corpus.sources import open_sources
from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import read_object, write_json
from carryon.cache.settings import CorpusSettings, DataSettings
from carryon.tools.compare.settings import CompareSettings
from carryon.train.data.contamination import NGRAM, WARN_ABOVE, hash_ngrams

logger = logging.getLogger(__name__)

_HELD_OUT_EVERY = 8
"""One record in eight is held out where the data mark none."""
_SHUFFLED_TOGETHER = 8
"""Samples of the first pass whose order a seed changes: a shorter run sees the same first ones."""

Row = dict[str, Any]
Pair = tuple[Row, Sample]
"""A row as it is written, and its sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """Training and held-out samples, the same for every method."""

    train_file: Path
    held_out_file: Path
    train: list[Sample]
    """In the order of the file."""
    held_out: list[Sample]
    facts: dict[str, Any]
    """Settings, counts and contamination, plain JSON values."""

    def count_samples(self, num_tokens: int) -> int:
        """Return how many of the first training samples have about `num_tokens` tokens."""
        ends = np.cumsum([len(sample.tokens) for sample in self.train])
        return max(2, min(len(ends), int(np.searchsorted(ends, num_tokens)) + 1))

    def train_lines(self, samples: range) -> bytes:
        """Return lines of the training file."""
        lines = self.train_file.read_bytes().splitlines(keepends=True)
        return b"".join(lines[samples.start : samples.stop])


def prepare_material(
    settings: CompareSettings, *, base: str, out: Path, data: Sequence[str] = ()
) -> Material:
    """Write the two files, unless they exist, and read them.

    Raises:
        InputError: a half is empty, or too little of the held-out half is clean.
    """
    tokenizer = read_tokenizer(locate_base(base))
    train_file, held_out_file, facts_file = (
        out / name for name in ("train.jsonl", "held-out.jsonl", "data.json")
    )
    if not facts_file.exists():
        halves = []
        for records in _split(list(_read_records(data))):
            rows = list(_cut(records, tokenizer, settings.window_tokens))
            rows = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]
            halves.append(_pair(rows, _read(rows, tokenizer)))
        train, held_out, facts = _separate(halves[0], halves[1], settings)
        _write(train_file, train)
        _write(held_out_file, held_out)
        write_json(facts_file, {"data": list(map(str, data)), **settings.shared(), **facts})
        logger.info(
            f"{facts['train_samples']:,} training samples of {facts['train_tokens']:,} tokens; "
            f"{facts['held_out_samples']:,} held-out samples of {facts['held_out_targets']:,} "
            f"targets; dropped {facts['dropped_train']} and {facts['dropped_held_out']} that "
            "repeat the other half"
        )
    return Material(
        train_file=train_file,
        held_out_file=held_out_file,
        train=_read([train_file], tokenizer),
        held_out=_read([held_out_file], tokenizer),
        facts=read_object(facts_file),
    )


def corpus_settings() -> CorpusSettings:
    """Return the settings for reading the files; nothing is cut again."""
    return CorpusSettings(long="error")


def order_pass(num_samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of a pass over the first `num_samples` samples; pure.

    The first pass follows the file, shuffled within short stretches, so runs over more or fewer
    samples begin with the same ones. Later passes are shuffled as a whole.
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


def _read_records(data: Data) -> Iterator[Record]:
    sources = open_sources(data, DataSettings(), folder=cache_folder())
    for shard in plan_shards(sources):
        for row in read_shard(shard):
            if isinstance(row, BadRow):
                raise InputError(f"{row.where}: {row.problem}")
            yield read_record(row)


def _split(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return the training and the held-out records; every eighth is held out if none is marked.

    Records of one group are in one half, but where all are of one.
    """
    halves = [record.half for record in records]
    if len(records) > 1 and len(set(halves)) == 1:
        logger.info("all records are of one split group: they are split one by one")
        halves = [record.id for record in records]
    marked = {half for record, half in zip(records, halves, strict=True) if record.is_held_out}
    held_out = marked or set(list(dict.fromkeys(halves))[::_HELD_OUT_EVERY])
    pairs = list(zip(records, halves, strict=True))
    train = [record for record, half in pairs if half not in held_out]
    if not train or not held_out:
        raise InputError(
            f"data: expected records to train on and to hold out, got {len(records)} records. "
            "Fix: give more data"
        )
    return train, [record for record, half in pairs if half in held_out]


def _cut(records: Iterable[Record], tokenizer: Any, window_tokens: int) -> Iterator[Row]:  # noqa: ANN401
    """Yield records as rows; texts in windows that end between two tokens."""
    for record in records:
        if not isinstance(record.content, Text):
            yield {"id": record.id, **_fields(record)}
            continue
        text = record.content.text
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ends = [end for _, end in encoding["offset_mapping"]]
        cuts = [0, *ends[window_tokens - 1 :: window_tokens]]
        for number, first in enumerate(cuts):
            stop = cuts[number + 1] if number + 1 < len(cuts) else len(text)
            if number and stop == len(text) and len(ends) % window_tokens < window_tokens // 4:
                continue  # a short end says little about its text
            yield {"id": f"{record.id}/{number}", "text": text[first:stop]}


def _fields(record: Record) -> Row:
    """Return the fields that read as the content of a record."""
    content = record.content
    if isinstance(content, Completion):
        return {"prompt": content.prompt, "completion": content.completion}
    if not isinstance(content, Chat):
        raise InputError(
            f"{record.where}: expected chats, completions or texts, got a preference pair. "
            "Fix: leave out such records"
        )
    messages = [
        {**message, "weight": 0} if message["role"] in TRAINED_ROLES and not is_trained else message
        for message, is_trained in zip(content.messages, content.is_trained, strict=True)
    ]
    row: Row = {"messages": messages, "tools": content.tools}
    row["chat_template_kwargs"] = content.template_kwargs
    return {name: value for name, value in row.items() if value}


def _pair(rows: Sequence[Row], samples: Sequence[Sample]) -> list[Pair]:
    """Return each row that has a sample with it.

    Raises:
        InputError: a row has several, so lines and samples would not be the same in number.
    """
    by_row: dict[int, Sample] = {}
    for sample in samples:
        if sample.group in by_row:
            raise InputError(
                f"data: expected one sample a record, got {by_row[sample.group].id} and "
                f"{sample.id}: the chat template rewrites earlier turns. Fix: give chats of one "
                "assistant turn"
            )
        by_row[sample.group] = sample
    keys = [hash_id(row["id"]) for row in rows]
    return [(row, by_row[key]) for row, key in zip(rows, keys, strict=True) if key in by_row]


def _separate(
    train: list[Pair], held_out: list[Pair], settings: CompareSettings
) -> tuple[list[Pair], list[Pair], dict[str, Any]]:
    """Return a training and a held-out half that have little in common, and their facts."""
    held_out = _first(held_out, settings.held_out_tokens)
    runs = _join(_runs(sample, targets_only=True) for _, sample in held_out)
    texts = {sample.tokens.tobytes() for _, sample in held_out}
    apart = [
        pair
        for pair in train
        if pair[1].tokens.tobytes() not in texts
        and ("text" not in pair[0] or _shared_ratio(pair[1], runs) < WARN_ABOVE)
    ]
    num_dropped = len(train) - len(apart)
    train = _first(apart, settings.tokens)
    known = _join(_runs(sample, targets_only=False) for _, sample in train)
    clean = [pair for pair in held_out if _shared_ratio(pair[1], known) < WARN_ABOVE]
    if len(clean) < 2 or not train:
        raise InputError(
            f"data: expected 2 or more held-out samples that share under {WARN_ABOVE:.0%} of their "
            f"runs of {NGRAM} tokens with training, got {len(clean)} of {len(held_out)}. "
            "Fix: give more data"
        )
    return (
        train,
        clean,
        {
            "train_samples": len(train),
            "train_tokens": sum(len(sample.tokens) for _, sample in train),
            "held_out_samples": len(clean),
            "held_out_targets": sum(int(sample.loss_mask.sum()) for _, sample in clean),
            "dropped_train": num_dropped,
            "dropped_held_out": len(held_out) - len(clean),
            "shared_ratio": float(np.mean([_shared_ratio(x, known) for _, x in clean])),
        },
    )


def _first(pairs: list[Pair], num_tokens: int) -> list[Pair]:
    ends = np.cumsum([len(sample.tokens) for _, sample in pairs])
    return pairs[: int(np.searchsorted(ends, num_tokens)) + 1]


def _shared_ratio(sample: Sample, known: NDArray[np.uint64]) -> float:
    """Return the part of a sample's runs, those that end in a target, that are known."""
    runs = _runs(sample, targets_only=True)
    return float(np.isin(runs, known).mean()) if len(runs) else 0.0


def _join(runs: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *runs]))


def _runs(sample: Sample, *, targets_only: bool) -> NDArray[np.uint64]:
    if len(sample.tokens) < NGRAM:
        return np.empty(0, dtype=np.uint64)
    runs = hash_ngrams(sample.tokens)
    return runs[sample.loss_mask[NGRAM - 1 :] == 1] if targets_only else runs


def _write(path: Path, pairs: Sequence[Pair]) -> None:
    write_file(path, "".join(json.dumps(row) + "\n" for row, _ in pairs).encode())


def _read(data: Data, tokenizer: Any) -> list[Sample]:  # noqa: ANN401
    limit = tokenizer.model_max_length
    return list(read_corpus(data, tokenizer, settings=corpus_settings(), max_tokens=limit).samples)
