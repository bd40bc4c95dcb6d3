"""Tiny stores: written from arrays, or extracted from a tiny base, perhaps by a killed process.

Sizes: D 16, units of 64 rows, chunks of 16 rows, head chunks of 64 rows, table chunks of 8 rows,
so every kind of boundary is crossed. Letters: T tokens, D width, V vocabulary, N rows.
"""

import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from carryon.cache.base.lm_head import FinalNorm, Head, widen
from carryon.cache.base.model import Base, load_base
from carryon.cache.corpus.rows import Data
from carryon.cache.corpus.samples import Sample, SampleTable
from carryon.cache.errors import CarryOnError
from carryon.cache.extraction import sample_tables
from carryon.cache.extraction.layout_writer import plan_files, write_plan
from carryon.cache.extraction.packing import UnitPlan, plan_samples
from carryon.cache.extraction.pilot import PilotSample, make_probe, measure_profile
from carryon.cache.extraction.pipeline import run_extraction
from carryon.cache.extraction.plan import plan_extraction
from carryon.cache.extraction.repair import RepairReport, repair
from carryon.cache.extraction.report import ExtractReport
from carryon.cache.extraction.sharing.leases import LeaseTimes
from carryon.cache.extraction.sharing.workers import Sharing
from carryon.cache.files.documents import digest_of
from carryon.cache.format import head_arrays, zarr_metadata
from carryon.cache.format.head_arrays import head_facts
from carryon.cache.format.manifest import CorpusPart, Manifest, read_manifest, write_manifest
from carryon.cache.format.quantization import STATE_TYPES, bfloat16_bits
from carryon.cache.format.zarr_metadata import places
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_writer import UnitInputs, write_unit
from carryon.tools.bench.processes import processes

WIDTH = 16
UNIT_TOKENS = 64
CHUNK_BYTES = 16 * WIDTH * 2  # 16 rows of bfloat16: four chunks a unit
FORWARD = ForwardSettings(device="cpu", compute_dtype="float32", batch_tokens=256)
SHARING = Sharing(workers=1, forward=FORWARD, times=LeaseTimes(heartbeat_s=0.1, expiry_s=2.0))
"""One of several processes; a test starts the others itself."""
READING = DataSettings(tokenizer_workers=1)
SETTINGS = StoreSettings(taps=["final", "layer.1"], unit_tokens=UNIT_TOKENS)


@contextmanager
def small_pieces() -> Iterator[None]:
    """Make chunks, head chunks and tables small: several of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr_metadata, "CHUNK_BYTES", CHUNK_BYTES)
        patch.setattr(head_arrays, "HEAD_CHUNK_BYTES", 64 * WIDTH * 2)
        patch.setattr(sample_tables, "TABLE_ROWS", 8)
        yield


# Written from arrays


@dataclass(frozen=True, kw_only=True)
class Given:
    """The content of a store; change a part to write a store with false content."""

    settings: StoreSettings
    samples: list[Sample]
    plan: UnitPlan
    hidden: dict[str, NDArray[np.float32]]
    """[N, D] float32 for each tap; 0 where there is no sample."""
    head: Head
    pilot: list[PilotSample]


def make_given(
    *,
    settings: StoreSettings = SETTINGS,
    num_samples: int = 20,
    num_tokens: int = 0,
    seed: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Given:
    """Return random samples, every fifth held out, and random states.

    Args:
        settings: of the store.
        num_samples: how many.
        num_tokens: of each sample; 0: 3 to 30.
        seed: of everything that is random.
        softcap: of the head.
        logit_scale: of the head.
    """
    random = np.random.default_rng(seed)
    samples = []
    for index in range(num_samples):
        length = num_tokens or int(random.integers(3, 31))
        tokens = random.integers(1, 256, length).astype(np.int32)
        sample = Sample(
            id=f"sample-{seed}-{index}",
            tokens=tokens,
            loss_mask=(np.arange(len(tokens)) % 3 > 0).astype(np.uint8),
            char_end=np.arange(1, len(tokens) + 1, dtype=np.int32) * 2,
            is_held_out=index % 5 == 4,
        )
        samples.append(sample)
    table = SampleTable.of(samples)
    plan = plan_samples(table, unit_tokens=settings.unit_tokens, seed=settings.seed)
    head = _make_head(random, softcap=softcap, logit_scale=logit_scale)
    prenorm = random.normal(size=(plan.num_units * settings.unit_tokens, WIDTH))
    prenorm *= np.exp(random.normal(size=WIDTH))  # channels of unequal size
    states = {"prenorm": prenorm.astype(np.float32)}
    states["final"] = head.norm.apply(states["prenorm"])
    for tap in settings.taps:
        states.setdefault(tap, random.normal(size=prenorm.shape).astype(np.float32))
    is_real = np.zeros(len(prenorm), dtype=np.bool_)
    for start, index in zip(plan.start.tolist(), plan.order.tolist(), strict=True):
        is_real[start : start + len(samples[index].tokens)] = True
    hidden = {tap: np.where(is_real[:, None], states[tap], np.float32(0)) for tap in states}
    first = range(min(2, int((plan.unit == 0).sum())))  # the probe lies in unit 0
    pilot = [_pilot_sample(hidden, head, samples, plan, position) for position in first]
    return Given(
        settings=settings, samples=samples, plan=plan, hidden=hidden, head=head, pilot=pilot
    )


def _make_head(random: np.random.Generator, *, softcap: float | None, logit_scale: float) -> Head:
    weight = bfloat16_bits(random.normal(size=(256, WIDTH)).astype(np.float32))
    norm_weight = random.normal(1.0, 0.2, WIDTH).astype(np.float32)
    norm = FinalNorm(kind="rms", eps=1e-6, weight_offset=0.0, weight=norm_weight, bias=None)
    return Head(weight=weight, bias=None, logit_scale=logit_scale, softcap=softcap, norm=norm)


def _pilot_sample(
    hidden: dict[str, NDArray[np.float32]],
    head: Head,
    samples: Sequence[Sample],
    plan: UnitPlan,
    position: int,
) -> PilotSample:
    first_row = int(plan.start[position])
    rows = slice(first_row, first_row + len(samples[int(plan.order[position])].tokens))
    states = {tap: values[rows] for tap, values in hidden.items()}
    everything = np.arange(head.vocab_size, dtype=np.int32)[None].repeat(len(states["final"]), 0)
    logits = torch.from_numpy(head.logits(states["final"], everything))
    return PilotSample(first_row=first_row, states=states, logits=logits)


def plan_given(root: Path, given: Given) -> Manifest:
    """Write the plan of a store, without hidden states."""
    counts = {
        "samples": len(given.samples),
        "tokens": sum(len(sample.tokens) for sample in given.samples),
        "supervised_tokens": sum(int(sample.loss_mask.sum()) for sample in given.samples),
    }
    ids = {"ids": [sample.id for sample in given.samples]}
    part = CorpusPart(
        fingerprint=digest_of(ids),
        files=[],
        counts=counts,
        first_unit=0,
        num_units=given.plan.num_units,
        first_sample=0,
        num_samples=len(given.samples),
    )
    settings = given.settings
    item_bytes = STATE_TYPES[settings.dtype].itemsize
    taps, profile = settings.taps, settings.profile
    manifest = Manifest(
        base={"id": "tiny", "revision": None, "weights_sha256": "0" * 64},
        forward={"compute_dtype": "float32", "attention": "sdpa"},
        corpus=CorpusSettings().to_dict(),
        settings=settings.to_dict(),
        parts=[part],
        width=WIDTH,
        rows_per_chunk=zarr_metadata.chunk_rows(
            row_bytes=WIDTH * item_bytes, unit_tokens=settings.unit_tokens
        ),
        head=head_facts(given.head),
        versions={},
        profile_error=measure_profile(given.pilot, given.head, taps=taps, profile=profile),
    )
    probe = make_probe(given.pilot)
    return write_plan(
        root,
        manifest,
        plan_files(
            manifest, SampleTable.of(given.samples), given.plan, head=given.head, probe=probe
        ),
    )


def write_units(root: Path, manifest: Manifest, given: Given, units: Sequence[int]) -> None:
    """Write units of a planned store."""
    inputs, size = UnitInputs(root, manifest), manifest.unit_tokens
    for unit in units:
        hidden = {tap: given.hidden[tap][unit * size : (unit + 1) * size] for tap in manifest.taps}
        write_unit(root, manifest, inputs.read(unit), hidden, elapsed_s=0.0)


def write_store(root: Path, given: Given) -> Manifest:
    """Write a whole store from arrays."""
    with small_pieces():
        manifest = plan_given(root, given)
    write_units(root, manifest, given, range(manifest.num_units))
    return manifest


# Extracted from a tiny base


def write_corpus(path: Path, *, num_samples: int, first: int = 0) -> Path:
    """Write a JSONL corpus of texts of 12 to 40 tokens, every fifth held out."""
    with path.open("w") as file:
        for index in range(first, first + num_samples):
            text = f"{index} is the thing " + "on an ice " * (index % 4) + "end" * (index % 3)
            split = "held-out" if index % 5 == 4 else "train"
            file.write(json.dumps({"id": f"text-{index}", "text": text, "split": split}) + "\n")
    return path


def drop_groups(root: Path) -> None:
    """Make a store one from before samples had groups and roles."""
    manifest = read_manifest(root)
    dropped = [
        path for path in manifest.files if path.startswith(("samples/group", "samples/role"))
    ]
    for path in dropped:
        for each in places(path):
            (root / each).unlink()
    kept = {path: known for path, known in manifest.files.items() if path not in dropped}
    write_manifest(root, replace(manifest, files=kept))


def repair_tiny(root: Path, base: Base | str) -> RepairReport:
    """Repair a store of small chunks."""
    with small_pieces(), one_thread():
        return repair(root, base=base, forward=FORWARD)


def extract_tiny(
    base: Base | str,
    data: Data,
    out: Path,
    *,
    corpus: CorpusSettings | None = None,
    store: StoreSettings = SETTINGS,
    forward: ForwardSettings = FORWARD,
    data_settings: DataSettings = READING,
    append: bool = False,
    max_disk_bytes: int | None = None,
    sharing: Sharing | None = None,
) -> ExtractReport:
    """Extract into a store of small chunks."""
    with small_pieces(), one_thread():
        plan = plan_extraction(
            base=base,
            data=data,
            out=out,
            corpus=corpus or CorpusSettings(),
            store=store,
            forward=forward,
            data_settings=data_settings,
            is_shared=sharing is not None,
        )
        return run_extraction(plan, append=append, max_disk_bytes=max_disk_bytes, sharing=sharing)


def planned_bytes(store: Path) -> int:
    """Return the bytes of a store's files before its first unit was computed."""
    return sum(
        len(content)
        for path, content in files_below(store).items()
        if not path.startswith(("hidden/final/c", "hidden/layer.1/c", "scale/"))
        and path.removeprefix("units/") not in receipts_in(store)
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: on tiny tensors and a busy machine ten times as fast."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def start_extraction(
    base_folder: Path,
    data: Path,
    out: Path,
    *,
    append: bool = False,
    held_at: str = "",
    sharing: Sharing | None = None,
) -> "Extraction":
    """Start the same call in a separate process.

    Args:
        base_folder: of the base.
        data: file of the corpus.
        out: folder of the store.
        append: as in extract.
        held_at: file of the store, or how its name begins; before it appears, the process waits
            until it is released.
        sharing: as in run_extraction.
    """
    context = processes()
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_extract_in_child, args=(base_folder, data, out, append, held_at, sharing, theirs)
    )
    process.start()
    theirs.close()
    extraction = Extraction(process=process, talk=ours)
    extraction.wait_for("started")
    return extraction


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """An extraction in a separate process; its base is loaded."""

    process: Any
    """As the standard library's Process."""
    talk: Connection
    """It sends `held` at `held_at` and continues when anything is sent to it; `done` at its end."""

    def wait_for(self, word: str) -> None:
        """Wait until the process sends `word`."""
        said = self.talk.recv()
        assert said == word, f"expected {word}, got {said}"

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.process.kill()
        self.process.join()
        self.talk.close()


def kill_at(number: int, root: Path, call: Callable[[], object]) -> int:
    """Run `call` in a process that sends itself SIGKILL before the n-th change below `root`.

    Returns:
        Its exit code, -9 if it was killed.
    """
    process = processes().Process(target=_die_in_child, args=(number, root, call))
    process.start()
    process.join()
    return int(process.exitcode)


def _die_in_child(number: int, root: Path, call: Callable[[], object]) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- closed with the process

    def die(change: int, _: Path) -> None:
        if change == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with watch_changes(root, die):
        call()


def count_changes(root: Path, call: Callable[[], object]) -> int:
    """Return the number of changes below `root` that `call` makes."""
    numbers = []
    with watch_changes(root, lambda number, _: numbers.append(number)):
        call()
    return len(numbers)


def _extract_in_child(
    base_folder: Path,
    data: Path,
    out: Path,
    append: bool,
    held_at: str,
    sharing: Sharing | None,
    talk: Connection,
) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- closed with the process
    base = load_base(str(base_folder), forward=FORWARD)

    was_held = False

    def hold(number: int, path: Path) -> None:
        nonlocal was_held
        if held_at and not was_held and str(path).startswith(f"{out / held_at}"):
            was_held = True
            talk.send("held")
            talk.recv()

    talk.send("started")
    with watch_changes(out, hold):
        extract_tiny(base, data, out, append=append, sharing=sharing)
    talk.send("done")


# What is on the disk


def readable_content(root: Path) -> dict[str, Any]:
    """Return all content of a finished store, as plain values."""
    store = Store.open(root)
    content: dict[str, Any] = {
        "fingerprint": store.fingerprint,
        "ids": [store.sample_id(sample) for sample in range(store.num_samples)],
        "places": [store.sample_starts.tolist(), store.sample_lengths.tolist()],
        "held_out": store.sample_held_out.tolist(),
        "groups": [store.sample_groups.tolist(), store.sample_roles.tolist()],
        "head": store.head().weight.tobytes(),
        "norm": store.head().norm.weight.tobytes(),
    }
    for unit in store.iter_units():
        rows: dict[str, NDArray[Any]] = {
            "tokens": unit.tokens,
            "loss_mask": unit.loss_mask,
            "char_end": unit.char_end,
        }
        for name, values in (rows | unit.hidden).items():
            content[f"{unit.unit}/{name}"] = values.tobytes()
    return content


def files_below(root: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a store but its lock."""
    paths = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def error_of(call: Callable[[], object]) -> str:
    """Return class and text of the CarryOnError that `call` raises; empty if it raises none."""
    try:
        call()
    except CarryOnError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def flip_byte(path: Path, offset: int, *, mask: int = 0x10) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def receipts_in(root: Path) -> dict[str, tuple[bytes, int]]:
    """Return bytes and time of change of every receipt."""
    paths = (root / "units").glob("*.json")
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in paths
        if path.stem.isdecimal()
    }


def states_of(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return stored states as float32."""
    return widen(values)


_CHANGES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
_listeners: list[tuple[Callable[[str, tuple[Any, ...]], None], tuple[str, ...]]] = []


@contextmanager
def audit(
    listener: Callable[[str, tuple[Any, ...]], None], events: tuple[str, ...]
) -> Iterator[None]:
    """Call `listener(event, arguments)` before each of these audit events of the interpreter."""
    _install_hook()
    _listeners.append((listener, events))
    try:
        yield
    finally:
        _listeners.pop()


@cache
def _install_hook() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _listeners and event in _listeners[-1][1]:
            _listeners[-1][0](event, arguments)

    sys.addaudithook(hook)  # cannot be removed; does nothing without a listener


@contextmanager
def watch_changes(root: Path, watcher: Callable[[int, Path], None]) -> Iterator[None]:
    """Call `watcher(n, path)` before the n-th change below `root`.

    A change is a file opened for writing, renamed or linked (to `path`), removed or truncated, or
    a folder made or removed. A kill at any instant leaves the disk as it is before one of them,
    except for the length of a partial file.
    """
    numbers = itertools.count()

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0]
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # below an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        if not isinstance(path, str | Path) or not str(path).startswith(str(root)):
            return
        if event != "open" or _is_writing(*arguments):
            is_named = event in ("os.rename", "os.link")
            watcher(next(numbers), Path(arguments[1] if is_named else path))

    with audit(listen, ("open", *_CHANGES)):
        yield


def _is_writing(path: object, mode: str | None, flags: int) -> bool:
    return bool(flags & os.O_CREAT) if mode is None else bool(set(mode) & set("wax+"))


def states_at_kills(
    root: Path, run: Callable[[], Any], *, at: Callable[[int], bool], into: Path
) -> list[Path]:
    """Run `run`, and copy what is below `root` before each chosen change.

    The disk before a change is in the state that a kill -9 since the change before it leaves.
    Changes that other threads are about to make wait until it is copied.

    Returns:
        The copies, one for each instant; of a folder that does not exist yet there is none.
    """
    copies: list[Path] = []
    is_copying = False
    lock = threading.RLock()

    def keep(number: int, path: Path) -> None:
        nonlocal is_copying
        with lock:
            if is_copying or not at(number) or not root.exists():
                return
            is_copying = True
            copies.append(into / f"{number:04}")
            shutil.copytree(root, copies[-1])
            is_copying = False

    with watch_changes(root, keep):
        run()
    return copies
