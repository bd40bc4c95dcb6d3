"""The process that runs vLLM: prompts of token ids come in, names of files of states go out.

A JSON line each way, on standard input and output: first the job and that the engine is ready, then
{"id", "tokens"} and {"id", "file", "cached"}, the tokens that a prefix cache had. All else that is
printed goes to standard error. It ends when its standard input is closed, as when the process that
started it is killed, and removes the folder of its temporary files.
"""

import json
import os
import queue
import shutil
import sys
import threading
from typing import Any, TextIO

_MORE_STEPS = 2
"""After the last request: the connector is told of a finished request in the step after it."""


def main() -> str:
    """Run the job and return its folder of temporary files."""
    said = os.fdopen(os.dup(1), "w", buffering=1, encoding="ascii")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.buffer.readline())
    os.environ.update(job["environment"])
    import vllm

    engine = vllm.LLM(**job["engine"]).llm_engine
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    _say(said, {"version": vllm.__version__})
    arrived: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(arrived,), daemon=True).start()
    more_steps = 0
    while _take(engine, sampling, arrived, said, waits=more_steps == 0):
        more_steps = _MORE_STEPS if engine.has_unfinished_requests() else max(0, more_steps - 1)
        for output in engine.step():
            if output.finished:
                path = (output.kv_transfer_params or {}).get("hidden_states_path", "")
                cached = getattr(output, "num_cached_tokens", None) or 0
                facts = {"file": os.path.basename(path), "cached": cached}
                _say(said, {"id": output.request_id, **facts})
    return str(job["temporary"])


def _take(
    engine: Any,  # noqa: ANN401 -- of vLLM
    sampling: Any,  # noqa: ANN401
    arrived: "queue.SimpleQueue[dict[str, Any] | None]",
    said: TextIO,
    *,
    waits: bool,
) -> bool:
    """Give the engine the requests that have arrived; return False if there will be no more."""
    while True:
        try:
            request = arrived.get(block=waits)
        except queue.Empty:
            return True
        if request is None:
            return False
        waits = False
        try:
            engine.add_request(request["id"], {"prompt_token_ids": request["tokens"]}, sampling)
        except ValueError as error:
            _say(said, {"id": request["id"], "error": str(error)})


def _listen(arrived: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    for line in sys.stdin.buffer:
        arrived.put(json.loads(line))
    arrived.put(None)


def _say(said: TextIO, message: dict[str, Any]) -> None:
    said.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    shutil.rmtree(main(), ignore_errors=True)
    os._exit(0)  # nothing to save; vLLM's own end takes seconds
