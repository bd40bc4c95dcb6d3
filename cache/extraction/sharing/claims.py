"""Claims: the next unit for this process, and its commit. Units are not divided beforehand, so a
slow process does not hold up the others.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from carryon.cache.extraction.sharing.commits import (
    clear_units,
    commit_unit,
    commits_in,
    discard_aside,
    finish_commit,
    is_commit,
    write_aside,
)
from carryon.cache.extraction.sharing.leases import Leases, is_lease
from carryon.cache.files.atomic import remove_file, sweep_partials
from carryon.cache.files.regular import names_below
from carryon.cache.format.manifest import Manifest, read_manifest
from carryon.cache.format.receipt import Receipt, has_receipt, units_with_receipt
from carryon.cache.store.shard_writer import EncodedUnit, Rows, UnitInput, write_states

Standing = Literal["taken", "present", "busy"]
"""A unit is this process's now; has a receipt; or another process works on it."""
PLAN = "plan"
"""Lease on writing the plan, or comparing with it."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 1.0


class UnitSource(Protocol):
    """What says which units a process computes, and commits them; as `Claims`."""

    def iter_units(
        self, units: Sequence[int], *, is_over: threading.Event | None = None
    ) -> Iterator[int]:
        """Yield each unit that this process is to compute; end soon once `is_over` is set."""

    def write_unit(
        self, unit_input: UnitInput, hidden: Mapping[str, Rows] | EncodedUnit, *, elapsed_s: float
    ) -> Receipt | None:
        """Write and commit a unit that was yielded; None if another process has committed it."""

    def give_back(self, unit: int) -> None:
        """Release a unit that was yielded and is not computed."""

    def num_others(self) -> int:
        """Return how many units other processes are working on."""


class Claims:
    """Units of a store that this process claims, one after the other."""

    def __init__(self, root: Path, manifest: Manifest, leases: Leases) -> None:
        """Prepare; nothing is written."""
        self._root, self._manifest, self._leases = root, manifest, leases

    def iter_units(
        self, units: Sequence[int], *, is_over: threading.Event | None = None
    ) -> Iterator[int]:
        """Yield each unit that this process is to compute, until every unit has a receipt.

        A unit that another process works on is waited for, and taken over if that process dies.

        Args:
            units: to compute.
            is_over: ends it when set.
        """
        is_over = is_over or threading.Event()
        pending, wait_s = list(units), _FIRST_WAIT_S
        while pending:
            busy, is_idle = [], True
            for unit in pending:
                if is_over.is_set():
                    return
                standing = self.take(unit)
                if standing == "present":
                    continue
                busy.append(unit)
                if standing == "busy":
                    continue
                is_idle = False
                yield unit
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S) if is_idle else _FIRST_WAIT_S
            pending = busy
            if pending:
                is_over.wait(wait_s)

    def take(self, unit: int) -> Standing:
        """Claim a unit, unless it is present or busy; a commit that was begun is finished."""
        if has_receipt(self._root, self._manifest, unit):
            return "present"
        if not self._leases.take(str(unit)):
            return "busy"
        if finish_commit(self._root, self._manifest, unit):
            self._leases.release(str(unit))
            return "present"
        return "taken"

    @property
    def token(self) -> str:
        """Names this process in its leases."""
        return self._leases.token

    def write_unit(
        self, unit_input: UnitInput, hidden: Mapping[str, Rows] | EncodedUnit, *, elapsed_s: float
    ) -> Receipt | None:
        """Write and commit a claimed unit; None if another process has committed it.

        Arguments and errors are those of `carryon.cache.store.shard_writer.write_unit`.
        """
        root, manifest = self._root, self._manifest
        token, unit = self._leases.token, unit_input.unit
        write = partial(write_aside, root, token=token)
        try:
            receipt = write_states(
                root, manifest, unit_input, hidden, elapsed_s=elapsed_s, write=write
            )
            is_own = commit_unit(root, manifest, receipt, token=token)
        except BaseException as error:
            with suppress(OSError):
                discard_aside(root, manifest, unit, token=token)
            if isinstance(error, FileNotFoundError) and has_receipt(root, manifest, unit):
                return None  # others finished, and removed what they found
            raise
        finally:
            self._leases.release(str(unit))
        return receipt if is_own else None

    def give_back(self, unit: int) -> None:
        """Release a unit that was yielded and is not computed."""
        self._leases.release(str(unit))

    def num_others(self) -> int:
        """Return how many units other processes are working on."""
        return len(self._leases.units_of_others() - units_with_receipt(self._root))


def clear_leftovers(root: Path, manifest: Manifest, leases: Leases) -> None:
    """Remove what killed and late processes have left in a store whose units are all computed."""
    units = (leases.units_of_others() | commits_in(root)) & set(range(manifest.num_units))
    clear_units(root, manifest, units)
    leases.clear(set(map(str, units)))
    if leases.is_known(PLAN) and leases.take(PLAN):  # its owner died while it wrote the plan
        if read_manifest(root).num_units == manifest.num_units:  # else files of others' units
            sweep_partials(root)
            leases.clear({PLAN})
        leases.release(PLAN)


def drop_claims(root: Path) -> None:
    """Remove leases and unfinished commits from a store that no other process writes to."""
    for name in names_below(root, "units"):
        if is_lease(name) or is_commit(name):
            remove_file(root / "units" / name)
