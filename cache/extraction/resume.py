"""Whether an extraction may resume a store: pure comparisons of manifests.

Each raises SettingMismatchError, which names the first setting that differs and both values.
"""

from collections.abc import Mapping
from typing import Any

from carryon.cache.base.model import Base
from carryon.cache.errors import KnownDataError, SettingMismatchError
from carryon.cache.extraction.plan import forward_facts
from carryon.cache.format.manifest import Manifest
from carryon.cache.settings import CorpusSettings

_BASE_FACTS = (
    "architecture",
    "quantization",
    "code_sha256",
    "config_sha256",
    "weights_sha256",
    "tokenizer_sha256",
    "chat_template_sha256",
)
_LONG = 100  # characters of a value that an error shows in full


def refuse_other_settings(old: Manifest, new: Manifest, *, name: str) -> None:
    """Compare all settings that determine the content of a unit.

    Library versions are not compared: another version computes the same to rounding. Nor is the
    path or hub id of the base; its digests are.
    """
    before = _settings(old)
    if "template_date" not in old.corpus:
        del before["template_date"]  # a store from before kept none: any day's is as good
    _compare(before, _settings(new), name=name, fix="use this setting, or another --out")


def refuse_other_base(manifest: Manifest, base: Base, *, name: str) -> None:
    """Check that a loaded base is that of the store, and computes as it did."""
    expected = _base_facts(manifest.base) | manifest.forward
    if manifest.corpus.get("chat_template"):  # the store's texts had another than the base
        del expected["base.chat_template_sha256"]
    got = _base_facts(base.identity.to_dict()) | forward_facts(base)
    _compare(expected, got, name=name, fix="give the base of the store, loaded with its settings")


def refuse_other_data(old: Manifest, new: Manifest, *, name: str) -> None:
    """Check that the corpus of `new` is one that the store was planned for."""
    known = [part.fingerprint for part in old.parts]
    fingerprint = new.parts[-1].fingerprint
    if fingerprint not in known:
        raise SettingMismatchError(
            f"{name}: data: expected those of the store, of fingerprint "
            f"{' or '.join(map(_short, known))}, got {_short(fingerprint)}. Fix: give the same "
            "data, add samples with --append, or use another --out"
        )


def refuse_known_data(old: Manifest, new: Manifest, *, name: str) -> None:
    """Check that nothing to be appended is in the store already.

    Raises:
        KnownDataError: a file is, or all samples are; names it and the part that has it.
    """
    known = {
        file["sha256"]: f"a file equal to {file['name']} of part {number}"
        for number, part in enumerate(old.parts, start=1)
        for file in part.files
    }
    samples = {part.fingerprint: f"part {n}" for n, part in enumerate(old.parts, start=1)}
    added = new.parts[-1]
    held = [
        (file["name"], known[file["sha256"]]) for file in added.files if file["sha256"] in known
    ]
    if added.fingerprint in samples:
        title = added.files[0]["name"] if added.files else "data"
        held.append((title, f"the samples of {samples[added.fingerprint]}"))
    if held:
        raise KnownDataError(
            f"{held[0][0]}: expected data that the store {name} does not hold yet, got "
            f"{held[0][1]}. Fix: leave it out"
        )


def _settings(manifest: Manifest) -> dict[str, Any]:
    return {
        "chat_template": "",  # compared first: its digest in the base says less
        **_base_facts(manifest.base),
        **manifest.forward,
        # Those that a store from before does not name had the effect of their defaults.
        **CorpusSettings().to_dict(),
        **manifest.corpus,
        **manifest.settings,
        "with_blocks": manifest.num_blocks,
        **{f"head.{name}": value for name, value in manifest.head.items()},
        "width": manifest.width,
    }


def _base_facts(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {f"base.{name}": identity.get(name) for name in _BASE_FACTS}


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], *, name: str, fix: str) -> None:
    for setting, value in before.items():
        if now.get(setting) != value:
            raise SettingMismatchError(
                f"{name}: {setting}: expected {_short(value)}, which the store was made with, got "
                f"{_short(now.get(setting))}. Fix: {fix}"
            )


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    if len(text) > _LONG:
        return f"{' '.join(text[:40].split())}... ({len(text):,} characters)"
    return (text[:12] if len(text) == 64 else text) or "none"  # 64: a digest
