"""What the benchmark `train` measures, and how much of it."""

from dataclasses import dataclass

from carryon.cache.settings import Settings, bounded
from carryon.tools.bench.settings import not_positive

FIGURES = {
    "loss": "loss:measure_loss",
    "step": "step:measure_step",
    "memory": "memory:measure_memory",
    "lora": "lora:measure_lora",
    "data_wait": "step:measure_data_wait",
    "padding": "step:measure_padding",
    "units": "train_units:measure_units",
    "resume": "train_units:measure_resume",
    "kills": "train_kills:measure_kills",
    "sweep": "train_sweep:measure_sweep",
    "profiles": "quality:measure_profiles",
    "taps": "quality:measure_taps",
    "presets": "quality:measure_presets",
    "sampled": "quality:measure_sampled",
}
"""What can be measured, in the order in which it is -> the file of this folder and the function of
it that measures, called as function(job) with a TrainJob (bench_train.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchTrainSettings(Settings):
    """What is measured."""

    figures: list[str] = bounded(list(FIGURES), choices=FIGURES)
    """Some of: loss (value and gradient against the two matrix products alone,
    exact and with a gradient filter), step (a whole
    step against the loss alone), memory (peak of a large carry-on on a large base), lora (steps
    against LoRA and full fine-tuning of the base), data_wait (share of a run spent waiting for
    data), padding (share of computed rows that are pads), units (a store of 100 times as many
    units), resume (time to the first batch late in an epoch), kills (runs killed at random
    instants), sweep (several runs side by side against as many one after another), profiles
    (held-out loss after training on lossy copies of a store), taps (several taps against `final`
    alone, three seeds), presets (held-out loss, bytes and seconds of each
    preset, after one epoch and after all), sampled (speed and held-out loss with a sampled softmax
    against those with the exact loss, three seeds)."""
    base: str = ""
    """Base to compare with: hub id, folder or .gguf file. Empty for none: what needs it is left
    out."""
    store: str = ""
    """Extracted store of that base. Empty for none: what needs it is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchTrainSizes(Settings):
    """How much is measured."""

    rounds: int = 5
    """Rounds that medians are taken of."""
    loss_width: int = 576
    """Width of the base whose head is multiplied in `loss` and `step`."""
    loss_vocabulary: int = 49152
    """Vocabulary of that head."""
    loss_tokens: int = 2048
    """Supervised positions of one call of the loss."""
    loss_filter: float = 1e-6
    """Gradient filter of `loss.filtered`: probabilities below it are left out of the gradient."""
    memory_width: int = 5120
    """Width of the base in `memory`."""
    memory_vocabulary: int = 152064
    """Vocabulary of the base in `memory`."""
    memory_carryon_width: int = 1760
    """Width of the carry-on in `memory`; 1,760 makes 100 million weights at width 5,120."""
    memory_tokens: int = 2048
    """Tokens of a micro-batch in `memory`."""
    memory_steps: int = 2
    """Optimizer steps in `memory`."""
    lora_steps: int = 4
    """Batches a round in `lora`, the same for every way."""
    lora_batch_tokens: int = 1024
    """Tokens of a batch in `lora`, at most."""
    units_small: int = 20
    """Units of the smaller store in `units`; the other has 100 times as many. `resume` takes that
    one too."""
    units_tokens: int = 400_000
    """Tokens that are streamed in a round of `units`."""
    kills_rounds: int = 30
    """Kills in `kills`."""
    sweep_runs: int = 8
    """Runs in `sweep`."""
    sweep_samples: int = 60
    """Samples of the store in `sweep`, of 300 tokens on average."""
    sweep_width: int = 2560
    """Width of the base in `sweep`."""
    sweep_taps: int = 4
    """Taps in `sweep`."""
    sweep_mb_per_second: int = 30
    """What the disk gives in `sweep`."""
    quality_epochs: int = 3
    """Epochs of every run in `profiles`, `taps`, `presets` and `sampled`."""
    sampled_rows: int = 2048
    """Rows that are drawn for a step in `sampled`."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [not_positive(self.to_dict())]


QUICK_TRAIN = BenchTrainSizes(
    rounds=1,
    loss_width=64,
    loss_vocabulary=2048,
    loss_tokens=256,
    memory_width=64,
    memory_vocabulary=2048,
    memory_carryon_width=32,
    memory_tokens=256,
    lora_steps=1,
    lora_batch_tokens=256,
    units_small=2,
    units_tokens=20_000,
    kills_rounds=1,
    sweep_runs=2,
    sweep_samples=12,
    sweep_width=64,
    quality_epochs=1,
    sampled_rows=1024,
)
"""Sizes that show in a minute that everything runs, and give no numbers to believe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Options without which a figure cannot be measured."""

    base: bool = False
    store: bool = False


NEEDS = {
    "lora": Needs(base=True, store=True),
    "data_wait": Needs(store=True),
    "padding": Needs(store=True),
    "profiles": Needs(store=True),
    "taps": Needs(store=True),
    "presets": Needs(store=True),
    "sampled": Needs(store=True),
}
"""Of the figures that are not named here, none needs anything."""


def missing_options(figure: str, settings: BenchTrainSettings) -> list[str]:
    """Return the options that `figure` needs and that were not given."""
    needs = NEEDS.get(figure, Needs())
    wanted = {"--base": (needs.base, settings.base), "--store": (needs.store, settings.store)}
    return [option for option, (is_needed, given) in wanted.items() if is_needed and not given]
