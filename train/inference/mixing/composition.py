"""The sources and the gate of a mixture, and the step that mixes their distributions.

Letters: B rows, n of them that are mixed, D width, V vocabulary, S sources; of the anchor.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from carryon.cache.alignment.growing_text import GrowingText, begin_text, end_prompt, grow
from carryon.cache.base.model import Base
from carryon.cache.corpus.tokenize import Encoder
from carryon.cache.format.framing import Framing
from carryon.train.inference.generate_settings import ChatChoice
from carryon.train.inference.mixing.session import AnchorWords, Prompts, Session
from carryon.train.inference.mixing.source_base import BaseCost, SourceBase, head_in_place
from carryon.train.inference.prompts import Prompt, encode_prompts, joined, uses_template
from carryon.train.mixing.gate import Gate, mixture_distribution
from carryon.train.mixing.healing import HealingStates
from carryon.train.mixing.logits import log_probabilities
from carryon.train.mixing.projection import (
    LEAST,
    Heads,
    own_features,
    project_full,
)

_PAIR, _TEXT = "prompt and completion", "text"


class Composition:
    """The other bases of a mixture, and its gate."""

    def __init__(self, base: Base, sources: Sequence[SourceBase], gate: Gate) -> None:
        """Join them with the anchor's base; the sources are loaded when they run."""
        self.sources = list(sources)
        self.gate = gate.to(base.device).requires_grad_(False)
        self.cost = BaseCost(name=base.identity.id)
        self._head = head_in_place(base)
        mapped, encoder = sources[0].vocabulary_map, Encoder(base.tokenizer)
        added: Mapping[int, object] = base.tokenizer.added_tokens_decoder
        self._words = AnchorWords(
            words=mapped.anchor,
            special={token: str(each).encode() for token, each in added.items()},
            start=tuple(encoder.start.tolist()),
            has_prefix=encoder.has_prefix,
            stops=frozenset(mapped.anchor_stops),
        )

    @property
    def costs(self) -> list[BaseCost]:
        """Costs of the anchor's base, then of each source."""
        return [self.cost, *(source.cost for source in self.sources)]

    def begin(
        self, prompts: Prompts | None, *, prompt_rows: Sequence[int], is_mixed: Sequence[bool]
    ) -> Session:
        """Begin a generation; arguments are those of Session."""
        return Session(
            self._words, self.sources, prompts, prompt_rows=prompt_rows, is_mixed=is_mixed
        )

    def read_prompts(
        self, prompts: Sequence[Prompt], *, framing: Framing, chat: ChatChoice
    ) -> list[list[GrowingText]]:
        """Return prompts as each source reads them, [prompts][sources].

        A conversation is written by each source's own chat template. Behind it, and behind the
        prompt of prompts and completions, generation begins a part that no token reaches into; a
        text goes on as one.

        Args:
            prompts: texts or messages.
            framing: of the carry-on's training texts.
            chat: whether prompts go through a chat template.
        """
        own = Framing(kinds=framing.kinds, template_date=framing.template_date)
        is_text = framing.kinds.get(_TEXT, 0) > framing.kinds.get(_PAIR, 0)
        columns = []
        for source in self.sources:
            tokenizer = source.facts.tokenizer
            if is_text and not uses_template(tokenizer, own, chat):
                begun = begin_text(source.start)
                texts = [grow(begun, joined(each).encode(), source.tokenizer) for each in prompts]
            else:
                rows = encode_prompts(tokenizer, prompts, framing=own, chat=chat)
                texts = [end_prompt(begin_text(tuple(row))) for row in rows]
            columns.append(texts)
        return [list(row) for row in zip(*columns, strict=True)]

    @torch.no_grad()
    def mix(self, session: Session, states: Tensor, logits: Tensor) -> Tensor:
        """Return log-probabilities of the mixture in the place of logits, [B, V] float32.

        Rows that are not mixed keep their logits.

        Args:
            session: whose positions were added up to these.
            states: [B, D] `final` states of the anchor's base.
            logits: [B, V] of the anchor with its carry-on.
        """
        rows = session.going
        out = logits.float()
        if not rows:
            return out
        is_all = len(rows) == len(out)
        at = torch.tensor(rows, device=out.device)
        own_states, own = (states, out) if is_all else (states[at], out[at])
        found = session.read(rows)
        projected, features = [], []
        for source, read in zip(self.sources, found, strict=True):
            logs, facts = self._project(source, read.known, own_states, read.exact, read.healing)
            projected.append(logs)
            features.append(facts)
        gate_logits = self.gate(own_states, torch.stack(features, dim=1))
        mixed = mixture_distribution(gate_logits, own.log_softmax(dim=1), projected)
        if is_all:
            return mixed
        out = out.clone()
        out[at] = mixed
        return out

    def _project(
        self,
        source: SourceBase,
        known: Sequence[int],
        states: Tensor,
        exact: Tensor,
        healing: HealingStates,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [n, V] and features; the anchor's where nothing is known."""
        if len(known) == len(states):
            found, features = project_full(
                exact_states=exact,
                healing=healing,
                anchor_states=states,
                heads=Heads(anchor=self._head, source=source.head),
                vocabulary_map=source.vocabulary_map,
            )
            return found.clamp_min_(LEAST).log_(), features
        logs = log_probabilities(states, self._head)
        facts = own_features(logs)
        if known:
            at = torch.tensor(known, device=states.device)
            logs[at], facts[at] = self._project(
                source, range(len(known)), states[at], exact, healing
            )
        return logs, facts
