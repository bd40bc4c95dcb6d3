"""Benchmarks of this folder by name: damage, kills, full disks, two writers, hostile documents."""

from carryon.tools.bench.benchmark import Benchmark

TRUST = {
    "trust.corruptions": Benchmark(
        place="trust.corruption:measure_corruptions",
        about="damaged carry-ons, runs, sweeps and lineages: noticed, and wrong numbers",
        quick={"trials": 5},
    ),
    "trust.store_corruptions": Benchmark(
        place="trust.corruption:measure_store_corruptions",
        about="damaged stores: noticed, and wrong numbers",
        quick={"trials": 2},
    ),
    "trust.kills": Benchmark(
        place="trust.kills:measure_kills",
        about="commands killed at any instant end with the same bits",
        quick={"kills": 1},
    ),
    "trust.shared_kills": Benchmark(
        place="trust.shared_kills:measure_shared_kills",
        about="workers, drivers and actors of Ray killed at random moments: the same bits",
        quick={"kills": 3},
    ),
    "trust.full_disk": Benchmark(
        place="trust.full_disks:measure_full_disks",
        about="commands on a disk that becomes full: one line, then the same bits",
        quick={"sizes": 1},
    ),
    "trust.writers": Benchmark(
        place="trust.writers:measure_writers",
        about="two commands at one folder: one works, one is refused",
        quick={"pairs": 4},
    ),
    "trust.open": Benchmark(
        place="trust.opening:measure_opening",
        about="seconds to open a store and carry-ons, against an earlier commit",
        quick={"units": 20, "samples": 2000, "widths": (16,), "rounds": 1},
    ),
    "trust.documents": Benchmark(
        place="trust.hostile:measure_documents",
        about="documents with any change: tracebacks, hangs, writes outside, memory; half an hour",
        quick={"documents": 16},
    ),
}
