"""vLLM in a process of this machine, in its own environment, fed through pipes.

It ends with this process, however that ends: it notices that its standard input is closed.
"""

import importlib.util
import json
import logging
import os
import queue
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from carryon.cache.errors import EngineError, InputError, MissingExtraError
from carryon.cache.exchange.engine.requests import file_name, remove_states, wait_for_file

logger = logging.getLogger(__name__)

PYTHON_VARIABLE = "CARRYON_VLLM_PYTHON"
_SIDE = Path(__file__).resolve().parent / "vllm_side"
_ENVIRONMENT = {
    # On a CPU threads are as many as OMP_NUM_THREADS says, wherever the system puts them.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What is set unless the user has set it."""
_REQUIRED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the process that is fed
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a token is asked for behind a sample of full length
}
_END_S = 10.0
_ERROR = re.compile(r"(?:[\w.]*(?:Error|Exception)): .*")
_LONGEST_REASON = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineJob:
    """What vLLM is to run."""

    model: str
    """Folder, or id on the hub."""
    revision: str | None
    layers: Sequence[int]
    """Layer ids, ascending."""
    dtype: str
    """That it computes in."""
    longest: int
    """Most tokens of a prompt."""
    batch_tokens: int
    """Tokens in one forward pass."""
    requests: int
    """Most requests at a time."""
    more: Mapping[str, Any]
    """Arguments of the engine that the user gave."""

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """Return the job as the process reads it; files go to `folder`."""
        given = {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()}
        engine: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            # a token that is asked for, and one that a speculation may add
            "max_model_len": self.longest + 2,
            "max_num_seqs": self.requests,
            "max_num_batched_tokens": max(self.batch_tokens, self.longest + 2),
            "enforce_eager": True,  # prompts only: graphs are for single tokens
            "enable_prefix_caching": False,
            "enable_chunked_prefill": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            **self.more,
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {
                    "hf_config": {"eagle_aux_hidden_state_layer_ids": list(self.layers)}
                },
            },
            "kv_transfer_config": {
                "kv_connector": "CarryOnConnector",
                "kv_connector_module_path": "carryon_connector",
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {"shared_storage_path": str(folder)},
            },
        }
        if self.revision is not None:
            engine["revision"] = self.revision
        return {"environment": given | _REQUIRED, "engine": engine}


def find_python(asked: str) -> str:
    """Return the Python that has vLLM.

    Args:
        asked: by the user. Empty: that of the environment variable, or this one.

    Raises:
        InputError: there is no such program.
        MissingExtraError: none is named, and vLLM is not installed here.
    """
    name = "--vllm-python" if asked else PYTHON_VARIABLE
    if python := asked or os.environ.get(PYTHON_VARIABLE, ""):
        if (found := shutil.which(Path(python).expanduser())) is None:
            raise InputError(
                f"{name}: expected the Python of the environment that has vLLM, got {python!a:.200}"
                ", which is no program. Fix: --vllm-python ENV/bin/python"
            )
        return str(found)
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError(
            "--backend vllm needs the package 'vllm' of the extra 'vllm', which is not installed: "
            "vLLM and this package want different versions of transformers, so run python -m venv "
            "ENV; ENV/bin/pip install vllm, and add --vllm-python ENV/bin/python"
        )
    return sys.executable


class LocalEngine:
    """A process with vLLM, as a context manager that ends it."""

    def __init__(self, job: EngineJob, *, python: str, folder: Path, timeout_s: float) -> None:
        """Prepare; nothing is started.

        Args:
            job: to run.
            python: of vLLM's environment.
            folder: for the files of states; made and removed by the caller.
            timeout_s: until a file that was told is missing.
        """
        self.folder, self.version = folder, ""
        self._job, self._python, self._timeout_s = job, python, timeout_s
        self._log = Path(tempfile.gettempdir()) / f"carryon-vllm-{secrets.token_hex(8)}.log"
        self._waiting: dict[str, Future[str]] = {}
        self._guard = threading.Lock()
        self._number, self._is_ending = 0, False
        self._failure: EngineError | None = None
        self._has_ended = threading.Event()
        self._answers: queue.SimpleQueue[tuple[Future[str], dict[str, Any]] | None] = (
            queue.SimpleQueue()
        )

    def __enter__(self) -> Self:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONHOME", "VIRTUAL_ENV")
        }
        environment["PYTHONPATH"] = str(_SIDE)  # packages of this environment are not for that one
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._python, str(_SIDE / "carryon_driver.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C ends this process, which ends that one
            )
        logger.info("vLLM starts, which takes some ten seconds or more")
        try:
            self._say(self._job.to_dict(self.folder))
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if not line:
                raise self._failed("did not start")
            self.version = str(json.loads(line)["version"])
        except BaseException:
            self._end()
            self._close()
            raise
        targets = (self._listen, self._take_answers)
        self._threads = [threading.Thread(target=each, daemon=True) for each in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending = True
        self._end()
        for thread in self._threads:
            thread.join()
        self._close()
        if self._failure is None:
            self._log.unlink(missing_ok=True)

    def submit(self, tokens: list[int]) -> Future[str]:
        """Ask for the states of token ids; see `Engine`."""
        future: Future[str] = Future()
        with self._guard:
            if self._failure is not None:
                raise self._failure
            self._number += 1
            name = str(self._number)
            self._waiting[name] = future
            self._say({"id": name, "tokens": tokens})
        return future

    def discard(self, name: str) -> None:
        """Remove a file that was read; see `Engine`."""
        remove_states(self.folder, name)

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode("ascii") + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failed("ended") from error

    def _listen(self) -> None:
        """Hand each answer on; when there are no more, the rest have failed."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            with self._guard:
                future = self._waiting.pop(str(answer["id"]))
            self._answers.put((future, answer))
        failure = None if self._is_ending else self._failed("ended")
        with self._guard:
            self._failure, left = failure, list(self._waiting.values())
        self._has_ended.set()
        self._answers.put(None)
        for future in left:
            if future.set_running_or_notify_cancel() and failure is not None:
                future.set_exception(failure)

    def _take_answers(self) -> None:
        """Wait for the file of each answer, beside the thread that notices the process's end."""
        while (each := self._answers.get()) is not None:
            future, answer = each
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._file(answer))
            except Exception as error:  # noqa: BLE001 -- of whoever waits for the answer
                future.set_exception(error)

    def _file(self, answer: Mapping[str, Any]) -> str:
        """Return the name of the file of an answer, when it is whole."""
        if "error" in answer:
            raise EngineError(
                f"vLLM: expected it to take a prompt, got {_one_line(answer['error'])}. Fix: "
                "--max-tokens, or --vllm-args"
            )
        name = file_name(answer["file"])
        how: dict[str, Any] = {"timeout_s": self._timeout_s, "is_over": self._has_ended}
        if wait_for_file(self.folder, name, **how):
            return name
        raise self._failure or EngineError(
            f"vLLM: expected the file {name} within {self._timeout_s:g} s, got none. Fix: run the "
            "same command to resume, or raise --request-timeout-s"
        )

    def _failed(self, what: str) -> EngineError:
        """Return the error of a process that has ended, with the reason that its log names."""
        with_code = ""
        try:
            with_code = f" with code {self._process.wait(_END_S)}"
        except subprocess.TimeoutExpired:
            self._process.kill()
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        reasons = [match[0] for line in lines if (match := _ERROR.search(line))]
        reason = _one_line((reasons or [line for line in lines if line.strip()] or ["no word"])[-1])
        return EngineError(f"vLLM: {what}{with_code}: {reason}. Fix: see {self._log}")

    def _end(self) -> None:
        """Close the pipe, which ends the process; end it by force where that takes long."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _close(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:_LONGEST_REASON]
