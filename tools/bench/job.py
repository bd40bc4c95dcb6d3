"""The input of a benchmark: a base, stores, a folder for temporary files, a place for figures."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.corpora import write_named_corpus
from carryon.tools.compare.figure import Figure

if TYPE_CHECKING:
    from carryon.cache.base.model import Base

_CORPUS_TOKENS = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Input of a benchmark."""

    work: Path
    """Existing folder for temporary files, removed afterwards."""
    add: Callable[[Figure], None]
    """Called with each figure as soon as it is measured."""
    base: str = ""
    """Hub id, folder or .gguf file."""
    given_stores: Sequence[str] = ()
    """Folders of extracted stores, each PATH or LABEL=PATH."""
    corpora: Sequence[str] = ()
    """Texts to extract with the base, each a corpus made here or LABEL=PATH."""
    shared: Path | None = None
    """Folder of stores that several benchmarks use; None: `work`."""
    is_quick: bool = False
    """Extract little text."""
    quick_tokens: int = 4096
    """How little, for a tokenizer of about 50,000 tokens."""

    def report(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        **details: Any,  # noqa: ANN401 -- plain JSON values
    ) -> None:
        """Add a figure, with a target on one side or none."""
        self.add(
            Figure(
                figure=name,
                value=value,
                unit=unit,
                target=at_most if at_least is None else at_least,
                sense="at most" if at_least is None else "at least",
                details=details,
            )
        )

    def load_base(self, *, device: str = "auto", dtype: str = "auto") -> "Base":
        """Load the base."""
        from carryon.cache.base.model import load_base  # 150 MB: `train.memory` counts imports

        settings = ForwardSettings.from_dict({"device": device, "compute_dtype": dtype})
        return load_base(self.base, forward=settings)

    def open_stores(
        self,
        default: Sequence[str],
        *,
        settings: StoreSettings | None = None,
        num_tokens: int = _CORPUS_TOKENS,
        max_tokens: int = 1024,
    ) -> dict[str, Store]:
        """Return the given stores by label, and with a base those of the corpora.

        Args:
            default: corpora to extract if none are named.
            settings: of stores that are extracted.
            num_tokens: tokens of each, roughly.
            max_tokens: length at which longer documents are split.
        """
        stores = {label: Store.open(path) for label, path in map(split_label, self.given_stores)}
        if self.base:
            for corpus in self.corpora or default:
                label, _ = split_label(corpus)
                if label not in stores:
                    stores[label] = self._extract(
                        corpus, settings or StoreSettings(), num_tokens, max_tokens
                    )
        return stores

    def open_store(
        self,
        settings: StoreSettings | None = None,
        *,
        default: str = "gsm",
        num_tokens: int = _CORPUS_TOKENS,
        max_tokens: int = 1024,
    ) -> Store:
        """Return the first given store, or extract the first corpus with the base.

        Args:
            settings: of a store that is extracted.
            default: corpus to extract if none is named.
            num_tokens: tokens to extract, roughly.
            max_tokens: length at which longer documents are split.
        """
        if self.given_stores:
            return Store.open(split_label(self.given_stores[0])[1])
        corpus = self.corpora[0] if self.corpora else default
        return self._extract(corpus, settings or StoreSettings(), num_tokens, max_tokens)

    def _extract(
        self, corpus: str, settings: StoreSettings, num_tokens: int, max_tokens: int
    ) -> Store:
        label, path = split_label(corpus)
        num_tokens = min(num_tokens, self.quick_tokens) if self.is_quick else num_tokens
        folder = self.shared or self.work
        name = "-".join([label, *settings.taps, str(settings.with_blocks), str(num_tokens)])
        root = folder / name
        if not root.exists():
            from carryon.cache.extraction.pipeline import extract

            base = self.load_base()
            limits = {}
            if "=" not in corpus:
                path = str(folder / f"{name}.jsonl")
                write_named_corpus(label, Path(path), num_tokens=num_tokens)
                limit = min(max_tokens, base.identity.context_tokens, settings.unit_tokens)
                limits = {"long": "split", "max_tokens": limit}
            extract(
                base=base,
                data=[path],
                out=root,
                corpus=CorpusSettings.from_dict(limits),
                store=settings,
            )
        return Store.open(root)


def split_label(text: str) -> tuple[str, str]:
    """Return label and path of `LABEL=PATH`; the label of a path is its last part."""
    label, equals, path = text.partition("=")
    return (label, path) if equals else (Path(text).name, text)


def check_labels(option: str, given: Sequence[str]) -> None:
    """Refuse two values of an option with one label.

    Raises:
        InputError: two have the same label.
    """
    labels = [split_label(text)[0] for text in given]
    if len(set(labels)) != len(labels):
        raise InputError(
            f"{option}: expected different labels, got {' '.join(labels)}. Fix: {option} LABEL=PATH"
        )


def run_fresh(program: str, *arguments: str) -> dict[str, Any]:
    """Run a Python program in a fresh process and return the JSON object that it prints last."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def median_of(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each value over several runs."""
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}


def in_turn(ways: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, float]:
    """Call each way once a round, in alternating order, and return the median of its results.

    Other load on the machine then affects all ways alike.
    """
    results: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for name in names:
            results[name].append(ways[name]())
    return {name: statistics.median(values) for name, values in results.items()}


def timed(way: Callable[[], None], *, calls: int = 1) -> Callable[[], float]:
    """Call `way` once to warm up; return a function that gives the seconds of a later call."""
    way()

    def seconds() -> float:
        synchronize()
        started_at = time.perf_counter()
        for _ in range(calls):
            way()
        synchronize()
        return (time.perf_counter() - started_at) / calls

    return seconds


def synchronize() -> None:
    """Wait for the accelerator, if there is one; kernels run after their calls return."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
