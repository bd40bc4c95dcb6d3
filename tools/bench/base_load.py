"""Peak memory and time to load a base and digest its weights, in a fresh process for each way.

Two peaks, above a process that has imported everything, against the bytes of the loaded weights:
resident memory, which is what limits of batch systems count, pages of mapped files too, and
anonymous memory, which only this process can free. Both have the target.

Then, in float32, of which nothing is mapped, the base with `--max-memory` for half of its weights,
which also runs once: its peak against
that limit, and its states, head and digest against those of the whole base. And quantized, against
the dense weights.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from carryon.tools.bench.job import Job, run_fresh

TARGET = 1.25
PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}

_LOAD = """
import hashlib, json, sys, time
from pathlib import Path
import accelerate, numpy as np, torch, transformers
from carryon.cache.base.facts import read_facts
from carryon.cache.base.hooks import capture
from carryon.cache.base.loading import read_config
from carryon.cache.base.source.location import locate_base
from carryon.cache.base.model import load_base, read_head
from carryon.cache.settings import ForwardSettings
from carryon.tools.compare.peak_memory import anonymous_bytes, watched_peak

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

source, settings, is_run = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "run"
read_facts(source)
# The code of this architecture is imported, which is no weight.
transformers.AutoModelForCausalLM._model_mapping[type(read_config(locate_base(source)))]
if settings.get("quantize", "none") != "none":
    from carryon.cache.base.quantizers import quantizer_of
    quantizer_of(settings["quantize"], torch.bfloat16)
before, before_anonymous = resident("VmRSS"), anonymous_bytes()
started_at = time.perf_counter()
states = ""
with watched_peak() as peak:
    base = load_base(source, forward=ForwardSettings.from_dict(settings))
    load_s = time.perf_counter() - started_at
    if is_run:
        ids = torch.arange(64)[None] % base.identity.vocab_size
        final = capture(base, ["final"], ids)["final"].float().cpu().numpy()
        states = hashlib.sha256(final.tobytes()).hexdigest()
run_s = time.perf_counter() - started_at - load_s
head = hashlib.sha256(np.ascontiguousarray(read_head(base).weight).data).hexdigest()
weights = {id(w): w.numel() * w.element_size() for w in base.model.parameters()}
kept = {id(w): w.numel() * w.element_size() for w in base.model.parameters() if not w.is_meta}
print(json.dumps({
    "weight_bytes": sum(weights.values()),
    "weight_bytes_in_memory": sum(kept.values()),
    "resident_bytes": resident("VmHWM") - before,
    "anonymous_bytes": peak.bytes - before_anonymous,
    "load_s": load_s,
    "run_s": run_s,
    "checkpoint_dtype": str(base.checkpoint_dtype).removeprefix("torch."),
    "weights_sha256": base.identity.weights_sha256,
    "quantization": base.identity.quantization,
    "head_sha256": head,
    "states_sha256": states,
}))
"""


def measure_base_loading(
    job: Job,
    *,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    offload_dtype: str = "float32",
    share: float = 0.5,
    quantize: Sequence[str] = ("nf4", "int8"),
) -> None:
    """Report the peaks of each dtype against its weights, of an offloaded and of quantized bases.

    Args:
        job: with a base.
        dtypes: to load in.
        offload_dtype: in which a base that does not fit is computed.
        share: of the weights for which there is memory.
        quantize: ways to quantize on load; those whose package is absent are left out.
    """
    for dtype in dtypes:
        found = _load(job, compute_dtype=dtype, device="cpu")
        for kind in ("resident", "anonymous"):
            job.report(
                f"base.load.{kind}.{dtype}",
                found[f"{kind}_bytes"] / found["weight_bytes"],
                "x",
                at_most=TARGET,
                **found,
            )
    whole = _load(job, is_run=True, compute_dtype=offload_dtype, device="cpu")
    _measure_offload(job, whole, dtype=offload_dtype, share=share)
    for method in quantize:
        if find_spec(PACKAGES[method]) is not None:
            found = _load(
                job, is_run=True, compute_dtype=offload_dtype, device="cpu", quantize=method
            )
            job.report(
                f"base.load.{method}",
                found["anonymous_bytes"] / whole["weight_bytes"],
                "x dense weights",
                is_same_head=found["head_sha256"] == whole["head_sha256"],
                slowdown=found["run_s"] / whole["run_s"],
                **found,
            )


def _measure_offload(job: Job, whole: Mapping[str, Any], *, dtype: str, share: float) -> None:
    """Report the peak of a base that does not fit, against the memory that it was given."""
    limit = int(share * whole["weight_bytes"])
    found = _load(
        job,
        is_run=True,
        compute_dtype=dtype,
        device_map="auto",
        max_memory=[f"cpu={limit}B"],
    )
    job.report(
        "base.load.offload",
        found["anonymous_bytes"] / limit,
        "x limit",
        at_most=TARGET,
        limit_bytes=limit,
        slowdown=found["run_s"] / whole["run_s"],
        **found,
    )
    names = ("weights_sha256", "states_sha256", "head_sha256")
    differing = sum(found[name] != whole[name] for name in names)
    job.report("base.load.offload.differing", float(differing), "digests", at_most=0.0)


def _load(job: Job, *, is_run: bool = False, **settings: Any) -> dict[str, Any]:  # noqa: ANN401
    """Load in a fresh process, and with `is_run` compute 64 tokens there."""
    return run_fresh(_LOAD, job.base, json.dumps(settings), "run" if is_run else "")
