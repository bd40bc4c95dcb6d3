"""Peak memory and time to load a base and digest its weights, in a fresh process for each dtype.

Two peaks, above a process that has imported everything, against the bytes of the loaded weights:
resident memory, which counts pages of the files as long as the system leaves them mapped, and
anonymous memory, which only this process can free.
"""

from collections.abc import Sequence

from carryon.tools.bench.job import Job, run_fresh

TARGET = 1.25

_LOAD = """
import json, sys, time
from pathlib import Path
import accelerate, torch, transformers
from carryon.cache.base.facts import read_facts
from carryon.cache.base.loading import locate_base, read_config
from carryon.cache.base.model import load_base
from carryon.cache.settings import ForwardSettings
from carryon.tools.compare.peak_memory import anonymous_bytes, watched_peak

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

source, dtype = sys.argv[1:]
read_facts(source)
# The code of this architecture is imported, which is no weight.
transformers.AutoModelForCausalLM._model_mapping[type(read_config(locate_base(source)))]
before, before_anonymous = resident("VmRSS"), anonymous_bytes()
started_at = time.perf_counter()
with watched_peak() as peak:
    base = load_base(source, forward=ForwardSettings(device="cpu", compute_dtype=dtype))
load_s = time.perf_counter() - started_at
weights = {w.data_ptr(): w.numel() * w.element_size() for w in base.model.parameters()}
print(json.dumps({
    "weight_bytes": sum(weights.values()),
    "resident_bytes": resident("VmHWM") - before,
    "anonymous_bytes": peak.bytes - before_anonymous,
    "load_s": load_s,
    "checkpoint_dtype": str(base.checkpoint_dtype).removeprefix("torch."),
    "weights_sha256": base.identity.weights_sha256,
}))
"""


def measure_base_loading(job: Job, *, dtypes: Sequence[str] = ("bfloat16", "float32")) -> None:
    """Report the peaks of each dtype against its weights; the checkpoint's own has the target."""
    for dtype in dtypes:
        found = run_fresh(_LOAD, job.base, dtype)
        for kind in ("resident", "anonymous"):
            # Mapped files of another dtype are no part of the weights, but are resident.
            is_judged = kind == "anonymous" or dtype == found["checkpoint_dtype"]
            job.report(
                f"base.load.{kind}.{dtype}",
                found[f"{kind}_bytes"] / found["weight_bytes"],
                "x",
                at_most=TARGET if is_judged else None,
                **found,
            )
