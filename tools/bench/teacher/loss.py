"""Cross-entropy beside the distance from a teacher's distribution, in plain torch.

Letters: M supervised positions, n some of them, D base width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from carryon.train.losses.frozen_head import FrozenHead

CHUNK = 128
"""Positions whose logits exist at one time: 78 MB of them for a vocabulary of 152,000."""
LogProbs = Callable[[slice], Tensor]
"""Gives a teacher's log-probabilities at some of the positions, [n, V] float32."""


def backpropagate(
    states_MD: Tensor,
    targets_M: Tensor,
    teacher: LogProbs | None,
    *,
    head: FrozenHead,
    weight: float,
    temperature: float,
    divisor: int,
) -> tuple[float, float]:
    """Add the gradient of the loss to what `states_MD` were computed from.

    The loss is the sum over positions, divided by `divisor`, of
    (1 - weight) * CE + weight * temperature^2 * KL(teacher || student), both at the temperature.

    Args:
        states_MD: float32, with a graph.
        targets_M: int64 token ids.
        teacher: None: the loss is the cross-entropy alone.
        head: of the student, in float32.
        weight: 0 to 1, of the teacher.
        temperature: of the distributions that are compared.
        divisor: targets of the step.

    Returns:
        The sums of CE and of KL, in nats; without a teacher the latter is 0.
    """
    leaf = states_MD.detach().requires_grad_()
    entropy = distance = 0.0
    for first in range(0, len(leaf), CHUNK):
        part = slice(first, first + CHUNK)
        logits = head_logits(leaf[part], head)
        loss = functional.cross_entropy(logits, targets_M[part], reduction="sum")
        entropy += float(loss.detach())
        if teacher is not None:
            divergence = divergences(teacher(part).to(logits.device), logits, temperature).sum()
            distance += float(divergence.detach())
            loss = (1 - weight) * loss + weight * temperature**2 * divergence
        (loss / divisor).backward()  # type: ignore[no-untyped-call]
    if leaf.grad is not None:
        states_MD.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return entropy, distance


def divergences(teacher_nV: Tensor, logits_nV: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) at each position at a temperature, [n], in nats.

    Args:
        teacher_nV: log-probabilities; what rounding left of their sum is scaled away.
        logits_nV: of the student.
        temperature: divides both.
    """
    teacher = functional.log_softmax(teacher_nV / temperature, dim=1)
    student = functional.log_softmax(logits_nV / temperature, dim=1)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def head_logits(states_nD: Tensor, head: FrozenHead) -> Tensor:
    """Return the logits of a head in float32, [n, V], differentiable in the states."""
    logits = functional.linear(states_nD, head.weight, head.bias)
    if head.logit_scale != 1:
        logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
