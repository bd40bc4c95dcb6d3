"""The customized model: a frozen base with carry-ons, as a transformers model.

The base's own forward pass runs; a hook replaces the `final` states x that its head reads by
x + alpha * delta. Logit caps, scales and slices are therefore the base's. With an untrained
carry-on, or alpha 0, the logits are the base's bit for bit. Rows of one batch may have different
carry-ons, or none: the base runs once for all of them.

One cache object serves base and carry-ons, whose layers follow the base's. What generation does to
a cache (reordering beams, cropping) so reaches both. Static caches are refused.
Letters: B rows, T positions, D base width.
"""

import copy
import inspect
import logging
from collections.abc import Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor
from transformers import Cache, GenerationMixin

from carryon.cache.base.hooks import contiguous_head_input
from carryon.cache.base.model import Base, load_base
from carryon.cache.base.placement import is_spread, output_device
from carryon.cache.base.pretrained import PreTrainedModel
from carryon.cache.checked_settings import apply_options
from carryon.cache.device import attention_of_any_shape
from carryon.cache.errors import InputError
from carryon.cache.format.framing import Framing
from carryon.cache.settings import ForwardSettings
from carryon.train.inference.adapters import DEFAULT, Alpha, CarryOnSet, Names
from carryon.train.inference.correction import correcting, get_correction
from carryon.train.inference.generate import answer_all
from carryon.train.inference.generate_settings import ChatChoice, GenerateSettings
from carryon.train.inference.merge import load_own_base, merge_in_memory
from carryon.train.inference.prompts import Prompt, framing_warnings
from carryon.train.kinds import get_kind
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.carryon import CarryOn
from carryon.train.modules.serialization import (
    locate_carryon,
    read_card,
    read_weights,
    write_carryon_files,
)

logger = logging.getLogger(__name__)


class CarryOnForCausalLM(ModelHubMixin, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A base and its carry-ons as one causal LM, with `answer` and `generate`.

    Each call can choose the carry-on of each row, and its strength. `save_pretrained` and
    `push_to_hub` come from huggingface_hub's mixin and write one carry-on, never the base.

    Example:
        model = CarryOnForCausalLM.from_pretrained("run/carryon")
        print(model.answer("Tom has 3 apples and eats 1. And now?", max_new_tokens=50))
    """

    base_model_prefix = "base"
    # The base was loaded with its attention backend; these only let its config pass.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # A hub counts downloads of this config.json. Without it the mixin would copy the base into it.
    _hub_mixin_config = {"model_type": "carryon"}  # noqa: RUF012

    def __init__(
        self, base: Base, carryon: CarryOn | None = None, card: CarryOnCard | None = None
    ) -> None:
        """Join a loaded base and, if given, the carry-on that rows use by default.

        Raises:
            SettingMismatchError: the carry-on was trained on another base or tokenizer.
            InputError: the architecture generates without past_key_values.
        """
        carryons = CarryOnSet(base.identity.to_dict())
        if carryon is not None:
            assert card is not None, "expected the card of the carry-on"
            carryons.put(DEFAULT, carryon.state_dict(), card)
        super().__init__(copy.deepcopy(base.model.config))
        accepted = inspect.signature(base.model.forward).parameters
        if "past_key_values" not in accepted:
            raise InputError(
                f"{base.identity.architecture}: expected a base that generates with "
                "past_key_values; carry-ons on this architecture are not supported yet"
            )
        self.base: Any = base.model
        self.carryons = carryons
        self.tokenizer = base.tokenizer
        self.identity = base.identity
        self.generation_config = copy.deepcopy(base.model.generation_config)
        self._is_stateful = base.model._is_stateful
        self._architecture = base.architecture
        self._compute_dtype = base.compute_dtype
        # Of a base that is spread over devices, that of its token ids, and of its last states.
        self._input_device = base.device if is_spread(base.model) else None
        self._final_device = output_device(base.model, base.architecture.norm)
        self._framing = Framing()
        self._warnings: set[str] = set()  # logged once
        self._optional = {"position_ids", "logits_to_keep"} & set(accepted)
        self.training = False

    @classmethod
    def from_base(
        cls,
        base: str | Path | Base,
        *,
        forward: ForwardSettings | None = None,
        **options: Any,  # noqa: ANN401
    ) -> "CarryOnForCausalLM":
        """Return a base without any carry-on; `add_carryon` loads them.

        Args:
            base: a loaded base, or its hub id, folder or .gguf file.
            forward: how to load and run the base. None: the defaults.
            options: fields of `forward` by name, such as `device="cpu"`.
        """
        [forward] = apply_options(options, forward or ForwardSettings())
        if not isinstance(base, Base):
            base = load_base(str(base), forward=forward)
        return cls(base)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        *,
        base: str | Path | Base | None = None,
        mix: Sequence[str | Path | Base] = (),
        mix_device: Sequence[str] = (),
        forward: ForwardSettings | None = None,
        **options: Any,  # noqa: ANN401
    ) -> "CarryOnForCausalLM":
        """Load a carry-on and its base; a mixture is a MixedForCausalLM.

        A `native` or `top` is merged into the base in memory: `base` is then the customized
        model, without carry-ons, and alpha has no effect.

        Args:
            folder: a carry-on, as `carryon train` writes it, or its id on the hub.
            base: a loaded base, or its hub id, folder or .gguf file. None: where it was at
                extraction.
            mix: the other bases of a mixture, in the order of its card. Empty: where they were at
                extraction.
            mix_device: device of each of them, or one for all. Empty: that of the base.
            forward: how to load and run the bases. None: the defaults.
            options: fields of `forward` by name, such as `device="cpu"`, or options of
                huggingface_hub: revision, token, cache_dir, ...

        Raises:
            MissingError: there is no carry-on, or its base is not found.
            SettingMismatchError: it was trained on another base than `base`.
        """
        names = {item.name for item in fields(ForwardSettings)} & set(options)
        own = {name: options.pop(name) for name in names}
        [forward] = apply_options(own, forward or ForwardSettings())
        place = locate_carryon(folder, **options)
        card = read_card(place, allow_mixture=True)
        if card.mixture or mix or mix_device:
            from carryon.train.inference.mixing.modeling import load_mixed  # is built on this one

            return load_mixed(
                place, card, base, mix=mix, mix_device=mix_device, forward=forward, where=folder
            )
        loaded = load_own_base(card, base, forward=forward, folder=folder)
        if get_kind(card.settings.get("kind", "bottleneck")).merges:
            merged = cls(merge_in_memory(place, loaded, is_shared=loaded is base))
            merged._framing = Framing.from_dict(card.framing)
            return merged
        customized = cls(loaded)
        customized.add_carryon(DEFAULT, place)
        return customized

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the default carry-on in bfloat16, without the base's weights."""
        own = self.carryons.get(DEFAULT)
        write_carryon_files(save_directory, own.weights, own.card, dtype=torch.bfloat16)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:  # type: ignore[override]  # noqa: ANN401
        """Upload the default carry-on, without paths of this machine; return the commit's URL.

        Arguments are those of huggingface_hub's mixin: private, token, branch, ...
        """
        own = self.carryons.get(DEFAULT)
        shared = copy.copy(self)
        shared.carryons = CarryOnSet(self.identity.to_dict())
        shared.carryons.put(DEFAULT, own.weights, own.card.without_paths())
        return str(ModelHubMixin.push_to_hub(shared, repo_id, **settings))

    @property
    def device(self) -> torch.device:
        """Where token ids are read."""
        device: torch.device = self._input_device or super().device
        return device

    @property
    def shares_prompts(self) -> bool:
        """Whether what prompts share may be read once: the base is told each token's position."""
        return "position_ids" in self._optional

    @property
    def alpha(self) -> float:
        """Strength of the default carry-on in calls that give none; 0 without one."""
        return self.carryons.get(DEFAULT).card.alpha if DEFAULT in self.carryons.names else 0.0

    def add_carryon(self, name: str, folder: str | Path, **download: Any) -> None:  # noqa: ANN401
        """Load a carry-on under `name`, replacing one of that name; `default` serves unnamed rows.

        Args:
            name: any text.
            folder: a carry-on, or its id on the hub.
            download: options of huggingface_hub, as in `from_pretrained`.

        Raises:
            MissingError: there is no carry-on.
            SettingMismatchError: it was trained on another base or tokenizer.
        """
        place = locate_carryon(folder, **download)
        card = read_card(place)
        self.carryons.put(name, read_weights(place), card, where=str(place))

    def drop_carryon(self, name: str) -> None:
        """Unload the carry-on `name`; batches that use it are finished with it.

        Raises:
            InputError: none has that name.
        """
        self.carryons.drop(name)

    def answer(
        self,
        prompts: str | Sequence[str],
        *,
        settings: GenerateSettings | None = None,
        alpha: float | None = None,
        carryons: Sequence[str | None] | None = None,
        batch_rows: int = 16,
        streamer: Any = None,  # noqa: ANN401 -- a streamer of transformers
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401 -- a text for a text, a list for a list
        """Return the text that the model generates after each prompt.

        Sampling restarts from its seed in each batch.

        Args:
            prompts: one text, or several; none of them empty.
            settings: length, sampling, chat template. None: the defaults, prompts framed as the
                training texts of the carry-on.
            alpha: as in `generate`.
            carryons: as in `generate`.
            batch_rows: maximum number of prompts in a batch.
            streamer: receives the tokens of a single prompt, as TextStreamer of transformers.
            options: fields of `settings` by name, such as `max_new_tokens=50`.

        Raises:
            InputError: an empty prompt, one too long for the base, or as in `generate`.
        """
        [settings] = apply_options(options, settings or GenerateSettings())
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        framings = self.framings(carryons, num_rows=len(texts))
        lines = (framing_warnings(self.tokenizer, each, settings) for each in framings)
        for line in set(chain.from_iterable(lines)) - self._warnings:
            logger.warning(line)
            self._warnings.add(line)
        answers = answer_all(
            self,
            texts,
            settings=settings,
            batch_rows=batch_rows,
            carryons=carryons,
            alpha=alpha,
            streamer=streamer,
        )
        return answers[0] if isinstance(prompts, str) else answers

    def read_prompts(self, prompts: Sequence[Prompt], *, chat: ChatChoice) -> dict[str, Any]:
        """Return what `generate` needs besides the token ids of prompts: nothing for one base."""
        return {}

    def framings(self, carryons: Sequence[str | None] | None, *, num_rows: int) -> list[Framing]:
        """Return how the training texts of each row's carry-on, or of the default, were framed."""
        return self.carryons.framings(carryons, num_rows=num_rows, fallback=self._framing)

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,  # noqa: ANN401
        carryons: Names = None,
        alpha: Alpha = None,
        **settings: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401 -- token ids, or an output class of transformers
        """Generate token ids, as `generate` of transformers, whose other arguments it takes.

        Args:
            inputs: [B, T] int64 token ids; or as `input_ids`.
            carryons: for each row the name of its carry-on, or None for the base alone. None:
                `default` for every row.
            alpha: strength of the correction, one for all rows or one for each. None: each
                carry-on's own.

        Raises:
            InputError: not one name or alpha for each row, an unknown name, alpha out of range,
                or a prompt longer than the base's context.
        """
        given = (inputs, settings.get("input_ids"), settings.get("inputs_embeds"))
        prompts = next((each for each in given if each is not None), None)
        num_rows, length = (1, 0) if prompts is None else prompts.shape[:2]
        if length > self.identity.context_tokens:
            raise InputError(
                f"prompt: expected at most the {self.identity.context_tokens} tokens that the base "
                f"allows, got {length}"
            )
        slots, strengths = self.carryons.resolve(carryons, alpha, num_rows=num_rows)
        # As tensors, which generation repeats for beams and several sequences of a prompt.
        if any(slots):
            settings["carryons"] = torch.tensor(slots)
            # Built now and kept, so that dropping a carry-on does not disturb this batch.
            place = self._final_device or self.device
            self.carryons.modules(slots, device=place, dtype=self._compute_dtype)
        is_one = len(set(strengths)) == 1
        settings["alpha"] = strengths[0] if is_one else torch.tensor(strengths)
        return super().generate(inputs, *args, **settings)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        carryons: Names = None,
        alpha: Alpha = None,
        **inputs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401 -- the output class of the base's architecture
        """Return the output of the base's forward pass, with corrected logits.

        The arguments are those of the base, and `carryons` and `alpha` of `generate`. Rows are
        [B, T], padded on either side; the mask is [B, T_all], 1 for real tokens, cached ones
        included; the cache is extended.

        Raises:
            InputError: as in `generate`, or a mask or cache that carry-ons cannot use.
        """
        named = {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        inputs |= {name: named[name] for name in self._optional}
        inputs |= {"attention_mask": attention_mask, "past_key_values": past_key_values}
        if inputs_embeds is not None:
            inputs["inputs_embeds"] = inputs_embeds
        inputs |= {"input_ids": input_ids, "return_dict": True}
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        correction = get_correction(
            self.carryons,
            carryons,
            alpha,
            cache=past_key_values,
            num_rows=len(given),
            device=self._final_device or given.device,
            dtype=self._compute_dtype,
        )
        with (
            attention_of_any_shape(),  # each token that is generated makes another shape
            contiguous_head_input(self.base),
            correcting(
                self._architecture,
                correction,
                position_ids=position_ids,
                attention_mask=attention_mask,
            ),
        ):
            return self.base(**inputs)

    def prepare_inputs_for_generation(
        self,
        *args: Any,  # noqa: ANN401
        inputs_embeds: Tensor | None = None,  # named, as transformers looks for it
        **kwargs: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        """Return a step's inputs, prepared by the base's own architecture."""
        prepared: dict[str, Any] = self.base.prepare_inputs_for_generation(
            *args, inputs_embeds=inputs_embeds, **kwargs
        )
        return prepared

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Let transformers switch the base's mixture of experts."""
        return True
