"""Export of a store in the layout of `speculators`, whose own reader takes it.

A data set as `save_to_disk` of `datasets` writes it, with token ids, loss mask and length of each
row, and `hidden_states/hs_ROW.safetensors` for each: [T, L, D], columns by ascending layer, the
last one before the final norm. More columns of the data set, which that reader passes over, keep
the rest of a sample, so that an import gives the same samples.
Letters: T tokens of a sample, L columns, D base width.
"""

import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.exchange.folder import STATES_FOLDER
from carryon.cache.exchange.layers import layer_of
from carryon.cache.exchange.saved_rows import CHAR_END, MASK, SAMPLE_COLUMNS
from carryon.cache.exchange.saved_rows import TOKENS as ROW_TOKENS
from carryon.cache.exchange.state_file import STATE_DTYPES, STATES, TOKENS
from carryon.cache.exchange.tensors import encode_file
from carryon.cache.files.atomic import (
    PARTIAL,
    sweep_partials,
    sync_below,
    whole_file,
    write_file,
)
from carryon.cache.files.documents import json_bytes
from carryon.cache.files.regular import read_below, stat_below
from carryon.cache.format.schema import MAX_DOCUMENT_BYTES
from carryon.cache.lock import FOLDER_LOCK, folder_lock
from carryon.cache.progress import Progress
from carryon.cache.store.reader import Store
from carryon.cache.store.samples import StoredSample

if TYPE_CHECKING:
    from pyarrow import RecordBatch

logger = logging.getLogger(__name__)

EXPORT_PATH = "carryon-export.json"
"""Says what is exported; written first, so that only the same export is resumed."""
_ARROW = "data-00000-of-00001.arrow"
_EARLY = re.compile(rf"{re.escape(FOLDER_LOCK)}|[.]{re.escape(EXPORT_PATH)}[.].*{PARTIAL}")
"""Names that an export killed before it had named what it exports leaves."""
_MAX_HEADER = 4096
"""Bytes of a file's header, rounded up: two tensors and up to 256 layer ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """Summary of an export."""

    folder: str
    fingerprint: str
    """Of the store."""
    layer_ids: list[int]
    """Of the columns."""
    num_samples: int
    num_tokens: int
    written_files: int
    """Files of states written by this call; the others were there."""
    written_bytes: int
    """Of these files."""
    elapsed_s: float


def export_speculators(
    store: str | Path, *, out: str | Path, taps: Sequence[str] = ()
) -> ExportReport:
    """Write a store in the layout of speculators; the same call resumes.

    Args:
        store: folder of a finished store, or `FOLDER#2` for a part.
        out: a new folder, or one that such an export was interrupted in.
        taps: `prenorm` and layers. Empty: all of the store but `final`.

    Raises:
        InputError: the store lacks `prenorm`, or the folder holds something else.
        SettingMismatchError: the folder holds the export of another store, or of other taps.
        StoreBusyError: another process writes to the folder.
        DiskFullError: files that are written are kept; the same call resumes.
    """
    opened, folder = Store.open(store), Path(out)
    chosen = _columns(opened, taps)
    num_layers = int(opened.manifest.base["num_layers"])
    layers = [layer_of(tap, num_layers=num_layers) for tap in chosen]
    about = {"fingerprint": opened.fingerprint, "taps": chosen, "layout": "speculators"}
    _refuse_foreign(folder, about)
    started_at = time.perf_counter()
    with folder_lock(folder, kind="export"):
        sweep_partials(folder)
        write_file(folder / EXPORT_PATH, json_bytes(about), root=folder)
        writer = _Writer(opened, folder, chosen, layers)
        with whole_file(folder / _ARROW, root=folder) as partial:
            writer.write(partial)
        write_file(folder / "dataset_info.json", json_bytes(_info()), root=folder)
        write_file(folder / "state.json", json_bytes(_state(opened.fingerprint)), root=folder)
    return ExportReport(
        folder=str(folder),
        fingerprint=opened.fingerprint,
        layer_ids=layers,
        num_samples=opened.num_samples,
        num_tokens=opened.num_tokens,
        written_files=writer.num_files,
        written_bytes=writer.num_bytes,
        elapsed_s=round(time.perf_counter() - started_at, 3),
    )


def _columns(store: Store, asked: Sequence[str]) -> list[str]:
    """Return the taps of the columns, by ascending layer; `prenorm` is the last."""
    for tap in asked:
        if tap == "final" or tap not in store.taps:
            have = " ".join(tap for tap in store.taps if tap != "final")
            raise InputError(
                f"--taps: expected some of {have or 'none'}, got {tap}. Fix: leave it out; "
                "readers of this layout compute final from prenorm"
            )
    chosen = list(dict.fromkeys(asked)) or [tap for tap in store.taps if tap != "final"]
    if "prenorm" not in chosen and "prenorm" in store.taps:
        raise InputError(
            f"--taps: expected prenorm among them, which the last column holds, got "
            f"{' '.join(chosen)}. Fix: --taps {' '.join(chosen)} prenorm"
        )
    if "prenorm" not in chosen:
        raise InputError(
            f"{store.root}: expected the tap prenorm, which the last column holds, got "
            f"{' '.join(store.taps)}. Fix: extract with --taps prenorm beside the others"
        )
    if "final" in store.taps:
        logger.info("final is left out: readers of this layout compute it from prenorm")
    if rounded := store.manifest.rounded_as:
        logger.warning(f"the files hold states rounded by the profile {rounded}, and do not say so")
    num_layers = int(store.manifest.base["num_layers"])
    layers = {tap: layer_of(tap, num_layers=num_layers) for tap in chosen}
    if len(set(layers.values())) < len(layers):
        raise InputError(
            f"--taps: expected different layers, got prenorm and layer.{num_layers}, which are "
            "one. Fix: leave out the second"
        )
    return sorted(chosen, key=lambda tap: layers[tap])


def _refuse_foreign(folder: Path, about: dict[str, Any]) -> None:
    """Check that a folder is missing, empty, or of this export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder, got a file. Fix: choose another --out")
    try:
        known = read_below(folder, EXPORT_PATH, max_bytes=MAX_DOCUMENT_BYTES)
    except FileNotFoundError:
        names = sorted(path.name for path in folder.iterdir())
        if others := [name for name in names if not _EARLY.fullmatch(name)]:
            raise InputError(
                f"{folder}: expected a new or empty folder, got one with {others[0]!a:.80}. Fix: "
                "choose another --out"
            ) from None
        return
    if known != json_bytes(about):
        raise SettingMismatchError(
            f"{folder}: expected the export of this store and these taps, got another one. Fix: "
            "choose another --out"
        )


class _Writer:
    """Writes rows and files of a store, unit by unit."""

    def __init__(
        self, store: Store, folder: Path, taps: Sequence[str], layers: Sequence[int]
    ) -> None:
        self._store, self._folder, self._taps = store, folder, list(taps)
        dtypes = {name: written for written, name in STATE_DTYPES.items()}
        self._dtype = dtypes[store.manifest.settings["dtype"]]
        self._metadata = {"layer_ids": " ".join(map(str, layers)), "format": "pt"}
        self._item_bytes = store.manifest.states_dtype.itemsize
        self.num_files = self.num_bytes = 0

    def write(self, arrow: Path) -> None:
        """Write the rows to a file, and the states of each unit that are not there."""
        import pyarrow

        store = self._store
        with (
            Progress(store.num_tokens, name="export", unit="tokens") as progress,
            pyarrow.OSFile(str(arrow), "wb") as file,
        ):
            schema = _schema()
            with pyarrow.ipc.new_stream(file, schema) as stream:
                for unit in range(store.num_units):
                    samples = list(self._samples(unit))
                    if samples:
                        stream.write_batch(self._rows(samples))
                    progress.update(sum(len(sample.tokens) for sample in samples))

    def _samples(self, unit: int) -> Iterator[StoredSample]:
        """Yield the samples of a unit, with their files written."""
        numbers = self._store.unit_samples(unit)
        missing = [number for number in numbers if not self._is_written(number)]
        read = self._store.read_unit(unit, taps=self._taps if missing else [])
        for number in numbers:
            yield read.sample(number, sample_id=self._store.sample_id(number))
        written = []
        for number in missing:
            path = self._folder / self._path(number)
            content = self._content(read.sample(number, sample_id=""))
            write_file(path, content, is_synced=False, root=self._folder)
            written.append(path)
            self.num_files += 1
            self.num_bytes += len(content)
        sync_below(self._folder, written)

    def _path(self, number: int) -> str:
        return f"{STATES_FOLDER}/hs_{number}.safetensors"

    def _is_written(self, number: int) -> bool:
        """Tell whether a file is there: it got its name when it was whole."""
        length = int(self._store.sample_lengths[number])
        least = length * (len(self._taps) * self._store.width * self._item_bytes + 8)
        try:
            size = stat_below(self._folder, self._path(number)).st_size
        except FileNotFoundError:
            return False
        return least < size <= least + _MAX_HEADER

    def _content(self, sample: StoredSample) -> bytes:
        """Return the file of a sample."""
        states = np.stack([sample.hidden[tap] for tap in self._taps], axis=1)
        tensors = {
            TOKENS: ("I64", sample.tokens.astype(np.int64)),
            STATES: (self._dtype, states),
        }
        return encode_file(tensors, self._metadata)

    def _rows(self, samples: Sequence[StoredSample]) -> "RecordBatch":
        """Return the rows of consecutive samples."""
        import pyarrow

        store = self._store
        first, stop = samples[0].index, samples[-1].index + 1
        columns: dict[str, Any] = {
            ROW_TOKENS: _lists([sample.tokens for sample in samples], np.int64),
            MASK: _lists([sample.loss_mask for sample in samples], np.int64),
            "seq_len": [len(sample.tokens) for sample in samples],
            "id": [sample.id for sample in samples],
            CHAR_END: _lists([sample.char_end for sample in samples], np.int32),
            "is_held_out": store.sample_held_out[first:stop].astype(bool),
            "group": store.sample_groups[first:stop],
            "role": store.sample_roles[first:stop],
        }
        schema = _schema()
        arrays = [pyarrow.array(columns[field.name], field.type) for field in schema]
        return pyarrow.record_batch(arrays, schema=schema)


def _lists(rows: Sequence[NDArray[Any]], dtype: Any) -> Any:  # noqa: ANN401 -- of Arrow
    import pyarrow

    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.concatenate(rows).astype(dtype, copy=False)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))


def _schema() -> Any:  # noqa: ANN401 -- of Arrow
    import pyarrow

    kinds = {
        ROW_TOKENS: pyarrow.list_(pyarrow.int64()),
        MASK: pyarrow.list_(pyarrow.int64()),
        "seq_len": pyarrow.int64(),
        "id": pyarrow.string(),
        CHAR_END: pyarrow.list_(pyarrow.int32()),
        "is_held_out": pyarrow.bool_(),
        "group": pyarrow.uint64(),
        "role": pyarrow.uint8(),
    }
    assert set(SAMPLE_COLUMNS) < set(kinds)
    return pyarrow.schema(list(kinds.items()))


def _info() -> dict[str, Any]:
    texts = dict.fromkeys(("citation", "description", "homepage", "license"), "")
    return texts | {"features": None}


def _state(fingerprint: str) -> dict[str, Any]:
    """Return state.json of `save_to_disk`: rows as torch tensors, without the added columns."""
    return {
        "_data_files": [{"filename": _ARROW}],
        "_fingerprint": fingerprint[:16],
        "_format_columns": [ROW_TOKENS, MASK, "seq_len"],
        "_format_kwargs": {},
        "_format_type": "torch",
        "_output_all_columns": False,
        "_split": None,
    }
