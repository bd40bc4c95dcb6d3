"""All benchmarks by name.

To add one, write `measure(job, *, size=...)` and add a line here, or to `benchmarks.py` of its
folder.
"""

from carryon.tools.bench.accuracy.benchmarks import ACCURACY
from carryon.tools.bench.benchmark import Benchmark
from carryon.tools.bench.exchange.benchmarks import EXCHANGE
from carryon.tools.bench.trust.benchmarks import TRUST

_SYNTHETIC = {"width": 256, "taps": 2, "mean_tokens": 128, "max_tokens": 512, "unit_tokens": 1024}
_QUALITY = {"epochs": 1}
_TEXT = {"prompt_tokens": 8, "new_tokens": 4, "rounds": 1}
_HEAD = {"rounds": 1, "width": 64, "vocabulary": 2048, "tokens": 256}

BENCHMARKS = {
    "store.lossless": Benchmark(
        place="size:measure_lossless", about="bytes of exact stores against raw", needs="store"
    ),
    "store.profiles": Benchmark(
        place="size:measure_profiles",
        about="bytes, KL and top-1 agreement of lossy profiles",
        needs="store",
    ),
    "store.extract": Benchmark(
        place="extract:measure_extraction",
        about="extraction speed against bare forward passes",
        needs="base",
        quick={"tokens": 2048, "unit_tokens": 1024},
    ),
    "store.pipeline": Benchmark(
        place="pipeline:measure_pipeline",
        about="extraction with a base that costs nothing: GB/s on one core, with two",
        quick={
            "tokens": 4096,
            "width": 64,
            "unit_tokens": 1024,
            "batch_tokens": 512,
            "mean_tokens": 64,
            "profiles": ("exact",),
            "rounds": 1,
        },
    ),
    "store.workers": Benchmark(
        place="workers:measure_workers",
        about="two processes that claim units against one with both cores",
        needs="base",
        quick={"tokens": 2000, "unit_tokens": 512, "rounds": 1},
    ),
    "store.ray": Benchmark(
        place="workers:measure_ray",
        about="two actors of Ray that claim units against two processes",
        needs="base",
        quick={"tokens": 2000, "unit_tokens": 512, "rounds": 1},
    ),
    "store.ray_overhead": Benchmark(
        place="ray_overhead:measure_overhead",
        about="time that Ray adds to a unit, with units that sleep",
        quick={"units": 20, "sleep_s": 0.01},
    ),
    "store.file_operations": Benchmark(
        place="file_operations:measure_file_operations",
        about="file operations of a worker for a unit",
        quick={"units": 4},
    ),
    "store.predicted": Benchmark(
        place="predicted:measure_prediction",
        about="bytes and seconds of an extraction as predicted, against what it took",
        quick={"tokens": 4096, "unit_tokens": 1024, "batch_tokens": 128},
    ),
    "base.load": Benchmark(
        place="base_load:measure_base_loading",
        about="peak memory of loading a base: whole, half of it on disk, quantized",
        needs="base",
    ),
    "store.stream": Benchmark(
        place="stream:measure_streaming",
        about="tokens/s into batches against other projects' layouts",
        quick={**_SYNTHETIC, "samples": 8, "store_tokens": 4096, "threads": (1,), "rounds": 1},
    ),
    "store.decode": Benchmark(
        place="decode:measure_decoding",
        about="decoding speed of a unit on one core",
        quick={**_SYNTHETIC, "rounds": 4},
    ),
    "store.write": Benchmark(
        place="write:measure_write_growth",
        about="write time of a unit in a large store against a small one",
        quick={"late_unit": 30, "rounds": 10},
    ),
    "store.open": Benchmark(
        place="open:measure_opening",
        about="time and memory to open a very large store",
        quick={"units": 20, "samples": 2000, "rounds": 1},
    ),
    "store.scale": Benchmark(
        place="scale:measure_scale",
        about="seconds to open a store of a million units, and to its first batch",
        quick={"units": 2000, "rounds": 1},
    ),
    "store.dataset": Benchmark(
        place="dataset:measure_dataset",
        about="tokens/s of StoreDataset against the stream that training reads",
        quick={"samples": 8, "width": 64, "unit_tokens": 2048, "rounds": 1},
    ),
    "train.loss": Benchmark(
        place="loss:measure_loss",
        about="loss and gradient against their two matrix products, exact and filtered",
        quick=_HEAD,
    ),
    "train.step": Benchmark(
        place="step:measure_step", about="a whole step against its loss", quick=_HEAD
    ),
    "train.compiled": Benchmark(
        place="compiled:measure_compiled",
        about="compiled steps against others; minutes of compiling",
        quick={**_HEAD, "batches": 2, "backend": "eager"},
    ),
    "gpu.loss": Benchmark(
        place="loss:measure_loss", about="train.loss on an accelerator", needs="gpu", quick=_HEAD
    ),
    "gpu.step": Benchmark(
        place="step:measure_step", about="train.step on an accelerator", needs="gpu", quick=_HEAD
    ),
    "gpu.ahead": Benchmark(
        place="gpu:measure_steps",
        about="steps whose figures are read together against steps read one by one",
        needs="gpu",
        quick=_HEAD,
    ),
    "gpu.compiled": Benchmark(
        place="compiled:measure_compiled",
        about="train.compiled on an accelerator, captured as CUDA graphs",
        needs="gpu",
        quick={**_HEAD, "batches": 2, "backend": "eager"},
    ),
    "gpu.extract": Benchmark(
        place="gpu_extract:measure_gpu_extraction",
        about="extraction against bare forward passes by width, compiled and not; a minute",
        needs="gpu",
        quick={"widths": (64,), "unit_tokens": 1024, "batch_tokens": 512, "seconds": 0.01},
    ),
    "train.memory": Benchmark(
        place="memory:measure_memory",
        about="peak memory of a 100M carry-on on a 30B-class base, and its estimate",
        quick={"width": 64, "vocabulary": 2048, "carryon_width": 32, "tokens": 256},
    ),
    "train.lora": Benchmark(
        place="lora:measure_lora",
        about="step speed against LoRA and full fine-tuning of the base",
        needs="base",
        quick={"rounds": 1, "steps": 1, "tokens_per_step": 256, "sampled": 1024},
    ),
    "train.data_wait": Benchmark(
        place="step:measure_data_wait", about="share of a run spent waiting for data", needs="store"
    ),
    "train.padding": Benchmark(
        place="step:measure_padding", about="share of computed rows that are padding", needs="store"
    ),
    "train.units": Benchmark(
        place="many_units:measure_units",
        about="streaming speed and memory with 100 times as many units",
        quick={"rounds": 1, "units": 2, "tokens": 20_000},
    ),
    "train.resume": Benchmark(
        place="many_units:measure_resume",
        about="time to the first batch when resuming late in an epoch",
        quick={"rounds": 1, "units": 2},
    ),
    "train.kills": Benchmark(
        place="kills:measure_kills",
        about="runs killed at random instants end with the same bits",
        quick={"kills": 1},
    ),
    "train.sweep": Benchmark(
        place="joint_runs:measure_sweep",
        about="bytes and time of a sweep against separate runs, on a slow disk",
        quick={"runs": 2, "samples": 12, "width": 64},
    ),
    "train.profiles": Benchmark(
        place="quality:measure_profiles",
        about="held-out loss after training on lossy stores",
        needs="store",
        quick=_QUALITY,
    ),
    "train.taps": Benchmark(
        place="quality:measure_taps",
        about="held-out loss with several taps against final alone",
        needs="store",
        quick=_QUALITY,
    ),
    "train.presets": Benchmark(
        place="quality:measure_presets",
        about="held-out loss, bytes and seconds of each preset",
        needs="store",
        quick=_QUALITY,
    ),
    "accuracy.evaluation": Benchmark(
        place="signals:measure_evaluation",
        about="seconds of evaluations during a run against those of its steps",
        needs="store",
        quick={"epochs": 1, "sampled": 20},
    ),
    "train.sampled": Benchmark(
        place="sampled:measure_sampled",
        about="a sampled softmax against the exact loss, at equal steps and seconds; an hour",
        needs="store",
        quick={"sampled": 1024, "tokens": 4096},
    ),
    "train.proposals": Benchmark(
        place="proposals:measure_proposals",
        about="error of the sampled softmax's gradient by where its negatives come from",
        needs="store",
        quick={"sampled": 128, "targets": 64, "draws": 4},
    ),
    "mixing.train": Benchmark(
        place="mixing:measure_mixing",
        about="gate and carry-on over several bases against each alone: loss, speed",
        needs="stores",
        quick=_QUALITY,
    ),
    "mixing.align": Benchmark(
        place="alignment:measure_alignment",
        about="seconds to align 1M tokens with the tokenizers of two stores' bases",
        needs="stores",
        quick={"tokens": 2000},
    ),
    "mixing.leak": Benchmark(
        place="alignment:measure_leaks",
        about="aligned positions that an edit of later text changes",
        needs="stores",
        quick={"edits": 20},
    ),
    "mixing.projection": Benchmark(
        place="projection:measure_projection",
        about="positions/s of projecting a base's distributions onto another vocabulary",
        needs="stores",
        quick={"positions": 32, "rounds": 1},
    ),
    "mixing.generation": Benchmark(
        place="mixed_generation:measure_mixed_generation",
        about="text of a mixture with and without a cache, and its speed beside its bases",
        quick={**_TEXT, "prompts": 4},
    ),
    "compose.generate": Benchmark(
        place="generate:measure_generation",
        about="generation speed with a carry-on against the base alone",
        needs="base",
        quick=_TEXT,
    ),
    "compose.mixed": Benchmark(
        place="generate:measure_mixed_rows",
        about="generation speed of rows with a carry-on each against rows that share one",
        needs="base",
        quick={**_TEXT, "rows": 4},
    ),
    "compose.equal_rows": Benchmark(
        place="generate:measure_equal_rows",
        about="generation speed behind prompts of equal length against that of transformers",
        needs="base",
        quick={"rows": 4, "prompt_tokens": 64, "new_tokens": 2, "rounds": 1},
    ),
    "compose.load": Benchmark(
        place="load:measure_loading",
        about="memory and time to load many carry-ons",
        needs="base",
        quick={"carryons": 8, "rounds": 1},
    ),
    "compose.greedy": Benchmark(
        place="same_text:measure_greedy",
        about="greedy text from a cache against recomputation",
        needs="base",
        quick={"prompts": 9, "prompt_tokens": 8, "new_tokens": 3},
    ),
    "compose.rows": Benchmark(
        place="same_logits:measure_rows",
        about="logits of a mixed batch against each carry-on alone",
        needs="base",
        quick={"rows": 4, "prompt_tokens": 8},
    ),
    "compose.families": Benchmark(
        place="same_logits:measure_families",
        about="cached against uncached logits on a tiny base of every architecture",
        needs="base",
    ),
    "merge.native": Benchmark(
        place="merged:measure_native",
        about="logits of a merged native against base + carry-on",
        needs="base",
    ),
    "merge.top": Benchmark(
        place="merged:measure_top",
        about="logits of a merged top against base + carry-on",
        needs="base",
    ),
    "merge.adapter": Benchmark(
        place="merged:measure_adapter",
        about="logits of a top by LoRA, as PEFT adapter and merged, against base + carry-on",
        needs="base",
    ),
    "merge.generate": Benchmark(
        place="merged:measure_generation",
        about="generation speed of a merged top against its base",
        needs="base",
        quick={"new_tokens": 4, "rounds": 1},
    ),
    "merge.speed": Benchmark(
        place="merged:measure_speed",
        about="training speed of a top against LoRA on the whole base",
        needs="base",
        quick={"rounds": 1},
    ),
    "compare.corpora": Benchmark(
        place="against_lora:measure_corpora",
        about="carryon compare on problems, reference and manual pages; hours",
        needs="base",
        quick={
            "corpora": ("pydoc",),
            "methods": ("lora", "bottleneck"),
            "seconds": (8.0,),
            "tokens": 2000,
            "held_out_tokens": 1000,
        },
    ),
    "paths.switching": Benchmark(
        place="paths:measure_paths",
        about="versions: steps against other ways, the trunk's bits, learning rates",
        quick={"schedules": ("cosine",)},
    ),
    **TRUST,
    **EXCHANGE,
    "house.shape": Benchmark(
        place="house:measure_shape",
        about="modules, floors, imports and lines of the source",
    ),
    "house.start": Benchmark(
        place="house:measure_start", about="seconds of --help, and modules loaded to open a store"
    ),
    "corpus.templates": Benchmark(
        place="corpus_step:measure_templates",
        about="targets of stock chat templates against hand-written ones and an engine",
    ),
    "corpus.tokenize": Benchmark(
        place="corpus_step:measure_tokenizing",
        about="speed of two processes against one, and against datasets.map",
        needs="base",
        quick={"megabytes": 1, "rounds": 1},
    ),
    "corpus.memory": Benchmark(
        place="corpus_step:measure_memory",
        about="peak memory of reading large corpora",
        needs="base",
        quick={"megabytes": 1, "text_megabytes": 1},
    ),
    "corpus.long_chat": Benchmark(
        place="corpus_step:measure_long_chats",
        about="seconds of one long conversation against several short ones",
        needs="base",
        quick={"turns": 80, "rounds": 1},
    ),
    "corpus.resume": Benchmark(
        place="corpus_step:measure_resuming",
        about="seconds before the first unit of a second extraction of the same data",
        quick={"records": 1000, "rounds": 1},
    ),
    **ACCURACY,
    "before.bits": Benchmark(
        place="before:measure_bits",
        about="bits of stores, runs, a sweep and a lineage against an earlier commit",
        needs="base",
        quick={"tokens": 6000},
    ),
    "before.extract": Benchmark(
        place="before:measure_extraction",
        about="extraction speed against an earlier commit",
        needs="base",
        quick={"tokens": 6000, "rounds": 1},
    ),
    "before.train": Benchmark(
        place="before:measure_training",
        about="training speed against an earlier commit",
        needs="base",
        quick={"tokens": 6000, "rounds": 1},
    ),
    "before.demo": Benchmark(
        place="before:measure_demo",
        about="duration of the demo against an earlier commit; minutes",
        needs="base",
    ),
}
"""By `group.name`, in the order in which a group runs."""


def list_groups() -> dict[str, list[str]]:
    """Return the names of the benchmarks of each group."""
    groups: dict[str, list[str]] = {}
    for name in BENCHMARKS:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return groups
