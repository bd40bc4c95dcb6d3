"""What the benchmark `compose` measures, and how much of it."""

from dataclasses import dataclass, field

from carryon.cache.settings import Settings, bounded
from carryon.tools.bench.settings import not_positive

FIGURES = {
    "generate": "generate:measure_generation",
    "mixed": "generate:measure_mixed_rows",
    "load": "load:measure_loading",
    "greedy": "same_text:measure_greedy",
    "rows": "same_logits:measure_rows",
    "families": "same_logits:measure_families",
}
"""What can be measured, in the order in which it is -> the file of this folder and the function of
it that measures, called as function(job) with a ComposeJob (bench_compose_job.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchComposeSettings(Settings):
    """What is measured."""

    base: str
    """Base to measure with: hub id, folder or .gguf file."""
    figures: list[str] = bounded(list(FIGURES), choices=FIGURES)
    """Some of: generate (tokens/s with a carry-on against the base alone), mixed (tokens/s of rows
    with a carry-on each against rows that share one), load (memory and time of loading many),
    greedy (generated text against plain recomputation), rows (logits of a mixed batch's rows
    against each carry-on alone), families (cached against uncached logits, tiny bases of every
    architecture)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchComposeSizes(Settings):
    """How much is measured."""

    carryon_bytes: int = 1_100_000
    """Size of a carry-on, at most; its width follows from that and the base's."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    """Rows of a batch in `generate` and `greedy`."""
    prompt_tokens: int = 64
    """Tokens of a prompt."""
    new_tokens: int = 64
    """Tokens that are generated where speed is measured."""
    mixed_rows: int = 16
    """Rows of the mixed batches, each with a carry-on of its own."""
    carryons: int = 200
    """Carry-ons that are loaded in `load`."""
    prompts: int = 100
    """Prompts in `greedy`."""
    greedy_tokens: int = 24
    """Tokens that are generated in `greedy`; each is held against a recomputation."""
    rounds: int = 7
    """Rounds that medians are taken of."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [not_positive(self.to_dict())]


QUICK_COMPOSE = BenchComposeSizes(
    prompt_tokens=8,
    new_tokens=4,
    mixed_rows=4,
    carryons=8,
    prompts=9,
    greedy_tokens=3,
    rounds=1,
)
"""Sizes that show in a minute that everything runs, and give no numbers to believe."""
