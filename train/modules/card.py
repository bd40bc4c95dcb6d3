"""The card of a carry-on: the facts about it besides its weights, and the base that it is for."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from carryon.cache.base.identity import refuse_other_quantization
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.format.framing import Framing
from carryon.train.modules.card_checks import check_values
from carryon.train.modules.taps import source_tap
from carryon.train.saved_settings import with_current_names

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CarryOnCard:
    """Facts about a carry-on besides its weights, as plain JSON values."""

    settings: dict[str, Any]
    """CarryOnSettings: kind and shape."""
    base_width: int
    """D, the width of the base's hidden states."""
    base: dict[str, Any]
    """Identity of the base, as in the manifest of the store."""
    store_fingerprint: str
    """Of the store it was trained on."""
    split: dict[str, Any]
    """held_out_ratio and seed: which samples of that store it never saw. `stores` it was trained
    on by fingerprint, `samples` and `parts` by what samples they and each of their parts hold."""
    alpha: float
    """Default strength of the correction."""
    figures: dict[str, Any]
    """Held-out NLL and other measurements of the run."""
    versions: dict[str, str]
    """Versions of the libraries that trained it."""
    framing: dict[str, Any] = field(default_factory=dict)
    """How the training texts stood before the base, as `Framing.to_dict`. Empty: not known."""
    mixture: dict[str, Any] = field(default_factory=dict)
    """Other bases that are mixed in: `by`, and the facts of each of its `sources`. Empty: it is of
    one base."""
    format_version: int = FORMAT_VERSION

    def is_trained_on(self, fingerprint: str, samples_digest: str) -> bool:
        """Return whether a store is one that it was trained on, or has the samples of one."""
        return fingerprint in self.split.get(
            "stores", [self.store_fingerprint]
        ) or samples_digest in self.split.get("samples", ())

    @property
    def has_gate(self) -> bool:
        """Whether a gate mixes the distributions of other bases."""
        return bool(self.mixture) and self.mixture["by"] != "state"

    @property
    def source_widths(self) -> dict[str, int]:
        """Taps of other bases that it reads -> their widths."""
        return {
            source_tap(number, tap): source["width"]
            for number, source in enumerate(self.mixture.get("sources", ()), 1)
            for tap in source.get("taps", ())
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; without a gate as cards from before there were any."""
        values = asdict(self)
        if not self.mixture:
            del values["mixture"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CarryOnCard":
        """Build from plain values; settings under former names get their current ones.

        Raises:
            InputError: another format version, unknown or missing keys, or a value of another type
                or out of its range.
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"format version: expected {FORMAT_VERSION}, got {version}")
        expected = {item.name for item in fields(cls)}
        if set(values) | {"framing", "mixture"} != expected:
            raise InputError(f"expected the keys {sorted(expected)}, got {sorted(values)}")
        Framing.from_dict(values.get("framing", {}))
        for key in ("settings", "split"):
            if not isinstance(values[key], Mapping):
                raise InputError(f"{key}: expected an object, got {type(values[key]).__name__}")
        current = dict(values) | {
            key: with_current_names(values[key]) for key in ("settings", "split")
        }
        check_values(current)
        return cls(**current)

    def without_paths(self) -> "CarryOnCard":
        """Return the card to share: of the path of a local base, only the last part is left."""
        name = str(self.base.get("id"))
        mixture = dict(self.mixture)
        if mixture:
            mixture["sources"] = [
                each | {"base": _without_path(each["base"])} for each in mixture["sources"]
            ]
        return replace(self, base=self.base | {"id": _without_path(name)}, mixture=mixture)


def _without_path(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def check_base(card: CarryOnCard, base: Mapping[str, Any], *, where: str | Path) -> None:
    """Refuse a base, or a store made with one, that the carry-on was not trained on.

    Args:
        card: of the carry-on.
        base: identity of the given base, as plain values.
        where: name of the base, store or carry-on for the error.

    Raises:
        SettingMismatchError: weights or tokenizer differ; names both digests.
    """
    refuse_other_quantization(card.base, base, where=str(where))
    for key, name in (("weights_sha256", "weights"), ("tokenizer_sha256", "tokenizer")):
        expected, got = card.base.get(key), base.get(key)
        if expected != got:
            raise SettingMismatchError(
                f"{where}: expected the {name} of {card.base.get('id')}, which the carry-on was "
                f"trained on ({str(expected)[:12]}), got those of {base.get('id')} "
                f"({str(got)[:12]}). Fix: give its own base, or a store made with it"
            )
    if base.get("width", card.base_width) != card.base_width:
        raise SettingMismatchError(
            f"{where}: expected a base of width {card.base_width}, which the carry-on was trained "
            f"on, got {base.get('width')}. Fix: give its own base, or a store made with it"
        )
