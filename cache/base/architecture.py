"""Where an architecture keeps its blocks, its final norm and its head.

Found by structure and proved by a small forward pass, not by a list of architectures: whatever
`Architecture` says is what the base was seen to do. A base that does something else between its
hidden states and its logits is refused. Letters: P rows, T positions, D width, V vocabulary.
"""

import copy
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from carryon.cache.base.lm_head import FinalNorm
from carryon.cache.errors import InputError

_PROBE_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The parts of a causal LM, with logits = cap(logit_scale * head(norm(last block)))."""

    decoder: nn.Module
    """Everything but the head: token ids to `final` states."""
    blocks: nn.ModuleList
    """The blocks, first to last."""
    norm: nn.Module
    """The final norm; a direct child of `decoder`."""
    head: nn.Linear
    """[V, D], with or without bias."""
    logit_scale: float
    """Multiplies what the head gives."""
    softcap: float | None
    """Soft limit of the scaled logits, or None."""


def get_architecture(model: PreTrainedModel) -> Architecture:
    """Return the parts of `model`, proved by running it on a few tokens.

    Raises:
        InputError: the model is not causal, or is built in a way that a store cannot carry.
    """
    name = type(model).__name__
    untyped: Any = model
    head, decoder = untyped.get_output_embeddings(), untyped.get_decoder()
    if not isinstance(head, nn.Linear) or decoder is None or decoder is model:
        raise _refusal(name, "expected a decoder with a linear head on top, found another build")
    blocks = _find_blocks(decoder, num_layers=model.config.get_text_config().num_hidden_layers)
    if blocks is None:
        raise _refusal(name, "no list of decoder blocks was found")

    seen = _run_once(model, decoder=decoder, blocks=blocks, head=head)
    norm = next((child for child, out in seen.leaving.items() if _is_same(out, seen.read)), None)
    if norm is None or not _is_same(seen.final, seen.read):
        raise _refusal(name, "what the head reads does not come straight from a final norm")
    if not _is_same(seen.entering[norm], seen.last):
        raise _refusal(name, "something stands between the last block and the final norm")
    scale, softcap = _fit_logits(model.config.get_text_config(), seen.scores, seen.logits)
    _check_causal(model, decoder)
    return Architecture(
        decoder=decoder,
        blocks=blocks,
        norm=norm,
        head=head,
        logit_scale=scale,
        softcap=softcap,
    )


def read_norm(norm: nn.Module, *, width: int) -> FinalNorm:
    """Return the final norm as numpy values, compared with the module on random states.

    Raises:
        InputError: the module is neither an RMS norm nor a layer norm.
    """
    exact = copy.deepcopy(norm).to(device="cpu", dtype=torch.float32)
    weight = getattr(exact, "weight", None)
    bias = getattr(exact, "bias", None)
    eps = next((getattr(exact, key) for key in _EPS_NAMES if hasattr(exact, key)), 0.0)
    scales = torch.tensor([0.001, 0.01, 0.1, 1.0, 10.0, 100.0])  # small rows show a wrong eps
    states = torch.randn(6, width, generator=torch.Generator().manual_seed(0)) + 0.5
    states = states * scales[:, None]
    with torch.inference_mode():
        expected = exact(states).numpy()
    for kind, offset in product(("rms", "layer"), (0.0, 1.0)):
        candidate = FinalNorm(
            kind="rms" if kind == "rms" else "layer",
            eps=float(eps),
            weight_offset=offset,
            weight=np.ones(width, np.float32) if weight is None else _to_float32(weight),
            bias=None if bias is None else _to_float32(bias),
        )
        if _relative_error(torch.from_numpy(candidate.apply(states.numpy())), expected) < 1e-4:
            return candidate
    raise _refusal(type(norm).__name__, "the final norm is neither an RMS norm nor a layer norm")


_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What passed through the parts of a model in one forward pass; all [1, T, ...]."""

    entering: dict[nn.Module, Tensor]  # direct children of the decoder: their input
    leaving: dict[nn.Module, Tensor]  # and their output
    last: Tensor  # output of the last block
    final: Tensor  # output of the decoder
    read: Tensor  # input of the head
    scores: Tensor  # output of the head
    logits: Tensor  # output of the model


def _run_once(
    model: PreTrainedModel, *, decoder: nn.Module, blocks: nn.ModuleList, head: nn.Linear
) -> _Seen:
    entering: dict[nn.Module, Tensor] = {}
    leaving: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        found = first_tensor(output)
        if found is not None:
            leaving[module] = found
            entering[module] = args[0] if args and isinstance(args[0], Tensor) else found[:0]

    children = [child for child in decoder.children() if not isinstance(child, nn.ModuleList)]
    watched = [*children, blocks[-1], decoder, head]
    hooks = [module.register_forward_hook(record) for module in watched]
    try:
        with torch.inference_mode():
            logits = model(input_ids=_probe_tokens(model), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not {decoder, head, blocks[-1]} <= leaving.keys():
        raise _refusal(type(model).__name__, "the decoder or the head is not called as expected")
    return _Seen(
        entering=entering,
        leaving={child: leaving[child] for child in children if child in leaving},
        last=leaving[blocks[-1]],
        final=leaving[decoder],
        read=entering[head],
        scores=leaving[head],
        logits=logits,
    )


def first_tensor(output: object) -> Tensor | None:
    """Return the hidden state among what a module returned: the tensor, or a tuple's first."""
    if isinstance(output, ModelOutput):
        output = output.to_tuple()
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _find_blocks(decoder: nn.Module, *, num_layers: int) -> nn.ModuleList | None:
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return next((found for found in lists if len(found) == num_layers), None)


def _fit_logits(config: Any, scores: Tensor, logits: Tensor) -> tuple[float, float | None]:  # noqa: ANN401
    """Return the scale and the cap that lead from the head's output to the logits.

    Configs name the scale differently, and one name means a factor in one architecture and a
    divisor in another, so the forward pass decides among what the config offers.
    """
    named = [getattr(config, key, None) for key in ("logit_scale", "lm_head_multiplier")]
    divisor = getattr(config, "logits_scaling", None)
    scales = [float(value) for value in named if value]
    scales += [1.0 / divisor, float(divisor)] if divisor else []
    cap_names = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
    caps = [float(value) for key in cap_names if (value := getattr(config, key, None))]
    if scores.shape == logits.shape:
        pairs = list(product([*scales, 1.0], [*caps, None]))
        errors = [_relative_error(_limit(scores * scale, cap), logits) for scale, cap in pairs]
        best = errors.index(min(errors))
        if errors[best] < _tolerance(scores.dtype):
            return pairs[best]
    raise _refusal(
        type(config).__name__,
        "something is done between the hidden state and the logits that a store cannot carry",
    )


def _limit(scores: Tensor, cap: float | None) -> Tensor:
    scores = scores.float()
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _check_causal(model: PreTrainedModel, decoder: nn.Module) -> None:
    """Refuse a base whose states at a position change with the tokens after it."""
    tokens = _probe_tokens(model)
    kept = _PROBE_TOKENS // 2
    changed = tokens.clone()
    changed[:, kept:] = tokens[:, kept:].flip(1).roll(1, dims=1)
    with torch.inference_mode():
        first = decoder(input_ids=tokens, use_cache=False)[0][:, :kept]
        second = decoder(input_ids=changed, use_cache=False)[0][:, :kept]
    if _relative_error(first, second) > 4 * _tolerance(first.dtype):
        raise InputError(
            f"{type(model).__name__}: expected a causal LM, but the hidden state of a token "
            "changes with the tokens after it; use a base that generates text"
        )


def _probe_tokens(model: PreTrainedModel) -> Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab_size, (1, _PROBE_TOKENS), generator=generator)
    return tokens.to(model.device)


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.equal(first, second))


def _relative_error(got: Tensor, expected: Any) -> float:  # noqa: ANN401 -- tensor or array
    expected = torch.as_tensor(expected).float()
    return float((got.float() - expected).norm() / expected.norm().clamp_min(1e-20))


def _tolerance(dtype: torch.dtype) -> float:
    """Return what rounding alone may do: a few units in the last place of `dtype`."""
    return 8 * torch.finfo(dtype).eps


def _to_float32(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return tensor.detach().float().cpu().numpy()


def _refusal(name: str, reason: str) -> InputError:
    return InputError(f"{name}: {reason}; this architecture cannot be a base yet")
