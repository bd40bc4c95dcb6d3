"""Benchmarks of this folder by name: states as files, and vLLM as the engine."""

from carryon.tools.bench.benchmark import Benchmark

EXCHANGE = {
    "exchange.guards": Benchmark(
        place="exchange.guards:measure_guards",
        about="wrong files of hidden states that an import takes",
    ),
    "exchange.round_trip": Benchmark(
        place="exchange.round_trip:measure_round_trip",
        about="a store as files of speculators and back: states with other bits",
        quick={"samples": 20},
    ),
    "exchange.import": Benchmark(
        place="exchange.rate:measure_import",
        about="MB/s of an import of many small files, against the disk's own rate",
        needs="base",
        quick={"files": 40},
    ),
    "vllm.speed": Benchmark(
        place="exchange.engine:measure_engine_speed",
        about="tokens a CPU second of an extraction by vLLM against one by transformers",
        needs="base",
        quick={"tokens": (500, 1500), "unit_tokens": 1024, "rounds": 1},
    ),
    "vllm.states": Benchmark(
        place="exchange.engine:measure_engine_states",
        about="states of vLLM against those of transformers, and carry-ons trained on each",
        needs="base",
        quick={"tokens": 3000, "epochs": 1},
    ),
}
