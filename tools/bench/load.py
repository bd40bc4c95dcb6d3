"""What it costs to load many carry-ons beside one base: memory, and seconds."""

import json
import subprocess
import sys

import numpy as np
import torch

from carryon.tools.bench.compose_job import ComposeJob, make_carryons, make_prompts
from carryon.tools.compare.figure import Figure
from carryon.train.modules.serialization import save_carryon

SECONDS_TARGET = 5.0
MB_TARGET = 250.0

_LOAD_IN_A_FRESH_PROCESS = """
import json, sys, time
from pathlib import Path
import psutil
from carryon.train.inference.adapters import CarryOnSet
folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
loaded = CarryOnSet(json.loads(sys.argv[2]))
# Not ru_maxrss: a child inherits the peak of its parent.
resident = psutil.Process().memory_info
before = resident().rss
started_at = time.perf_counter()
for folder in folders:
    loaded.add(folder.name, folder)
load_s = time.perf_counter() - started_at
# Files that are only mapped would not count: touch every weight.
sums = [float(w.float().sum()) for n in loaded.names for w in loaded.get(n).weights.values()]
after = resident().rss
print(json.dumps({
    "carryons": len(loaded.names),
    "load_s": load_s,
    "load_mb": (after - before) / 1e6,
    "file_mb": sum(path.stat().st_size for folder in folders for path in folder.iterdir()) / 1e6,
}))
"""


def measure_loading(job: ComposeJob) -> None:
    """Load made-up carry-ons in fresh processes that hold no base, one after another."""
    sizes = job.sizes
    tokens = make_prompts(job.base, job.work, num=1, num_tokens=sizes.prompt_tokens)
    root = job.work / "carryons"
    made = make_carryons(job.base, 1, max_bytes=sizes.carryon_bytes, tokens=tokens)
    carryon, card = made[0]
    for number in range(sizes.carryons):
        torch.nn.init.normal_(carryon.bridges[0].weight)  # type: ignore[arg-type]
        save_carryon(root / f"user-{number}", carryon, card, dtype=torch.bfloat16)
    runs = []
    for _ in range(sizes.rounds):
        identity = json.dumps(job.base.identity.to_dict())
        command = [sys.executable, "-c", _LOAD_IN_A_FRESH_PROCESS, str(root), identity]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        runs.append(json.loads(done.stdout))
    median = {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
    for figure, key, unit, target in (
        ("load.memory", "load_mb", "MB", MB_TARGET),
        ("load.seconds", "load_s", "s", SECONDS_TARGET),
    ):
        job.report(
            Figure(figure=figure, value=median[key], unit=unit, target=target, details=median)
        )
