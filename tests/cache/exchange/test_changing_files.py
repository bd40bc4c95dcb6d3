"""Files of hidden states that change while they are read, or are still being written."""

import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError
from carryon.cache.exchange.folder import list_folder, read_file
from carryon.cache.exchange.importing import plan_import
from carryon.cache.exchange.settings import ImportSettings
from carryon.cache.exchange.state_file import read_facts
from carryon.cache.exchange.tensors import FIRST_BYTES, encode_file
from carryon.tools.bench.exchange.state_files import LAYERS, make_tokens, write_states


@pytest.mark.parametrize("number", [0, 2])
def test_a_file_that_is_half_written_is_said_to_be_written(
    tiny_base: Base, store_tmp: Path, number: int
) -> None:
    files = write_states(store_tmp / "files", tiny_base, make_tokens(4))
    path = files / f"request-{number}.safetensors"
    os.truncate(path, 100)
    settings = ImportSettings(layer_ids=list(LAYERS))
    with path.with_name(f"{path.name}.lock").open("w") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=rf"request-{number}.*another process is writing"):
            plan_import(files, base=tiny_base, out=store_tmp / "store", imports=settings)


def test_a_lock_that_is_removed_after_the_listing_means_a_finished_file(
    tiny_base: Base, store_tmp: Path
) -> None:
    files = write_states(store_tmp / "files", tiny_base, make_tokens(2))
    lock = files / "request-1.safetensors.lock"
    lock.touch()
    listed = list_folder(files)
    lock.unlink()
    assert read_file(listed, "request-1.safetensors").shape[1] == len(LAYERS)


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = np.ones((FIRST_BYTES // 16, 1, 16), np.uint16)
    tokens = np.arange(len(states), dtype=np.int64)
    tensors = {"hidden_states": ("BF16", states), "token_ids": ("I64", tokens)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_file(tensors, {}))
    read = os.pread

    def shrink(handle: int, size: int, offset: int) -> bytes:
        if offset:
            os.truncate(path, offset + 11)
        return read(handle, size, offset)

    assert len(read_facts(tmp_path, path.name, is_locked=False).token_ids) == len(tokens)
    monkeypatch.setattr(os, "pread", shrink)
    with pytest.raises(InputError, match=r"x.safetensors.*became shorter"):
        read_facts(tmp_path, path.name, is_locked=False)
