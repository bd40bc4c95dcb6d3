"""The manifest: what made a store, kept in the attributes of its root group.

Everything that determines the content (base, corpus, taps, settings, versions) is hashed into the
store's fingerprint, which everything downstream records. The rest lists the files that planning
wrote, with the digests that each may have. A digest over both detects any change of the document.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from carryon.cache.errors import (
    DamagedStoreError,
    InputError,
    MissingError,
    StoreError,
    UnsafePathError,
)
from carryon.cache.files.documents import digest_of, json_bytes, parse_json, write_json
from carryon.cache.files.regular import read_below, stat_below
from carryon.cache.format.quantization import STATE_TYPES, STEPS
from carryon.cache.format.schema import check_manifest
from carryon.cache.format.zarr_metadata import copy_path, group_document

FORMAT = "carryon-store"
FORMAT_VERSION = 1
MANIFEST_PATH = "zarr.json"
"""File that holds the manifest: the zarr.json of the root group."""
ENGINE = "engine"
"""Key of a manifest's `forward` that only a store of files has: what computed the states."""
ROUNDED = "rounded_as"
"""Key of a manifest's `settings` that only a raw copy of a lossy store has: its profile."""
MAX_MANIFEST_BYTES = 32 << 20
"""A parsed manifest needs up to 20 times its bytes in memory."""

_LOCATION = ("id", "revision")  # of a base: its digests identify it
_READING = ("report", "kinds")  # of a part: how its data were read, which decides no content
_PART_TYPES = {"fingerprint": str, "files": list, "counts": dict, "report": dict, "kinds": dict}
_MAX_REPORT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusPart:
    """Samples of one extraction into a store: the first, or one that was appended."""

    fingerprint: str
    """SHA-256 over the samples: ids, tokens, masks, character ends, held-out marks."""
    files: list[dict[str, Any]]
    """Name, bytes and SHA-256 of each input file."""
    counts: dict[str, int]
    """Records read; samples, tokens and supervised tokens kept."""
    first_unit: int
    num_units: int
    first_sample: int
    num_samples: int
    report: dict[str, Any] = field(default_factory=dict)
    """Records and tokens that were lost, and why: `Report.to_dict`. Empty in old stores."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Samples of each kind of record. Empty in old stores."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; without `report` and `kinds` where they are empty."""
        values = asdict(self)
        return {name: values[name] for name in values if values[name] or name not in _READING}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CorpusPart":
        """Check and build.

        Raises:
            TypeError: a value is missing, unknown, too large or of another type.
        """
        part = cls(**values)
        for item in fields(cls):
            value, kind = getattr(part, item.name), _PART_TYPES.get(item.name, int)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{item.name}: expected {kind.__name__}, got {value!r:.80}")
        if not all(type(count) is int for count in (*part.counts.values(), *part.kinds.values())):
            raise TypeError("counts and kinds: expected whole numbers")
        if (size := len(json_bytes(part.report))) > _MAX_REPORT_BYTES:
            raise TypeError(f"report: expected at most {_MAX_REPORT_BYTES} bytes, got {size}")
        return part


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything about a store but its tensors."""

    base: dict[str, Any]
    """Identity of the base: id, revision, architecture, sizes, digests of weights and tokenizer."""
    forward: dict[str, Any]
    """compute_dtype and attention backend that the states were computed with."""
    corpus: dict[str, Any]
    """CorpusSettings, with max_tokens, date and the text of a chat template resolved."""
    settings: dict[str, Any]
    """StoreSettings: taps, profile, dtype, unit_tokens, seed; see also `ROUNDED`."""
    parts: list[CorpusPart]
    """The corpus, in the order in which it was added."""
    width: int
    """D, the base's hidden width."""
    rows_per_chunk: int
    """Rows of an inner chunk of the hidden states."""
    head: dict[str, Any]
    """Norm kind, eps, weight offset, logit scale and soft cap; the arrays are in `head/`."""
    versions: dict[str, str]
    """Versions of the libraries that computed the states."""
    profile_error: dict[str, dict[str, float]] = field(default_factory=dict)
    """For each tap of a lossy profile: relative error; for the tap the head reads also KL and
    top-1 agreement through the head."""
    alignment: dict[str, Any] = field(default_factory=dict)
    """Of a store that has the samples and rows of another, its anchor: fingerprint, base and
    tokenizer of the anchor, digest of the alignment. Empty in a store of its own."""
    files: dict[str, list[str]] = field(default_factory=dict)
    """SHA-256 that each file written by planning may have; two while an append is under way."""

    @property
    def taps(self) -> list[str]:
        """Taps of the store; an aligned one has `stable` beside `final`."""
        taps = list(self.settings["taps"])
        return [*taps, "stable"] if self.alignment and "final" in taps else taps

    @property
    def num_blocks(self) -> int:
        """The base's last blocks that are kept."""
        return int(self.settings.get("with_blocks", 0))

    @property
    def unit_tokens(self) -> int:
        """Rows of a unit."""
        return int(self.settings["unit_tokens"])

    @property
    def states_dtype(self) -> np.dtype[Any]:
        """Type of the states as they are read; uint16 holds the bits of bfloat16."""
        return STATE_TYPES[self.settings["dtype"]]

    @property
    def is_lossy(self) -> bool:
        """Whether the profile stores codes in place of states."""
        return self.settings["profile"] in STEPS

    @property
    def is_raw(self) -> bool:
        """Whether the states are stored as they are, not compressed."""
        return bool(self.settings["profile"] == "raw")

    @property
    def rounded_as(self) -> str:
        """Lossy profile whose rounding the states have; empty if they are exact.

        That of the store, or, if the store is a raw copy, of the store that was copied.
        """
        return str(self.settings["profile"] if self.is_lossy else self.settings.get(ROUNDED, ""))

    @property
    def num_units(self) -> int:
        """Units planned."""
        return sum(part.num_units for part in self.parts)

    @property
    def num_samples(self) -> int:
        """Samples planned."""
        return sum(part.num_samples for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples; unused rows at the end of units are not counted."""
        return sum(part.counts["tokens"] for part in self.parts)

    @property
    def num_supervised(self) -> int:
        """Tokens that are training targets."""
        return sum(part.counts["supervised_tokens"] for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the content."""
        parts = [replace(part, report={}, kinds={}).to_dict() for part in self.parts]
        return digest_of(self._content() | {"parts": parts})

    @property
    def samples_digest(self) -> str:
        """SHA-256 of which samples there are and where they lie.

        Random choices for a store are seeded with it: stores of one corpus are split alike and
        read in one order, whatever their taps and their precision.
        """
        left_out = ("files", *_READING)
        parts = [
            {name: value for name, value in asdict(part).items() if name not in left_out}
            for part in self.parts
        ]
        return digest_of({"parts": parts, "unit_tokens": self.unit_tokens})

    @property
    def base_content(self) -> dict[str, Any]:
        """Identity of the base, without where it was found."""
        return {name: value for name, value in self.base.items() if name not in _LOCATION}

    def _content(self) -> dict[str, Any]:
        names = ("forward", "corpus", "settings", "width", "rows_per_chunk", "head", "versions")
        content = {name: getattr(self, name) for name in names}
        content |= {"format": FORMAT, "format_version": FORMAT_VERSION, "base": self.base_content}
        if self.alignment:
            content["alignment"] = self.alignment
        return content | {"parts": [part.to_dict() for part in self.parts]}

    def to_dict(self) -> dict[str, Any]:
        """Return the document, with its digests."""
        document = self._content() | {
            "base": self.base,
            "profile_error": self.profile_error,
            "files": self.files,
            "fingerprint": self.fingerprint,
        }
        return document | {"sha256": digest_of(document)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, name: str) -> "Manifest":
        """Check and build.

        Raises:
            StoreError: not a carryon store, or of a format that this version does not read.
            DamagedStoreError: the digest does not match.
        """
        values = dict(document)
        if values.pop("sha256", None) != digest_of(values):
            raise DamagedStoreError(f"{name}: the manifest does not match its own digest")
        kind, version = values.pop("format", None), values.pop("format_version", None)
        if kind != FORMAT:
            raise StoreError(f"{name}: expected a {FORMAT}, got format {kind!r}")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{name}: expected format version {FORMAT_VERSION}, got {version}. Fix: install a "
                "version of gpt-carry-on that reads it"
            )
        fingerprint = values.pop("fingerprint", None)
        try:
            parts = [CorpusPart.from_dict(part) for part in values["parts"]]
            check_manifest({"profile_error": {}, "files": {}, **values})
            values["parts"] = parts
            manifest = cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise DamagedStoreError(f"{name}: the manifest is damaged: {error}") from error
        if manifest.fingerprint != fingerprint:
            raise DamagedStoreError(f"{name}: the manifest does not match its own fingerprint")
        return manifest

    def is_stage_of(self, other: "Manifest") -> bool:
        """Tell whether both are of one store, perhaps with an append under way between them."""
        both = min(len(self.parts), len(other.parts))
        mine, theirs = (replace(each, parts=each.parts[:both], files={}) for each in (self, other))
        return mine == theirs

    def is_behind(self, other: "Manifest") -> bool:
        """Tell whether `other` has a part, or accepts a file, that this one does not.

        The copy of a manifest is written first, and is never behind.
        """
        if len(self.parts) != len(other.parts):
            return len(self.parts) < len(other.parts)
        return any(set(known) - {*self.files.get(path, ())} for path, known in other.files.items())

    def part_of(self, unit: int) -> CorpusPart:
        """Return the part of the corpus that a unit belongs to."""
        return next(part for part in self.parts if unit < part.first_unit + part.num_units)

    def of_part(self, number: int, *, name: str) -> "Manifest":
        """Return the manifest of a store with only the samples of a part, counted from 1.

        Raises:
            InputError: the store, called `name`, has no such part.
        """
        if not 1 <= number <= len(self.parts):
            raise InputError(f"{name}: expected a part from 1 to {len(self.parts)}, got {number}")
        part = replace(self.parts[number - 1], first_unit=0, first_sample=0)
        return replace(self, parts=[part])

    def accepting(self, files: Mapping[str, str]) -> "Manifest":
        """Return a manifest that accepts, for each of `files`, the given digest as well."""
        merged = {path: list(digests) for path, digests in self.files.items()}
        for path, digest in files.items():
            known = merged.setdefault(path, [])
            if digest not in known:
                known.append(digest)
        return replace(self, files=merged)


def manifest_path(root: Path) -> Path:
    """Return the file that holds the manifest: the zarr.json of the root group."""
    return root / MANIFEST_PATH


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest and its copy; from then on the store exists, with its plan."""
    document = _document(manifest)
    write_json(root / copy_path(MANIFEST_PATH), document, root=root)
    write_json(manifest_path(root), document, root=root)


def manifest_bytes(manifest: Manifest) -> int:
    """Return the size of a manifest's file."""
    return len(json_bytes(_document(manifest)))


def _document(manifest: Manifest) -> dict[str, Any]:
    return group_document({"carryon": manifest.to_dict()})


def read_manifest(root: Path) -> Manifest:
    """Read and check the manifest of the store at `root`.

    Raises:
        MissingError: there is no store.
        StoreError: there is something else, or another format.
        DamagedStoreError: the document has been changed, or only its copy is there.
    """
    if root.is_file():
        raise StoreError(
            f"{root}: expected the folder of a store, got a file. Fix: carryon extract makes a "
            "store of data"
        )
    path, has_copy = manifest_path(root), _is_there(root, copy_path(MANIFEST_PATH))
    if _is_there(root, MANIFEST_PATH):
        content = read_below(root, MANIFEST_PATH, max_bytes=MAX_MANIFEST_BYTES)
        return parse_manifest(content, name=str(path), is_mirrored=has_copy)
    if has_copy:
        raise DamagedStoreError(f"{path}: missing, but its copy is there")
    raise MissingError(
        f"{root}: expected a store (zarr.json), found none. Fix: carryon extract makes one"
    )


def _is_there(root: Path, path: str) -> bool:
    """Tell whether there is something at a path below `root`; what, reading it finds out."""
    try:
        stat_below(root, path)
    except FileNotFoundError:
        return False
    except UnsafePathError:
        return True
    return True


def parse_manifest(content: bytes, *, name: str, is_mirrored: bool) -> Manifest:
    """Return the manifest in the bytes of a root group's zarr.json.

    Args:
        content: of the file.
        name: of the file, for errors.
        is_mirrored: whether a copy of a manifest lies in the store: then a document of something
            else is damaged.

    Raises:
        StoreError: there is something else, or another format.
        DamagedStoreError: the document has been changed.
    """
    try:
        described = parse_json(content)["attributes"].get("carryon")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{name}: not the zarr.json of a group") from error
    if not isinstance(described, dict):
        kind = DamagedStoreError if is_mirrored else StoreError
        raise kind(f"{name}: a Zarr group, but not a store of carryon (no manifest)")
    manifest = Manifest.from_dict(described, name=name)
    if json_bytes(group_document({"carryon": described})) != content:
        raise DamagedStoreError(f"{name}: not in the form it was written in")
    return manifest


def sha256_hex(content: bytes | bytearray | memoryview) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()
