"""What a lineage folder holds, and what it says of itself.

lineage.json        base, settings, alpha, and every increment of data with its steps
config.yaml         the settings, flat, for the next update
store/              the growing store, unless another is named
texts.json          where the texts are that updates have extracted, by SHA-256
start/              step folder of the carry-on that it begins with, where another base came before
trunk/0002-head     run folder: increment 2 up to the branch point
trunk/0002-tail     run folder: the rest of it, taken when the next version is asked for
versions/0002       run folder: the branch; its carryon/ is version 2
versions.json       held-out losses measured so far
paths.png           learning rates
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from carryon.cache.errors import InputError, MissingError
from carryon.cache.files import write_file, write_json
from carryon.train.config import TrainSettings, setting_of, with_current_names
from carryon.train.optim.lr_paths import branch_point
from carryon.train.trainer.run_dir import FREE_SETTINGS, RunFolder

FORMAT = "carryon-lineage"
FORMAT_VERSION = 2
_BEFORE_ITS_FIRST_INCREMENT = {"store", "start", "texts.json"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Increment:
    """The data of one update."""

    stores: list[str]
    """STORE#NUMBER of each part of a store: absolute folders."""
    fingerprints: list[str]
    """Of each part; a store that grows leaves them as they are."""
    steps: int
    """Steps of its whole order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """What a lineage folder says of itself."""

    root: Path
    base: dict[str, Any]
    """Identity of the base."""
    alpha: float
    settings: dict[str, Any]
    """Flat, without those that a resumed run may change."""
    increments: list[Increment]
    predecessor: dict[str, Any] | None = None
    """The lineage on another base whose newest version this one begins with, and what that came
    to. None: it begins with an untrained carry-on."""

    @property
    def ends(self) -> list[int]:
        """The step of the trunk at which each increment ends."""
        return list(accumulate(increment.steps for increment in self.increments))

    @property
    def released(self) -> list[int]:
        """Numbers of the versions that are there."""
        numbers = range(1, len(self.increments) + 1)
        return [number for number in numbers if self.version(number).result.exists()]

    @property
    def store(self) -> Path:
        """The growing store, unless another is named."""
        return self.root / "store"

    @property
    def start(self) -> Path:
        """Checkpoints: one, which the trunk begins with, where there is a predecessor."""
        return self.root / "start"

    def branch_step(self, version: int) -> int:
        """Return the step of a version's increment at which its branch leaves the trunk."""
        return branch_point(0, self.increments[version - 1].steps, alpha=self.alpha)

    def head(self, version: int) -> RunFolder:
        """Return the trunk's segment up to a version's branch point."""
        return RunFolder(root=self.root / "trunk" / f"{version:04d}-head")

    def tail(self, version: int) -> RunFolder:
        """Return the trunk's segment from a version's branch point to the increment's end."""
        return RunFolder(root=self.root / "trunk" / f"{version:04d}-tail")

    def version(self, version: int) -> RunFolder:
        """Return the branch that is a version."""
        return RunFolder(root=self.root / "versions" / f"{version:04d}")


def read_lineage(root: str | Path) -> Lineage | None:
    """Return the lineage in a folder; None where there is none.

    Raises:
        InputError: the folder holds something else.
    """
    path = Path(root) / "lineage.json"
    if not path.exists():
        if Path(root).exists() and (not Path(root).is_dir() or _others(Path(root))):
            raise InputError(f"{root}: holds something that is not a lineage: give a new folder")
        return None
    document = json.loads(path.read_text(encoding="ascii"))
    found = document.pop("format"), document.pop("format_version")
    if found != (FORMAT, FORMAT_VERSION):
        raise InputError(
            f"{path}: expected {FORMAT} {FORMAT_VERSION}, got {found[0]} {found[1]}: begin another "
            "lineage"
        )
    increments = [Increment(**each) for each in document.pop("increments")]
    document["settings"] = with_current_names(document["settings"])
    return Lineage(root=Path(root), increments=increments, **document)


def open_lineage(root: str | Path) -> Lineage:
    """Return the lineage in a folder.

    Raises:
        MissingError: there is none.
    """
    lineage = read_lineage(root)
    if lineage is None:
        raise MissingError(f"{root}: expected a lineage, found none: carryon update begins one")
    return lineage


def write_lineage(lineage: Lineage) -> None:
    """Write lineage.json; from here on the lineage is what it says."""
    document: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
    document |= {name: getattr(lineage, name) for name in ("base", "alpha", "settings")}
    document["increments"] = [asdict(each) for each in lineage.increments]
    document["predecessor"] = lineage.predecessor
    lineage.root.mkdir(parents=True, exist_ok=True)
    write_json(lineage.root / "lineage.json", document)


def write_config(lineage: Lineage, settings: TrainSettings) -> None:
    """Write config.yaml, for --config of the next update."""
    config = yaml.safe_dump(settings.to_flat() | {"alpha": lineage.alpha}, sort_keys=False)
    write_file(lineage.root / "config.yaml", config.encode())


def lasting_settings(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings, flat, that all runs of a lineage have."""
    flat = settings.to_flat()
    return {name: value for name, value in flat.items() if name not in FREE_SETTINGS}


def settings_of(lineage: Lineage) -> TrainSettings:
    """Return the settings of a lineage's runs; those that do not decide the result as usual."""
    return TrainSettings.from_options(**lineage.settings)


def refuse_changed_settings(lineage: Lineage, settings: TrainSettings, *, alpha: float) -> None:
    """Check that an update comes with the settings of the first one.

    Raises:
        InputError: names each setting that changed, and both values.
    """
    expected = lineage.settings | {"alpha": lineage.alpha}
    got = lasting_settings(settings) | {"alpha": alpha}
    changed = [
        f"{name} {expected.get(name)} -> {got.get(name)}"
        for name in sorted(set(expected) | set(got))
        if setting_of(expected, name) != setting_of(got, name)
    ]
    if changed:
        raise InputError(
            f"{lineage.root}: expected the settings of the first update, got "
            f"{', '.join(changed)}: give --config {lineage.root / 'config.yaml'}, or begin another "
            "lineage"
        )


def refuse_changed_base(lineage: Lineage, base: Mapping[str, Any], *, name: str) -> None:
    """Check that a base, or the base of a store, is the lineage's: by digests, wherever it is.

    Raises:
        InputError: names both.
    """
    expected, got = (
        {key: each.get(key) for key in ("weights_sha256", "config_sha256", "tokenizer_sha256")}
        for each in (lineage.base, base)
    )
    if expected != got:
        raise InputError(
            f"{name}: expected the base of the lineage {lineage.root}, {_named(lineage.base)}, got "
            f"{_named(base)}: give that base or a store made with it; carryon update --new-base "
            "begins a lineage on another base with what this one has learned"
        )


def _named(base: Mapping[str, Any]) -> str:
    return f"{base.get('id')} (weights {str(base.get('weights_sha256'))[:12]})"


def _others(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - _BEFORE_ITS_FIRST_INCREMENT
