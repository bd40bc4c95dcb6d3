"""The samples of a folder of states: those of its files, or of a corpus whose tokens they hold.

Letters: S samples, T tokens of a sample.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.facts import BaseFacts
from carryon.cache.corpus.dataset import Corpus
from carryon.cache.corpus.report import Report, Tally, merge_reports
from carryon.cache.corpus.samples import Sample, SampleTable
from carryon.cache.errors import InputError
from carryon.cache.exchange.char_ends import CharEnds
from carryon.cache.exchange.folder import StatesFolder, read_file, read_files, sample_of
from carryon.cache.exchange.saved_rows import SavedRow
from carryon.cache.exchange.settings import ImportSettings
from carryon.cache.exchange.state_file import FileFacts, StateFile
from carryon.cache.progress import Progress

_MISSING = "no file of states"
_END = re.compile(r"(/chosen|/rejected|@\d+)?(#\d+)?$")
"""Of a sample's id, behind that of its record: half of a pair, or turn; and piece."""


class FileSamples:
    """Reads everything of the files of a folder but their states, once."""

    def __init__(
        self,
        folder: StatesFolder,
        imports: ImportSettings,
        *,
        drop_missing: bool,
    ) -> None:
        """Take from the first file what every other one has to agree with.

        Args:
            folder: of the files.
            imports: what they hold, as far as it is given.
            drop_missing: leave out, and count, samples without a file.

        Raises:
            InputError: the first file cannot be read.
        """
        first = read_file(folder, folder.names[0])
        self.layers = imports.layer_ids or list(first.layer_ids or ())
        """Layer ids of the columns; empty if neither settings nor files name them."""
        self.dtype = first.dtype
        """Of the states."""
        self._folder, self._unit_tokens, self._drops = folder, imports.unit_tokens, drop_missing
        self.files: list[StateFile] = []
        """Those that were read."""
        self.of_sample: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """[S] index, in `files`, of the file of each sample."""
        self._digest = hashlib.sha256()
        self._dropped: list[str] = []

    def read(self, base: BaseFacts, texts: Corpus | None) -> Corpus:
        """Return the samples, and keep the file of each.

        Args:
            base: facts of the base.
            texts: corpus that the nodes were given. None: the files' own samples.

        Raises:
            InputError: a file cannot be used, or files and corpus do not belong together; names
                file or sample.
        """
        entry: dict[str, Any] = {"name": self._folder.states.resolve().name or "states"}
        if texts is None:
            corpus, self.of_sample = self._own(base)
        else:
            corpus, self.of_sample = self._matched(base, texts)
        entry |= {
            "bytes": sum(file.num_bytes for file in self.files),
            "sha256": self._digest.hexdigest(),
        }
        return replace(corpus, files=[*corpus.files, entry])

    def _checked(self, base: BaseFacts) -> Iterator[tuple[FileFacts, SavedRow | None]]:
        """Yield the files, each compared with the base and with the others."""
        dropped = self._dropped if self._drops else None
        with Progress(len(self._folder.names), name="read files", unit="files") as progress:
            for facts, row in read_files(self._folder, dropped=dropped):
                self._check(facts, base)
                self.files.append(facts.file)
                name = facts.file.name.encode()
                self._digest.update(len(name).to_bytes(8, "little") + name + facts.digest)
                progress.update(1)
                yield facts, row

    def _check(self, facts: FileFacts, base: BaseFacts) -> None:
        shown = self._folder.states / facts.file.name
        num_tokens, num_columns, width = facts.shape
        ids = facts.layer_ids or self.layers
        for what, expected, got in (
            ("columns, one for each layer id", len(self.layers), num_columns),
            ("layer ids", " ".join(map(str, self.layers)), " ".join(map(str, ids))),
            ("width", base.width, width),
            ("dtype", self.dtype, facts.dtype),
        ):
            if got != expected:
                raise InputError(
                    f"{shown}: {what}: expected {expected!s:.400}, got {got!s:.80}. Fix: check "
                    "--layer-ids and --base, or write the files again with one setting"
                )
        if num_tokens > self._unit_tokens:
            raise InputError(
                f"{shown}: expected at most {self._unit_tokens} tokens, those of a unit, got "
                f"{num_tokens}. Fix: --unit-tokens {1 << (num_tokens - 1).bit_length()}"
            )
        if base.vocab_size is not None and int(facts.token_ids.max()) >= base.vocab_size:
            raise InputError(
                f"{shown}: token_ids: expected 0 to {base.vocab_size - 1}, the base's, got "
                f"{int(facts.token_ids.max())}. Fix: check --base"
            )

    def _own(self, base: BaseFacts) -> tuple[Corpus, NDArray[np.int64]]:
        """Return the samples of the files themselves, in the order of the files."""
        char_ends: list[CharEnds] = []

        def samples() -> Iterator[Sample]:
            for facts, row in self._checked(base):
                if not char_ends and not (row and row.more):
                    size = base.vocab_size or len(base.tokenizer)
                    char_ends.append(CharEnds(base.tokenizer, vocab_size=size))
                yield sample_of(facts, row, char_ends[0] if char_ends else None)

        table = SampleTable.of(samples())
        _refuse_none(len(table), self._folder)
        _refuse_equal_ids(table, self._folder)
        kind = "states file" if self._folder.rows is None else "row of speculators"
        missing = [(str(self._folder.states / name), 0) for name in self._dropped]
        return _corpus(table, {kind: len(table)}, [], missing), np.arange(len(table))

    def _matched(self, base: BaseFacts, texts: Corpus) -> tuple[Corpus, NDArray[np.int64]]:
        """Return the samples of a corpus, each with the file of its tokens."""
        known: dict[bytes, list[int]] = {}
        masks: dict[int, bytes] = {}
        for number, (facts, row) in enumerate(self._checked(base)):
            known.setdefault(_key(facts.token_ids), []).append(number)
            mask = facts.loss_mask if row is None else row.loss_mask
            if mask is not None:
                masks[number] = _key(mask)
        of_sample, kept, missing, used = [], [], [], set()
        for index, sample in enumerate(texts.samples):
            files = known.get(_key(sample.tokens), [])
            if not files:
                if not self._drops:
                    raise InputError(
                        f"{self._folder.states}: expected a file with the {len(sample.tokens)} "
                        f"token ids of the sample {sample.id!a:.80}, got none. Fix: send "
                        "these ids as its prompt, or --drop-missing; or check --data and --base"
                    )
                missing.append((sample.id, len(sample.tokens)))
                continue
            targets = _key(sample.loss_mask)
            number = next((each for each in files if masks.get(each) == targets), files[0])
            used.update(files)
            if masks.get(number, targets) != targets:
                raise InputError(
                    f"{self._folder.states / self.files[number].name}: expected the loss mask of "
                    f"the sample {sample.id!a:.80}, got another one. Fix: leave out --data to take "
                    "that of the files, or check --mask"
                )
            kept.append(index)
            of_sample.append(number)
        _refuse_none(len(kept), self._folder)
        if unused := sorted(set(range(len(self.files))) - used):
            raise InputError(
                f"{self._folder.states / self.files[unused[0]].name}: expected the token ids of "
                f"a sample of the data, got others, as in {len(unused)} of {len(self.files)} "
                "files. Fix: check --data, its chat template and --base, or move them elsewhere"
            )
        places = np.array(of_sample, dtype=np.int64)
        if not missing:
            return texts, places
        table = SampleTable.of(texts.samples[index] for index in kept)
        return _corpus(table, texts.kinds, texts.files, missing, texts=texts), places


def _key(values: NDArray[Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).digest()


def _refuse_equal_ids(table: SampleTable, folder: StatesFolder) -> None:
    known: set[str] = set()
    for name in (name for names in table.iter_ids() for name in names):
        if name in known:
            raise InputError(
                f"{folder.rows}: expected a different id for each row, got {name!a:.80} twice. "
                "Fix: export the store again"
            )
        known.add(name)


def _refuse_none(num_samples: int, folder: StatesFolder) -> None:
    if not num_samples:
        raise InputError(
            f"{folder.states}: expected files of states of one sample or more, got none. Fix: give "
            "the folder of the files"
        )


def _corpus(
    table: SampleTable,
    kinds: dict[str, int],
    files: list[dict[str, Any]],
    missing: Sequence[tuple[str, int]],
    *,
    texts: Corpus | None = None,
) -> Corpus:
    """Return a corpus of samples, a part of those of `texts`; those without a file are counted and
    listed, beside what reading `texts` has lost."""
    report = _report(table, missing, None if texts is None else texts.report)
    return Corpus(
        samples=table,
        fingerprint=table.digest(),
        files=files,
        counts={
            "records": report.records,
            "samples": len(table),
            "tokens": report.tokens,
            "supervised_tokens": sum(int(sample.loss_mask.sum()) for sample in table),
        },
        kinds=kinds,
        report=report,
        skipped=[
            *([] if texts is None else texts.skipped),
            *({"where": name, "problem": _MISSING} for name, _ in missing),
        ],
    )


def _report(table: SampleTable, missing: Sequence[tuple[str, int]], texts: Report | None) -> Report:
    tally = Tally()
    for name, lost in missing:
        tally.count(_MISSING, where=name, tokens=lost)
    tally.records, tally.kept = len(table) + len(missing), len(table)
    tally.tokens = int(table.lengths.sum())
    own = tally.report()
    if texts is None:
        return own
    # A record may have given several samples, whose ids end in what they are of it, and records
    # may be of one group.
    stems = (_END.sub("", name) for names in table.iter_ids() for name in names)
    kept = len(set(zip(table.groups.tolist(), stems, strict=True)))
    both = merge_reports([texts, own])
    return replace(both, records=texts.records, kept=kept, tokens=own.tokens)
