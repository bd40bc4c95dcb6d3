"""The carry-ons that are loaded for one base, and which of them each row of a batch uses.

A loaded carry-on is its weights as saved and its card: about a megabyte, loaded in a millisecond.
Modules are built only for the carry-ons of a batch, one for each shape. Adding and dropping change
a table; a running batch keeps what it started with.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.format.framing import Framing
from carryon.train.config import CarryOnSettings
from carryon.train.modules.bottleneck import Bottleneck
from carryon.train.modules.card import CarryOnCard, check_base
from carryon.train.modules.card_checks import check_sizes, check_weights
from carryon.train.modules.carryon import CarryOn
from carryon.train.modules.no_correction import NoCorrection
from carryon.train.modules.stacked_weights import with_weights
from carryon.train.modules.taps import check_alpha

DEFAULT = "default"
"""Name of the carry-on of rows for which a call names none."""
NOBODY = 0
"""Slot of a row without a carry-on."""
Names = Sequence[str | None] | Tensor | None
"""Carry-ons of a batch's rows: names or None, or slots [B]. None: the default for all."""
Alpha = float | Sequence[float] | Tensor | None
"""Strengths of a batch's rows: one for all, or [B]. None: each carry-on's own."""
_KEPT_BATCHES = 4  # stacked weights of a batch are kept for its next generation steps


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedCarryOn:
    """A carry-on in memory."""

    card: CarryOnCard
    weights: Mapping[str, Tensor]
    """By name, in the saved type, on the CPU."""
    shape: CarryOn
    """A module shared by all carry-ons of this shape; its own weights are not used."""


class CarryOnSet:
    """Carry-ons of one base by name; each gets a slot, a number that is never reused."""

    def __init__(self, base: Mapping[str, Any]) -> None:
        """Start empty, for the base of this identity."""
        self._base = base
        self._names: dict[str, int] = {}
        self._loaded: dict[int, LoadedCarryOn] = {}
        self._shapes: dict[str, CarryOn] = {}
        self._next = NOBODY + 1
        self._batches: dict[tuple[object, ...], list[CarryOn]] = {}  # the most recent last

    @property
    def names(self) -> list[str]:
        """Names of the loaded carry-ons, in the order they were added."""
        return list(self._names)

    def put(
        self, name: str, weights: Mapping[str, Tensor], card: CarryOnCard, *, where: str = ""
    ) -> None:
        """Add a carry-on, replacing one of that name; its weights are shared, not copied.

        Errors begin with `where`, or with the name.

        Raises:
            InputError: the weights are not finite numbers of the shapes that the card implies.
            SettingMismatchError: it was trained on another base or tokenizer.
        """
        where = where or f"carry-on {name}"
        check_base(card, self._base, where=where)
        kind = card.settings.get("kind", "bottleneck")
        if kind not in ("bottleneck", "none"):
            raise InputError(
                f"{where}: expected a bottleneck, got the kind {kind}. Fix: carryon merge makes a "
                "checkpoint of a native or top"
            )
        try:
            check_sizes(CarryOnSettings.from_dict(card.settings), card.base_width, weights)
            shape = self._shape_of(card)
            check_weights(weights, shape.state_dict())
        except InputError as error:
            raise InputError(
                f"{where}: not a carry-on of the shape in its card: {error}"
            ) from error
        slot, self._next = self._next, self._next + 1
        self._loaded[slot] = LoadedCarryOn(card=card, weights=dict(weights), shape=shape)
        replaced = self._names.get(name)
        self._names[name] = slot  # atomic: other threads see the old carry-on or the new one
        if replaced is not None:
            del self._loaded[replaced]

    def drop(self, name: str) -> None:
        """Unload a carry-on.

        Raises:
            InputError: none has that name.
        """
        slot = self.slot(name)
        del self._names[name], self._loaded[slot]

    def get(self, name: str) -> LoadedCarryOn:
        """Return the carry-on called `name`; errors as those of `drop`."""
        return self._loaded[self.slot(name)]

    def slot(self, name: str | None) -> int:
        """Return the slot of `name`; None is a row without a carry-on."""
        if name is None:
            return NOBODY
        if name not in self._names:
            known = ", ".join(self._names) or "none"
            raise InputError(f"carryons: no carry-on is called {name!r}; loaded are {known}")
        return self._names[name]

    def resolve(
        self, names: Names, alpha: Alpha, *, num_rows: int
    ) -> tuple[list[int], list[float]]:
        """Return the slot and the strength of each row; the strength without a carry-on is 0.

        Raises:
            InputError: not one for each row, a carry-on that is not loaded, or alpha out of range.
        """
        if names is None:
            slots = [self._names.get(DEFAULT, NOBODY)] * num_rows
        elif isinstance(names, str) or len(names) != num_rows:
            got = repr(names) if isinstance(names, str) else len(names)
            raise InputError(
                f"carryons: expected a list of one name or None for each of the {num_rows} rows, "
                f"got {got}"
            )
        else:
            rows = names.tolist() if isinstance(names, Tensor) else names
            slots = [row if isinstance(row, int) else self.slot(row) for row in rows]
        if alpha is None:
            alphas = [1.0 if slot == NOBODY else self._loaded[slot].card.alpha for slot in slots]
        else:
            values = alpha.tolist() if isinstance(alpha, Tensor) else alpha
            alphas = [values] * num_rows if isinstance(values, int | float) else list(values)
        if len(alphas) != num_rows:
            raise InputError(
                f"alpha: expected a number, or one for each of the {num_rows} rows, "
                f"got {len(alphas)}"
            )
        checked = [check_alpha(each) for each in alphas]
        corrects = {slot: self._corrects(slot) for slot in slots}
        return slots, [a if corrects[s] else 0.0 for s, a in zip(slots, checked, strict=True)]

    def framings(self, names: Names, *, num_rows: int, fallback: Framing) -> list[Framing]:
        """Return for each row how the training texts of its carry-on were framed.

        A row without a carry-on is framed as those of the default one; `fallback` if there is none.
        Raises as `resolve`.
        """
        slots, _ = self.resolve(names, None, num_rows=num_rows)
        default = self._names.get(DEFAULT, NOBODY)
        cards = {slot: self._loaded[slot].card for slot in {default, *slots} - {NOBODY}}
        known = {slot: Framing.from_dict(card.framing) for slot, card in cards.items()}
        own = known.get(default, fallback)
        return [known.get(slot, own) for slot in slots]

    def modules(
        self, slots: Sequence[int], *, device: torch.device, dtype: torch.dtype
    ) -> list[CarryOn]:
        """Return a module for each shape among the rows; their deltas are to be summed.

        A module returns exactly 0 for rows of another shape or without a carry-on. The modules of
        the last few batches are kept, even after a carry-on of theirs is dropped.

        Raises:
            InputError: a carry-on is not loaded.
        """
        used = list(slots[:1]) if len(set(slots)) == 1 else list(slots)
        key = (device, dtype, *used)
        kept = self._batches.pop(key, None)  # and put back as the most recent
        if kept is not None:
            self._batches[key] = kept
            return kept
        if set(used) - {NOBODY, *self._loaded}:
            raise InputError("carryons: expected carry-ons that are loaded, got one that is not")
        rows = [self._loaded[slot] if self._corrects(slot) else None for slot in used]
        shapes = {id(row.shape): row.shape for row in rows if row is not None}
        modules = [
            with_weights(
                shape,
                [None if row is None or row.shape is not shape else row.weights for row in rows],
                device=device,
                dtype=dtype,
            )
            for shape in shapes.values()
        ]
        self._batches[key] = modules
        while len(self._batches) > _KEPT_BATCHES:
            self._batches.pop(list(self._batches)[0], None)  # other threads may do so too
        return modules

    def _corrects(self, slot: int) -> bool:
        """Return whether a slot's carry-on has anything to add; the kind `none` has not."""
        loaded = self._loaded.get(slot)  # None: dropped since its batch began
        return slot != NOBODY and not (loaded and isinstance(loaded.shape, NoCorrection))

    def _shape_of(self, card: CarryOnCard) -> CarryOn:
        settings = replace(CarryOnSettings.from_dict(card.settings), dropout=0.0)
        key = json.dumps([settings.to_dict(), card.base_width], sort_keys=True)
        if key not in self._shapes:
            make = Bottleneck if settings.kind == "bottleneck" else NoCorrection
            with torch.random.fork_rng(devices=[]):
                self._shapes[key] = make(settings, base_width=card.base_width)
        return self._shapes[key]
