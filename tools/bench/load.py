"""Memory and time to load many carry-ons beside one base."""

import json

import torch

from carryon.tools.bench.job import Job, median_of, run_fresh
from carryon.tools.bench.random_carryons import MAX_BYTES, make_carryons, make_prompts
from carryon.train.modules.serialization import save_carryon

SECONDS_TARGET = 5.0
MB_TARGET = 250.0

_LOAD = """
import json, sys, time
from pathlib import Path
import psutil
from carryon.train.inference.adapters import CarryOnSet
from carryon.train.modules.serialization import read_card, read_weights
folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
loaded = CarryOnSet(json.loads(sys.argv[2]))
# Not ru_maxrss: a child inherits the peak of its parent.
resident = psutil.Process().memory_info
before = resident().rss
started_at = time.perf_counter()
for folder in folders:
    loaded.put(folder.name, read_weights(folder), read_card(folder))
load_s = time.perf_counter() - started_at
# Mapped files count once they are touched.
sums = [float(w.float().sum()) for n in loaded.names for w in loaded.get(n).weights.values()]
after = resident().rss
print(json.dumps({
    "carryons": len(loaded.names),
    "load_s": load_s,
    "load_mb": (after - before) / 1e6,
    "file_mb": sum(path.stat().st_size for folder in folders for path in folder.iterdir()) / 1e6,
}))
"""


def measure_loading(
    job: Job, *, carryons: int = 200, carryon_bytes: int = MAX_BYTES, rounds: int = 7
) -> None:
    """Load random carry-ons one after another, in fresh processes without a base."""
    base = job.load_base()
    tokens = make_prompts(base, job.work, num=1, num_tokens=64)
    root = job.work / "carryons"
    [(carryon, card)] = make_carryons(base, 1, max_bytes=carryon_bytes, tokens=tokens)
    for number in range(carryons):
        torch.nn.init.normal_(carryon.bridges[0].weight)  # type: ignore[arg-type]
        save_carryon(root / f"user-{number}", carryon, card, dtype=torch.bfloat16)
    identity = json.dumps(base.identity.to_dict())
    median = median_of([run_fresh(_LOAD, str(root), identity) for _ in range(rounds)])
    for figure, key, unit, target in (
        ("load.memory", "load_mb", "MB", MB_TARGET),
        ("load.seconds", "load_s", "s", SECONDS_TARGET),
    ):
        job.report(figure, median[key], unit, at_most=target, **median)
