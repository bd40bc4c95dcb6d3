"""Benchmarks of this folder by name: answers that are scored."""

from carryon.tools.bench.benchmark import Benchmark

ACCURACY = {
    "accuracy.copy": Benchmark(
        place="accuracy.copying:measure_copying",
        about="answers whose last line repeats the number that they computed, by taps",
        needs="base",
        quick={"samples": 24, "answers": 4, "epochs": 1, "max_new_tokens": 8},
    ),
    "accuracy.answers": Benchmark(
        place="accuracy.answers:measure_answers",
        about="tokens/s of answers that are scored, vLLM against transformers",
        needs="base",
        quick={"answers": 4, "max_new_tokens": 4},
    ),
}
