"""What a finished run came to."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """The figures of a run; `RUN/result.json` holds them."""

    out: str
    """The run folder."""
    carryon: str
    """Folder of the finished carry-on."""
    num_parameters: int
    """Trained values."""
    carryon_bytes: int
    """Size of the carry-on's weights as saved."""
    num_steps: int
    """Steps taken."""
    num_tokens: int
    """Tokens trained on, all epochs."""
    num_targets: int
    """Supervised tokens trained on, all epochs."""
    train_s: float
    """Seconds of steps, without evaluations and checkpoints."""
    tokens_per_second: float
    """num_tokens / train_s."""
    data_wait_share: float
    """Part of train_s spent waiting for data."""
    held_out_samples: int
    """Samples kept for evaluation."""
    held_out_targets: int
    """Their supervised tokens."""
    base_nll: float
    """Of the held-out samples, in nats per supervised token."""
    carryon_nll: float
    """The same with the carry-on, weights rounded as saved."""
    base_perplexity: float
    """exp(base_nll)."""
    carryon_perplexity: float
    """exp(carryon_nll)."""
    held_out_overlap: float
    """Share of the held-out targets whose last 32 tokens stand in the training half too."""
    finished_with_step: int
    """Step whose weights the carry-on has: the last, or the one with the best held-out loss."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)
