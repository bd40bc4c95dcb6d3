"""The process that runs vLLM: its answers, its failures, its end. A stand-in takes vLLM's place."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny_vllm import make_tiny_vllm

from carryon.cache.errors import EngineError, InputError, MissingExtraError
from carryon.cache.exchange.engine.local import (
    PYTHON_VARIABLE,
    EngineJob,
    LocalEngine,
    find_python,
)


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python with the stand-in."""
    return make_tiny_vllm(tmp_path / "vllm")


def make_job(model: str = "tiny") -> EngineJob:
    """Return a job for the stand-in."""
    return EngineJob(
        model=model,
        revision=None,
        layers=[0, 1, 2],
        dtype="float32",
        longest=20,
        batch_tokens=64,
        requests=4,
        more={},
    )


@pytest.fixture
def engine(tmp_path: Path, python: str) -> Iterator[LocalEngine]:
    """A running stand-in."""
    folder = tmp_path / "states"
    folder.mkdir()
    with LocalEngine(make_job(), python=python, folder=folder, timeout_s=10) as engine:
        yield engine


def test_each_prompt_gets_its_own_whole_file(engine: LocalEngine) -> None:
    asked = [list(range(first, first + 7)) for first in range(20, 40)]
    for tokens, future in [(tokens, engine.submit(tokens)) for tokens in asked]:
        tensors = load_file(engine.folder / future.result(timeout=20))
        assert tensors["token_ids"].tolist() == tokens
        assert tensors["hidden_states"].shape == (7, 3, 16)
    assert engine.version == "0.32.0"


def test_the_last_prompt_needs_no_other_behind_it(engine: LocalEngine) -> None:
    name = engine.submit([1, 2]).result(timeout=20)
    assert (engine.folder / name).is_file()
    again = engine.submit([3]).result(timeout=20)
    assert np.array_equal(load_file(engine.folder / again)["token_ids"], [3])


def test_a_refused_prompt_is_an_error_of_that_prompt_alone(engine: LocalEngine) -> None:
    refused, taken = engine.submit([1] * 30), engine.submit([1])
    with pytest.raises(EngineError, match="expected it to take a prompt, got too long"):
        refused.result(timeout=20)
    assert taken.result(timeout=20)


def test_an_engine_that_dies_fails_every_prompt(engine: LocalEngine) -> None:
    dying = engine.submit([13])
    for tokens in ([1], [2]):  # some may be asked before it is dead
        with pytest.raises(EngineError):
            engine.submit(tokens).result(timeout=20)
    with pytest.raises(EngineError, match=r"vLLM: ended with code 3: .*Fix: see /"):
        dying.result(timeout=20)
    with pytest.raises(EngineError, match=r"vLLM: ended with code 3: .*Fix: see /"):
        engine.submit([3])


@pytest.mark.parametrize(
    ("model", "says"), [("broken", "RuntimeError: no such"), ("tiny", "No module named 'vllm'")]
)
def test_an_engine_that_does_not_start_says_why(
    tmp_path: Path, python: str, model: str, says: str
) -> None:
    chosen = python if model == "broken" else sys.executable
    with (
        pytest.raises(EngineError, match=f"vLLM: did not start with code 1: .*{says}") as caught,
        LocalEngine(make_job(model), python=chosen, folder=tmp_path, timeout_s=1),
    ):
        pass
    log = Path(str(caught.value).rpartition(" ")[2])
    assert says in log.read_text(encoding="utf-8")
    log.unlink()


PARENT = """
import sys, time
from pathlib import Path
from carryon.cache.exchange.engine.local import EngineJob, LocalEngine
job = EngineJob(model="tiny", revision=None, layers=[0, 1, 2], dtype="float32", longest=20,
                batch_tokens=64, requests=4, more={})
with LocalEngine(job, python=sys.argv[1], folder=Path(sys.argv[2]), timeout_s=10) as engine:
    print(engine._process.pid, flush=True)
    time.sleep(60)
"""


def test_the_engine_ends_with_a_killed_parent(tmp_path: Path, python: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, python, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    stop = time.monotonic() + 20
    while _is_alive(child) and time.monotonic() < stop:
        time.sleep(0.02)
    assert not _is_alive(child)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_the_python_of_vllm_is_found(monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, python)
    assert find_python("") == python
    assert find_python(sys.executable) == sys.executable
    monkeypatch.setenv(PYTHON_VARIABLE, "/no/python")
    with pytest.raises(InputError, match="CARRYON_VLLM_PYTHON: expected the Python"):
        find_python("")
    with pytest.raises(InputError, match="--vllm-python: expected the Python .* Fix: --vllm-py"):
        find_python("/no/python")


def test_without_vllm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        MissingExtraError, match="of the extra 'vllm'.*--vllm-python ENV/bin/python"
    ):
        find_python("")


def test_the_log_of_a_sound_end_is_removed(tmp_path: Path, python: str) -> None:
    with LocalEngine(make_job(), python=python, folder=tmp_path, timeout_s=10) as engine:
        assert engine._log.is_file()
    assert not engine._log.exists()
    assert os.listdir(tmp_path) == ["vllm"]


def test_what_the_user_set_in_the_environment_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    environment = make_job().to_dict(tmp_path)["environment"]
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"  # else nobody steps the engine
