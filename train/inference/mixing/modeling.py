"""A mixture of several bases as one causal LM: the anchor generates, the sources read along.

At each step the log-probabilities of the mixture stand in the place of the anchor's logits, so
`generate` of transformers does the rest. Letters: B rows, T positions.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache

from carryon.cache.base.hooks import watch_taps
from carryon.cache.base.model import Base
from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings
from carryon.train.inference.adapters import DEFAULT, Alpha, Names
from carryon.train.inference.generate_settings import ChatChoice
from carryon.train.inference.merge import load_own_base
from carryon.train.inference.mixing.composition import Composition
from carryon.train.inference.mixing.session import Prompts, find_session, host_rows, keep_session
from carryon.train.inference.mixing.source_base import BaseCost, check_places, place_sources
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.inference.prompts import Prompt
from carryon.train.mixing.mixture import load_gate
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.card_file import GATE
from carryon.train.modules.serialization import read_weights

logger = logging.getLogger(__name__)
_KINDS = ("bottleneck", "none")


class MixedForCausalLM(CarryOnForCausalLM):
    """An anchor with its carry-on, mixed with other bases.

    Rows whose carry-on is another one, or None, are the anchor's alone.
    """

    def __init__(self, base: Base, composition: Composition) -> None:
        """Join an anchor's base and what it is mixed with; its carry-on is added afterwards."""
        super().__init__(base)
        self.composition = composition

    @property
    def shares_prompts(self) -> bool:
        """False: the other bases read each prompt as a whole."""
        return False

    @property
    def costs(self) -> list[BaseCost]:
        """What each base has cost: seconds, tokens, tokens in the place of cropped ones."""
        return self.composition.costs

    def read_prompts(
        self,
        prompts: Sequence[Prompt],
        *,
        chat: ChatChoice,
    ) -> dict[str, Any]:
        """Return what `generate` needs so that the sources read these prompts as in training."""
        [framing] = self.framings(None, num_rows=1)  # rows with another carry-on are not mixed
        return {"source_texts": self.composition.read_prompts(prompts, framing=framing, chat=chat)}

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,  # noqa: ANN401
        source_texts: Any = None,  # noqa: ANN401 -- of `read_prompts`
        **settings: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401 -- token ids, or an output class of transformers
        """Generate token ids, as CarryOnForCausalLM does.

        The sources read what the prompts spell, or `source_texts`.

        Raises:
            InputError: as there; or a source's context is too short.
            SettingMismatchError: the weights of a source are others than in training.
        """
        given = inputs if inputs is not None else settings.get("input_ids")
        if given is None:
            raise InputError(
                "input_ids: expected token ids, whose text the other bases read, got none"
            )
        check_alpha(self.carryons.get(DEFAULT).card, settings.get("alpha"))
        settings["prompts"] = Prompts(length=given.shape[1], texts=source_texts)
        # As tensors, which generation repeats for beams and several sequences of a prompt.
        settings["prompt_rows"] = torch.arange(len(given))
        settings["is_mixed"] = self._is_mixed(settings.get("carryons"), num_rows=len(given))
        return super().generate(inputs, *args, **settings)

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
        prompts: Prompts | None = None,
        prompt_rows: Tensor | None = None,
        is_mixed: Tensor | None = None,
        **inputs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401 -- the output class of the base's architecture
        """Return the anchor's output, with log-probabilities of the mixture as logits.

        Each position whose logits are kept costs a step of each source.

        Raises:
            InputError: as in `generate`, labels, or a cache that was begun by another model.
        """
        if input_ids is None or inputs.get("labels") is not None:
            raise InputError("forward: expected input_ids, and no inputs_embeds or labels")
        session = find_session(past_key_values)
        num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        if num_cached != (session.num_positions if session else 0):
            raise InputError(
                f"past_key_values: expected a cache that the mixture has begun, got {num_cached} "
                "tokens of another model. Fix: start another cache"
            )
        states: list[Tensor] = []
        started = time.perf_counter()
        with watch_taps(self._architecture, ["final"], lambda _, values: states.append(values)):
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                logits_to_keep=logits_to_keep,
                carryons=carryons,
                alpha=alpha,
                **inputs,
            )
        cost = self.composition.cost
        cost.seconds += time.perf_counter() - started
        num_rows, num_new = input_ids.shape
        own_mask = None if attention_mask is None else attention_mask[:, -num_new:]
        cost.tokens += num_rows * num_new if own_mask is None else int(own_mask.sum())
        if session is None:
            if is_mixed is None:
                is_mixed = self._is_mixed(carryons, num_rows=num_rows)
            session = self.composition.begin(
                prompts,
                prompt_rows=range(num_rows) if prompt_rows is None else prompt_rows.tolist(),
                is_mixed=is_mixed.tolist(),
            )
            keep_session(output.get("past_key_values"), session)
        kept = torch.arange(num_new)
        if isinstance(logits_to_keep, int):
            kept = kept[-logits_to_keep:] if logits_to_keep else kept
        else:
            kept = kept[logits_to_keep.cpu()]
        tokens, mask, first = input_ids.tolist(), host_rows(own_mask), 0
        mixed = []
        for place, position in enumerate(kept.tolist()):
            part = slice(first, position + 1)
            session.add(
                [row[part] for row in tokens],
                None if mask is None else [row[part] for row in mask],
            )
            first = position + 1
            mixed.append(
                self.composition.mix(session, states[0][:, position], output.logits[:, place])
            )
        rest = slice(first, num_new)
        session.add(
            [row[rest] for row in tokens], None if mask is None else [r[rest] for r in mask]
        )
        output["logits"] = torch.stack(mixed, dim=1)
        return output

    def _is_mixed(self, carryons: Names, *, num_rows: int) -> Tensor:
        """Return which rows have the carry-on that the gate was trained with, [B] bool."""
        slots, _ = self.carryons.resolve(carryons, None, num_rows=num_rows)
        return torch.tensor(slots) == self.carryons.slot(DEFAULT)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the default carry-on and the gate, without the weights of any base."""
        gate = self.composition.gate.state_dict()
        weights = {name: weight.cpu().contiguous() for name, weight in gate.items()}
        save_file(weights, save_directory / GATE, metadata={"format": "pt"})
        super()._save_pretrained(save_directory)


def load_mixed(
    place: Path,
    card: CarryOnCard,
    base: str | Path | Base | None,
    *,
    mix: Sequence[str | Path | Base],
    mix_device: Sequence[str],
    forward: ForwardSettings,
    where: str | Path,
) -> MixedForCausalLM:
    """Return a carry-on with a gate, its base and the other bases, which are loaded when they run.

    Args:
        place: folder of the carry-on.
        card: of it.
        base: its own, as of `CarryOnForCausalLM.from_pretrained`.
        mix: places of the other bases, in the order of the card. Empty: where they were at
            extraction.
        mix_device: device of each, or one for all. Empty: that of the base.
        forward: how they are run.
        where: name of the carry-on, for errors.

    Raises:
        InputError: no mixture by probability, not one place or device for each, or a merged kind.
        MissingError: a base is not there.
        SettingMismatchError: a base is another one than in training.
    """
    check_mixture(card, mix, mix_device, where=where)
    loaded = load_own_base(card, base, forward=forward, folder=where)
    sources = place_sources(
        card.mixture["sources"], mix, mix_device, anchor=loaded, forward=forward, where=where
    )
    model = MixedForCausalLM(loaded, Composition(loaded, sources, load_gate(place, card)))
    model.carryons.put(DEFAULT, read_weights(place), card, where=str(place))
    return model


def check_mixture(
    card: CarryOnCard,
    mix: Sequence[str | Path | Base],
    mix_device: Sequence[str],
    *,
    where: str | Path,
) -> None:
    """Check a mixture, and that its other bases are there, before any base is loaded.

    Arguments are those of `load_mixed`.

    Raises:
        InputError, MissingError: as of `load_mixed`.
    """
    if not card.mixture:
        raise InputError(
            f"{where}: expected a mixture of several bases with --mix, got a carry-on of one. Fix: "
            "leave out --mix and --mix-device"
        )
    if card.mixture["by"] != "probability":
        raise InputError(
            f"{where}: expected a mixture by probability, got one by {card.mixture['by']}, which "
            "does not generate yet. Fix: carryon evaluate --mix STORE, or train with --mix-by "
            "probability"
        )
    kind = card.settings.get("kind", "bottleneck")
    if kind not in _KINDS:
        raise InputError(
            f"{where}: expected a mixture of the kind {' or '.join(_KINDS)}, got {kind}, which is "
            "merged into its base while the gate reads the base itself. Fix: carryon evaluate "
            "--mix, or train a bottleneck"
        )
    check_places(card.mixture["sources"], mix, mix_device, where=where)


def check_alpha(card: CarryOnCard, alpha: Alpha) -> None:
    """Check that a mixture has a correction, if a strength of it is given.

    Raises:
        InputError: it has a gate alone.
    """
    if alpha is not None and card.settings.get("kind") == "none":
        raise InputError(
            "alpha: expected none for a mixture of the kind none, which corrects nothing, got "
            f"{alpha}. Fix: leave out --alpha"
        )


def log_costs(model: MixedForCausalLM) -> None:
    """Log what each base has cost, and begin to count again."""
    for cost in model.costs:
        if cost.tokens:
            logger.info(
                f"{cost.name}: {cost.seconds:.1f} s, {cost.tokens:,} tokens, "
                f"{cost.tokens_again:,} of them in the place of cropped ones"
            )
        cost.reset()
