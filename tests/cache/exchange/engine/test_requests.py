"""Order and number of requests, waits for files, arguments of the engine: no engine runs."""

import fcntl
import os
from concurrent.futures import Future
from pathlib import Path
from threading import Timer

import pytest

from carryon.cache.errors import EngineError, InputError
from carryon.cache.exchange.engine.planning import asked_layers
from carryon.cache.exchange.engine.requests import (
    file_name,
    request_ahead,
    retry_waits,
    wait_for_file,
)
from carryon.cache.exchange.engine.settings import check_measured, parse_engine_args
from carryon.cache.exchange.engine.staging import staging_folder


class Recorder:
    """An engine that answers at once, and counts what is asked and not yet taken."""

    def __init__(self) -> None:
        self.folder, self.version = Path(), ""
        self.asked: list[Future[str]] = []

    def submit(self, tokens: list[int]) -> Future[str]:
        """Answer with the first token."""
        future: Future[str] = Future()
        future.set_result(str(tokens[0]))
        self.asked.append(future)
        return future

    def discard(self, name: str) -> None:
        """Forget nothing."""


@pytest.mark.parametrize("num_ahead", [1, 3, 100])
def test_prompts_are_asked_in_order_and_ahead(num_ahead: int) -> None:
    engine, taken = Recorder(), 0
    for key, name in request_ahead(engine, ((n, [n]) for n in range(20)), num_ahead=num_ahead):
        assert str(key) == name == str(taken)
        assert len(engine.asked) == min(20, taken + num_ahead)
        taken += 1
    assert taken == 20


def test_what_is_under_way_is_given_up() -> None:
    class Stuck(Recorder):
        def submit(self, tokens: list[int]) -> Future[str]:
            future: Future[str] = Future()
            if not self.asked:
                future.set_exception(EngineError("no"))
            self.asked.append(future)
            return future

    engine = Stuck()
    with pytest.raises(EngineError):
        list(request_ahead(engine, ((n, [n]) for n in range(20)), num_ahead=4))
    assert [future.cancelled() for future in engine.asked] == [False, True, True, True]


def test_waits_double_up_to_a_limit() -> None:
    assert retry_waits(0) == []
    assert retry_waits(3) == [0.5, 1.0, 2.0]
    assert retry_waits(40)[-1] == 30.0


@pytest.mark.parametrize(
    "path",
    [None, 1, "", "a", "a/.safetensors", "/x/..", "/x/.h.safetensors", "a\n.safetensors", "-a"],
)
def test_only_names_of_files_of_states_are_taken(path: object) -> None:
    with pytest.raises(EngineError, match="expected the name of a file of states"):
        file_name(path)


def test_the_folder_of_a_path_is_not_taken() -> None:
    assert file_name("/etc/../cmpl-1.2-a.safetensors") == "cmpl-1.2-a.safetensors"


@pytest.fixture
def locked(tmp_path: Path) -> int:
    """A lock that the writer of a file holds."""
    handle = os.open(tmp_path / "a.safetensors.lock", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def test_a_file_is_waited_for_until_its_lock_is_free(tmp_path: Path, locked: int) -> None:
    assert not wait_for_file(tmp_path, "a.safetensors", timeout_s=0.01)
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert not wait_for_file(tmp_path, "a.safetensors", timeout_s=0.01)
    Timer(0.05, os.close, [locked]).start()
    assert wait_for_file(tmp_path, "a.safetensors", timeout_s=10)


def test_arguments_of_the_engine_are_json_or_texts() -> None:
    words = ["tensor_parallel_size=2", "load_format=dummy", "enforce_eager=false", "a=[1, 2]"]
    assert parse_engine_args(words) == {
        "tensor_parallel_size": 2,
        "load_format": "dummy",
        "enforce_eager": False,
        "a": [1, 2],
    }


@pytest.mark.parametrize("word", ["a", "=1", "A b=1", "model=x", "speculative_config={}"])
def test_wrong_arguments_of_the_engine_are_refused(word: str) -> None:
    with pytest.raises(InputError, match="--vllm-args: expected .* Fix: "):
        parse_engine_args([word])


@pytest.mark.parametrize("name", ["enable_prefix_caching", "enable_chunked_prefill"])
def test_what_may_change_states_is_taken_only_as_measured(name: str) -> None:
    check_measured({name: True}, version="0.32.1")
    check_measured({name: False}, version="0.33.0")
    for version in ("0.33.0", "0.3.2", "1.0", "unknown"):
        with pytest.raises(InputError, match=f"expected {name} only with vLLM 0.32"):
            check_measured({name: True}, version=version)


def test_layers_of_taps_are_ascending_and_once_each() -> None:
    taps = ["final", "layer.3", "prenorm", "layer.0", "layer.30", "layer.15"]
    assert asked_layers(taps, num_layers=30) == [0, 3, 15, 30]


def test_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    units = tmp_path / "units"
    (units / ".states-empty").mkdir(parents=True)
    (units / ".states-left").mkdir()
    for name in (".owner", "1.safetensors"):
        (units / ".states-left" / name).touch()
    with staging_folder(tmp_path) as first, staging_folder(tmp_path) as second:
        assert {path.name for path in units.iterdir()} == {first.name, second.name}
    assert not list(units.iterdir())


def test_a_folder_whose_owner_is_not_known_is_kept(tmp_path: Path) -> None:
    """The lock is one of a file: other nodes do not see that of a folder."""
    kept = tmp_path / "units/.states-kept"
    kept.mkdir(parents=True)
    (kept / "1.safetensors").touch()
    (tmp_path / "elsewhere").touch()
    linked = tmp_path / "units/.states-linked"
    linked.mkdir()
    (linked / ".owner").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "units/.states-link").symlink_to(tmp_path)
    with staging_folder(tmp_path) as own:
        held = os.open(own / ".owner", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(held)
    assert (kept / "1.safetensors").exists()
    assert (linked / ".owner").is_symlink()
    assert (tmp_path / "units/.states-link").is_symlink()
