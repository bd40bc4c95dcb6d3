"""A server that answers as vLLM does, over HTTP, and writes files of states as its connector.

The tiny base computes them. Faults can be planned: refusals, lost, late and wrong files.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from carryon.cache.base.model import Base
from carryon.tools.bench.exchange.state_files import LAYERS, make_states

Tensors = dict[str, torch.Tensor]
LATE_S = 0.2


class TinyServer(ThreadingHTTPServer):
    """Serves a base; counts what was asked."""

    daemon_threads = True

    def __init__(self, base: Base, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.base, self.folder = base, folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.version, self.max_model_len = "0.32.0", 4096
        self.layers: tuple[int, ...] = LAYERS
        self.names_layers = True
        self.faults: dict[int, str] = {}
        """By number of the prompt; a name of a file is told, and no file is written."""
        self.on_prompt: Callable[[int], object] = lambda _: None
        """Called with the number of each prompt, before it is answered."""
        self.change: Callable[[int, Tensors], Tensors] = lambda _, tensors: tensors
        """Changes what is written for a prompt of a number."""
        self.prompts: list[list[int]] = []
        self.salts: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.guard, self.compute = threading.Lock(), threading.Lock()
        self.may_end = threading.Event()
        """Ends the wait of silent requests."""

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Answer a request for a completion; None where it is to get no answer."""
        assert (body["max_tokens"], body["temperature"], body["model"]) == (1, 0, "tiny")
        with self.guard:
            number = len(self.prompts)
            self.prompts.append(body["prompt"])
            self.salts.append(body["cache_salt"])
        self.on_prompt(number)
        fault = self.faults.get(number, "")
        if fault.isdigit():
            return int(fault), {"error": {"message": "told to\nfail"}}
        if fault == "hang up":
            return None
        if fault == "silent":
            self.may_end.wait()
            return None
        name = fault if fault.endswith(".safetensors") else f"cmpl-{number}-0a1b.safetensors"
        told = {"hidden_states_path": f"/on/the/server/{name}"}
        if fault == "no path":
            return 200, {"choices": []}
        if fault == "outside":
            return 200, {"kv_transfer_params": {"hidden_states_path": "/etc/..hidden"}}
        if fault == "late":
            handle = os.open(self.folder / f"{name}.lock", os.O_CREAT | os.O_WRONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            (self.folder / name).write_bytes(b"half")
            threading.Thread(target=self._write_late, args=(number, name, handle)).start()
        elif fault not in ("lost", name):
            self._write(number, name)
        return 200, {"kv_transfer_params": told}

    def _write_late(self, number: int, name: str, handle: int) -> None:
        time.sleep(LATE_S)
        self._write(number, name)
        os.close(handle)

    def _write(self, number: int, name: str) -> None:
        tokens = np.array(self.prompts[number], dtype=np.int64)
        with self.compute:
            tensors = {
                "hidden_states": make_states(self.base, tokens, self.layers),
                "token_ids": torch.from_numpy(tokens),
            }
        metadata = {"layer_ids": " ".join(map(str, self.layers))} if self.names_layers else None
        save_file(self.change(number, tensors), self.folder / name, metadata=metadata)
        (self.folder / f"{name}.lock").touch()


class _Handler(BaseHTTPRequestHandler):
    server: TinyServer

    def do_GET(self) -> None:
        model = {"id": "tiny", "max_model_len": self.server.max_model_len}
        known = {"/version": {"version": self.server.version}, "/v1/models": {"data": [model]}}
        self._answer(200, known[self.path])

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.guard:
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            if (answer := server.complete(body)) is None:
                self.close_connection = True
            else:
                self._answer(*answer)
        finally:
            with server.guard:
                server.in_flight -= 1

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(base: Base, folder: Path) -> Iterator[TinyServer]:
    """Run a server that writes files of states to a folder, which is made."""
    folder.mkdir(parents=True)
    with TinyServer(base, folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.may_end.set()
            server.shutdown()
            thread.join()
