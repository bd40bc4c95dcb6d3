"""The settings of a training run.

One dataclass per concern: the carry-on's shape, its optimisation, the stream of data, the loss, the
run itself. Field names are unique across them, so that a run's settings are one flat list of
names on a command line and in `config.yaml`. Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

from carryon.cache.errors import InputError

_SettingsT = TypeVar(
    "_SettingsT",
    bound="CarryOnSettings | OptimizationSettings | StreamSettings | LossSettings | RunSettings",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CarryOnSettings:
    """The shape of a carry-on."""

    kind: Literal["bottleneck"] = "bottleneck"
    """`bottleneck`: decoder blocks of a width of your choice behind a bridge."""
    taps: list[str] = field(default_factory=lambda: ["final"])
    """Taps of the store that the carry-on reads."""
    width: int = 128
    """Width d of the carry-on's blocks, in channels."""
    blocks: int = 2
    """Number of decoder blocks."""
    heads: int = 4
    """Attention heads of a block; divides the width into even parts."""
    mlp_width: int = 248
    """Inner width of a block's MLP, in channels."""
    gate: Literal["channel", "token", "none"] = "channel"
    """What decides how much of the correction is let through: a gate per `channel` of the base,
    one per `token`, or `none`."""

    def __post_init__(self) -> None:
        """Raise InputError naming every field that is out of range."""
        _refuse(
            [
                (self.kind != "bottleneck", f"kind: expected bottleneck, got {self.kind}"),
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
                (self.mlp_width < 1, f"mlp_width: expected 1 or more, got {self.mlp_width}"),
                (
                    self.gate not in ("channel", "token", "none"),
                    f"gate: expected channel, token or none, got {self.gate}",
                ),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CarryOnSettings":
        """Build from plain values; unknown keys are refused."""
        return _from_dict(cls, values)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizationSettings:
    """How the carry-on's weights are found."""

    epochs: int = 3
    """Passes over the training samples."""
    batch_tokens: int = 1024
    """Tokens in a step; one longer sample still makes a step."""
    micro_batch_tokens: int = 0
    """Tokens that are computed at one time within a step: less memory, the same step to
    rounding. 0: the whole step."""
    learning_rate: float = 3e-3
    """Highest learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate over the run, after the warm-up: `cosine` falls all the way, `wsd` stays at
    the top and falls in the last part, `constant` stays."""
    warmup_share: float = 0.03
    """Part of all steps in which the learning rate rises from zero."""
    decay_share: float = 0.2
    """Part of all steps in which `wsd` falls."""
    final_share: float = 0.0
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
    """Seed of the first weights and of the order."""

    def __post_init__(self) -> None:
        """Raise InputError naming every field that is out of range."""
        _refuse(
            [
                (self.epochs < 1, f"epochs: expected 1 or more, got {self.epochs}"),
                (
                    self.batch_tokens < 2,
                    f"batch_tokens: expected 2 or more, got {self.batch_tokens}",
                ),
                (
                    not 0 <= self.micro_batch_tokens <= self.batch_tokens,
                    "micro_batch_tokens: expected 0 to batch_tokens, which is "
                    f"{self.batch_tokens}, got {self.micro_batch_tokens}",
                ),
                (
                    not self.learning_rate > 0,
                    f"learning_rate: expected more than 0, got {self.learning_rate}",
                ),
                (
                    self.schedule not in ("cosine", "wsd", "constant"),
                    f"schedule: expected cosine, wsd or constant, got {self.schedule}",
                ),
                _not_a_share("warmup_share", self.warmup_share),
                _not_a_share("decay_share", self.decay_share),
                (
                    self.warmup_share + self.decay_share > 1,
                    "warmup_share and decay_share: expected at most 1 together, got "
                    f"{self.warmup_share} and {self.decay_share}",
                ),
                _not_a_share("final_share", self.final_share),
                (
                    not self.weight_decay >= 0,
                    f"weight_decay: expected 0 or more, got {self.weight_decay}",
                ),
                _not_below_one("beta1", self.beta1),
                _not_below_one("beta2", self.beta2),
                (not self.grad_clip >= 0, f"grad_clip: expected 0 or more, got {self.grad_clip}"),
                (self.seed < 0, f"seed: expected 0 or more, got {self.seed}"),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OptimizationSettings":
        """Build from plain values; unknown keys are refused."""
        return _from_dict(cls, values)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings:
    """What is read from the store, and how far ahead."""

    held_out_share: float = 0.05
    """Part of the samples kept for evaluation; used only where the store marks none as held
    out."""
    window_units: int = 4
    """Units that are in memory together; samples are mixed and sorted by length within them."""
    read_ahead_units: int = 1
    """Further units that are read while the window is in use."""
    reader_threads: int = 1
    """Threads that read and decode units."""

    def __post_init__(self) -> None:
        """Raise InputError naming every field that is out of range."""
        _refuse(
            [
                (
                    not 0 < self.held_out_share < 1,
                    f"held_out_share: expected between 0 and 1, got {self.held_out_share}",
                ),
                (
                    self.window_units < 1,
                    f"window_units: expected 1 or more, got {self.window_units}",
                ),
                (
                    self.read_ahead_units < 0,
                    f"read_ahead_units: expected 0 or more, got {self.read_ahead_units}",
                ),
                (
                    self.reader_threads < 1,
                    f"reader_threads: expected 1 or more, got {self.reader_threads}",
                ),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StreamSettings":
        """Build from plain values; unknown keys are refused."""
        return _from_dict(cls, values)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """How the frozen head is multiplied."""

    head_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the head's matrix products. `auto`: bfloat16 where the device multiplies it
    natively, else float32. The loss itself is always summed in float32."""
    chunk_tokens: int = 0
    """Supervised positions whose logits exist at one time. 0: 256 on a CPU, where they then stay
    in the cache, and 2,048 on an accelerator."""

    def __post_init__(self) -> None:
        """Raise InputError naming every field that is out of range."""
        _refuse(
            [
                (
                    self.head_dtype not in ("auto", "bfloat16", "float32"),
                    f"head_dtype: expected auto, bfloat16 or float32, got {self.head_dtype}",
                ),
                (
                    self.chunk_tokens < 0,
                    f"chunk_tokens: expected 0 or more, got {self.chunk_tokens}",
                ),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LossSettings":
        """Build from plain values; unknown keys are refused."""
        return _from_dict(cls, values)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Where a run computes, and what it leaves behind."""

    device: str = "auto"
    """`auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    evaluate_every: int = 0
    """Steps between evaluations on the held-out samples. 0: at the end of each epoch. The start
    and the end are always evaluated."""
    evaluate_tokens: int = 65536
    """Held-out tokens, at most, of an evaluation during the run; the last one takes all."""
    checkpoint_every: int = 100
    """Steps between checkpoints. 0: at the end of each epoch."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the last may be the one that a crash cut short."""
    saved_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights in the finished carry-on."""
    log_every: int = 10
    """Steps that a line of `metrics.jsonl` sums up."""

    def __post_init__(self) -> None:
        """Raise InputError naming every field that is out of range."""
        _refuse(
            [
                (
                    self.evaluate_every < 0,
                    f"evaluate_every: expected 0 or more steps, got {self.evaluate_every}",
                ),
                (
                    self.evaluate_tokens < 2,
                    f"evaluate_tokens: expected 2 or more, got {self.evaluate_tokens}",
                ),
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
                (
                    self.saved_dtype not in ("bfloat16", "float32"),
                    f"saved_dtype: expected bfloat16 or float32, got {self.saved_dtype}",
                ),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunSettings":
        """Build from plain values; unknown keys are refused."""
        return _from_dict(cls, values)


def _from_dict(cls: type[_SettingsT], values: Mapping[str, Any]) -> _SettingsT:
    unknown = sorted(set(values) - {item.name for item in fields(cls)})
    if unknown:
        raise InputError(f"{cls.__name__}: unknown setting {', '.join(unknown)}")
    return cls(**values)


def _not_a_share(name: str, value: float) -> tuple[bool, str]:
    return not 0 <= value <= 1, f"{name}: expected 0 to 1, got {value}"


def _not_below_one(name: str, value: float) -> tuple[bool, str]:
    return not 0 <= value < 1, f"{name}: expected 0 or more and below 1, got {value}"


def _refuse(problems: list[tuple[bool, str]]) -> None:
    found = [text for is_wrong, text in problems if is_wrong]
    if found:
        raise InputError("; ".join(found))
