"""States that an engine wrote for a prompt: checked, taken to the taps of a store, removed.

What an engine writes is checked as a stranger's file is: see `state_file`.
Letters: T tokens, L columns, D base width.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import Head, widen
from carryon.cache.corpus.samples import Sample
from carryon.cache.errors import InputError
from carryon.cache.exchange.agreement import FirstStates, checked_positions
from carryon.cache.exchange.engine.requests import Engine, request_ahead
from carryon.cache.exchange.layers import column_taps, stored_taps
from carryon.cache.exchange.state_file import FileFacts, read_facts, read_states
from carryon.cache.exchange.taps import tap_states
from carryon.cache.exchange.units import empty_states, put_states
from carryon.cache.extraction.packing import UnitPlan
from carryon.cache.extraction.pilot import PILOT_TOKENS
from carryon.cache.format.manifest import Manifest
from carryon.cache.progress import Progress
from carryon.cache.store.shard_writer import UnitInput, UnitInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """What every file of an engine holds."""

    layers: list[int]
    """[L] layer id of each column."""
    dtype: str
    """Of the states, as in a store."""
    num_layers: int
    """Blocks of the base."""
    width: int
    """D."""

    @classmethod
    def of_file(
        cls, facts: FileFacts, *, layers: Sequence[int], num_layers: int, width: int
    ) -> "Columns":
        """Return the columns of an engine whose settings are not known, from its first file.

        Args:
            facts: of the file.
            layers: layer ids that the user gave. Empty: those that the file names.
            num_layers: blocks of the base.
            width: of the base.

        Raises:
            InputError: layer ids are out of range, or nobody names them.
        """
        layers = list(layers or facts.layer_ids or ())
        column_taps(layers, num_layers=num_layers)
        return cls(layers=layers, dtype=facts.dtype, num_layers=num_layers, width=width)

    def check_taps(self, taps: Sequence[str]) -> None:
        """Check that the columns give the taps of a store.

        Raises:
            InputError: a tap has no column.
        """
        last = f"layer.{self.num_layers}"
        asked = ["prenorm" if tap == last else tap for tap in taps]
        columns = column_taps(self.layers, num_layers=self.num_layers)
        stored_taps(asked, columns, num_layers=self.num_layers)

    def check(self, facts: FileFacts, tokens: NDArray[np.int32], *, name: str) -> None:
        """Compare everything of a file but its states.

        Args:
            facts: of the file.
            tokens: [T] of the prompt.
            name: of the file, for errors.

        Raises:
            InputError: names the file and what differs.
        """
        ids = self.layers if facts.layer_ids is None else facts.layer_ids
        for what, expected, got in (
            ("tokens", len(tokens), facts.shape[0]),
            ("columns, one for each layer id", len(self.layers), facts.shape[1]),
            ("layer ids", " ".join(map(str, self.layers)), " ".join(map(str, ids))),
            ("width", self.width, facts.shape[2]),
            ("dtype", self.dtype, facts.dtype),
        ):
            if got != expected:
                raise InputError(
                    f"{name}: {what}: expected {expected!s:.400}, got {got!s:.80}. Fix: check "
                    "that vLLM runs this base, with this type and these layer ids, and without "
                    "prefix caching"
                )
        if (facts.token_ids != tokens).any():
            token = int(np.argmax(facts.token_ids != tokens))
            raise InputError(
                f"{name}: expected the token ids of the prompt, got {facts.token_ids[token]} in "
                f"place of {tokens[token]} at token {token}. Fix: run the same command to resume; "
                "serve this base alone"
            )


def read_taps(
    folder: Path,
    name: str,
    tokens: NDArray[np.int32],
    columns: Columns,
    *,
    taps: Sequence[str],
    head: Head,
) -> dict[str, NDArray[Any]]:
    """Return the states of a file at each tap, [T, D]; the file is kept.

    Args:
        folder: of the file.
        name: of the file.
        tokens: [T] of its prompt.
        columns: that it must have.
        taps: of the store.
        head: of the base.

    Raises:
        InputError: the file is not what was asked for; names it.
    """
    facts = read_facts(folder, name, is_locked=True)
    columns.check(facts, tokens, name=str(folder / name))
    states = read_states(
        folder,
        facts.file,
        token_ids=tokens,
        shape=(len(columns.layers), columns.width),
        dtype=columns.dtype,
        memory=np.empty(facts.file.num_bytes, np.uint8),
    )
    return {
        tap: tap_states(states, tap, columns.layers, num_layers=columns.num_layers, head=head)
        for tap in taps
    }


class FirstFiles:
    """The first states of samples that are compared with the base, asked for all at once."""

    def __init__(
        self,
        engine: Engine,
        columns: Columns,
        samples: Sequence[Sample],
        units: UnitPlan,
        *,
        taps: Sequence[str],
        head: Head,
    ) -> None:
        """Send the requests.

        Args:
            engine: to ask.
            columns: of its files.
            samples: of the corpus.
            units: places of the samples.
            taps: of the store.
            head: of the base.
        """
        self._engine, self._columns, self._taps, self._head = engine, columns, list(taps), head
        # the probe's rows are in the first two samples
        positions = {*checked_positions(len(units.order)), *range(min(2, len(units.order)))}
        self._tokens = {
            position: samples[int(units.order[position])].tokens[:PILOT_TOKENS]
            for position in sorted(positions)
        }
        self._asked: dict[int, Future[str]] = {
            position: engine.submit(tokens.tolist()) for position, tokens in self._tokens.items()
        }
        self._read: dict[int, tuple[str, dict[str, NDArray[np.float32]]]] = {}

    def __call__(self, position: int, num_tokens: int) -> FirstStates:
        """Return the first states of the sample at a position."""
        tokens = self._tokens[position]
        if position not in self._read:
            name = self._asked[position].result()
            folder, how = self._engine.folder, {"taps": self._taps, "head": self._head}
            taps = read_taps(folder, name, tokens, self._columns, **how)  # type: ignore[arg-type]
            self._engine.discard(name)
            shown = str(folder / name)
            self._read[position] = shown, {tap: widen(rows) for tap, rows in taps.items()}
        name, states = self._read[position]
        return name, tokens[:num_tokens], {tap: rows[:num_tokens] for tap, rows in states.items()}


class EngineStates:
    """States of units, by an engine that is asked ahead: a `StatesOf`."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        engine: Engine,
        columns: Columns,
        *,
        head: Head,
        requests: int,
        units: Sequence[int],
    ) -> None:
        """Prepare; nothing is asked.

        Args:
            root: of the store.
            manifest: of the store.
            engine: to ask.
            columns: of its files.
            head: of the base.
            requests: most in flight.
            units: in the order in which they are computed, so that the next one is begun while the
                engine finishes one. Empty: that is not known, as others claim units too.
        """
        self._inputs, self._manifest = UnitInputs(root, manifest), manifest
        self._engine, self._columns, self._head = engine, columns, head
        self._requests, self._is_shared = requests, not units
        self._files = self._ask(map(self._inputs.read, units))

    def __call__(self, unit: UnitInput, progress: Progress) -> dict[str, NDArray[Any]]:
        """Return the states of a unit; its files are removed as they are read."""
        if self._is_shared:
            self._files = self._ask(iter([unit]))
        hidden = empty_states(self._manifest, len(unit.tokens))
        for _ in range(len(unit.lengths)):
            (number, rows, tokens), name = next(self._files)
            assert number == unit.unit
            folder = self._engine.folder
            how: Mapping[str, Any] = {"taps": self._manifest.taps, "head": self._head}
            put_states(hidden, rows, read_taps(folder, name, tokens, self._columns, **how))
            self._engine.discard(name)
            progress.update(len(tokens))
        return hidden

    def _ask(
        self, units: Iterator[UnitInput]
    ) -> Iterator[tuple[tuple[int, slice, NDArray[np.int32]], str]]:
        """Yield unit, rows and tokens of each sample, with the name of its file."""
        prompts = (
            ((unit.unit, slice(start, start + length), tokens), tokens.tolist())
            for unit in units
            for start, length in zip(unit.starts.tolist(), unit.lengths.tolist(), strict=True)
            for tokens in [unit.tokens[start : start + length]]
        )
        return request_ahead(self._engine, prompts, num_ahead=self._requests)
