"""Settings of `carryon compare`, the methods by name, and the timed runs that they need.

A row is one timed training: a method, a store made within the time (`first`) or before it
(`second`), a budget in seconds, a seed. Nothing here imports torch.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from carryon.cache.checked_settings import Settings, bounded
from carryon.cache.errors import InputError
from carryon.train.config import CarryOnSettings, rates_of

RunName = Literal["first", "second", "sweep"]
LORA_RANK = 8
CONTROLS = ("linear", "mlp")
"""Methods to compare with, which `carryon train` does not train."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to customize a base."""

    name: str
    rates: tuple[float, ...]
    """Highest learning rates; of several, short runs find the best."""
    is_cheap: bool = False
    """A step costs a tenth of extracting its tokens: a first run reads them several times."""
    carryon: CarryOnSettings | None = None
    """Shape of the carry-on, or taps of a control. None: the base itself is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareSettings(Settings):
    """What is compared, and for how long."""

    methods: list[str] = bounded(["lora", "bottleneck", "top", "top-lora"], min_items=1)
    """Some of `lora`, `full` (fine-tuning of the whole base), and the kinds of carry-ons
    `bottleneck`, `native`, `top` and `top-lora`. `native-2`, `top-12` and `top-lora-12` set the
    number of blocks. The controls `linear` and `mlp` see one token at a time."""
    seconds: list[float] = bounded([150.0, 300.0], min_items=1, above=0)
    """Time budgets of a training, in seconds. Each is a separate run."""
    seeds: list[int] = bounded([0], min_items=1)
    """Seeds of weights and sample order. Several show how much of a difference is noise."""
    runs: list[Literal["first", "second"]] = bounded(["first", "second"], min_items=1)
    """Runs of a carry-on: `first` extracts its text within the budget, `second` finds a finished
    store."""
    tokens: int = bounded(120_000, above=0)
    """Training tokens at most."""
    held_out_tokens: int = bounded(12_000, above=0)
    """Held-out tokens at most."""
    window_tokens: int = bounded(512, at_least=64)
    """Tokens of the windows that longer texts are cut into."""
    tokens_per_step: int = bounded(512, above=0)
    """Tokens of a step, for every method."""
    sampled_softmax: int = bounded(2048, at_least=0)
    """Negatives of the sampled softmax, for every method but `full`. 0: the exact loss."""
    learning_rates: list[str] = field(default_factory=list)
    """METHOD=RATE or METHOD=RATE,RATE,... instead of a method's own."""
    sweep_seconds: float = bounded(0.0, at_least=0)
    """Budget of the short runs that find a learning rate. 0: the shortest of --seconds."""
    allow_pickle: bool = False
    """Read the base's weights from pickle files, which can run code, if it has no safetensors."""

    def shared(self) -> dict[str, Any]:
        """Return the settings that all rows of one folder have in common."""
        names = ("tokens", "held_out_tokens", "window_tokens", "tokens_per_step", "sampled_softmax")
        return {name: getattr(self, name) for name in names}

    @property
    def seconds_of_sweep(self) -> float:
        """Budget of the short runs, in seconds."""
        return self.sweep_seconds or min(self.seconds)


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
        """Name of its file."""
        rate = f"-lr{self.learning_rate:g}" if self.learning_rate else ""
        return f"{self.method}-{self.run}-{self.seconds:g}s-seed{self.seed}{rate}"


def list_rows(settings: CompareSettings, methods: dict[str, Method]) -> list[Row]:
    """Return all rows: those that find a learning rate first, then seed by seed."""
    rows = [
        Row(
            method=name,
            run="sweep",
            seconds=settings.seconds_of_sweep,
            seed=0,
            learning_rate=rate,
        )
        for name, method in methods.items()
        for rate in (method.rates if len(method.rates) > 1 else ())
    ]
    for seed in settings.seeds:
        for seconds in settings.seconds:
            for name, method in methods.items():
                # The whole base needs no store: all its runs are first ones.
                runs: list[RunName] = [*settings.runs] if method.carryon else ["first"]
                rows += [Row(method=name, run=run, seconds=seconds, seed=seed) for run in runs]
    return rows


def get_methods(settings: CompareSettings, *, num_layers: int, width: int) -> dict[str, Method]:
    """Return the chosen methods by name.

    Args:
        settings: with the names and changes to learning rates.
        num_layers: blocks of the base.
        width: D of the base.

    Raises:
        InputError: a method does not exist, or a change names none of the chosen ones.
    """
    methods = {name: _method(name, num_layers=num_layers, width=width) for name in settings.methods}
    for name, rates in _changed_rates(settings.learning_rates, methods):
        methods[name] = replace(methods[name], rates=rates)
    return methods


def _method(name: str, *, num_layers: int, width: int) -> Method:
    match = re.fullmatch(r"(lora|full|bottleneck|linear|mlp|native|top|top-lora)(?:-(\d+))?", name)
    kind, number = (match[1], match[2]) if match else ("", None)
    if not match or (number and kind not in ("native", "top", "top-lora")):
        raise InputError(
            f"method {name!r}: expected lora, full, bottleneck, native, top, top-lora, linear or "
            "mlp; native-K, top-K and top-lora-K with a number of blocks"
        )
    if kind in ("lora", "full"):
        rates = (1e-3, 2e-3, 4e-3, 8e-3) if kind == "lora" else (2e-5, 6e-5, 2e-4)
        return Method(name=name, rates=rates)
    if kind == "native":
        shape = CarryOnSettings(kind="native", blocks=int(number or 2), taps=["prenorm"])
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
    shape = same_size(CarryOnSettings(), taps=taps, base_width=width)
    return Method(name=name, rates=rates_of(CarryOnSettings()), is_cheap=True, carryon=shape)


def _changed_rates(
    given: list[str], methods: dict[str, Method]
) -> Iterator[tuple[str, tuple[float, ...]]]:
    for text in given:
        name, _, values = text.partition("=")
        try:
            rates = tuple(map(float, values.split(",")))
        except ValueError:
            rates = ()
        if name not in methods or not rates or not min(rates) > 0:
            raise InputError(
                f"learning_rates: expected METHOD=RATE for one of {', '.join(methods)}, "
                f"got {text!r}"
            )
        yield name, rates
