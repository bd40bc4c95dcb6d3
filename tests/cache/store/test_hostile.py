"""A stranger's store, every digest valid, ends in one line and changes nothing outside."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_stores import (
    UNIT_TOKENS,
    WIDTH,
    make_given,
    write_store,
)

from carryon.cache.corpus.report import Report
from carryon.cache.errors import CarryOnError, DamagedStoreError, InputError, UnsafePathError
from carryon.cache.extraction.repair import repair
from carryon.cache.files.documents import json_bytes
from carryon.cache.format.codec import encode_chunk, encode_shard
from carryon.cache.format.zarr_metadata import copy_path, receipt_path, row_path, shard_path
from carryon.cache.lock import LOCK_PATH, refuse_busy, write_lock
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify
from carryon.tools.bench.trust.signing import (
    garbage_chunk,
    replace_of_unit,
    replace_planned,
    sign_manifest,
    sign_receipt,
    with_checksum,
)
from carryon.tools.cli.main import main

CANARY = b"of the user"


@pytest.fixture
def root(store_tmp: Path) -> Path:
    """A finished store beside a file of the user."""
    write_store(store_tmp / "store", make_given())
    (store_tmp / "canary").write_bytes(CANARY)
    return store_tmp / "store"


def outside(root: Path) -> dict[str, bytes]:
    """Return the files beside a store."""
    paths = (path for path in root.parent.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in paths if root not in path.parents}


def read_all(root: Path) -> None:
    """Read everything of a store."""
    store = Store.open(root)
    store.head()
    for unit in store.iter_units():
        for sample in unit.samples:
            store.sample_id(sample)
    assert len(store.sample_lengths) == len(store.sample_groups) == len(store.sample_held_out)


def ends(call: Callable[[], object]) -> str:
    """Return the one line that a call ends with; empty if it ends well."""
    try:
        call()
    except CarryOnError as error:
        line = f"{type(error).__name__}: {error}"
    else:
        return ""
    assert "\n" not in line
    return line


def assert_refused(root: Path, *texts: str) -> None:
    """Assert that opening, verifying and repairing all stop or name it, and change nothing else."""
    before = outside(root)
    started_at = time.perf_counter()
    read = ends(lambda: read_all(root))
    report = verify(root, depth="full")
    found = [read, *(problem.text for problem in report.problems)]
    assert read, "it was read"
    assert not report.is_sound
    for text in texts:
        assert any(text in each for each in found), found
    ends(lambda: repair(root, base="./no/such/base"))
    assert outside(root) == before
    assert time.perf_counter() - started_at < 30, "it hung"


PATHS = [
    "/tmp/written",
    "../written",
    "head/../../written",
    "./skipped.jsonl",
    "head//zarr.json",
    "/dev/zero",
    "head/lm_head/c/0/0/..",
    "head\\lm_head",
    "head/zarr.json\0",
    "skipped.jsonl\n",
    "samples/../../written/c/0",
    "hidden/../c/0",
    "units/.lock",
    "units/0.json",
    "zarr.json",
    "tokens/c/0",
    "units/copy/zarr.json",
    "head/lm_head/c/00/0",
    "",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_no_store_has_is_refused_and_nothing_is_written_there(
    root: Path, path: str
) -> None:
    copy = root / "units/copy" / path.lstrip("/").replace("\0", "")
    if ".." not in path and not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(CANARY)
    sign_manifest(root, lambda values: values["files"].update({path: ["0" * 64]}))
    assert_refused(root, "files: expected names of files of a store")
    assert not Path("/tmp/written").exists()
    assert main(["verify", str(root), "--full"]) != 0


@pytest.mark.parametrize(
    "tap", ["../../x", "layer.01", "layer.00", "layer.-1", "Final", "final/..", "layer.1\n"]
)
def test_a_tap_of_another_name_is_refused(root: Path, tap: str) -> None:
    sign_manifest(root, lambda values: values["settings"].update(taps=["final", tap]))
    assert_refused(root, "taps: expected different final, prenorm, layer.K")


def test_a_receipt_that_names_another_file_is_refused(root: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["files"]["../written"] = values["files"].pop(row_path("tokens", 1))

    sign_receipt(root, 1, change)
    assert_refused(root, "the receipt is damaged: files: expected")


# Links, pipes and folders in the place of files


def test_a_lock_that_is_a_link_is_refused_and_its_target_is_not_emptied(root: Path) -> None:
    lock = root / LOCK_PATH
    lock.unlink(missing_ok=True)
    lock.symlink_to(root.parent / "canary")
    for call in (lambda: refuse_busy(root), lambda: repair(root)):
        assert "expected a file, got a link" in ends(call)
    with pytest.raises(UnsafePathError), write_lock(root):
        pass
    assert (root.parent / "canary").read_bytes() == CANARY


def test_a_lock_that_is_another_file_by_a_hard_link_is_not_emptied(root: Path) -> None:
    lock = root / LOCK_PATH
    lock.unlink(missing_ok=True)
    lock.hardlink_to(root.parent / "canary")
    for call in (lambda: refuse_busy(root), lambda: repair(root)):
        assert "expected a lock with the number of a process, got another file" in ends(call)
    assert (root.parent / "canary").read_bytes() == CANARY


def test_a_folder_of_receipts_behind_a_link_is_refused_by_writers(root: Path) -> None:
    target = root.parent / "elsewhere"
    (root / "units").rename(target)
    (root / "units").symlink_to(target)
    before = outside(root)
    assert "units: expected a folder, got a link" in ends(lambda: repair(root))
    assert "units: expected a folder, got a link" in ends(lambda: Store.open(root))
    assert outside(root) == before


@pytest.mark.parametrize("folder", ["hidden/final/c", "tokens", "units/copy/tokens", "head"])
def test_a_chunk_folder_behind_a_link_is_refused_and_nothing_is_written_there(
    root: Path, folder: str
) -> None:
    target = root.parent / "elsewhere"
    (root / folder).rename(target)
    (root / folder).symlink_to(target)
    for path in list(target.rglob("*")):
        if path.is_file():
            path.write_bytes(CANARY)  # damaged, so that repair wants to restore it
    before = outside(root)
    report = verify(root, depth="full")
    assert any("expected a folder, got a link" in each.text for each in report.problems)
    assert ends(lambda: repair(root, base="./no/such/base"))
    assert outside(root) == before


KINDS: list[Callable[[Path], object]] = [
    lambda path: path.symlink_to(path.parents[3] / "canary"),
    lambda path: path.symlink_to("/dev/zero"),
    os.mkfifo,
    lambda path: path.mkdir(),
]
FILES = [
    row_path("tokens", 0),
    copy_path(row_path("tokens", 0)),
    shard_path("final", 0),
    receipt_path(0),
    "samples/id/zarr.json",
    "head/lm_head/c/0/0",
    "zarr.json",
    copy_path("zarr.json"),
]


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("number", range(len(KINDS)))
def test_a_link_pipe_or_folder_in_the_place_of_a_file_is_named_and_not_read(
    root: Path, path: str, number: int
) -> None:
    (root / path).unlink()
    KINDS[number](root / path)
    before = outside(root)
    report = verify(root, depth="full")
    assert any("expected a file, got" in problem.text for problem in report.problems)
    if not path.startswith("units/copy/"):
        assert "expected a file, got" in ends(lambda: read_all(root))
    if not path.startswith(("hidden/", "units/0", "head/")):
        ends(lambda: repair(root, base="./no/such/base"))
        assert number == 3 or verify(root, depth="full").is_complete
    assert outside(root) == before


def test_the_store_itself_may_be_reached_through_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    read_all(link)
    assert repair(link).is_complete


# Values beyond every limit


def set_in(values: dict[str, Any], where: str, value: object) -> None:
    """Set `a.0.b` of a document."""
    *way, last = where.split(".")
    for name in way:
        values = values[int(name)] if isinstance(values, list) else values[name]
    values[last] = value


HUGE = 10**12
VALUES = [
    ("settings.unit_tokens", 0),
    ("settings.unit_tokens", -64),
    ("settings.unit_tokens", HUGE),
    ("settings.unit_tokens", "64"),
    ("settings.unit_tokens", 64.0),
    ("settings.unit_tokens", 1 << 24),
    ("settings.dtype", "object"),
    ("settings.dtype", ["bfloat16"]),
    ("settings.profile", "tiny"),
    ("settings.taps", []),
    ("settings.taps", "final"),
    ("settings.taps", [["final"]]),
    ("settings.taps", ["final", "final"]),
    ("settings.with_blocks", -1),
    ("settings", []),
    ("rows_per_chunk", 0),
    ("rows_per_chunk", 7),
    ("rows_per_chunk", HUGE),
    ("width", 0),
    ("width", HUGE),
    ("width", True),
    ("width", 32),
    ("head.vocab_size", HUGE),
    ("head.vocab_size", 255),
    ("head.norm_eps", -1.0),
    ("head.softcap", 0),
    ("head.norm_kind", "none"),
    ("head.has_bias", "yes"),
    ("head", None),
    ("base.id", 3),
    ("base", []),
    ("parts", []),
    ("parts", {}),
    ("parts.0.num_units", 1 << 22),
    ("parts.0.num_units", HUGE),
    ("parts.0.num_units", -1),
    ("parts.0.num_samples", HUGE),
    ("parts.0.num_samples", 1 << 31),
    ("parts.0.first_unit", 1),
    ("parts.0.counts", {}),
    ("parts.0.counts.tokens", HUGE),
    ("profile_error", {"final": 3}),
    ("profile_error", {"final": {"channel_relative_error": 1e6}}),
    ("profile_error", {"final": {"kl": 1e300}}),
    ("versions", {"torch": 2}),
    ("forward", {"attention": 3}),
    ("files", {}),
    ("files", []),
    ("files", {"head/zarr.json": "0" * 64}),
    ("files", {"head/zarr.json": []}),
]


@pytest.mark.parametrize(("where", "value"), VALUES)
def test_a_value_beyond_every_limit_is_named_in_one_line(
    root: Path, where: str, value: object
) -> None:
    sign_manifest(root, lambda values: set_in(values, where, value))
    assert_refused(root)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("unit", -1),
        ("num_tokens", HUGE),
        ("num_tokens", 1),
        ("input_sha256", 3),
        ("elapsed_s", "long"),
        ("versions", []),
        ("files", None),
        ("files", {}),
    ],
)
def test_a_value_of_a_receipt_beyond_every_limit_is_named(
    root: Path, where: str, value: object
) -> None:
    sign_receipt(root, 1, lambda values: set_in(values, where, value))
    before = outside(root)
    assert not verify(root, depth="full").is_sound
    assert "\n" not in ends(lambda: read_all(root))
    assert outside(root) == before


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"attributes":' * 50_000, b"\xff\xfe", b""])
@pytest.mark.parametrize("path", ["zarr.json", receipt_path(1), "samples/id/zarr.json"])
def test_json_nested_too_deeply_or_no_json_is_named(root: Path, path: str, content: bytes) -> None:
    if path.startswith("samples"):
        replace_planned(root, path, content)
    else:
        (root / path).write_bytes(content)
    assert_refused(root, path)


DOCUMENTS = [
    ("shape", [HUGE]),
    ("shape", [-1]),
    ("shape", [1 << 70]),
    ("shape", []),
    ("shape", [20, 20]),
    ("data_type", "object"),
    ("data_type", "O"),
    ("data_type", "float64"),
    ("data_type", {}),
    ("chunk_grid", {"configuration": {"chunk_shape": [0]}}),
    ("chunk_grid", {"configuration": {"chunk_shape": [HUGE]}}),
    ("chunk_grid", []),
]


NAMES = ["samples/start", "probe/rows", "head/norm_weight", "tokens", "hidden/final"]
GROWING = ("samples/start", "tokens", "hidden/final")
"""Their rows grow when samples are appended, so there may be more than the manifest says."""


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (name, key, value)
        for name in NAMES
        for key, value in DOCUMENTS
        if name not in GROWING or value not in ([HUGE], [-1], [1 << 70])
    ],
)
def test_an_array_document_that_disagrees_is_named(
    root: Path, name: str, key: str, value: object
) -> None:
    path = f"{name}/zarr.json"
    document = json.loads((root / path).read_bytes())
    document[key] = value
    replace_planned(root, path, json_bytes(document))
    assert_refused(root, name.partition("/")[0])


# Content that no digest can vouch for


def harm_size(frame: bytearray) -> None:
    frame[4:8] = (1 << 30).to_bytes(4, "little")


def harm_block(frame: bytearray) -> None:
    frame[8:12] = (1 << 30).to_bytes(4, "little")


def harm_body(frame: bytearray) -> None:
    frame[16:] = bytes(len(frame) - 16)


def cut(frame: bytearray) -> None:
    del frame[10:]


@pytest.mark.parametrize("harm", [harm_size, harm_block, harm_body, cut])
def test_a_blosc_frame_of_garbage_with_valid_digests_is_named(
    root: Path, harm: Callable[[bytearray], object]
) -> None:
    tokens = np.random.default_rng(0).integers(1, 256, UNIT_TOKENS).astype(np.int32)
    replace_of_unit(root, 1, row_path("tokens", 1), garbage_chunk(tokens, harm))
    assert_refused(root, "tokens/c/1")
    rows = np.random.default_rng(0).integers(1, 256, (8, 64)).astype(np.uint8)
    replace_planned(root, "samples/id/c/0/0", garbage_chunk(rows, harm))
    assert_refused(root)


def test_an_index_that_points_outside_of_its_shard_is_named(root: Path) -> None:
    states = np.ones((UNIT_TOKENS, WIDTH), dtype=np.uint16)
    shard = bytes(encode_shard(states, rows_per_chunk=16))
    entries = np.array([[1 << 62, 1 << 40]] * 4, dtype="<u8").tobytes()
    shard = shard[: -4 - len(entries)] + with_checksum(entries)
    replace_of_unit(root, 1, shard_path("final", 1), shard)
    assert_refused(root, "index points outside of the file")


@pytest.mark.parametrize("token", [-1, 256, 2**31 - 1, -(2**31)])
def test_a_token_id_that_the_base_has_not_is_refused(root: Path, token: int) -> None:
    tokens = np.full(UNIT_TOKENS, 3, dtype=np.int32)
    tokens[5] = token
    replace_of_unit(root, 1, row_path("tokens", 1), encode_chunk(tokens))
    assert_refused(root, f"expected token ids from 0 to 255, got {token}")


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
def test_states_that_are_no_numbers_are_named_by_a_full_verification(root: Path, bits: int) -> None:
    states = np.zeros((UNIT_TOKENS, WIDTH), dtype=np.uint16)
    states[20, 3] = bits
    shard = bytes(encode_shard(states, rows_per_chunk=16))
    replace_of_unit(root, 1, shard_path("layer.1", 1), shard)
    [problem] = verify(root, depth="full").problems
    assert problem.path == shard_path("layer.1", 1)
    assert "unit 1 tap layer.1: expected finite states" in problem.text


def test_samples_that_lie_outside_of_their_units_are_refused(root: Path) -> None:
    starts = np.zeros(65536, dtype=np.int64)
    store = Store.open(root)
    starts[: len(store)] = store.sample_starts - UNIT_TOKENS
    for chunk in range(3):
        rows = np.zeros(8, dtype=np.int64)
        part = starts[chunk * 8 : min(chunk * 8 + 8, len(store))]
        rows[: len(part)] = part
        replace_planned(root, f"samples/start/c/{chunk}", encode_chunk(rows))
    assert_refused(root, "samples one after another")


def test_an_id_that_is_no_text_is_named(root: Path) -> None:
    rows = np.full((8, 64), 0xFF, dtype=np.uint8)
    replace_planned(root, "samples/id/c/0/0", encode_chunk(rows))
    with pytest.raises(DamagedStoreError, match="the id of sample 0 is no text"):
        Store.open(root).sample_id(0)


def test_a_folder_in_the_place_of_a_receipt_is_mended_without_a_traceback(root: Path) -> None:
    (root / receipt_path(1)).unlink()
    (root / receipt_path(1)).mkdir()
    assert ends(lambda: repair(root, base="./no/such/base"))


@pytest.mark.parametrize("losses", [[{"reason": "x", "records": [0], "tokens": 0, "first": ""}]])
def test_counts_of_a_corpus_that_are_no_numbers_are_refused(losses: object) -> None:
    values = {"records": 1, "kept": 1, "tokens": 1, "losses": losses, "notes": []}
    with pytest.raises(InputError, match="expected the counts of a corpus"):
        Report.from_dict(values)
