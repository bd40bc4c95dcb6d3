"""What `carryon compare` compares: its settings, the methods by name, and the rows that they make.

A row is one timed training: a method, from a store yet to be made (`first`) or there already
(`second`), with so many seconds and one seed. Nothing here imports torch.
"""

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from carryon.cache.errors import InputError
from carryon.cache.settings import Settings, bounded
from carryon.train.config import CarryOnSettings, rates_of

RunName = Literal["first", "second", "sweep"]
LORA_RANK = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to customize a base."""

    name: str
    rates: tuple[float, ...]
    """Highest learning rates: of several the best is found by short runs, and taken."""
    passes: float | None = 1.0
    """Passes over what is extracted that a first run plans with. None: as the text wants."""
    carryon: CarryOnSettings | None = None
    """Shape of the carry-on, or taps of a control; None: the whole base is trained."""

    @property
    def is_carryon(self) -> bool:
        """Whether it is trained from a store."""
        return self.carryon is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareSettings(Settings):
    """What is compared, on what, for how long."""

    corpus: str = "pydoc"
    """Text: `pydoc` (Python's reference), `python` (its library), `manpages` of this system, worked
    problems `gsm`, or LABEL=PATH of your own files (.jsonl as for extract, or plain text)."""
    methods: list[str] = bounded(
        [
            "lora",
            "full",
            "bottleneck",
            "native",
            "top",
            "top-lora",
            "linear",
            "mlp",
        ],
        min_items=1,
    )
    """Which methods: `lora` and `full` train the whole base; `linear` and `mlp` are controls on
    the taps of the `bottleneck`; `native-2`, `top-12`, `top-lora-12` give a number of blocks."""
    seeds: list[int] = bounded([0], min_items=1)
    """Of first weights and of the order of samples."""
    seconds: list[float] = bounded([150.0, 300.0], min_items=1, above=0)
    """Budgets; each is a run of its own, whose learning rate falls to its end."""
    runs: list[Literal["first", "second"]] = bounded(["first", "second"], min_items=1)
    """For carry-ons: `first` extracts within the budget, `second` finds the store there."""
    evaluate_at: list[float] = field(default_factory=lambda: [75.0, 225.0])
    """Seconds on a run's clock at which it is evaluated as well; the clock stands still then."""
    learning_rates: list[str] = field(default_factory=list)
    """METHOD=RATE or METHOD=RATE,RATE,... in place of a method's own."""
    passes: list[str] = field(default_factory=list)
    """METHOD=PASSES in place of a method's own: how often a first run plans to read what it
    extracts. Blocks plan one; the others 3 of prose, which they learn by heart in ten, and 12 of
    answers, where only these are targets."""
    sweep_seconds: float = bounded(150.0, above=0)
    """Budget of the short runs that find a learning rate; a rate that wins in a minute can be too
    high for five."""
    tokens: int = bounded(120_000, above=0)
    """Training tokens in all; few of them make many passes. Second runs find all extracted."""
    held_out_tokens: int = bounded(12_000, above=0)
    """Held-out tokens that are looked at, in clean windows."""
    window_tokens: int = bounded(512, at_least=64)
    """Tokens of a window that documents are cut into."""
    tokens_per_step: int = bounded(512, above=0)
    """Tokens of a step, of every method; small ones, as a CPU takes few of them in minutes."""
    sampled_softmax: int = bounded(2048, at_least=0)
    """As of `carryon train`, for every method but `full`. 0: all train on the exact loss."""

    def data_facts(self) -> dict[str, Any]:
        """Return the settings that all rows of one folder share."""
        names = (
            "corpus",
            "tokens",
            "held_out_tokens",
            "window_tokens",
            "tokens_per_step",
            "sampled_softmax",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One timed training."""

    method: str
    run: RunName
    seconds: float
    seed: int
    learning_rate: float = 0.0
    """Of a `sweep`; 0: the method's best."""

    @property
    def name(self) -> str:
        """Of its file."""
        rate = f"-lr{self.learning_rate:g}" if self.learning_rate else ""
        return f"{self.method}-{self.run}-{self.seconds:g}s-seed{self.seed}{rate}"


def list_rows(settings: CompareSettings, methods: dict[str, Method]) -> list[Row]:
    """Return all rows: those that find a learning rate first, then seed by seed."""
    rows = [
        Row(
            method=name,
            run="sweep",
            seconds=settings.sweep_seconds,
            seed=0,
            learning_rate=rate,
        )
        for name, method in methods.items()
        for rate in (method.rates if len(method.rates) > 1 else ())
    ]
    for seed in settings.seeds:
        for seconds in settings.seconds:
            for name, method in methods.items():
                # Nothing is extracted for the whole base: all its runs are first ones.
                runs: list[RunName] = [*settings.runs] if method.is_carryon else ["first"]
                rows += [Row(method=name, run=run, seconds=seconds, seed=seed) for run in runs]
    return rows


def row_command(settings: CompareSettings, row: Row, *, base: str, out: str) -> str:
    """Return the command that makes one row alone."""
    words = ["carryon", "compare", "--base", base, "--out", out]
    defaults = CompareSettings().to_dict()
    one = replace(settings, methods=[row.method], seeds=[row.seed], seconds=[row.seconds])
    if row.run != "sweep":
        one = replace(one, runs=[row.run])
    own = f"{row.method}="
    one = replace(
        one,
        learning_rates=[text for text in one.learning_rates if text.startswith(own)],
        passes=[text for text in one.passes if text.startswith(own)],
    )
    if row.run == "sweep":  # the same training, under a name of its own
        one = replace(one, learning_rates=[f"{row.method}={row.learning_rate:g}"])
    for name, value in one.to_dict().items():
        if value != defaults[name] or name == "methods":
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *(_plain(each) for each in values)]
    return shlex.join(words)


def get_methods(settings: CompareSettings, *, num_layers: int, width: int) -> dict[str, Method]:
    """Return the methods asked for, by name.

    Args:
        settings: which, and changes to them.
        num_layers: blocks of the base.
        width: D of the base.

    Raises:
        InputError: there is no method of a name, or a change names none that is compared.
    """
    methods = {name: _method(name, num_layers=num_layers, width=width) for name in settings.methods}
    for name, text in _changes("learning_rates", settings.learning_rates, methods):
        methods[name] = replace(methods[name], rates=tuple(map(float, text.split(","))))
    for name, text in _changes("passes", settings.passes, methods):
        methods[name] = replace(methods[name], passes=float(text))
    return methods


def _method(name: str, *, num_layers: int, width: int) -> Method:
    found = re.fullmatch(r"(lora|full|bottleneck|linear|mlp|native|top|top-lora)(?:-(\d+))?", name)
    kind, number = (found[1], found[2]) if found else ("", None)
    if not found or (number and kind not in ("native", "top", "top-lora")):
        raise InputError(
            f"method {name!r}: expected lora, full, bottleneck, native, top, top-lora, linear or "
            "mlp; native-K, top-K and top-lora-K with a number of blocks"
        )
    if kind in ("lora", "full"):
        rates = (1e-3, 2e-3, 4e-3, 8e-3) if kind == "lora" else (2e-5, 6e-5, 2e-4)
        return Method(name=name, rates=rates)
    if kind == "native":
        blocks = int(number or 2)
        shape = CarryOnSettings(kind="native", blocks=blocks, taps=["prenorm"])
        return Method(name=name, rates=rates_of(shape), carryon=shape)
    if kind.startswith("top"):
        blocks = int(number or max(1, min(8, num_layers - 1)))
        rank = LORA_RANK if kind == "top-lora" else 0
        shape = CarryOnSettings(
            kind="top", blocks=blocks, taps=[f"layer.{num_layers - blocks}"], lora_rank=rank
        )
        return Method(name=name, rates=rates_of(shape), carryon=shape)
    from carryon.tools.compare.methods import same_size  # imports torch

    taps = ["final", f"layer.{math.ceil(num_layers / 2)}"]
    return Method(
        name=name,
        rates=rates_of(CarryOnSettings()),
        passes=None,  # a step costs it a tenth of what extracting its tokens does
        carryon=same_size(CarryOnSettings(), taps=taps, base_width=width),
    )


def _changes(name: str, given: list[str], methods: dict[str, Method]) -> Iterator[tuple[str, str]]:
    for text in given:
        method, equals, value = text.partition("=")
        is_number = all(re.fullmatch(r"\d*\.?\d+(e-?\d+)?", part) for part in value.split(","))
        if not equals or method not in methods or not is_number:
            raise InputError(
                f"{name}: expected METHOD=NUMBER for one of {', '.join(methods)}, got {text!r}"
            )
        yield method, value


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
