"""A package called vllm that does what the driver asks of it, for machines without the real one.

Files are written in the step after the one that answers, as by the real connector. And whether the
real one is there to be tested.
"""

import importlib.util
import os
import stat
import sys
import time
from pathlib import Path

from carryon.cache.exchange.engine.vllm_process import PYTHON_VARIABLE

PATIENCE_S = 60.0
_KEPT = "CARRYON_TESTS_VLLM_PYTHON"
if PYTHON_VARIABLE in os.environ:
    os.environ[_KEPT] = os.environ.pop(PYTHON_VARIABLE)
VLLM_PYTHON = os.environ.get(_KEPT, "")
"""Of the real one. Its variable is renamed before any test: a command, also in a fixture or forked,
would answer by vLLM. Renamed, not removed, as the workers of pytest-xdist start after that."""
if os.environ.get("CARRYON_TESTS_NEED_VLLM") and not VLLM_PYTHON:
    raise RuntimeError("expected the real vLLM, which was installed, got no Python that has it")
HAS_VLLM = bool(VLLM_PYTHON) or importlib.util.find_spec("vllm") is not None
WITHOUT_VLLM = (
    f"VLLM IS NOT TESTED HERE: set {PYTHON_VARIABLE} to the Python of an environment that has it"
)

_PACKAGE = '''
"""Stands in for vLLM."""
import os
import tempfile
import time
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import save_file

__version__ = os.environ.get("TINY_VLLM_VERSION", "0.32.0")
SamplingParams = SimpleNamespace


class LLM:
    def __init__(self, **args):
        print("all that vLLM prints")
        tempfile.mkstemp(prefix="vllm_dist_")  # which the real one leaves, too
        if args["model"] == "slow to start":
            time.sleep(1000)
        if args["model"] == "broken":
            raise RuntimeError("no such\\nmodel")
        self.args = args
        if "kv_transfer_config" in args:
            self.llm_engine = Engine(args)

    def generate(self, prompts, sampling, use_tqdm):
        answers = []
        for prompt, each in zip(prompts, sampling, strict=True):
            tokens = prompt["prompt_token_ids"]
            if tokens[0] == 13 or self.args["model"] == "not to compute":
                os._exit(3)
            if tokens[0] == 14:
                time.sleep(1000)
            if len(tokens) > self.args["max_model_len"]:
                raise ValueError("too\\nlong")
            given = (each.seed, each.max_tokens, each.temperature, each.top_p, each.detokenize)
            output = SimpleNamespace(
                token_ids=[*tokens, *(int(10 * value) for value in given)],
                finish_reason="length" if each.seed else "stop",
            )
            answers.append(SimpleNamespace(outputs=[output]))
        return answers[:1] if tokens[0] == 15 else answers


class Engine:
    def __init__(self, args):
        extra = args["kv_transfer_config"]["kv_connector_extra_config"]
        self.folder, self.longest = extra["shared_storage_path"], args["max_model_len"]
        self.width, self.layers = 16, [0, 1, 2]
        self.waiting, self.done = [], []

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def add_request(self, name, prompt, sampling):
        assert (sampling.max_tokens, sampling.temperature) == (1, 0.0)
        if len(prompt["prompt_token_ids"]) > self.longest:
            raise ValueError("too\\nlong")
        self.waiting.append((name, prompt["prompt_token_ids"]))

    def step(self):
        for name, tokens in self.done:
            if tokens[0] == 13:
                os._exit(3)
            shape = (len(tokens), len(self.layers), self.width)
            states = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            tensors = {"hidden_states": states, "token_ids": np.array(tokens, np.int64)}
            save_file(tensors, f"{self.folder}/{name}-ab.safetensors")
        taken, self.waiting = self.waiting[:2], self.waiting[2:]
        self.done = taken
        for name, tokens in taken:
            if tokens[0] == 14:
                time.sleep(1000)
            if tokens[0] == 15:  # as where several processes hold a base
                pid = os.fork()
                if not pid:
                    time.sleep(1000)
                with open(f"{self.folder}/forked", "w") as file:
                    file.write(str(pid))
            if tokens[0] == 16:
                os.write(3, b"not of the driver\\n" * 9)
        path = self.folder + "/{}-ab.safetensors"
        return [
            SimpleNamespace(
                finished=True,
                request_id=name,
                kv_transfer_params={"hidden_states_path": path.format(name)},
            )
            for name, _ in taken
        ]
'''


def make_tiny_vllm(folder: Path) -> str:
    """Write the package, and return a Python that has it."""
    package = folder / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_PACKAGE, encoding="ascii")
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="{package.parent}:$PYTHONPATH" exec {sys.executable} "$@"\n',
        encoding="utf-8",
    )
    os.chmod(python, stat.S_IRWXU)
    return str(python)


def wait_for_the_end_of(pid: int) -> None:
    """Wait until a process has ended; fail if it runs on."""
    stop = time.monotonic() + PATIENCE_S
    while is_alive(pid) and time.monotonic() < stop:
        time.sleep(0.02)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
