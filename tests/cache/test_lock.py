"""One writer a store."""

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest
from support.tiny_stores import extract_tiny, files_below, readable_content, start_extraction

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError, StoreBusyError
from carryon.cache.extraction.repair import repair
from carryon.cache.format.zarr_metadata import receipt_path
from carryon.cache.lock import LOCK_PATH, folder_lock, write_lock


def settled_files(root: Path) -> dict[str, bytes]:
    """Return the files of a store once a held process has written what it writes beside that."""
    before, now = dict[str, bytes](), files_below(root)
    while now != before:
        time.sleep(0.5)
        before, now = now, files_below(root)
    return now


@pytest.mark.slow
def test_a_second_writer_is_refused_at_once_and_the_first_is_unharmed(
    tiny_base_folder: Path,
    tiny_base: Base,
    store_data: Path,
    store_original: Path,
    store_tmp: Path,
) -> None:
    root = store_tmp / "store"
    first = start_extraction(tiny_base_folder, store_data, root, held_at=receipt_path(2))
    first.wait_for("held")
    before = settled_files(root)
    busy = f"process {first.process.pid} is writing to this store. Fix: wait for it, or stop it"
    started_at = time.perf_counter()
    with pytest.raises(StoreBusyError, match=busy):
        extract_tiny(tiny_base, store_data, root)
    with pytest.raises(StoreBusyError, match=busy):
        repair(root, base=tiny_base)
    assert time.perf_counter() - started_at < 10  # it did not wait for the first
    assert files_below(root) == before
    first.talk.send("go on")
    first.wait_for("done")
    first.kill()
    assert readable_content(root) == readable_content(store_original)


@pytest.mark.slow
def test_a_killed_writer_leaves_no_lock(
    tiny_base_folder: Path, tiny_base: Base, store_data: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    first = start_extraction(tiny_base_folder, store_data, root, held_at=receipt_path(2))
    first.wait_for("held")
    first.kill()
    assert (root / LOCK_PATH).read_text() == str(first.process.pid)  # only its name is left
    assert extract_tiny(tiny_base, store_data, root).is_finished


def test_the_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), write_lock(tmp_path / "store"):
        raise KeyError
    with write_lock(tmp_path / "store"):
        pass


def test_a_lock_within_a_lock_is_refused(tmp_path: Path) -> None:
    with (
        write_lock(tmp_path),
        pytest.raises(StoreBusyError, match="process [0-9]+ is writing"),
        write_lock(tmp_path),
    ):
        pass


def test_the_holder_is_named_though_it_writes_its_number_a_moment_later(tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    handle = os.open(tmp_path / LOCK_PATH, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    timer = threading.Timer(0.1, lambda: os.pwrite(handle, b"4711", 0))
    timer.start()
    with pytest.raises(StoreBusyError, match="process 4711 is writing"), write_lock(tmp_path):
        pass
    timer.join()
    os.close(handle)


def test_a_holder_that_is_no_number_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    handle = os.open(tmp_path / LOCK_PATH, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.pwrite(handle, b"\x1b[2J now run this", 0)
    with pytest.raises(StoreBusyError, match="process unknown is writing"), write_lock(tmp_path):
        pass
    os.close(handle)


def test_a_place_where_no_folder_can_be_made_is_refused_in_a_line() -> None:
    root = Path("/proc/carryon-store")
    with pytest.raises(InputError, match="place where none can be made: No such file"):
        write_lock(root).__enter__()
    with pytest.raises(InputError, match="place where none can be made: No such file"):
        folder_lock(root, kind="run").__enter__()
