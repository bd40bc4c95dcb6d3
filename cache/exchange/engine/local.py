"""vLLM on this machine: what it is to run, requests to its process, and the answers."""

import json
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from carryon.cache.errors import EngineError
from carryon.cache.exchange.engine.requests import file_name, remove_states, wait_for_file
from carryon.cache.exchange.engine.vllm_process import (
    END_S,
    VllmProcess,
    one_line,
    vllm_environment,
)

logger = logging.getLogger(__name__)

_LOOK_S = 0.5


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

    def to_dict(self, folder: Path, *, temporary: Path) -> dict[str, Any]:
        """Return the job as the process reads it.

        Args:
            folder: for files of states.
            temporary: for other files; it removes it at its end.
        """
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
        environment = vllm_environment()
        return {"environment": environment, "engine": engine, "temporary": str(temporary)}


class LocalEngine:
    """A process with vLLM, as a context manager that ends it."""

    def __init__(self, job: EngineJob, *, python: str, folder: Path, timeout_s: float) -> None:
        """Prepare; nothing is started.

        Args:
            job: to run.
            python: of vLLM's environment.
            folder: for the files of states; made and removed by the caller.
            timeout_s: until an answer, or a file that was told, is missing.
        """
        self.folder, self.version = folder, ""
        self._job, self._python, self._timeout_s = job, python, timeout_s
        self._waiting: dict[str, Future[str]] = {}
        self._heard_at = 0.0
        """When the last answer came, or the first of the requests that wait was sent."""
        self._guard, self._reason = threading.Lock(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self._number, self._num_cached, self._is_ending = 0, 0, False
        self._verb = "did not start"
        self._failure: EngineError | None = None
        self._has_ended = threading.Event()
        self._answers: queue.SimpleQueue[tuple[Future[str], dict[str, Any]] | None] = (
            queue.SimpleQueue()
        )

    def __enter__(self) -> Self:
        self._process = VllmProcess(self._python, driver="carryon_driver.py")
        try:
            logger.info("vLLM starts, which takes some ten seconds or more")
            self._say(self._job.to_dict(self.folder, temporary=self._process.temporary))
            self.version = self._read_version()
            self._verb = "ended"
        except BaseException:
            self._leave(after_s=0.0)
            raise
        targets = (self._listen, self._take_answers, self._watch)
        self._threads = [threading.Thread(target=each, daemon=True) for each in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending = True
        self._leave(after_s=END_S)
        if self._num_cached:
            logger.info(f"vLLM took {self._num_cached:,} tokens from its prefix cache")

    def submit(self, tokens: list[int]) -> Future[str]:
        """Ask for the states of token ids; see `Engine`."""
        future: Future[str] = Future()
        with self._guard:
            if self._failure is not None:
                raise self._failure
            if not self._waiting:
                self._heard_at = time.monotonic()
            self._number += 1
            name = str(self._number)
            self._waiting[name] = future
            self._say({"id": name, "tokens": tokens})
        return future

    def discard(self, name: str) -> None:
        """Remove a file that was read; see `Engine`."""
        remove_states(self.folder, name)

    def _leave(self, *, after_s: float) -> None:
        """End the process after a while, and remove what it leaves."""
        self._process.end(after_s=after_s)
        for thread in self._threads:
            thread.join()
        self._process.lines.close()
        self._process.clear(keeps_log=self._failure is not None)

    def _read_version(self) -> str:
        line = self._process.lines.readline()
        try:
            return str(json.loads(line)["version"])
        except (ValueError, KeyError, TypeError):
            problem = f"expected its version, got {line!a:.80}" if line else ""
            raise self._fail(problem) from None

    def _say(self, message: Mapping[str, Any]) -> None:
        try:
            self._process.say(message)
        except BrokenPipeError as error:
            raise self._fail() from error

    def _listen(self) -> None:
        """Hand each answer on; when there are no more, the rest have failed."""
        problem = ""
        for line in self._process.lines:
            try:
                answer = json.loads(line)
                with self._guard:
                    future = self._waiting.pop(str(answer["id"]))
                    self._heard_at = time.monotonic()
            except (ValueError, KeyError, TypeError):
                problem = f"expected an answer, got {line!a:.80}"
                break
            self._answers.put((future, answer))
        failure = None if self._is_ending else self._fail(problem)
        with self._guard:
            left = list(self._waiting.values())
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

    def _watch(self) -> None:
        """End a process that gives no answer, and what a dead one has left running."""
        while not self._has_ended.wait(_LOOK_S):
            if self._process.code is not None:
                self._process.kill()  # what it has started may keep its output open
            with self._guard:
                silent_s = time.monotonic() - self._heard_at if self._waiting else 0.0
                if silent_s > self._timeout_s:
                    fix = "run the same command to resume, or raise --request-timeout-s"
                    self._fail(f"no answer within {self._timeout_s:g} s", fix=fix)

    def _file(self, answer: Mapping[str, Any]) -> str:
        """Return the name of the file of an answer, when it is whole."""
        if "error" in answer:
            raise EngineError(
                f"vLLM: expected it to take a prompt, got {one_line(answer['error'])}. Fix: "
                "--max-tokens, or --vllm-args"
            )
        name = file_name(answer["file"])
        self._num_cached += answer["cached"]
        how: dict[str, Any] = {"timeout_s": self._timeout_s, "is_over": self._has_ended}
        if wait_for_file(self.folder, name, **how):
            return name
        raise self._failure or EngineError(
            f"vLLM: expected the file {name} within {self._timeout_s:g} s, got none. Fix: run the "
            "same command to resume, or raise --request-timeout-s"
        )

    def _fail(self, problem: str = "", *, fix: str = "") -> EngineError:
        """Return why no more answers will come, and kill the process; the first reason counts.

        Args:
            problem: with a process that may still run. Empty: it has ended.
            fix: what helps besides the log.
        """
        if not problem:
            self._process.end(after_s=END_S)
            problem = f"{self._verb} with code {self._process.code}"
        with self._reason:
            if self._failure is None:
                more = f"{fix}; see" if fix else "see"
                self._failure = EngineError(
                    f"vLLM: {problem}: {self._process.last_word()}. Fix: {more} {self._process.log}"
                )
        self._process.kill()  # only now, or its end would look like the reason
        return self._failure
