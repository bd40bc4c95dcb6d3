"""Fixtures shared by all tests: tiny bases, tiny stores; and how many rounds damage tests run."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.small_disks import mounted
from support.tiny_bases import make_tiny_base
from support.tiny_stores import extract_tiny, write_corpus
from support.tiny_vllm import VLLM_PYTHON

from carryon.cache.base.model import Base, load_base
from carryon.cache.exchange.engine.vllm_process import PYTHON_VARIABLE
from carryon.cache.settings import ForwardSettings


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run take the full number of rounds."""
    parser.addoption(
        "--kill-rounds",
        type=int,
        default=2,
        help="random kill -9 during extraction (full: 50); 50 or more also kill at every change",
    )
    parser.addoption(
        "--corruption-rounds",
        type=int,
        default=12,
        help="single bytes flipped at random in a store (full: 200)",
    )
    parser.addoption(
        "--fuzz",
        type=int,
        default=60,
        help="random documents of each fuzz test (full: 5000)",
    )


THREADS = torch.get_num_threads()


MEMORY = Path("/dev/shm")
ROOM_BYTES = 6e9
"""A whole run leaves 1 GB there."""
HAS_ROOM = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM_BYTES
CACHE = tempfile.TemporaryDirectory(prefix="carryon-tests-", dir=MEMORY if HAS_ROOM else None)


def pytest_configure() -> None:
    """One thread for tiny tensors, which mostly wait on several; in fixtures and processes too.

    How many threads there are decides the last bits of a sum. Samples are cached in a new folder.
    That and temporary folders are in memory where there is room: runs and stores flush every file,
    which on a disk takes half of the time of their tests.
    """
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CARRYON_CACHE"] = CACHE.name
    if HAS_ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_unconfigure() -> None:
    """Remove the cached samples."""
    CACHE.cleanup()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All threads for real bases; vLLM only where a test is about it."""
    if VLLM_PYTHON and request.node.get_closest_marker("vllm") is not None:
        monkeypatch.setenv(PYTHON_VARIABLE, VLLM_PYTHON)
    if request.node.get_closest_marker("real") is not None:
        torch.set_num_threads(THREADS)
        monkeypatch.delenv("OMP_NUM_THREADS")
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama in bfloat16: width 16, 2 blocks, byte-level tokenizer, chat template."""
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def tiny_base(tiny_base_folder: Path) -> Base:
    """The same base, loaded to compute in float32 on the CPU."""
    return load_base(
        str(tiny_base_folder), forward=ForwardSettings(device="cpu", compute_dtype="float32")
    )


@pytest.fixture(scope="session")
def real_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder, made once for all processes of a test run."""
    from carryon.tools.demo.base_model import fetch_base

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "real-base"
    with (shared / "real-base.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            fetch_base(folder)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system in memory; see `resize`."""
    with mounted(tmp_path / "disk") as folder:
        yield folder


@pytest.fixture
def store_tmp(tmp_path: Path) -> Iterator[Path]:
    """A new folder, in memory where the system has one: stores flush every file to the disk."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def store_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 12 texts, two of them held out."""
    return write_corpus(tmp_path_factory.mktemp("corpora") / "texts.jsonl", num_samples=12)


@pytest.fixture(scope="session")
def store_more_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another 8 texts, to be appended."""
    path = tmp_path_factory.mktemp("corpora") / "more.jsonl"
    return write_corpus(path, num_samples=8, first=12)


@pytest.fixture(scope="session")
def store_original(
    tiny_base: Base, store_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished store of several units, at taps final and layer.1; not to be changed."""
    root = tmp_path_factory.mktemp("stores") / "store"
    extract_tiny(tiny_base, store_data, root)
    return root


@pytest.fixture
def store_folder(store_original: Path, store_tmp: Path) -> Path:
    """A copy of it, for a test to damage."""
    return Path(shutil.copytree(store_original, store_tmp / "store"))
