"""The customized model: a frozen base joined to a carry-on, as a transformers model.

The base's own forward pass runs as it is; where its decoder hands the `final` states x to the
head, they become x + alpha * delta. So caps, scales and sliced logits are the base's own, and
with an untrained carry-on, or alpha 0, the logits are the base's bit for bit.

One cache object serves both: the carry-on's layers stand behind the base's, so that whatever
generation does to a cache (reordering beams, cropping) reaches both. Static caches are refused.
Letters: B rows, T positions, D base width, V vocabulary.
"""

import copy
import inspect
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from carryon.cache.base import Base, load_base
from carryon.cache.capture import watch_taps
from carryon.cache.errors import InputError, MissingError, SettingMismatchError
from carryon.cache.spec import ForwardSettings
from carryon.train.carryon import CarryOn, customized_states
from carryon.train.carryon_folder import CarryOnCard, load_carryon, save_carryon

MAX_ALPHA = 10.0
"""Largest strength of a correction; far beyond what is of use."""


class CarryOnForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A base and a carry-on as one causal LM, with `generate`; `alpha` can be set per call."""

    base_model_prefix = "base"
    # The base has been loaded with its attention backend; these only let the config pass.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, base: Base, carryon: CarryOn, card: CarryOnCard) -> None:
        """Join a loaded base and its carry-on, which is moved to the base's device and dtype.

        Raises:
            SettingMismatchError: the carry-on was trained on another base or tokenizer.
            InputError: the architecture generates with a cache of another kind.
        """
        check_same_base(card, base)
        super().__init__(copy.deepcopy(base.model.config))
        accepted = inspect.signature(base.model.forward).parameters
        if "past_key_values" not in accepted:
            raise InputError(
                f"{base.identity.architecture}: expected a base that generates with "
                "past_key_values; this architecture cannot be composed with a carry-on yet"
            )
        self.base: Any = base.model
        self.carryon = _place_carryon_(carryon, base)
        self.card = card
        self.alpha = check_alpha(card.alpha)
        self.tokenizer = base.tokenizer
        self.identity = base.identity
        self.generation_config = copy.deepcopy(base.model.generation_config)
        self._is_stateful = base.model._is_stateful
        self._anatomy = base.anatomy
        self._dropped = {"position_ids", "logits_to_keep"} - set(accepted)
        self.training = False

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        *,
        base: str | Base | None = None,
        forward: ForwardSettings | None = None,
    ) -> "CarryOnForCausalLM":
        """Load a carry-on and the base it belongs to.

        Args:
            folder: a carry-on, as `carryon train` writes it.
            base: a loaded base, or its hub id, folder or .gguf file. None: where the carry-on
                says that its base was.
            forward: how to run the base, where it is not loaded yet. None: the defaults.

        Raises:
            MissingError: there is no carry-on, or its base is not found.
            SettingMismatchError: `base` is not the base that it was trained on.
        """
        carryon, card = load_carryon(folder)
        if not isinstance(base, Base):
            base = _load_own_base(card, base, forward=forward or ForwardSettings(), folder=folder)
        return cls(base, carryon, card)

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]
        """Write the carry-on, in bfloat16; the base's weights are not copied."""
        save_carryon(save_directory, self.carryon, self.card, dtype=torch.bfloat16)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        alpha: float | None = None,
        **inputs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401 -- the output class of the base's architecture
        """Return what the base's forward pass returns, its logits corrected.

        Args:
            input_ids: [B, T] int64, padded on either side.
            attention_mask: [B, T_all] 1 where a token is real, the cached ones included.
            position_ids: [B, T].
            past_key_values: what an earlier call returned; it is extended.
            logits_to_keep: as in transformers.
            alpha: strength of the correction. None: the model's own `alpha`.
            inputs: anything else the base's forward pass takes.

        Raises:
            InputError: alpha out of range; a mask or cache that cannot be shared.
        """
        strength = self.alpha if alpha is None else check_alpha(alpha)
        named = {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        inputs |= {key: value for key, value in named.items() if key not in self._dropped}
        inputs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "return_dict": True,
        }
        if strength == 0:
            return self.base(**inputs)
        if past_key_values is not None:
            self._check_cache(past_key_values)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise InputError(
                "attention_mask: expected 0 and 1 for each token, [B, T], got "
                f"{attention_mask.ndim} dimensions"
            )

        states: dict[str, Tensor] = {}
        thread = threading.get_ident()  # others may run the same base at the same time

        def correct(module: nn.Module, args: tuple[object, ...], output: Any) -> None:  # noqa: ANN401
            if threading.get_ident() != thread:
                return
            final = output.last_hidden_state  # [B, T, D]
            cache = output.get("past_key_values")
            delta = self.carryon(
                states | {"final": final},
                position_ids=position_ids,
                attention_mask=attention_mask,
                past_key_values=None if cache is None else self._carryon_cache(cache),
            )
            corrected = customized_states(final, delta, alpha=strength)
            output["last_hidden_state"] = corrected.to(final.dtype)

        taps = [tap for tap in self.carryon.settings.taps if tap != "final"]
        with (
            watch_taps(self._anatomy, taps, states.__setitem__),
            self._anatomy.decoder.register_forward_hook(correct),
        ):
            return self.base(**inputs)

    def prepare_inputs_for_generation(
        self,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        """Return a step's inputs as the base's own architecture prepares them."""
        prepared: dict[str, Any] = self.base.prepare_inputs_for_generation(*args, **kwargs)
        return prepared

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Answer transformers for the base, whose mixture of experts it may switch."""
        return True

    def _carryon_cache(self, cache: Cache) -> Cache:
        """Return the carry-on's part of `cache` as a cache of its own, sharing the layers."""
        layers = [layer for layer in cache.layers if isinstance(layer, _CarryOnLayer)]
        if not layers:
            make: Any = _CarryOnLayer
            layers = [make() for _ in range(self.carryon.settings.blocks)]
            cache.layers.extend(layers)
        return Cache(layers=list(layers))

    def _check_cache(self, cache: Cache) -> None:
        if any(layer.is_compileable for layer in cache.layers):
            raise InputError(
                "past_key_values: expected a cache that grows, got a static one; leave out "
                "cache_implementation"
            )
        seen = [layer for layer in cache.layers if isinstance(layer, _CarryOnLayer)]
        num_seen = seen[0].get_seq_length() if seen else 0
        if num_seen != cache.get_seq_length():
            raise InputError(
                f"past_key_values: expected {cache.get_seq_length()} tokens seen by the carry-on "
                f"as by the base, got {num_seen}; start a cache with the alpha it goes on with, "
                "as alpha 0 leaves the carry-on out"
            )


class _CarryOnLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer of the carry-on's body, told apart by its class from those of the base."""


def check_alpha(alpha: float) -> float:
    """Return `alpha`.

    Raises:
        InputError: it is no number from 0 to MAX_ALPHA.
    """
    if not 0 <= alpha <= MAX_ALPHA:
        raise InputError(f"alpha: expected 0 to {MAX_ALPHA:g}, got {alpha}")
    return float(alpha)


def check_same_base(card: CarryOnCard, base: Base) -> None:
    """Refuse a base that the carry-on was not trained on.

    Raises:
        SettingMismatchError: weights or tokenizer differ; names both digests.
    """
    found = base.identity.to_dict()
    for key, name in (("weights_sha256", "weights"), ("tokenizer_sha256", "tokenizer")):
        if card.base.get(key) != found[key]:
            raise SettingMismatchError(
                f"base {base.source}: expected the {name} of {card.base.get('id')}, which the "
                f"carry-on was trained on ({str(card.base.get(key))[:12]}), got another "
                f"({found[key][:12]}); give the base it belongs to"
            )


def _load_own_base(
    card: CarryOnCard, source: str | None, *, forward: ForwardSettings, folder: str | Path
) -> Base:
    if source is not None:
        return load_base(source, forward=forward)
    name, revision = card.base["id"], card.base.get("revision")
    try:
        return load_base(f"{name}@{revision}" if revision else name, forward=forward)
    except MissingError as error:
        raise MissingError(
            f"{folder}: the base it was trained on was not found; say where it is now with base. "
            f"{error}"
        ) from error


def _place_carryon_(carryon: CarryOn, base: Base) -> CarryOn:
    """Move the carry-on to the base; only its weights take the base's dtype.

    The rotary frequencies are a buffer and stay float32: bfloat16 rounds positions.
    """
    carryon.to(base.device).eval().requires_grad_(False)
    for weight in carryon.parameters():
        weight.data = weight.data.to(base.compute_dtype)
    return carryon
