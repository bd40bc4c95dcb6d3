"""Gate for each token that mixes the anchor's distribution with projected ones.

    log p(target) = log sum_s g_s p_s(target),   g = softmax(bias + W_2 silu(W_1 x))

Source 0 is the anchor, or its carry-on; x joins the reduced states and the features of the
projections. The bias begins at the best constant shares, so that an untrained gate is not worse
than the better source. Letters: n positions, S projected sources, F features of a source.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from carryon.train.mixing.projection import FEATURES

STATE_WIDTH, HIDDEN_WIDTH = 32, 64
"""About 24,000 weights at an anchor's width of 576 and one source without its states."""
LEAST_SHARE = 0.02
"""Of a source at the start: with less its gate would hardly learn."""
_ITERATIONS = 50


class Gate(nn.Module):
    """The gate's weights: a projection of each state, and one hidden layer."""

    def __init__(
        self,
        *,
        anchor_width: int,
        source_widths: Sequence[int],
        num_sources: int,
        shares: Tensor,
        seed: int,
    ) -> None:
        """Make a gate whose shares are constant until it is trained.

        Args:
            anchor_width: width of the anchor's states.
            source_widths: widths of the sources' states; empty: it does not read them.
            num_sources: S.
            shares: [1 + S] at the start, of `initial_shares`.
            seed: of the other weights.
        """
        super().__init__()
        if len(shares) != 1 + num_sources:
            raise ValueError(f"expected {1 + num_sources} shares, got {len(shares)}")
        widths = [anchor_width, *source_widths]
        self.states = nn.ModuleList(nn.Linear(width, STATE_WIDTH, bias=False) for width in widths)
        joined = STATE_WIDTH * len(widths) + len(FEATURES) * num_sources
        self.hidden = nn.Linear(joined, HIDDEN_WIDTH)
        self.out = nn.Linear(HIDDEN_WIDTH, 1 + num_sources)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (*self.states, self.hidden):
                weight = layer.weight
                assert isinstance(weight, Tensor)
                weight.normal_(std=weight.shape[1] ** -0.5, generator=random)
            self.hidden.bias.zero_()
            self.out.weight.zero_()
            self.out.bias.copy_(shares.log())

    def forward(
        self, anchor_states: Tensor, features: Tensor, source_states: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return the gate's logits, [n, 1 + S] float32.

        Args:
            anchor_states: [n, anchor_width].
            features: [n, S, F] of the projections.
            source_states: [n, width] of each source that the gate reads.
        """
        reduced = [
            layer(_normed(states))
            for layer, states in zip(self.states, [anchor_states, *source_states], strict=True)
        ]
        joined = torch.cat([*reduced, features.flatten(1).float()], dim=1)
        logits: Tensor = self.out(nn.functional.silu(self.hidden(joined)))
        return logits.float()


def _normed(states: Tensor) -> Tensor:
    """Return states of root mean square 1."""
    return nn.functional.rms_norm(states.float(), states.shape[-1:], eps=1e-6)


def initial_shares(log_probs: Tensor) -> Tensor:
    """Return the constant shares under which targets are likeliest, [1 + S] float32 of sum 1.

    Expectation maximization; each share is at least LEAST_SHARE.

    Args:
        log_probs: [n, 1 + S] of the targets, anchor first.
    """
    logs = log_probs.double()
    num_sources = logs.shape[1]
    shares = torch.full((num_sources,), 1 / num_sources, dtype=torch.float64, device=logs.device)
    for _ in range(_ITERATIONS if len(logs) else 0):
        shares = torch.softmax(shares.clamp_min(1e-12).log() + logs, dim=1).mean(dim=0)
    shares = shares.clamp_min(LEAST_SHARE)
    return (shares / shares.sum()).float()


def mixture_log_probs(gate_logits: Tensor, anchor: Tensor, sources: Tensor) -> Tensor:
    """Return log sum_s g_s p_s of the targets, [n]; minus its mean is the loss.

    Gradients reach the gate and the anchor's log-probabilities, whose gradient is the anchor's
    share of the target (`target_shares`), never the cached ones.

    Args:
        gate_logits: [n, 1 + S].
        anchor: [n] log-probabilities of the targets by the anchor with its carry-on.
        sources: [n, S] projected log-probabilities; -inf is no loss as long as one is finite.
    """
    log_parts = _log_parts(gate_logits, anchor, sources)
    return torch.logsumexp(log_parts, dim=1)


@torch.no_grad()
def mixture_distribution(gate_logits: Tensor, anchor: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """Return log sum_s g_s p_s of all tokens, [n, V] float32.

    Args:
        gate_logits: [n, 1 + S].
        anchor: [n, V] log-probabilities by the anchor with its carry-on.
        sources: S times [n, V] log-probabilities.
    """
    log_gate = torch.log_softmax(gate_logits, dim=1)
    mixed = anchor.float() + log_gate[:, :1]
    for number, source in enumerate(sources, 1):
        mixed = torch.logaddexp(mixed, source + log_gate[:, number : number + 1])
    return mixed


@torch.no_grad()
def target_shares(gate_logits: Tensor, anchor: Tensor, sources: Tensor) -> Tensor:
    """Return which part of the target's probability is of which source, [n, 1 + S], of sum 1.

    Arguments are those of `mixture_log_probs`. Column 0 is the gradient of the mixture's
    log-probability to the anchor's: the weight of a position in a loss that makes its gradient in
    the forward pass.
    """
    return torch.softmax(_log_parts(gate_logits, anchor, sources), dim=1)


def _log_parts(gate_logits: Tensor, anchor: Tensor, sources: Tensor) -> Tensor:
    logs = torch.cat([anchor.unsqueeze(1), sources.detach().to(anchor)], dim=1)
    return torch.log_softmax(gate_logits, dim=1) + logs
