"""The models of arms, each ready to answer prompts; a base is loaded once for all its arms."""

import copy
import gc
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from carryon.cache.base.architecture import get_architecture
from carryon.cache.base.loading import check_is_there
from carryon.cache.base.model import load_base
from carryon.cache.base.placement import refuse_spread
from carryon.cache.errors import EngineError, InputError, MissingError
from carryon.cache.files.documents import digest_of
from carryon.cache.files.regular import digest_file
from carryon.cache.format.framing import Framing
from carryon.cache.optional import require
from carryon.cache.settings import ForwardSettings
from carryon.train.inference.adapters import DEFAULT
from carryon.train.inference.generate import Generation, generate_rows
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.merge import load_own_base
from carryon.train.inference.mixing.modeling import (
    MixedForCausalLM,
    check_alpha,
    check_mixture,
    log_costs,
)
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.inference.prompts import (
    Prompt,
    encode_prompts,
    framing_warnings,
    uses_template,
    with_variables,
)
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.vllm_engine import (
    BATCH_ROWS,
    Engine,
    VllmAnswers,
    uses_vllm,
)
from carryon.train.kinds import get_kind
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.serialization import locate_carryon, read_card

logger = logging.getLogger(__name__)

Answer = Callable[[Sequence[Sequence[int]], int, Sequence[Prompt]], list[Generation]]
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answerer:
    """A model of an arm."""

    digest: str
    """Of its weights, as hex."""
    context_tokens: int
    encode: Callable[[Sequence[Prompt]], list[list[int]]]
    """Returns the token ids of prompts."""
    answer: Answer
    """Returns answers to prompts of token ids, all in one batch. The number seeds sampling; the
    prompts are there for other bases of a mixture, which read them in tokens of their own."""
    batch_rows: int
    """Answers generated at a time."""


def check_arms(
    arms: Sequence[Arm], *, carryon: str, mix: Sequence[str], mix_device: Sequence[str]
) -> None:
    """Check that the model of each arm is there and can answer; nothing is loaded.

    Args:
        arms: of a call.
        carryon: folder or hub id; empty: none.
        mix: places of its other bases, if it is a mixture.
        mix_device: devices of them.

    Raises:
        InputError: alpha where nothing is corrected or all is merged into the base, a mixture that
            does not generate, or other bases without an arm that is mixed with them.
        MissingError: a folder or file is not there.
        MissingExtraError: a LoRA without PEFT.
    """
    if (mix or mix_device) and not any(arm.model == "carryon" and not arm.place for arm in arms):
        raise InputError(
            "--mix: expected an arm that answers with --carryon, got none. Fix: leave out --mix "
            "and --mix-device, or give --carryon, and carryon among --arms"
        )
    for arm in arms:
        if arm.model == "merged":
            check_is_there(arm.place)
        elif arm.model == "lora":
            _find_adapter(arm)
        elif arm.model == "carryon":
            folder = arm.place or carryon
            card = read_card(locate_carryon(folder), allow_mixture=True)
            places, devices = (mix, mix_device) if folder == carryon else ((), ())
            if card.mixture or places or devices:
                check_mixture(card, places, devices, where=folder)
                check_alpha(card, arm.alpha)
            elif _merges(card) and arm.alpha not in (None, 1.0):
                raise InputError(
                    f"arms: {arm.name}: expected no alpha for a carry-on of the kind native or "
                    "top, which is merged into its base"
                )


class Models:
    """Loads the models of arms."""

    def __init__(
        self,
        *,
        base: str | None,
        carryon: str | None,
        forward: ForwardSettings,
        settings: GenerateSettings,
        engine: Engine,
        batch_rows: int,
        mix: Sequence[str] = (),
        mix_device: Sequence[str] = (),
        arms: Sequence[Arm] = (),
    ) -> None:
        """Load the base, and the carry-on if there is one.

        Prompts of all arms stand as the training texts of that carry-on; without one, as those of
        the first that `arms` name. Another carry-on that they name is asked as it was trained.
        `mix` and `mix_device` are places and devices of the other bases, if it is a mixture.

        Raises:
            InputError: neither of them is given, or a variable of the chat template is wrong.
            MissingError: one of them is not found.
            SettingMismatchError: the carry-on was trained on another base.
        """
        self._forward, self._settings = forward, settings
        self._engine, self._batch_rows = engine, batch_rows
        self._engines = dict[str, Answer | None]()
        self._mix, self._mix_device = mix, mix_device
        self._mixtures = dict[str, MixedForCausalLM]()
        self.card: CarryOnCard | None = None
        if carryon:
            place = locate_carryon(carryon)
            self.card = read_card(place, allow_mixture=True)
            self.base = load_own_base(self.card, base, forward=forward, folder=carryon)
        elif base:
            self.base = load_base(base, forward=forward)
        else:
            raise InputError("base: expected a base or a carry-on, got neither. Fix: --base")
        self._main = CarryOnForCausalLM.from_base(self.base)
        self._carryon = carryon or ""
        self._base_digest = digest_of(self.base.identity.to_dict())
        named = [arm for arm in arms if _names_carryon(arm)]
        self._trained = Framing()
        if self.card:
            self._trained = Framing.from_dict(self.card.framing)
        elif named:
            self._trained = _framing_of(named[0])
        framings = [self._trained, *map(_framing_of, named)]
        found = [framing_warnings(self.base.tokenizer, each, settings) for each in framings]
        for line in dict.fromkeys(chain.from_iterable(found)):
            logger.warning(line)

    @property
    def framing(self) -> Framing:
        """How prompts stand before the base, but for the variables that the settings have."""
        return self._trained

    @property
    def alpha(self) -> float | None:
        """Alpha in the card of the carry-on; None without one."""
        return self.card.alpha if self.card else None

    def encode(self, arm: Arm, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the token ids of prompts for an arm that is not merged."""
        return self._encode(self.base.tokenizer, prompts, arm)

    def _encode(self, tokenizer: Tokenizer, prompts: Sequence[Prompt], arm: Arm) -> list[list[int]]:
        chat = self._settings.chat
        return encode_prompts(tokenizer, prompts, framing=self._asked(arm), chat=chat)

    def _framing_facts(self, tokenizer: Tokenizer, arm: Arm) -> dict[str, Any]:
        """Return in what an arm's prompts differ from the base's own; answers keep only messages.

        Nothing where they do not, so that older files of answers stay of use.
        """
        asked, chat = self._asked(arm), self._settings.chat
        is_chat = uses_template(tokenizer, asked, chat)
        if not is_chat:
            own = uses_template(tokenizer, Framing(), chat)
            return {"chat": False} if own else {}
        facts = {
            "chat_template": asked.chat_template,
            "chat_template_kwargs": list(asked.chat_template_kwargs),
            "template_date": asked.template_date,
        }
        return {name: value for name, value in facts.items() if value}

    def _asked(self, arm: Arm) -> Framing:
        """Return how the prompts of an arm stand before its model."""
        framing = _framing_of(arm) if _names_carryon(arm) else self._trained
        return with_variables(framing, self._settings)

    def open(self, arm: Arm) -> Answerer:
        """Return the model of an arm.

        Raises:
            MissingError: its folder is not there.
            InputError: vLLM is asked for and cannot run it, or a LoRA of another base.
            SettingMismatchError: its carry-on was trained on another base.
            EngineError: vLLM is asked for and does not start.
        """
        source = arm.place or self.base.source
        is_vllm = uses_vllm(arm, source, engine=self._engine)
        if is_vllm and self._forward.quantize != "none":
            if self._engine == "vllm":
                raise InputError(
                    f"engine: expected transformers with --quantize {self._forward.quantize}, "
                    "got vllm, which would run the dense base. Fix: --engine transformers"
                )
            is_vllm = False
        if arm.model == "carryon":
            return self._open_carryon(arm)
        if arm.model == "merged":
            other = load_base(arm.place, forward=self._forward)
            model = CarryOnForCausalLM.from_base(other)
            opened = self._answerer(arm, model, digest_of(other.identity.to_dict()))
            return self._with_vllm(opened, source, other.tokenizer) if is_vllm else opened
        if arm.model == "lora":
            return self._open_lora(arm)
        opened = self._answerer(arm, self._main, self._base_digest)
        return self._with_vllm(opened, source, self.base.tokenizer) if is_vllm else opened

    def _with_vllm(self, opened: Answerer, source: str, tokenizer: Tokenizer) -> Answerer:
        if source not in self._engines:
            self._engines[source] = self._start_vllm(opened, source, tokenizer)
        if (answer := self._engines[source]) is None:
            return opened
        digest = f"vllm-{opened.digest}"
        return replace(opened, digest=digest, answer=answer, batch_rows=BATCH_ROWS)

    def _start_vllm(
        self, opened: Answerer, source: str, tokenizer: Tokenizer
    ) -> VllmAnswers | None:
        """Return what answers; None where nobody asked for vLLM and it does not run this base."""
        try:
            return VllmAnswers(
                source,
                tokenizer=tokenizer,
                settings=self._settings,
                context_tokens=opened.context_tokens,
                dtype=str(self.base.compute_dtype).removeprefix("torch."),
            )
        except EngineError as error:
            if self._engine == "vllm":
                raise
            logger.warning(f"{error}. With --engine auto transformers answers instead")
            return None

    def _open_carryon(self, arm: Arm) -> Answerer:
        folder = arm.place or self._carryon
        place = locate_carryon(folder)
        card = read_card(place, allow_mixture=True)
        digest = digest_of({"base": self._base_digest, "card": card.to_dict(), "alpha": arm.alpha})
        if card.mixture:
            return self._answerer(arm, self._mixture(folder), digest, name=DEFAULT, alpha=arm.alpha)
        if _merges(card):
            model = CarryOnForCausalLM.from_pretrained(folder, base=self.base)
            return self._answerer(arm, model, digest)
        name = arm.place or DEFAULT
        if name not in self._main.carryons.names:
            self._main.add_carryon(name, folder)
        return self._answerer(arm, self._main, digest, name=name, alpha=arm.alpha)

    def _mixture(self, folder: str) -> MixedForCausalLM:
        if folder not in self._mixtures:
            is_main = folder == self._carryon  # others name their bases themselves
            model = CarryOnForCausalLM.from_pretrained(
                folder,
                base=self.base,
                mix=self._mix if is_main else (),
                mix_device=self._mix_device if is_main else (),
                forward=self._forward,
            )
            assert isinstance(model, MixedForCausalLM)
            self._mixtures[folder] = model
        return self._mixtures[folder]

    def log_costs(self) -> None:
        """Log what each base of a mixture has cost since the last call."""
        for model in self._mixtures.values():
            log_costs(model)

    def _open_lora(self, arm: Arm) -> Answerer:
        peft, weights = _find_adapter(arm)
        refuse_spread(self.base.model, what=f"arms: {arm.name}: a LoRA, which is merged")
        if quantization := self.base.identity.quantization:
            raise InputError(
                f"arms: {arm.name}: expected a dense base, into which a LoRA is merged, got a "
                f"quantized one ({quantization}). Fix: leave out --quantize"
            )
        try:
            with warnings.catch_warnings():  # PEFT reads a deprecated attribute of transformers
                warnings.simplefilter("ignore", FutureWarning)
                own = copy.deepcopy(self.base.model)
                merged = peft.PeftModel.from_pretrained(own, arm.place).merge_and_unload()
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"arms: {arm.name}: expected a LoRA of this base: {reason:.300}"
            ) from error
        merged.requires_grad_(False)
        adapted = replace(self.base, model=merged, architecture=get_architecture(merged))
        files = [digest_file(weights), digest_file(weights.with_name(_ADAPTER_CONFIG))]
        digest = digest_of({"base": self._base_digest, "adapter": files})
        return self._answerer(arm, CarryOnForCausalLM.from_base(adapted), digest)

    def _answerer(
        self,
        arm: Arm,
        model: CarryOnForCausalLM,
        digest: str,
        *,
        name: str | None = None,
        alpha: float | None = None,
    ) -> Answerer:
        tokenizer = model.tokenizer
        if facts := self._framing_facts(tokenizer, arm):
            digest = digest_of({"model": digest, **facts})

        def answer(
            rows: Sequence[Sequence[int]], seed: int, prompts: Sequence[Prompt]
        ) -> list[Generation]:
            settings = replace(self._settings, seed=seed)
            names = [name] * len(rows)
            more = model.read_prompts(prompts, chat=settings.chat)
            return generate_rows(
                model, rows, settings=settings, alpha=alpha, carryons=names, **more
            )

        return Answerer(
            digest=digest[:32],
            context_tokens=model.identity.context_tokens,
            encode=lambda prompts: self._encode(tokenizer, prompts, arm),
            answer=answer,
            batch_rows=self._batch_rows,
        )


def _names_carryon(arm: Arm) -> bool:
    return arm.model == "carryon" and bool(arm.place)


def _framing_of(arm: Arm) -> Framing:
    """Return how the training texts of an arm's own carry-on were framed."""
    return Framing.from_dict(read_card(locate_carryon(arm.place), allow_mixture=True).framing)


def _merges(card: CarryOnCard) -> bool:
    return bool(get_kind(card.settings.get("kind", "bottleneck")).merges)


def _find_adapter(arm: Arm) -> tuple[Any, Path]:
    """Return PEFT, and the file of weights of an arm with a LoRA."""
    peft: Any = require("peft", extra="lora", purpose=f"the arm {arm.name}")
    weights = Path(arm.place) / _ADAPTER
    if not weights.is_file():
        raise MissingError(f"arms: {arm.name}: expected a folder with {_ADAPTER}, got none")
    return peft, weights


def free_memory() -> None:
    """Release the memory of models that are not used any more."""
    gc.collect()
    with suppress(RuntimeError):
        torch.accelerator.empty_cache()
