"""The process that runs vLLM: its answers, its failures, its end. A stand-in takes vLLM's place."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny_vllm import is_alive, make_tiny_vllm, wait_for_the_end_of

from carryon.cache.errors import EngineError, InputError, MissingExtraError
from carryon.cache.exchange.engine.local import EngineJob, LocalEngine
from carryon.cache.exchange.engine.vllm_process import PYTHON_VARIABLE, VllmProcess, find_python

PATIENCE_S = 300.0
"""For a slow machine; on none is it waited for."""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Python with the stand-in; temporary files are made in a folder of the test."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
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
    with LocalEngine(make_job(), python=python, folder=folder, timeout_s=PATIENCE_S) as engine:
        yield engine


def test_each_prompt_gets_its_own_whole_file(engine: LocalEngine) -> None:
    asked = [list(range(first, first + 7)) for first in range(20, 40)]
    for tokens, future in [(tokens, engine.submit(tokens)) for tokens in asked]:
        tensors = load_file(engine.folder / future.result(timeout=PATIENCE_S))
        assert tensors["token_ids"].tolist() == tokens
        assert tensors["hidden_states"].shape == (7, 3, 16)
    assert engine.version == "0.32.0"


def test_the_last_prompt_needs_no_other_behind_it(engine: LocalEngine) -> None:
    name = engine.submit([1, 2]).result(timeout=PATIENCE_S)
    assert (engine.folder / name).is_file()
    again = engine.submit([3]).result(timeout=PATIENCE_S)
    assert np.array_equal(load_file(engine.folder / again)["token_ids"], [3])


def test_a_refused_prompt_is_an_error_of_that_prompt_alone(engine: LocalEngine) -> None:
    refused, taken = engine.submit([1] * 30), engine.submit([1])
    with pytest.raises(EngineError, match="expected it to take a prompt, got too long"):
        refused.result(timeout=PATIENCE_S)
    assert taken.result(timeout=PATIENCE_S)


def test_an_engine_that_dies_fails_every_prompt(engine: LocalEngine) -> None:
    dying = engine.submit([13])
    for tokens in ([1], [2]):  # some may be asked before it is dead
        with pytest.raises(EngineError):
            engine.submit(tokens).result(timeout=PATIENCE_S)
    with pytest.raises(EngineError, match=r"vLLM: ended with code 3: .*Fix: see /"):
        dying.result(timeout=PATIENCE_S)
    with pytest.raises(EngineError, match=r"vLLM: ended with code 3: .*Fix: see /"):
        engine.submit([3])


def test_a_process_whose_input_another_thread_has_closed_has_ended() -> None:
    process = VllmProcess(sys.executable, driver="carryon_driver.py")
    process.end(after_s=0.0)
    with pytest.raises(BrokenPipeError):
        process.say({})
    process.lines.close()
    process.clear(keeps_log=False)


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
    assert list(log.parent.parent.iterdir()) == [log.parent]
    assert list(log.parent.iterdir()) == [log]


def test_an_engine_without_an_answer_is_not_waited_for_without_end(
    tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slowly its log is read: that it is killed is not the reason."""
    last_word = VllmProcess.last_word
    monkeypatch.setattr(
        VllmProcess, "last_word", lambda process: (time.sleep(0.5), last_word(process))[1]
    )
    engine = LocalEngine(make_job(), python=python, folder=tmp_path, timeout_s=0.2)
    with engine, pytest.raises(EngineError, match=r"vLLM: no answer within 0.2 s: .*request-time"):
        engine.submit([14]).result(timeout=PATIENCE_S)
    assert engine._process.code == -signal.SIGKILL


def test_what_an_engine_has_started_ends_with_it(engine: LocalEngine) -> None:
    """Also where that keeps the streams of an engine that has died open."""
    engine.submit([15]).result(timeout=PATIENCE_S)
    forked = int((engine.folder / "forked").read_text())
    assert is_alive(forked)
    dying = [engine.submit([13]), engine.submit([1]), engine.submit([1]), engine.submit([1])]
    with pytest.raises(EngineError, match="vLLM: ended with code 3"):
        dying[-1].result(timeout=PATIENCE_S)
    wait_for_the_end_of(forked)


def test_words_that_are_none_of_the_drivers_end_it(engine: LocalEngine) -> None:
    with pytest.raises(EngineError, match="vLLM: expected an answer, got b'not of the driver"):
        engine.submit([16]).result(timeout=PATIENCE_S)


def test_an_interrupt_while_it_starts_leaves_nothing(tmp_path: Path, python: str) -> None:
    """Nothing is to be saved then, so it is not waited for."""
    engine = LocalEngine(make_job("slow to start"), python=python, folder=tmp_path, timeout_s=9)

    def interrupt() -> None:
        while not list(tmp_path.glob("temporary/*/vllm_dist_*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            engine.__enter__()
    finally:
        signal.signal(signal.SIGINT, before)
    assert engine._process.code == -signal.SIGKILL
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("program", ["exit 0", "echo hello; sleep 1000"])
def test_a_python_that_is_none_is_named(tmp_path: Path, python: str, program: str) -> None:
    Path(python).write_text(f"#!/bin/sh\n{program}\n")
    engine = LocalEngine(make_job(), python=python, folder=tmp_path, timeout_s=9)
    with pytest.raises(EngineError, match=r"^vLLM: (did not start|expected its version)") as caught:
        engine.__enter__()
    assert "\n" not in str(caught.value)


def test_a_program_that_cannot_be_run_is_named(tmp_path: Path, python: str) -> None:
    Path(python).write_bytes(b"\x7fELF")
    engine = LocalEngine(make_job(), python=python, folder=tmp_path, timeout_s=9)
    with pytest.raises(InputError, match="--vllm-python: expected a program .*Exec format.*Fix: "):
        engine.__enter__()
    assert not list((tmp_path / "temporary").iterdir())


PARENT = """
import sys, time
from pathlib import Path
from carryon.cache.exchange.engine.local import EngineJob, LocalEngine
job = EngineJob(model="tiny", revision=None, layers=[0, 1, 2], dtype="float32", longest=20,
                batch_tokens=64, requests=4, more={})
with LocalEngine(job, python=sys.argv[1], folder=Path(sys.argv[2]), timeout_s=10) as engine:
    print(engine._process.pid, flush=True)
    time.sleep(1000)
"""


def test_the_engine_ends_with_a_killed_parent(tmp_path: Path, python: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, python, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_for_the_end_of(child)
    while list((tmp_path / "temporary").iterdir()):  # the last that it does
        time.sleep(0.02)


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
        assert engine._process.log.is_file()
        assert list(tmp_path.glob("temporary/*/vllm_dist_*"))
    assert sorted(os.listdir(tmp_path)) == ["temporary", "vllm"]
    assert not list((tmp_path / "temporary").iterdir())


def test_what_the_user_set_in_the_environment_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    environment = make_job().to_dict(tmp_path, temporary=tmp_path)["environment"]
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"  # else nobody steps the engine
