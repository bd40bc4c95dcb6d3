"""A vLLM server that is asked over HTTP; its files lie in a folder that both sides see.

Each request has its own cache salt, so no prompt takes states from a prefix cache. What the server
answers is checked as a stranger's answer is.
"""

import http.client
import json
import logging
import re
import secrets
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

from carryon.cache.errors import EngineError, InputError
from carryon.cache.exchange.engine.connections import Connections
from carryon.cache.exchange.engine.requests import file_name, retry_waits, wait_for_file
from carryon.cache.exchange.engine.settings import MEASURED_VERSIONS, VllmSettings, is_measured
from carryon.cache.exchange.engine.told_files import ToldFiles

logger = logging.getLogger(__name__)

_MAX_ANSWER_BYTES = 1 << 20
_FILE_WAIT_S = 60.0
"""For a file whose name was told: as long as a file system of a network may hide it."""
_LONGEST_TOLD_WAIT_S = 60.0
_END_S = 10.0
_LONGEST_VERSION = 40
_UNUSUAL = re.compile(r"[^ -~]")
_SHOWN = 300  # characters of what a server says


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a server answered."""

    status: int
    content: dict[str, Any]
    """The JSON object; empty if it was none."""
    wait_s: float
    """Seconds that it asks to wait before the next try."""

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in (408, 425, 429) or self.status >= 500

    @property
    def reason(self) -> str:
        """What went wrong, in a line."""
        error = self.content.get("error", self.content)
        said = error.get("message", error) if isinstance(error, dict) else error
        return f"{self.status} {' '.join(str(said or '').split())!a:.{_SHOWN}}"


class Endpoint:
    """A server that computes states, as a context manager that gives up what is under way."""

    def __init__(self, url: str, *, model: str, longest: int, vllm: VllmSettings) -> None:
        """Prepare; nothing is asked.

        Args:
            url: of the server.
            model: base that it is to run, as the user named it.
            longest: most tokens of a prompt.
            vllm: how it is asked.

        Raises:
            InputError: the address is no http one, or there is no folder for files.
        """
        self._url, self._place = url, parse_url(url)
        self._asked, self._longest, self._vllm = model, longest, vllm
        self.folder, self.version = Path(vllm.states_folder).expanduser(), ""
        if not self.folder.is_dir():
            raise InputError(
                f"--states-folder: expected the folder that the server writes states to, found no "
                f"folder {vllm.states_folder!a:.200}. Fix: give its shared_storage_path, as this "
                "machine sees it"
            )
        self._connections = Connections(self._place, timeout_s=vllm.request_timeout_s)
        self._model, self._has_file = "", False
        self._files = ToldFiles(self.folder)
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=vllm.requests, thread_name_prefix="endpoint")

    def __enter__(self) -> Self:
        try:
            told = self._ask("GET", "/version").content.get("version", "unknown")
            self.version = _UNUSUAL.sub("?", str(told)[:_LONGEST_VERSION])  # the store keeps it
            self._model = self._choose(self._ask("GET", "/v1/models").content)
        except BaseException:
            self.__exit__()
            raise
        if not is_measured(self.version):
            logger.warning(
                f"--endpoint: states of vLLM {self.version} with chunked prefill were not "
                f"compared with those without, as they were in {' '.join(MEASURED_VERSIONS)}: "
                "serve with --no-enable-chunked-prefill"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        # An answer tells the name of a file, which is removed then; no answer is waited for long.
        self._connections.cut(after_s=_END_S)
        self._pool.shutdown(cancel_futures=True)
        self._files.remove_all()

    def submit(self, tokens: list[int]) -> Future[str]:
        """Ask for the states of token ids; see `Engine`."""
        return self._pool.submit(self._states, tokens)

    def discard(self, name: str) -> None:
        """Remove a file that was read; see `Engine`."""
        self._files.remove(name)

    def _choose(self, listed: Mapping[str, Any]) -> str:
        """Return the name of the base on the server."""
        models = listed.get("data")
        known = {
            str(model.get("id")): model
            for model in (models if isinstance(models, list) else [])
            if isinstance(model, dict)
        }
        name = self._asked if self._asked in known else next(iter(known), "")
        if not name or (len(known) > 1 and name != self._asked):
            raise EngineError(
                f"--endpoint {self._url}: expected it to serve {self._asked!a:.200}, got "
                f"{' '.join(known)!a:.200}. Fix: serve it with --served-model-name {self._asked}"
            )
        room = known[name].get("max_model_len")
        if type(room) is int and room <= self._longest:
            raise InputError(
                f"--endpoint {self._url}: expected room for samples of {self._longest} tokens and "
                f"one more, got max_model_len {room}. Fix: serve with --max-model-len "
                f"{self._longest + 1}, or --max-tokens {room - 1}"
            )
        return name

    def _states(self, tokens: list[int]) -> str:
        """Return the name of the file of a prompt once it is whole; ask again where it is lost."""
        body = {"model": self._model, "prompt": tokens, "max_tokens": 1, "temperature": 0}
        timeout_s = min(self._vllm.request_timeout_s, _FILE_WAIT_S)
        for _ in range(self._vllm.retries + 1):
            look = self._files.look()
            salted = body | {"cache_salt": secrets.token_hex(16)}
            content = self._ask("POST", "/v1/completions", salted).content
            known = content.get("kv_transfer_params")
            name = file_name(known.get("hidden_states_path") if isinstance(known, dict) else None)
            self._files.take(name, look=look)
            if wait_for_file(self.folder, name, timeout_s=timeout_s, is_over=self._is_over):
                self._has_file = True
                return name
            if not self._has_file or self._is_over.is_set():
                break
            logger.info(f"--endpoint: no file {name}: asked again")
        raise EngineError(
            f"--states-folder {self.folder}: expected the file {name}, which the server named, got "
            f"none within {timeout_s:g} s. Fix: give the server's shared_storage_path, or run the "
            "same command to resume"
        )

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        """Return an answer of status 200; tries again after waits.

        Raises:
            EngineError: the server refused, or does not answer.
        """
        waits = retry_waits(self._vllm.retries)
        for wait_s in [*waits, None]:
            try:
                answer = self._send(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                reason, told_s = f"no answer ({' '.join(str(error).split())!a:.{_SHOWN}})", 0.0
            else:
                if answer.status == 200:
                    return answer
                reason, told_s = answer.reason, answer.wait_s
                if not answer.is_retryable:
                    raise EngineError(
                        f"--endpoint {self._url}{path}: expected an answer, got {reason}. Fix: "
                        "check that it serves this base with the connector of docs/exchange.md"
                    )
            if wait_s is None or self._is_over.wait(max(wait_s, told_s)):
                break
            logger.info(f"--endpoint: {reason}: asked again")
        raise EngineError(
            f"--endpoint {self._url}{path}: expected an answer, got {reason} after "
            f"{len(waits) + 1} tries. Fix: run the same command to resume once it serves, or raise "
            "--retries"
        )

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        content = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        with self._connections.opened() as connection:
            connection.request(method, self._place.path.rstrip("/") + path, content, headers)
            response = connection.getresponse()
            read = response.read(_MAX_ANSWER_BYTES + 1)
            told = response.getheader("Retry-After", "")
        is_short = told.isascii() and told.isdigit() and len(told) < 6
        wait_s = min(float(told), _LONGEST_TOLD_WAIT_S) if is_short else 0.0
        return Answer(status=response.status, content=_parse(read), wait_s=wait_s)


def parse_url(url: str) -> SplitResult:
    """Return the parts of a server's address, without an ending /v1.

    Raises:
        InputError: it is no http address.
    """
    try:
        place = urlsplit(url.rstrip("/").removesuffix("/v1"))
        is_sound = place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
        (place.hostname or "").encode("idna")  # a UnicodeError is a ValueError
    except ValueError:
        is_sound = False
    if not is_sound or place.query or place.fragment or place.username:
        raise InputError(
            f"--endpoint: expected http://HOST:PORT, got {url!a:.200}. Fix: --endpoint "
            "http://127.0.0.1:8000"
        )
    return place


def _parse(content: bytes) -> dict[str, Any]:
    """Return a JSON object; empty if it is too long or something else."""
    if len(content) > _MAX_ANSWER_BYTES:
        return {}
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
