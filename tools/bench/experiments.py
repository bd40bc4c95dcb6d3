"""All experiments and their steps by name: commands with options of their own."""

from carryon.tools.bench.benchmark import Benchmark

EXPERIMENTS = {
    "growth": Benchmark(
        place="growth:growth",
        about="how seconds grow with tokens, units, samples, taps, width, vocabulary, carry-ons",
    ),
    "guard": Benchmark(
        place="guard:guard", about="ten headline ratios beside recorded ones: what fell; minutes"
    ),
    "experiment-paths": Benchmark(
        place="experiment_paths:experiment_paths",
        about="ways of releasing versions, compared on your stores",
        needs="store",
    ),
    "experiment-cot": Benchmark(
        place="accuracy.experiment:experiment_cot",
        about="right answers of carry-ons beside prompts and LoRA, on chains of thought",
        needs="base",
    ),
    "experiment-improve": Benchmark(
        place="accuracy.rounds:experiment_improve",
        about="rounds of carryon improve with several seeds: whether accuracy rises",
        needs="base",
    ),
    "experiment-mix": Benchmark(
        place="mixtures.experiment:experiment_mix",
        about="a mixture of bases beside each base with its own carry-on, per byte",
        needs="base",
    ),
    "experiment-teacher": Benchmark(
        place="teacher.experiment:experiment_teacher",
        about="a carry-on trained with a larger base as its teacher, and without",
        needs="stores",
    ),
    "mix-corpus": Benchmark(
        place="mixtures.corpus:make_mix_corpus",
        about="a step of experiment-mix: windows of documents, by half",
    ),
    "mix-bytes": Benchmark(
        place="mixtures.measure:count_bytes",
        about="a step of experiment-mix: held-out bytes of a store",
        needs="store",
    ),
    "mix-places": Benchmark(
        place="mixtures.measure:measure_places",
        about="a step of experiment-mix: losses at straddled positions",
        needs="store",
    ),
    "cot-templates": Benchmark(
        place="accuracy.templates:make_problems",
        about="a step of experiment-cot: problems for training and test of different templates",
    ),
    "cot-corpus": Benchmark(
        place="accuracy.corpus:make_corpus", about="a step of experiment-cot: worked answers"
    ),
    "cot-mlp": Benchmark(
        place="accuracy.mlp:train_mlp",
        about="a step of experiment-cot: a carry-on without attention",
        needs="store",
    ),
    "cot-lora": Benchmark(
        place="accuracy.lora:train_lora",
        about="a step of experiment-cot: LoRA against the clock",
        needs="base",
    ),
}
"""Functions with options of their own, whose figures need hours."""
