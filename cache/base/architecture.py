"""The parts of a causal LM: its blocks, its final norm and its head.

Found by structure and checked by a small forward pass, not by a list of architectures. A base
that does anything else between its hidden states and its logits is refused.
Letters: P rows, T positions, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from carryon.cache.base.lm_head import FinalNorm
from carryon.cache.base.placement import copy_alone, input_device
from carryon.cache.base.pretrained import PreTrainedModel
from carryon.cache.errors import InputError

_PROBE_TOKENS = 8
_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps")
_SCALE_NAMES = ("logit_scale", "lm_head_multiplier")
_CAP_NAMES = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_NORM_KINDS: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")


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
    """Multiplies the head's output."""
    softcap: float | None
    """Soft limit of the scaled logits, or None."""


def get_architecture(model: PreTrainedModel) -> Architecture:
    """Return the parts of `model`, checked by running it on a few tokens.

    Raises:
        InputError: the model is not causal, or a store cannot reproduce its logits.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    untyped: Any = model
    head, decoder = untyped.get_output_embeddings(), untyped.get_decoder()
    if not isinstance(head, nn.Linear) or decoder is None or decoder is model:
        raise _refusal(name, "expected a decoder with a linear head on top, got another structure")
    children = list(decoder.children())
    lists = [child for child in children if isinstance(child, nn.ModuleList)]
    blocks = next((each for each in lists if len(each) == config.num_hidden_layers), None)
    if blocks is None:
        raise _refusal(name, f"expected a list of {config.num_hidden_layers} blocks, got none")

    passed, logits = _run_once(model, [*children, blocks[-1], decoder, head])
    _check_finite(model, logits)
    if not {decoder, head, blocks[-1]} <= passed.keys():
        raise _refusal(name, "the decoder or the head is not called as expected")
    read = passed[head].entering
    called = [child for child in children if child in passed]
    norm = next((child for child in called if _is_same(passed[child].leaving, read)), None)
    if norm is None or not _is_same(passed[decoder].leaving, read):
        raise _refusal(name, "the head does not read the output of a final norm")
    if not _is_same(passed[norm].entering, passed[blocks[-1]].leaving):
        raise _refusal(name, "the final norm does not read the output of the last block")
    scale, softcap = _fit_logits(config, passed[head].leaving, logits)
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
    exact = copy_alone(norm).to(device="cpu", dtype=torch.float32)
    weight: Tensor | None = getattr(exact, "weight", None)
    bias: Tensor | None = getattr(exact, "bias", None)
    eps = next((getattr(exact, key) for key in _EPS_NAMES if hasattr(exact, key)), 0.0)
    scales = torch.tensor([0.001, 0.01, 0.1, 1.0, 10.0, 100.0])  # small rows show a wrong eps
    states = torch.randn(6, width, generator=torch.Generator().manual_seed(0)) + 0.5
    states = states * scales[:, None]
    with torch.inference_mode():
        expected = exact(states)
    for kind, offset in product(_NORM_KINDS, (0.0, 1.0)):
        candidate = FinalNorm(
            kind=kind,
            eps=float(eps),
            weight_offset=offset,
            weight=(torch.ones(width) if weight is None else weight.detach()).numpy(),
            bias=None if bias is None else bias.detach().numpy(),
        )
        if _relative_error(torch.from_numpy(candidate.apply(states.numpy())), expected) < 1e-4:
            return candidate
    raise _refusal(type(norm).__name__, "the final norm is neither an RMS norm nor a layer norm")


class _Passed(NamedTuple):
    """First input and output of a module in one forward pass, [1, T, ...] each."""

    entering: Tensor
    leaving: Tensor


def _run_once(
    model: PreTrainedModel, modules: Sequence[nn.Module]
) -> tuple[dict[nn.Module, _Passed], Tensor]:
    """Return what passed through each module that returned a tensor, and the model's logits."""
    passed: dict[nn.Module, _Passed] = {}

    def record(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        leaving = first_tensor(output)
        if leaving is not None:
            entering = args[0] if args and isinstance(args[0], Tensor) else leaving[:0]
            passed[module] = _Passed(entering, leaving)

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        with torch.inference_mode():
            logits = model(input_ids=_probe_tokens(model), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return passed, logits


def _check_finite(model: PreTrainedModel, logits: Tensor) -> None:
    """Refuse a base whose weights are not finite, before its architecture is blamed."""
    if bool(torch.isfinite(logits).all()):
        return
    name = type(model).__name__
    for path, weight in model.state_dict().items():
        is_held = weight.is_floating_point() and not weight.is_meta
        if is_held and not bool(torch.isfinite(weight.float()).all()):
            raise InputError(
                f"{name}: expected finite weights, got NaN or infinity in {path}. Fix: download "
                "or save the base again"
            )
    raise InputError(
        f"{name}: expected finite logits, got NaN or infinity from finite weights in "
        f"{logits.dtype}. Fix: --compute-dtype float32"
    )


def first_tensor(output: object) -> Tensor | None:
    """Return a module's output tensor, or the first of its output tuple; None if there is none."""
    if isinstance(output, ModelOutput):
        output = output.to_tuple()
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _fit_logits(config: Any, scores: Tensor, logits: Tensor) -> tuple[float, float | None]:  # noqa: ANN401
    """Return scale and soft cap between the head's output and the logits.

    Configs name the scale differently, and one name means a factor in one architecture and a
    divisor in another, so the forward pass decides among the values in the config.
    """
    scales = [float(value) for key in _SCALE_NAMES if (value := getattr(config, key, None))]
    if divisor := getattr(config, "logits_scaling", None):
        scales += [1.0 / divisor, float(divisor)]
    caps = [float(value) for key in _CAP_NAMES if (value := getattr(config, key, None))]
    if scores.shape == logits.shape:
        pairs = list(product([*scales, 1.0], [*caps, None]))
        errors = [_relative_error(_limit(scores * scale, cap), logits) for scale, cap in pairs]
        best = errors.index(min(errors))
        if errors[best] < _tolerance(scores.dtype):
            return pairs[best]
    raise _refusal(
        type(config).__name__,
        "a step between the hidden state and the logits is neither a scale nor a soft cap",
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
    return tokens.to(input_device(model))


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.equal(first, second.to(first.device)))


def _relative_error(got: Tensor, expected: Tensor) -> float:
    expected = expected.float()
    error = got.float().to(expected.device) - expected  # of a base on several devices
    return float(error.norm() / expected.norm().clamp_min(1e-20))


def _tolerance(dtype: torch.dtype) -> float:
    """Return the error that rounding may cause: a few units in the last place of `dtype`."""
    return 8 * torch.finfo(dtype).eps


def _refusal(name: str, reason: str) -> InputError:
    return InputError(f"{name}: {reason}; this architecture cannot be a base yet")
