"""The settings of a training run.

One dataclass per concern: the carry-on's shape, its optimisation, the stream of data, the loss, the
run itself. Field names are unique across them, so that a run's settings are one flat list of
names on a command line and in `config.yaml`. Nothing here imports torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, get_origin, get_type_hints

import yaml

from carryon.cache.errors import InputError
from carryon.cache.settings import Settings, apply_options, not_a_ratio, not_below_one, parse_value
from carryon.train.kinds import KINDS, get_kind, kind_problem

LATER_SETTINGS = {"sampled_softmax": 0}
"""Settings that came later than the first runs, with what those had."""


FORMER_NAMES = {
    "mlp_width": "intermediate_size",
    "batch_tokens": "tokens_per_step",
    "warmup_share": "warmup_ratio",
    "decay_share": "decay_ratio",
    "explore_share": "explore_ratio",
    "final_share": "min_lr_ratio",
    "held_out_share": "held_out_ratio",
}
"""Names in carry-ons, runs and lineages saved before settings were renamed -> those of today."""


OTHER_NAMES = FORMER_NAMES | {
    "lr": "learning_rate",
    "batch_size": "tokens_per_step",
    "max_grad_norm": "grad_clip",
    "hidden_size": "width",
    "layers": "blocks",
}
"""What settings are called elsewhere, for the question after an unknown name."""


def with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved settings under today's names."""
    return {FORMER_NAMES.get(name, name): value for name, value in values.items()}


def setting_of(settings: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401
    """Return a setting of a run or lineage that may have been begun before there was one."""
    return settings.get(name, LATER_SETTINGS.get(name))


@dataclass(frozen=True, kw_only=True, slots=True)
class CarryOnSettings(Settings):
    """The shape of a carry-on."""

    kind: str = "bottleneck"
    """`bottleneck`: decoder blocks of a width of your choice behind a bridge. `native`: new blocks
    of the base's own kind behind its last. `top`: a copy of the base's last blocks. The last two
    need a store with blocks of the base, and can be merged into an ordinary checkpoint."""
    taps: list[str] = field(default_factory=lambda: ["final"])
    """Taps of the store that the carry-on reads. `native` and `top` have theirs: `prenorm`, and
    the one below the copied blocks."""
    width: int = 128
    """Width d of the carry-on's blocks, in channels."""
    blocks: int = 2
    """Number of decoder blocks."""
    heads: int = 4
    """Attention heads of a block; divides the width into even parts."""
    intermediate_size: int = 248
    """Inner width of a block's MLP, in channels."""
    gate: Literal["channel", "token", "none"] = "channel"
    """What decides how much of the correction is let through: a gate per `channel` of the base,
    one per `token`, or `none`."""
    dropout: float = 0.0
    """Part of the channels of width d that are set to zero at the blocks' entrance and exit in
    training. Which ones is decided by seed and step."""
    lora_rank: int = 0
    """Rank of LoRA on the copy of a `top`. 0: the copy is trained whole."""
    lora_alpha: int = 16
    """LoRA's scale: what it adds is multiplied by this, divided by the rank."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        kind = KINDS.get(self.kind)
        return [
            (kind is None, kind_problem(self.kind)),
            (
                kind is not None and kind.needs_blocks and self.dropout > 0,
                f"dropout: expected 0 for the kind {self.kind}, got {self.dropout}",
            ),
            (
                self.lora_rank < 0
                or (kind is not None and not kind.lora_rates and self.lora_rank > 0),
                f"lora_rank: expected 0, or more for the kind top, got {self.lora_rank} for "
                f"the kind {self.kind}",
            ),
            (self.lora_alpha < 1, f"lora_alpha: expected 1 or more, got {self.lora_alpha}"),
            (not self.taps, "taps: expected at least one tap, got none"),
            (
                len(set(self.taps)) != len(self.taps),
                f"taps: expected each tap once, got {' '.join(self.taps)}",
            ),
            (self.width < 2, f"width: expected 2 or more channels, got {self.width}"),
            (self.blocks < 1, f"blocks: expected 1 or more, got {self.blocks}"),
            (
                self.heads < 1 or self.width % (2 * max(self.heads, 1)) != 0,
                f"heads: expected a number whose double divides the width {self.width}, "
                f"got {self.heads}",
            ),
            (
                self.intermediate_size < 1,
                f"intermediate_size: expected 1 or more, got {self.intermediate_size}",
            ),
            not_below_one("dropout", self.dropout),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizationSettings(Settings):
    """How the carry-on's weights are found."""

    epochs: int = 3
    """Passes over the training samples."""
    tokens_per_step: int = 1024
    """Tokens in a step; one longer sample still makes a step."""
    micro_batch_tokens: int = 0
    """Tokens that are computed at one time within a step: less memory, the same step to
    rounding. 0: the whole step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon`: Muon for the matrices of the decoder blocks, AdamW for the rest."""
    learning_rate: float = 0.0
    """Highest learning rate. 0: the kind's own, which is 0.003 for a `bottleneck`, 0.001 for a
    `native`, 0.0002 for a `top`, and 0.002 for a `top` by LoRA."""
    schedule: Literal["cosine", "wsd", "constant", "knee", "multistep"] = "cosine"
    """Learning rate over the run, after the warm-up: `cosine` falls all the way, `wsd` stays at
    the top and falls in the last part, `constant` stays, `knee` stays for a part and then falls in
    a straight line, `multistep` falls at once after 80 % and after 90 %."""
    warmup_ratio: float = 0.03
    """Part of all steps in which the learning rate rises from zero."""
    decay_ratio: float = 0.2
    """Part of all steps in which `wsd` falls."""
    explore_ratio: float = 0.5
    """Part of the steps after the warm-up in which `knee` stays at the top."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a part of the highest; `constant` ignores it."""
    weight_decay: float = 0.01
    """AdamW's decay of matrices; norms, biases and gates of one dimension are spared."""
    beta1: float = 0.9
    """AdamW's memory of gradients."""
    beta2: float = 0.99
    """AdamW's memory of squared gradients."""
    grad_clip: float = 1.0
    """Largest norm of all gradients together. 0: no clipping."""
    seed: int = 0
    """Seed of the first weights, of the order within a window, and of dropout."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [
            (self.epochs < 1, f"epochs: expected 1 or more, got {self.epochs}"),
            (
                self.tokens_per_step < 2,
                f"tokens_per_step: expected 2 or more, got {self.tokens_per_step}",
            ),
            (
                not 0 <= self.micro_batch_tokens <= self.tokens_per_step,
                "micro_batch_tokens: expected 0 to tokens_per_step, which is "
                f"{self.tokens_per_step}, got {self.micro_batch_tokens}",
            ),
            (
                not self.learning_rate >= 0,
                f"learning_rate: expected 0 or more, got {self.learning_rate}",
            ),
            (
                self.schedule == "multistep" and self.min_lr_ratio == 0,
                "min_lr_ratio: expected more than 0 for multistep, whose factors multiply to "
                "it, got 0: 0.1 is usual",
            ),
            not_below_one("explore_ratio", self.explore_ratio),
            not_a_ratio("warmup_ratio", self.warmup_ratio),
            not_a_ratio("decay_ratio", self.decay_ratio),
            (
                self.warmup_ratio + self.decay_ratio > 1,
                "warmup_ratio and decay_ratio: expected at most 1 together, got "
                f"{self.warmup_ratio} and {self.decay_ratio}",
            ),
            not_a_ratio("min_lr_ratio", self.min_lr_ratio),
            (
                not self.weight_decay >= 0,
                f"weight_decay: expected 0 or more, got {self.weight_decay}",
            ),
            not_below_one("beta1", self.beta1),
            not_below_one("beta2", self.beta2),
            (not self.grad_clip >= 0, f"grad_clip: expected 0 or more, got {self.grad_clip}"),
            (self.seed < 0, f"seed: expected 0 or more, got {self.seed}"),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings(Settings):
    """What is read from the store, and how far ahead."""

    held_out_ratio: float = 0.05
    """Part of the samples kept for evaluation; used only where the store marks none as held
    out."""
    data_seed: int = 0
    """Seed of that choice, and of the order in which units are read."""
    store_weights: list[float] = field(default_factory=list)
    """How often an epoch goes through each store, where several are given: 2 is twice, 0.5
    through one half and in the next epoch through the other. None given: once each."""
    window_units: int = 2
    """Units whose samples are shuffled together, at most; fewer where `host_memory_gb` does not
    hold them."""
    host_memory_gb: float = 2.0
    """Hidden states in the host's memory at one time, at most, in units of 1e9 bytes: two
    windows, one in use and one being read."""
    reader_threads: int = 2
    """Threads that read and decode units."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [
            (
                not 0 < self.held_out_ratio < 1,
                f"held_out_ratio: expected between 0 and 1, got {self.held_out_ratio}",
            ),
            (self.data_seed < 0, f"data_seed: expected 0 or more, got {self.data_seed}"),
            (
                any(not weight > 0 for weight in self.store_weights),
                f"store_weights: expected more than 0 for each, got {self.store_weights}",
            ),
            (
                not self.host_memory_gb > 0,
                f"host_memory_gb: expected more than 0, got {self.host_memory_gb}",
            ),
            (
                self.window_units < 1,
                f"window_units: expected 1 or more, got {self.window_units}",
            ),
            (
                self.reader_threads < 1,
                f"reader_threads: expected 1 or more, got {self.reader_threads}",
            ),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings(Settings):
    """How the frozen head is multiplied."""

    head_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the matrix products, the head's and the carry-on's. `auto`: bfloat16 where the
    device multiplies it natively, else float32. The loss itself is always summed in float32."""
    chunk_tokens: int = 0
    """Supervised positions whose logits exist at one time. 0: 2,048."""
    chunk_vocabulary: int = 0
    """Rows of the head that are multiplied at one time. 0: what suits the device and the place of
    the head."""
    head_place: Literal["device", "host", "mapped"] = "device"
    """Where the head lies: on the `device`; in the `host`'s memory; or `mapped`, in an unnamed
    temporary file from which the system fetches it as it is needed. From `host` and `mapped` it
    comes to the device a few thousand rows at a time."""
    kl_weight: float = 0.0
    """Weight of KL(base || customized model), in nats a supervised token, added to the loss that
    is trained on; it keeps the customized model near its base. 0: none."""
    gradient_filter: float = 0.0
    """Probability below which a token of the vocabulary is left out of the gradient of the
    cross-entropy; the loss itself stays exact. 1e-6 and 1e-5 save most of one of the loss's two
    matrix products. A position's gradient is off by at most the probability left out times the
    largest distance of a head's row from their mean. 0: nothing is left out."""
    sampled_softmax: int = 0
    """Train against the 4,096 most frequent tokens of the store, the step's own targets and so many
    others, drawn anew each step to stand for all the rest, instead of the whole vocabulary; 2048
    makes a small carry-on's step several times as fast. Losses in the log are then estimates,
    held-out ones stay exact. 0: the whole vocabulary."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [
            (
                self.chunk_tokens < 0,
                f"chunk_tokens: expected 0 or more, got {self.chunk_tokens}",
            ),
            (
                self.chunk_vocabulary < 0,
                f"chunk_vocabulary: expected 0 or more, got {self.chunk_vocabulary}",
            ),
            (not self.kl_weight >= 0, f"kl_weight: expected 0 or more, got {self.kl_weight}"),
            not_below_one("gradient_filter", self.gradient_filter),
            (
                self.sampled_softmax < 0,
                f"sampled_softmax: expected 0 or more, got {self.sampled_softmax}",
            ),
            (
                self.sampled_softmax > 0 and (self.gradient_filter > 0 or self.kl_weight > 0),
                "sampled_softmax: expected 0 with gradient_filter or kl_weight, which need the "
                f"whole vocabulary, got {self.sampled_softmax}: leave out one of them",
            ),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySettings(Settings):
    """What the weights and all that belongs to them take up."""

    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights and their gradients. `bfloat16` halves both; each move of a
    weight is then rounded up or down by chance, in proportion, so that small moves add up."""
    optimizer_bits: Literal[32, 8] = 32
    """Bits of each number of the optimizer's state; 8: in blocks of 256 with a scale each."""
    step_in_backward: bool = False
    """Move each matrix or vector of weights as soon as its gradient is known, and free that: all
    gradients never exist together, if a step is one micro-batch. Clipping is then by the norm of
    each one's own gradient."""
    recompute: bool = False
    """Keep only the input of each decoder block for the backward pass and compute the rest again:
    a third more work in the body, little memory."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings(Settings):
    """Where a run computes, and what it leaves behind."""

    device: str = "auto"
    """`auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    evaluate_every: int = 0
    """Steps between evaluations on the held-out samples. 0: at the end of each epoch. The start
    and the end are always evaluated."""
    evaluate_tokens: int = 65536
    """Held-out tokens, at most, of an evaluation during the run; the last one takes all."""
    patience: int = 0
    """Evaluations in a row without a better held-out loss, after which the run ends early. 0:
    never."""
    finish_with: Literal["auto", "last", "best"] = "auto"
    """Weights of the finished carry-on: those of the `last` step, or those with the `best`
    held-out loss of all evaluations. `auto`: the best where `patience` is set, else the last."""
    checkpoint_every: int = 100
    """Steps between checkpoints. 0: at the end of each epoch."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the last may be the one that a crash cut short."""
    saved_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights in the finished carry-on."""
    log_every: int = 10
    """Steps that a line of `metrics.jsonl` sums up."""
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where the metrics go as well, through accelerate; `tensorboard` writes to RUN/tensorboard."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [
            (
                self.evaluate_every < 0,
                f"evaluate_every: expected 0 or more steps, got {self.evaluate_every}",
            ),
            (
                self.evaluate_tokens < 2,
                f"evaluate_tokens: expected 2 or more, got {self.evaluate_tokens}",
            ),
            (self.patience < 0, f"patience: expected 0 or more, got {self.patience}"),
            (
                self.checkpoint_every < 0,
                f"checkpoint_every: expected 0 or more steps, got {self.checkpoint_every}",
            ),
            (
                self.keep_checkpoints < 2,
                "keep_checkpoints: expected 2 or more, as the last may be half written, got "
                f"{self.keep_checkpoints}",
            ),
            (self.log_every < 1, f"log_every: expected 1 or more steps, got {self.log_every}"),
        ]

    @property
    def finishes_with_best(self) -> bool:
        """Whether the finished carry-on has the weights of the best evaluation."""
        return self.finish_with == "best" or (self.finish_with == "auto" and self.patience > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateSettings(Settings):
    """How text is generated."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Temperature of sampling. 0: always the likeliest token."""
    top_p: float = 1.0
    """Sampling keeps the likeliest tokens up to this sum of probabilities."""
    seed: int = 0
    """Seed of sampling."""
    chat: bool = True
    """Put the prompt into the base's chat template, as a user's turn; a base without a template
    gets the prompt as it is."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [
            (
                self.max_new_tokens < 1,
                f"max_new_tokens: expected 1 or more, got {self.max_new_tokens}",
            ),
            (
                not self.temperature >= 0,
                f"temperature: expected 0 or more, got {self.temperature}",
            ),
            (
                not 0 < self.top_p <= 1,
                f"top_p: expected more than 0, up to 1, got {self.top_p}",
            ),
            (self.seed < 0, f"seed: expected 0 or more, got {self.seed}"),
        ]


def rates_of(carryon: CarryOnSettings) -> tuple[float, ...]:
    """Return the learning rates that suit a carry-on, its own first."""
    kind = get_kind(carryon.kind)
    return kind.lora_rates if carryon.lora_rank else kind.learning_rates


def with_own_rate(
    optimization: OptimizationSettings, carryon: CarryOnSettings
) -> OptimizationSettings:
    """Return the settings with the kind's own learning rate where none is given."""
    rate = optimization.learning_rate or rates_of(carryon)[0]
    return replace(optimization, learning_rate=rate)


def rate_warning(optimization: OptimizationSettings, carryon: CarryOnSettings) -> str:
    """Return what to say of a learning rate that wrecks a `top`; nothing of one that does not."""
    rate, own = optimization.learning_rate, rates_of(carryon)[0]
    if rate <= get_kind(carryon.kind).max_rate_factor * own:
        return ""
    return (
        f"learning_rate {rate:g} is {rate / own:.0f} times what suits a {carryon.kind}"
        f"{' by LoRA' if carryon.lora_rank else ''} ({own:g}), which begins as the base itself and "
        "may be worse than it after a few steps: leave out --learning-rate, or lower it"
    )


PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}
"""Name -> file."""


def read_preset(name: str) -> dict[str, Any]:
    """Return the settings of a preset, by name."""
    found: dict[str, Any] = yaml.safe_load(PRESETS[name].read_text(encoding="ascii"))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """All settings of a run, grouped by concern; omitted fields use their defaults."""

    carryon: CarryOnSettings = field(default_factory=CarryOnSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    run: RunSettings = field(default_factory=RunSettings)

    @classmethod
    def from_options(cls, **options: Any) -> Self:  # noqa: ANN401 -- each setting has its own type
        """Build from field names of all groups: `from_options(learning_rate=1e-3, width=64)`.

        Raises:
            InputError: a name is unknown, or a value is of another type or out of range.
        """
        return cls().with_options(**options)

    def with_options(self, **options: Any) -> Self:  # noqa: ANN401 -- each setting has its own type
        """Return the settings with some fields changed; errors as those of `from_options`."""
        names = [group.name for group in fields(self)]
        groups = apply_options(typed_options(options), *(getattr(self, name) for name in names))
        return replace(self, **dict(zip(names, groups, strict=True)))

    def resolved(self) -> Self:
        """Return the settings with the learning rate of the carry-on's kind if none is given."""
        return replace(self, optimization=with_own_rate(self.optimization, self.carryon))

    def to_flat(self) -> dict[str, Any]:
        """Return all fields by name as plain values, the learning rate resolved."""
        resolved = self.resolved()
        return {
            name: value
            for group in fields(self)
            for name, value in getattr(resolved, group.name).to_dict().items()
        }


Changes = Mapping[str, Any]
"""Settings in which one run differs from others, by name."""


@cache
def setting_types() -> dict[str, Any]:
    """Return the type of every field of TrainSettings' groups, by name."""
    return {
        name: kind
        for group in get_type_hints(TrainSettings).values()
        for name, kind in get_type_hints(group).items()
    }


def typed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in the types of their fields; texts are parsed, as YAML reads 1e-3 as one.

    Raises:
        InputError: a name is unknown, or a value is not of the field's type.
    """
    typed: dict[str, Any] = {}
    for name, value in options.items():
        if name not in setting_types():
            raise InputError(f"no setting {name}: {_hint(name, setting_types())}")
        kind = setting_types()[name]
        items = (
            [value] if get_origin(kind) is list and not isinstance(value, (list, tuple)) else value
        )
        typed[name] = parse_value(name, items, kind)
    return typed


def _hint(name: str, known: Iterable[str]) -> str:
    """Return the question for the name that was probably meant."""
    elsewhere = [OTHER_NAMES[name]] if name in OTHER_NAMES else []
    parts = [each for each in known if name in each.split("_")]
    near = [*elsewhere, *get_close_matches(name, known, n=1), *parts]
    return f"did you mean {near[0]}?" if near else "carryon train --help-all lists them"
