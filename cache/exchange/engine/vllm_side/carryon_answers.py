"""The process that lets vLLM answer: prompts of token ids come in, answers go out.

A JSON line each way, on standard input and output: first the job and that the engine is ready, then
{"rows", "seeds", "sampling"} and {"answers": [[tokens, is cut], ...]} or {"error"}. All else that
is printed goes to standard error. It ends at once when its standard input is closed, as when the
process that started it is killed, and removes the folder of its temporary files.
"""

import json
import os
import queue
import shutil
import sys
import threading
from typing import Any


def main() -> None:
    """Answer until standard input is closed."""
    said = os.fdopen(os.dup(1), "w", buffering=1, encoding="ascii")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.buffer.readline())
    os.environ.update(job["environment"])
    arrived: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(arrived, job["temporary"]), daemon=True).start()
    import vllm

    engine = vllm.LLM(**job["engine"])
    said.write(json.dumps({"version": vllm.__version__}) + "\n")
    while True:
        request = arrived.get()
        sampling = [
            vllm.SamplingParams(**request["sampling"], seed=seed, detokenize=False)
            for seed in request["seeds"]
        ]
        prompts = [{"prompt_token_ids": row} for row in request["rows"]]
        try:
            results = engine.generate(prompts, sampling, use_tqdm=False)
        except ValueError as error:
            said.write(json.dumps({"error": str(error)}) + "\n")
            continue
        outputs = [result.outputs[0] for result in results]
        answers = [[list(each.token_ids), each.finish_reason == "length"] for each in outputs]
        said.write(json.dumps({"answers": answers}) + "\n")


def _listen(arrived: "queue.SimpleQueue[dict[str, Any]]", temporary: str) -> None:
    for line in sys.stdin.buffer:
        arrived.put(json.loads(line))
    shutil.rmtree(temporary, ignore_errors=True)
    os._exit(0)  # nothing to save; vLLM's own end takes seconds


if __name__ == "__main__":
    main()
