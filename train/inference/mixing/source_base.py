"""A source of a mixture as it generates: tokenizer and vocabulary map now, weights when it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from carryon.cache.alignment.boundaries import read_rules
from carryon.cache.alignment.prefixes import PrefixTokenizer
from carryon.cache.base.facts import BaseFacts, facts_of, read_facts
from carryon.cache.base.identity import digest_tokenizer, refuse_other_quantization
from carryon.cache.base.loading import check_is_there
from carryon.cache.base.model import Base, load_base
from carryon.cache.base.placement import refuse_spread
from carryon.cache.base.recorded import recorded_forward, recorded_source
from carryon.cache.corpus.tokenize import Encoder
from carryon.cache.errors import InputError, MissingError, SettingMismatchError
from carryon.cache.settings import ForwardSettings
from carryon.train.losses.frozen_head import CPU_BLOCK_ROWS, FrozenHead
from carryon.train.mixing.sources import Vocabulary
from carryon.train.mixing.vocabulary_cache import Words, cached_words
from carryon.train.mixing.vocabulary_map import VocabularyMap


@dataclass(kw_only=True, slots=True)
class BaseCost:
    """What a base has cost since the model was loaded or its costs were reset."""

    name: str
    seconds: float = 0.0
    """In its forward passes, without heads."""
    tokens: int = 0
    """Tokens that it has run, pads left out."""
    tokens_again: int = 0
    """Those of them that it ran in the place of tokens that were cropped."""

    def reset(self) -> None:
        """Begin at zero."""
        self.seconds, self.tokens, self.tokens_again = 0.0, 0, 0


class SourceBase:
    """A base that is mixed with the anchor."""

    def __init__(
        self,
        recorded: Mapping[str, str],
        place: str | Path | Base | None,
        *,
        anchor: Vocabulary,
        forward: ForwardSettings,
        where: str | Path,
    ) -> None:
        """Read its tokenizer, and compare it with the one of training.

        Args:
            recorded: what the card of the carry-on says of it.
            place: the loaded base, or its hub id, folder or .gguf file. None: where it was at
                extraction.
            anchor: the vocabulary of the anchor.
            forward: how it is run.
            where: the carry-on, for errors.

        Raises:
            MissingError: there is no such base.
            SettingMismatchError: it is another one than in training.
            InputError: its tokenizer cannot be aligned.
        """
        self._recorded, self._where = recorded, where
        self.name = recorded["name"]
        self.forward = recorded_forward(replace(forward, quantize="none"), recorded)
        self.cost = BaseCost(name=self.name)
        self._loaded: Base | None = None
        if isinstance(place, Base):
            self._loaded, self.place = place, place.source
            self._check_base(place)
            self.facts = facts_of(place)
        else:
            self.place, self.facts = self._read_facts(place)
        self._check("tokenizer_sha256", digest_tokenizer(self.facts.tokenizer))
        self.encoder = Encoder(self.facts.tokenizer)
        rules = read_rules(self.encoder, name=self.name)
        self.tokenizer = PrefixTokenizer(self.encoder, rules)
        self.start: tuple[int, ...] = tuple(self.encoder.start.tolist())
        self.vocabulary_map = self._map(anchor)

    @property
    def is_loaded(self) -> bool:
        """Whether its weights are in memory."""
        return self._loaded is not None

    @cached_property
    def base(self) -> Base:
        """The base, loaded at the first use.

        Raises:
            SettingMismatchError: its weights are others than in training.
        """
        if self._loaded is None:
            loaded = load_base(self.place, forward=self.forward)
            self._check_base(loaded)
            self._loaded = loaded
        return self._loaded

    @cached_property
    def head(self) -> FrozenHead:
        """The head of the loaded base, not copied."""
        return head_in_place(self.base)

    def _read_facts(self, place: str | Path | None) -> tuple[str, BaseFacts]:
        try:
            recorded = {
                "id": self._recorded["base"],
                "revision": self._recorded["revision"] or None,
            }
            source = str(place) if place else recorded_source(recorded, where=self._where)
            return source, read_facts(source, trusts_code=self.forward.trust_remote_code)
        except MissingError as error:
            raise _missing(self._recorded, error, where=self._where) from error

    def _check_base(self, base: Base) -> None:
        where = f"mix: {self.place}"
        refuse_other_quantization(self._recorded, base.identity.to_dict(), where=where)
        refuse_spread(base.model, what=where)
        self._check("weights_sha256", base.identity.weights_sha256)

    def _check(self, name: str, digest: str) -> None:
        expected = self._recorded[name]
        if digest != expected:
            what = name.removesuffix("_sha256")
            raise SettingMismatchError(
                f"mix: {self.place}: expected the {what} of {self._recorded['base']}, which "
                f"{self._where} was trained with ({expected[:12]}), got others ({digest[:12]}). "
                "Fix: give the bases of its card, in that order"
            )

    def _map(self, anchor: Vocabulary) -> VocabularyMap:
        loaded = self._loaded
        size = self.facts.vocab_size if loaded is None else loaded.architecture.head.out_features
        if size is None:  # a config that does not name it
            size = self.base.architecture.head.out_features
        names = ("revision", "weights_sha256", "tokenizer_sha256")
        own = _vocabulary(
            {"id": self._recorded["base"]} | {name: self._recorded[name] or None for name in names},
            self.facts,
            size,
        )
        found = VocabularyMap(
            source=own.tokens,
            anchor=anchor.tokens,
            source_stops=own.stops,
            anchor_stops=anchor.stops,
        )
        self._check("vocabulary_map_sha256", found.digest())
        return found


def _missing(
    recorded: Mapping[str, str], error: MissingError, *, where: str | Path
) -> MissingError:
    return MissingError(
        f"{where}: mix: the base {recorded['base']} that it was trained with was not found. Fix: "
        f"give its place with --mix. {error}"
    )


def vocabulary_of(base: Base) -> Vocabulary:
    """Return the vocabulary of a loaded base.

    Raises:
        InputError: the bytes of its tokens are not known.
    """
    identity, size = base.identity.to_dict(), base.architecture.head.out_features
    return _vocabulary(identity, facts_of(base), size)


def _vocabulary(identity: Mapping[str, Any], facts: BaseFacts, size: int) -> Vocabulary:
    """Return the vocabulary of a base, as training has kept it in the cache, or read now."""

    def read() -> Words:
        found = Vocabulary.of(facts, size)
        return found.tokens, found.stops

    tokens, stops = cached_words(identity, vocab_size=size, compute=read)
    return Vocabulary(tokens=tokens, stops=stops)


def head_in_place(base: Base) -> FrozenHead:
    """Return the head of a loaded base as the projection multiplies it; nothing is copied."""
    head = base.architecture.head
    weight = head.weight.detach()
    is_cpu = weight.device.type == "cpu"
    return FrozenHead(
        weight=weight,
        bias=None if head.bias is None else head.bias.detach().float(),
        logit_scale=base.architecture.logit_scale,
        softcap=base.architecture.softcap,
        dtype=weight.dtype,
        device=weight.device,
        block_rows=CPU_BLOCK_ROWS if is_cpu and weight.dtype != torch.float32 else len(weight),
    )


def check_places(
    recorded: Sequence[Mapping[str, str]],
    places: Sequence[str | Path | Base],
    devices: Sequence[str],
    *,
    where: str | Path,
) -> None:
    """Check that each source has a place where a base is; nothing is loaded.

    Arguments are those of `place_sources`.

    Raises:
        InputError: not one place or device for each.
        MissingError: a base is not there.
    """
    names = ", ".join(each["base"] for each in recorded)
    for option, given in (("mix", places), ("mix-device", devices)):
        is_one = option == "mix-device" and len(given) == 1
        if given and len(given) != len(recorded) and not is_one:
            raise InputError(
                f"--{option}: expected one for each of {names}, which {where} was trained with, "
                f"got {len(given)}. Fix: give {len(recorded)}, in that order, or leave it out"
            )
    extracted = ["@".join(filter(None, (each["base"], each["revision"]))) for each in recorded]
    for each, place in zip(recorded, places or extracted, strict=True):
        if isinstance(place, Base):
            continue
        try:
            check_is_there(str(place))
        except MissingError as error:
            raise _missing(each, error, where=where) from error


def place_sources(
    recorded: Sequence[Mapping[str, str]],
    places: Sequence[str | Path | Base],
    devices: Sequence[str],
    *,
    anchor: Base,
    forward: ForwardSettings,
    where: str | Path,
) -> list[SourceBase]:
    """Return the sources of a mixture, none of them loaded yet.

    Args:
        recorded: what the card says of each.
        places: one for each, in this order; empty: where they were at extraction.
        devices: one for each, or one for all; empty: that of the anchor.
        anchor: the anchor's base.
        forward: how the anchor is run.
        where: the carry-on, for errors.

    Raises:
        MissingError: a base is not there.
        SettingMismatchError: a base is another one than in training.
    """
    refuse_spread(anchor.model, what="mix")
    forward = replace(forward, device_map="", max_memory=[], offload_folder="")
    used = devices or [str(anchor.device)]
    vocabulary = vocabulary_of(anchor)
    return [
        SourceBase(
            each,
            places[number] if places else None,
            anchor=vocabulary,
            forward=replace(forward, device=used[number if len(used) > 1 else 0]),
            where=where,
        )
        for number, each in enumerate(recorded)
    ]
