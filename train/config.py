"""Settings of a training run, one dataclass per concern, and TrainSettings, which groups them.

Field names are unique across the groups: `config.yaml`, command lines and `train(**options)` hold
one flat list of names. Importing this loads neither torch nor numpy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

from carryon.cache.checked_settings import Settings, apply_options, bounded, parse_options
from carryon.cache.errors import InputError
from carryon.train.compile_settings import CompileSettings
from carryon.train.kinds import KINDS, get_kind, kind_problem
from carryon.train.saved_settings import FORMER_NAMES

OTHER_NAMES = FORMER_NAMES | {
    "lr": "learning_rate",
    "batch_size": "tokens_per_step",
    "max_grad_norm": "grad_clip",
    "hidden_size": "width",
    "layers": "blocks",
}
"""Names that settings have elsewhere -> names here, to suggest after an unknown name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CarryOnSettings(Settings):
    """Carry-on."""

    kind: str = "bottleneck"
    """`bottleneck`: decoder blocks of a small width behind a bridge. `native`: new blocks of the
    base's class after its last. `top`: a copy of the base's last blocks. `native` and `top` need a
    store with blocks of the base, and merge into an ordinary checkpoint. `none`: no correction;
    with `mix`, the gate alone is trained."""
    taps: list[str] = bounded(["final"], min_items=1, is_unique=True)
    """Taps of the store that the carry-on reads. `native` always reads `prenorm`, `top` the tap
    below the copied blocks."""
    width: int = bounded(128, at_least=2, at_most=65536)
    """Width d of the carry-on's blocks, in channels."""
    blocks: int = bounded(2, at_least=1, at_most=1024)
    """Decoder blocks."""
    heads: int = bounded(4, at_least=1, at_most=4096)
    """Attention heads of a block. Twice the number must divide the width."""
    intermediate_size: int = bounded(248, at_least=1, at_most=262144)
    """Inner width of a block's MLP, in channels."""
    gate: Literal["channel", "token", "none"] = "channel"
    """Gate of the correction: one per `channel` of the base, one per `token`, or `none`."""
    dropout: float = bounded(0.0, at_least=0, below=1)
    """Dropout before the first block and after the last."""
    lora_rank: int = bounded(0, at_least=0, at_most=65536)
    """Rank of LoRA on the copy of a `top`. 0: train the whole copy."""
    lora_alpha: int = bounded(16, at_least=1, at_most=65536)
    """LoRA's scale: its output is multiplied by lora_alpha / lora_rank."""

    def problems(self) -> list[tuple[bool, str]]:
        """Check the kind, and what it allows."""
        kind = KINDS.get(self.kind)
        return [
            (kind is None, kind_problem(self.kind)),
            (
                kind is not None and kind.needs_blocks and self.dropout > 0,
                f"dropout: expected 0 for the kind {self.kind}, got {self.dropout}",
            ),
            (
                kind is not None and not kind.lora_rates and self.lora_rank > 0,
                f"lora_rank: expected 0 for the kind {self.kind}, got {self.lora_rank}. "
                "Fix: --kind top",
            ),
            (
                self.width % (2 * self.heads) != 0,
                f"heads: expected a number whose double divides the width {self.width}, "
                f"got {self.heads}",
            ),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizationSettings(Settings):
    """Optimization."""

    epochs: int = bounded(3, at_least=1)
    """Passes over the training samples."""
    tokens_per_step: int = bounded(1024, at_least=2)
    """Tokens in a step. A longer sample is a step by itself."""
    micro_batch_tokens: int = bounded(0, at_least=0)
    """Tokens computed at one time within a step: less memory, the same step up to rounding. 0: the
    whole step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon`: Muon for the matrices of the decoder blocks, AdamW for the rest."""
    learning_rate: float = bounded(0.0, at_least=0)
    """Peak learning rate. 0: the kind's default, which is 0.003 for `bottleneck`, 0.001 for
    `native`, 0.0002 for `top`, and 0.002 for `top` with LoRA."""
    schedule: Literal["cosine", "wsd", "constant", "knee", "multistep"] = "cosine"
    """Learning rate after the warmup. `cosine`: decay over all steps. `wsd`: stay at the peak, then
    decay. `constant`: stay. `knee`: stay, then decay linearly. `multistep`: drop at 80 % and at
    90 %."""
    warmup_ratio: float = bounded(0.03, at_least=0, at_most=1)
    """Fraction of all steps in which the learning rate rises from zero."""
    decay_ratio: float = bounded(0.2, at_least=0, at_most=1)
    """Fraction of all steps in which `wsd` decays."""
    explore_ratio: float = bounded(0.5, at_least=0, below=1)
    """Fraction of the steps after the warmup in which `knee` stays at the peak."""
    min_lr_ratio: float = bounded(0.0, at_least=0, at_most=1)
    """Last learning rate, as a fraction of the peak. `constant` ignores it."""
    weight_decay: float = bounded(0.01, at_least=0)
    """AdamW weight decay of matrices; norms, biases and gates of one dimension have none."""
    beta1: float = bounded(0.9, at_least=0, below=1)
    """AdamW beta1."""
    beta2: float = bounded(0.99, at_least=0, below=1)
    """AdamW beta2."""
    grad_clip: float = bounded(1.0, at_least=0)
    """Maximum norm of the whole gradient. 0: no clipping."""
    seed: int = bounded(0, at_least=0)
    """Seed of the initial weights, of dropout, and of the order within a window."""

    def problems(self) -> list[tuple[bool, str]]:
        """Check what depends on two fields."""
        return [
            (
                self.micro_batch_tokens > self.tokens_per_step,
                f"micro_batch_tokens: expected 0 to tokens_per_step, which is "
                f"{self.tokens_per_step}, got {self.micro_batch_tokens}",
            ),
            (
                self.schedule == "multistep" and self.min_lr_ratio == 0,
                "min_lr_ratio: expected more than 0 for multistep, whose drops multiply to it, "
                "got 0. Fix: --min-lr-ratio 0.1",
            ),
            (
                self.warmup_ratio + self.decay_ratio > 1,
                "warmup_ratio and decay_ratio: expected at most 1 together, got "
                f"{self.warmup_ratio} and {self.decay_ratio}",
            ),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings(Settings):
    """Data."""

    held_out_ratio: float = bounded(0.05, above=0, below=1)
    """Fraction of samples held out for evaluation. Ignored if the store marks held-out samples."""
    data_seed: int = bounded(0, at_least=0)
    """Seed of the held-out split and of the order of units."""
    store_weights: list[float] = bounded([], above=0)
    """Passes over each store in an epoch: 2 is twice, 0.5 one half, and the other half in the next
    epoch. None given: 1 each."""
    window_units: int = bounded(2, at_least=1)
    """Maximum units whose samples are shuffled together. Fewer if `host_memory_gb` is too small."""
    host_memory_gb: float = bounded(2.0, above=0)
    """Maximum hidden states in host memory, in units of 1e9 bytes: one window in use, one being
    read."""
    reader_threads: int = bounded(2, at_least=1)
    """Threads that read and decode units."""
    decoded_cache: str = ""
    """Folder for decoded hidden states, on a fast disk. The first epoch writes them there; later
    epochs and runs map them instead of decompressing. Empty: none."""
    decoded_cache_gb: float = bounded(50.0, above=0)
    """Maximum size of `decoded_cache`, in units of 1e9 bytes. Units that do not fit are decoded in
    each epoch; nothing is removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixSettings(Settings):
    """Other bases."""

    mix: list[str] = bounded([], is_unique=True)
    """Stores of other bases, each written with `carryon extract --align-to STORE`. A gate mixes
    their distributions with that of the carry-on, token by token. None given: one base."""
    mix_by: Literal["probability", "state", "both"] = "probability"
    """How other bases are mixed in. `probability`: a gate mixes their next-token distributions.
    `state`: the carry-on reads their hidden states beside the base's own. `both`: both."""
    mix_taps: list[str] = bounded(["final"], min_items=1, is_unique=True)
    """Taps of the stores of other bases that the carry-on reads, with `mix_by` state or both."""

    @property
    def reads_states(self) -> bool:
        """Whether the carry-on reads the states of other bases."""
        return bool(self.mix) and self.mix_by != "probability"

    @property
    def has_gate(self) -> bool:
        """Whether a gate mixes distributions."""
        return bool(self.mix) and self.mix_by != "state"

    def problems(self) -> list[tuple[bool, str]]:
        """Check that what is given has an effect."""
        is_by_state = self.mix_by != "probability"
        return [
            (
                is_by_state and not self.mix,
                f"mix_by: expected with mix, got {self.mix_by} without another base. Fix: add "
                "--mix STORE",
            ),
            (
                not is_by_state and self.mix_taps != ["final"],
                "mix_taps: expected with mix_by state or both, as distributions are of the tap "
                f"final, got {' '.join(self.mix_taps)}. Fix: --mix-by both",
            ),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings(Settings):
    """LM-head loss."""

    head_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of matrix products, of the LM head and of the carry-on. `auto`: bfloat16 if the device
    multiplies it faster, which is timed when a run begins, else float32; a resumed run keeps it.
    The loss is always summed in float32."""
    loss_way: Literal["auto", "attention", "float32", "shifted", "rounded", "plain"] = "auto"
    """How a CPU computes the loss with its gradient. `auto`: the fastest on this machine that is
    exact to 0.002 nats of the mean loss and 0.5 % of the gradient, timed when a run begins; a
    resumed run keeps it. A run with a sampled softmax is not timed: `attention`. `attention`:
    torch's attention kernel, or plain products where it cannot multiply the head. `float32`:
    products in float32. `shifted`: products in the head's type, rounded relative to the
    log-sum-exp. `rounded`: the same with rounded exponentials. `plain`: products that are rounded
    as they are. An accelerator has one way."""
    chunk_tokens: int = bounded(0, at_least=0)
    """Targets whose logits exist at one time. 0: 2,048."""
    chunk_vocabulary: int = bounded(0, at_least=0)
    """Rows of the LM head multiplied at one time. 0: chosen for the device and `head_place`."""
    head_place: Literal["device", "host", "mapped"] = "device"
    """Where the LM head is kept: in the memory of the `device`, of the `host`, or `mapped`, in an
    unnamed temporary file. From `host` and `mapped` a few thousand rows at a time are copied."""
    kl_weight: float = bounded(0.0, at_least=0)
    """Weight of KL(base || customized model), in nats per target, added to the loss. It keeps the
    customized model near its base. 0: none."""
    gradient_filter: float = bounded(0.0, at_least=0, below=1)
    """Probability below which a token of the vocabulary is left out of the gradient; the loss stays
    exact. 1e-6 and 1e-5 save most of one of the loss's two matrix products. The error of a
    position's gradient is at most the probability left out, times the largest distance of a row of
    the head from their mean. 0: nothing is left out."""
    sampled_softmax: int = bounded(0, at_least=0)
    """Train against the 4,096 tokens that are the most frequent or that the base finds the most
    probable, the step's own targets, and this many sampled negatives per step, reweighted. 2048
    makes a step of a small carry-on several times as fast. Training losses are then estimates;
    held-out losses are over the whole vocabulary, as all are with 0."""

    def problems(self) -> list[tuple[bool, str]]:
        """Check what depends on two fields."""
        return [
            (
                self.sampled_softmax > 0 and (self.gradient_filter > 0 or self.kl_weight > 0),
                "sampled_softmax: expected 0 with gradient_filter or kl_weight, which need the "
                f"whole vocabulary, got {self.sampled_softmax}. Fix: leave out one of them",
            )
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySettings(Settings):
    """Memory."""

    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights and their gradients. `bfloat16` halves both and uses stochastic
    rounding."""
    optimizer_bits: Literal[32, 8] = 32
    """Bits of each number of the optimizer's state. 8: in blocks of 256 with one scale each."""
    step_in_backward: bool = False
    """Update each weight tensor as soon as its gradient is known, then free the gradient. Gradient
    clipping is then by each tensor's own norm. Needs steps of one micro-batch to save memory."""
    recompute: bool = False
    """Activation checkpointing: keep only the input of each decoder block for the backward pass. A
    third more work in the blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings(Settings):
    """Run."""

    device: str = "auto"
    """`auto` (an accelerator if there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    evaluate_every: int = bounded(0, at_least=0)
    """Steps between evaluations on the held-out samples. 0: at the end of each epoch. The first and
    the last step are always evaluated."""
    evaluate_tokens: int = bounded(0, at_least=0)
    """Maximum held-out tokens of an evaluation during the run; the last evaluation uses all. 0: as
    many as a tenth of the training time allows, at least 6 samples and 500 targets, at most
    65,536 tokens. A resumed run keeps its number."""
    patience: int = bounded(0, at_least=0)
    """Evaluations in a row without a lower held-out loss after which the run stops early. 0:
    never."""
    finish_with: Literal["auto", "last", "best"] = "auto"
    """Weights of the finished carry-on: of the `last` step, or of the evaluation with the `best`
    held-out loss. `auto`: best if `patience` is set, else last."""
    checkpoint_every: int = bounded(100, at_least=0)
    """Steps between checkpoints. 0: at the end of each epoch."""
    keep_checkpoints: int = bounded(2, at_least=2)
    """Newest checkpoints to keep."""
    saved_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights of the finished carry-on."""
    log_every: int = bounded(10, at_least=1)
    """Steps per line of `metrics.jsonl`."""
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Experiment tracker that also gets the metrics, through accelerate. `tensorboard` writes to
    RUN/tensorboard."""

    @property
    def finishes_with_best(self) -> bool:
        """Whether the finished carry-on has the weights of the best evaluation."""
        return self.finish_with == "best" or (self.finish_with == "auto" and self.patience > 0)


def rates_of(carryon: CarryOnSettings) -> tuple[float, ...]:
    """Return the learning rates that suit a carry-on, its default first."""
    kind = get_kind(carryon.kind)
    return kind.lora_rates if carryon.lora_rank else kind.learning_rates


Changes = Mapping[str, Any]
"""Settings in which one run differs from others, by name."""


def parse_changes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by name in the types of their fields; errors as `TrainSettings.from_options`.

    Example: `{"learning_rate": "1e-3"}` becomes `{"learning_rate": 0.001}`.
    """
    groups = (item.default_factory for item in fields(TrainSettings))
    return parse_options(options, *groups, other_names=OTHER_NAMES)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """All settings of a run, grouped by concern; omitted fields use their defaults."""

    carryon: CarryOnSettings = field(default_factory=CarryOnSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    mixing: MixSettings = field(default_factory=MixSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    compilation: CompileSettings = field(default_factory=CompileSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def check_mix(self, *, is_scored: bool = False) -> None:
        """Check what a mixture of several bases allows.

        Args:
            is_scored: whether answers are scored in training.

        Raises:
            InputError: a kind without weights alone, a kind that cannot read the states of other
                bases, a sampled softmax beside a gate, or scores of a mixture.
        """
        if self.mixing.mix and is_scored:
            raise InputError(
                "score_every: expected 0 with mix, as answers of a mixture are not built yet. Fix: "
                "leave out --score-every"
            )
        kind = self.carryon.kind
        if self.mixing.reads_states and not get_kind(kind).reads_sources:
            kinds = ", ".join(name for name, each in KINDS.items() if each.reads_sources)
            raise InputError(
                f"kind {kind}: expected one that reads the states of other bases ({kinds}) with "
                f"mix_by {self.mixing.mix_by}, got {kind}. Fix: leave out --mix-by, or --kind "
                "bottleneck"
            )
        if self.carryon.kind == "none" and not self.mixing.mix:
            raise InputError(
                "kind none: expected other bases to mix with, as nothing else is trained, got "
                "none. Fix: add --mix STORE, or choose another --kind"
            )
        if self.mixing.has_gate and self.loss.sampled_softmax:
            raise InputError(
                "sampled_softmax: expected 0 with mix, whose gate compares exact probabilities, "
                f"got {self.loss.sampled_softmax}. Fix: leave out --sampled-softmax"
            )

    @classmethod
    def from_options(cls, **options: Any) -> Self:  # noqa: ANN401
        """Build from field names of all groups: `from_options(learning_rate=1e-3, width=64)`.

        Raises:
            InputError: a name is unknown, or a value is of another type or out of range.
        """
        return cls().with_options(**options)

    def with_options(self, **options: Any) -> Self:  # noqa: ANN401
        """Return the settings with some fields changed; errors as those of `from_options`."""
        names = [group.name for group in fields(self)]
        groups = [getattr(self, name) for name in names]
        changed = apply_options(options, *groups, other_names=OTHER_NAMES)
        return replace(self, **dict(zip(names, changed, strict=True)))

    def resolved(self) -> Self:
        """Return the settings with the kind's learning rate if none is given."""
        rate = self.optimization.learning_rate or rates_of(self.carryon)[0]
        return replace(self, optimization=replace(self.optimization, learning_rate=rate))

    def to_flat(self) -> dict[str, Any]:
        """Return all fields by name as plain values, the learning rate resolved."""
        resolved = self.resolved()
        return {
            name: value
            for group in fields(self)
            for name, value in getattr(resolved, group.name).to_dict().items()
        }
