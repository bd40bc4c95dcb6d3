"""The kinds of carry-on, one entry each, and `register_kind` for a kind of your own.

Loads neither torch nor a kind's module: an entry names what builds it.
"""

import difflib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from carryon.cache.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What differs between kinds; their modules do the rest (modules/carryon.py)."""

    build: str | Callable[..., Any]
    """Returns an untrained module. Called as `build(settings, base_width=D)`, or as
    `build(settings, blocks=...)` if `needs_blocks`. A string is "package.module:name"."""
    learning_rates: tuple[float, ...] = (1e-3,)
    """Peak learning rates that suit it: its default, then others worth trying."""
    lora_rates: tuple[float, ...] = ()
    """The same for training by LoRA. Empty: it cannot be trained by LoRA."""
    max_rate_factor: float = math.inf
    """A learning rate above this many times the default draws a warning."""
    own_tap: str = ""
    """The one tap it reads, where its output replaces the base's `final` state: `prenorm`, or
    `layer.{below}`, the state below the base's last `blocks` blocks. Empty: it reads the taps of
    the settings and corrects `final`."""
    needs_blocks: bool = False
    """Whether it is built from the base's last blocks, which the store must then hold."""
    reads_sources: bool = False
    """Whether it can read the states of other bases too; `build` is then also given
    `sources={tap: width}`, if there are any."""
    compiles: bool = False
    """Whether torch may compile its `correct_packed`, which then also sees samples of zeros."""
    merges: Literal["", "append", "replace"] = ""
    """How its blocks merge into a checkpoint of the base: behind the base's blocks, or in place of
    the last ones. Empty: it does not merge."""

    def make(self) -> Callable[..., Any]:
        """Return what builds the module, imported if it is given by name."""
        if not isinstance(self.build, str):
            return self.build
        module, _, name = self.build.partition(":")
        maker: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return maker


KINDS = {
    "bottleneck": Kind(
        build="carryon.train.modules.bottleneck:Bottleneck",
        learning_rates=(3e-3, 1e-3),
        reads_sources=True,
        compiles=True,
    ),
    "native": Kind(
        build="carryon.train.modules.base_blocks:BlocksCarryOn",
        learning_rates=(1e-3, 3e-4),
        own_tap="prenorm",
        needs_blocks=True,
        merges="append",
    ),
    "top": Kind(
        build="carryon.train.modules.base_blocks:BlocksCarryOn",
        learning_rates=(2e-4, 5e-4, 1e-3),
        lora_rates=(2e-3, 1e-3),
        max_rate_factor=10.0,
        own_tap="layer.{below}",
        needs_blocks=True,
        merges="replace",
    ),
    "none": Kind(build="carryon.train.modules.no_correction:NoCorrection", learning_rates=(3e-3,)),
    "custom": Kind(build="carryon.train.modules.carryon:refuse_custom"),
}
"""Name -> entry. `custom` is the module that is passed to train(module=...)."""
BUILT_IN = frozenset(KINDS)
"""The kinds of this package; `register_kind` adds others to KINDS."""


def register_kind(name: str, kind: Kind) -> None:
    """Add a kind, so that settings, saved carry-ons and `--kind` can name it.

    Example:
        register_kind("mlp", Kind(build=lambda settings, base_width: Mlp(base_width)))

    Raises:
        InputError: the name is taken.
    """
    if name in KINDS:
        raise InputError(f"register_kind: expected a new name, got {name}, which is taken")
    KINDS[name] = kind


def get_kind(name: str) -> Kind:
    """Return the entry of a kind.

    Raises:
        InputError: no kind has that name; suggests the nearest.
    """
    if problem := kind_problem(name):
        raise InputError(problem)
    return KINDS[name]


def kind_problem(name: str) -> str:
    """Return what is wrong with the name of a kind; empty if nothing is."""
    if name in KINDS:
        return ""
    near = difflib.get_close_matches(name, KINDS, n=1)
    fix = f"did you mean {near[0]}?" if near else "register_kind adds a kind of your own"
    return f"kind: expected one of {', '.join(KINDS)}, got {name}: {fix}"
