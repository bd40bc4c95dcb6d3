"""What the benchmark `store` measures, and how much of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carryon.cache.settings import Settings, bounded

FIGURES = ("lossless", "profiles", "extract", "stream", "decode", "write", "open")
"""What can be measured, in the order in which it is."""


def not_positive(values: Mapping[str, Any]) -> tuple[bool, str]:
    """Return the problem of numbers, or lists of them, that are not above 0."""
    wrong = []
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not min(numbers) > 0:
            wrong.append(name)
    return bool(wrong), f"{', '.join(wrong)}: expected more than 0"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSettings(Settings):
    """What is measured."""

    figures: list[str] = bounded(list(FIGURES), choices=FIGURES)
    """Some of: lossless (bytes against raw), profiles (near and compact: bytes, KL and top-1
    agreement), extract (speed against bare forward passes), stream (tokens/s into batches against
    other layouts), decode (one core), write (an early unit against a late one), open (a very
    large store)."""
    store: list[str] = field(default_factory=list)
    """Extracted stores to measure, each PATH or LABEL=PATH; the labels gsm and python have
    targets."""
    base: str = ""
    """Base to extract with: hub id, folder or .gguf file. Empty for none: what needs it is left
    out."""
    corpus: list[str] = field(default_factory=lambda: ["gsm", "python"])
    """Corpora to extract with --base, unless a --store has the same label: gsm (GSM-symbolic
    problems), python (the standard library's docstrings and code), or LABEL=PATH of your own."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        labels = [label for label, _ in map(split_label, self.store)]
        return [
            (
                len(set(labels)) != len(labels),
                f"store: expected a label of its own for each store, got {' '.join(labels)}: "
                "write LABEL=PATH",
            ),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSizes(Settings):
    """How much is measured."""

    corpus_tokens: int = 65536
    """Tokens, about, of each corpus that is extracted."""
    extract_tokens: int = 24576
    """Tokens of the extraction that is timed against bare forward passes."""
    extract_unit_tokens: int = 4096
    """Tokens in a unit of that extraction; each unit is one round."""
    samples: int = 96
    """Made-up samples that are streamed."""
    width: int = 2560
    """Width of the made-up states, in channels."""
    taps: int = 4
    """Taps of the made-up states."""
    mean_tokens: int = 588
    """Mean length of the made-up samples, in tokens; lengths are log-normal."""
    max_tokens: int = 2048
    """Length at which they are cut off, in tokens."""
    stream_tokens: int = 262144
    """Tokens, at most, of an extracted store that are streamed."""
    unit_tokens: int = 8192
    """Tokens in a unit of the made-up stores that are streamed and decoded."""
    threads: list[int] = field(default_factory=lambda: [1, 2])
    """Reader threads that every layout is streamed with; the best of them counts."""
    slow_disk: float = 300.0
    """Speed of the slow disk, in MB/s."""
    early_unit: int = 10
    """Units in the store that a late unit's writing is compared with."""
    late_unit: int = 1000
    """Units in the store whose next unit is the late one."""
    large_units: int = 4000
    """Units of the large store that is opened."""
    large_samples: int = 2_000_000
    """Samples of the large store that is opened."""
    rounds: int = 3
    """Rounds that medians are taken of; writing takes ten times as many."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [not_positive(self.to_dict())]


QUICK = BenchSizes(
    corpus_tokens=4096,
    extract_tokens=2048,
    extract_unit_tokens=1024,
    samples=8,
    width=256,
    taps=2,
    mean_tokens=128,
    max_tokens=512,
    stream_tokens=4096,
    unit_tokens=1024,
    threads=[1],
    late_unit=30,
    large_units=20,
    large_samples=2000,
    rounds=1,
)
"""Sizes that show in a minute that everything runs, and give no numbers to believe."""


def split_label(text: str) -> tuple[str, str]:
    """Return label and path of `LABEL=PATH`; a path alone is labelled with its last part."""
    label, equals, path = text.partition("=")
    return (label, path) if equals else (Path(text).name, text)
