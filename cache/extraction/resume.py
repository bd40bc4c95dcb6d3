"""Whether an extraction may go on in a store that is there: pure comparison of manifests."""

from collections.abc import Mapping
from typing import Any

from carryon.cache.errors import SettingMismatchError
from carryon.cache.format.manifest import Manifest

_BASE_FACTS = (
    "architecture",
    "config_sha256",
    "weights_sha256",
    "tokenizer_sha256",
    "chat_template_sha256",
)


def refuse_other_settings(old: Manifest, new: Manifest, *, name: str) -> None:
    """Compare all settings that determine the content of a unit.

    Library versions are left out: the same setting computed by another version is the same to
    rounding. So is where the base was found; its digests count.

    Raises:
        SettingMismatchError: names the first setting that differs, and both values.
    """
    pairs = _settings(old), _settings(new)
    for setting, before in pairs[0].items():
        now = pairs[1].get(setting)
        if before != now:
            raise SettingMismatchError(
                f"{name}: the store was begun with {setting} = {_short(before)}, this call has "
                f"{_short(now)}: use the same setting, or another folder"
            )


def refuse_other_forward(manifest: Manifest, forward: Mapping[str, Any], *, name: str) -> None:
    """Check that a loaded base computes as the one that made the store.

    Raises:
        SettingMismatchError: names the setting that differs, and both values.
    """
    for setting, before in manifest.forward.items():
        if forward.get(setting) != before:
            raise SettingMismatchError(
                f"{name}: the store was made with {setting} = {before}, this base was loaded with "
                f"{forward.get(setting)}: load it as the store was made"
            )


def refuse_other_base(manifest: Manifest, base: Mapping[str, Any], *, name: str) -> None:
    """Check that a loaded base (its identity as plain values) is the one of the store.

    Raises:
        SettingMismatchError: names the digest that differs.
    """
    for fact in _BASE_FACTS:
        if manifest.base.get(fact) != base.get(fact):
            raise SettingMismatchError(
                f"{name}: the store was made with a base of {fact} "
                f"{_short(manifest.base.get(fact))}, this base ({base.get('id')}) has "
                f"{_short(base.get(fact))}: give the same base"
            )


def refuse_other_data(old: Manifest, new: Manifest, *, name: str) -> None:
    """Check that the corpus of `new` is one that the store was planned for.

    Raises:
        SettingMismatchError: it is not.
    """
    known = [part.fingerprint for part in old.parts]
    fingerprint = new.parts[-1].fingerprint
    if fingerprint not in known:
        raise SettingMismatchError(
            f"{name}: the store was begun with data of fingerprint "
            f"{' and '.join(_short(item) for item in known)}, this data has "
            f"{_short(fingerprint)}: give the same files, add samples with --append, "
            "or use another folder"
        )


def _settings(manifest: Manifest) -> dict[str, Any]:
    sections: dict[str, Mapping[str, Any]] = {
        "base": {name: manifest.base.get(name) for name in _BASE_FACTS},
        "forward": manifest.forward,
        "corpus": manifest.corpus,
        "store": manifest.settings | {"with_blocks": manifest.num_blocks},
        "head": manifest.head,
    }
    flat = {
        f"{section}.{name}" if section in ("base", "head") else name: value
        for section, values in sections.items()
        for name, value in values.items()
    }
    return flat | {"width": manifest.width}


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
