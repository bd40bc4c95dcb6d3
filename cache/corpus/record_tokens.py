"""Records as tokens and targets, and what is worth counting about them.

The functions are generators that ask for the tokens of a text and are sent them, so that the texts
of many records are tokenized in one call.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.chat.chat_template import ChatTemplate
from carryon.cache.corpus.chat.rendering import Rendering
from carryon.cache.corpus.chat.turns import Conversation
from carryon.cache.corpus.records import Chat, Completion, Pair, Record, Text
from carryon.cache.corpus.report import Tally
from carryon.cache.corpus.samples import ROLES
from carryon.cache.corpus.tokenize import Encoder, Request, Tokens, join
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings

if TYPE_CHECKING:
    pass

KINDS = {
    Chat: ("messages", ("assistant", "completion", "all")),
    Completion: ("prompt and completion", ("completion", "all")),
    Text: ("text", ("all",)),
    Pair: ("preference pair", ("assistant", "completion")),
}
"""Name and masks of each kind of record; `auto` is the first."""
Asks = Generator[Request, Tokens, "list[Piece]"]
Count = Callable[..., None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A sample to be, before it is cut to length."""

    suffix: str
    """Of its id, behind the record's."""
    tokens: Tokens
    loss_mask: NDArray[np.uint8]
    """[T] uint8: 1 where the token is a training target."""
    role: int = 0
    text: str = ""
    """That was tokenized."""
    cuts: tuple[int, ...] = ()
    """Characters of it where generation begins."""


class RecordTokens:
    """Tokenizes records."""

    def __init__(
        self,
        encoder: Encoder,
        template: ChatTemplate,
        *,
        settings: CorpusSettings,
        max_tokens: int,
        end_tokens: Iterable[int],
    ) -> None:
        """Keep what all records share.

        Args:
            encoder: the tokenizer.
            template: the chat template.
            settings: of the corpus.
            max_tokens: of a sample.
            end_tokens: ids at which generation stops, for the count of targets without any.
        """
        self._encoder, self._template, self._settings = encoder, template, settings
        self._max_tokens, self._ends = max_tokens, frozenset(end_tokens)

    def pieces(self, record: Record, tally: Tally) -> Asks:
        """Return the samples of a record other than a long text; see `text_windows`.

        Raises:
            UnfitError: the chat template refuses a conversation or does not write all of it.
            InputError: `mask` does not fit the record, or the tokenizer lacks what it needs.
        """
        mask = self.check_mask(record)
        content, count = record.content, partial(tally.count, where=record.where)
        if isinstance(content, Completion):
            return (yield from self._completion(content, mask, count))
        if isinstance(content, Chat):
            return (yield from self._chat(content, mask, count))
        if isinstance(content, Text):
            if not content.text.strip():
                count("no target")
                return []
            tokens = yield content.text, ()
            loss_mask = self._encoder.mark(tokens, None)
            return [Piece(suffix="", tokens=tokens, loss_mask=loss_mask, text=content.text)]
        halves = []
        for role, half in enumerate((content.chosen, content.rejected), start=1):
            made = yield from (
                self._chat(half, "completion", count)
                if isinstance(half, Chat)
                else self._completion(half, "completion", count)
            )
            halves += [replace(piece, suffix=f"/{ROLES[role]}", role=role) for piece in made]
        return halves

    def check_mask(self, record: Record) -> str:
        """Return the mask of a record.

        Raises:
            InputError: the one that is set does not fit it.
        """
        kind, masks = KINDS[type(record.content)]
        mask = self._settings.mask
        if mask not in ("auto", *masks):
            raise InputError(
                f"mask {mask!r} does not fit {kind}: expected auto or {' or '.join(masks)}"
            )
        return masks[0] if mask == "auto" else mask

    def frame(self, tokens: Tokens, num_chars: int) -> Tokens:
        """Add start tokens and the end-of-text token to a text, unless it has them."""
        start, end = self._encoder.start, self._encoder.required_end
        parts = [tokens]
        if len(start) and tokens.ids[: len(start)].tolist() != start.tolist():
            parts.insert(0, Tokens.at(start, 0))
        if not len(tokens.ids) or tokens.ids[-1] != end:
            parts.append(Tokens.at(np.array([end], dtype=np.int32), num_chars))
        return join(parts)

    def _completion(self, content: Completion, mask: str, count: Count) -> Asks:
        if not content.completion.strip():  # to answer nothing is not learned
            count("no target")
            return []
        length = len(content.prompt)
        text = content.prompt + content.completion
        encoded = yield text, [length]
        tokens = self.frame(encoded, len(text))
        targets = None if mask == "all" else [(length, len(text) + 1)]
        loss_mask = self._encoder.mark(tokens, targets)
        if targets is None:
            loss_mask[tokens.ends == 0] = 0  # start tokens
        cuts = (length,)
        return [Piece(suffix="", tokens=tokens, loss_mask=loss_mask, text=text, cuts=cuts)]

    def _chat(self, chat: Chat, mask: str, count: Count) -> Asks:
        only_last = mask == "completion" or self._settings.turns == "last"
        conversation = Conversation(chat, self._template, only_last=only_last)
        for note in conversation.notes:
            count(note)
        contents = [str(message.get("content") or "") for message in chat.messages]
        if any(end in content for end in self._template.end_names for content in contents):
            count("control tokens within the text of a message")
        if mask == "all":
            rendering = conversation.render_all()
            tokens = yield rendering.text, ()
            loss_mask = self._encoder.mark(tokens, None)
            return [Piece(suffix="", tokens=tokens, loss_mask=loss_mask, text=rendering.text)]
        num_turns = len(conversation.trained)
        if not num_turns:
            count("no target")
            return []
        if shared := conversation.render_shared():
            encode = self._encode_turn if num_turns == 1 else self._encode_whole
            if whole := (yield from encode(shared)):
                return [self._mark(shared, whole, count)]
        if num_turns > 1:
            count("one sample per turn, as the chat template rewrites earlier turns")
        pieces = []
        for number, rendering in enumerate(conversation.render_turns()):
            tokens = yield from self._encode_turn(rendering)
            piece = self._mark(rendering, tokens, count)
            if self._is_beyond(piece):  # so are the longer prompts of all later turns
                count("prompt longer than a sample")
                count("turn left out, its prompt longer than a sample", records=num_turns - number)
                break
            pieces.append(piece)
        return pieces

    def _is_beyond(self, piece: Piece) -> bool:
        """Tell whether a piece would lose all its targets by being cut off."""
        first = int(np.argmax(piece.loss_mask)) if piece.loss_mask.any() else 0
        return first >= self._max_tokens and self._settings.long in ("auto", "truncate")

    def _encode_whole(self, rendering: Rendering) -> Generator[Request, Tokens, Tokens | None]:
        """Return the tokens of a text, None if a prompt alone would have others."""
        text, ends_a_prompt = rendering.text, self._encoder.ends_a_prompt
        tokens = yield text, ()
        since = 0
        for start, stop in rendering.targets or ():
            is_prompt = start in rendering.prompts
            if is_prompt and not ends_a_prompt(text, tokens, start, since=since):
                return None
            if not ends_a_prompt(text, tokens, stop, since=start if is_prompt else since):
                return None
            since = stop
        return tokens

    def _encode_turn(self, rendering: Rendering) -> Generator[Request, Tokens, Tokens]:
        """Return the tokens of a text with one target."""
        # behind a prompt some tokenizers put a blank that they would not put by itself
        if self._encoder.has_prefix and (whole := (yield from self._encode_whole(rendering))):
            return whole
        return (yield rendering.text, rendering.prompts)

    def _mark(self, rendering: Rendering, tokens: Tokens, count: Count) -> Piece:
        for note in rendering.notes:
            count(note)
        loss_mask = self._encoder.mark(tokens, rendering.targets)
        for start, stop in (rendering.targets or ()) if self._ends else ():
            first = int(np.searchsorted(tokens.ends, start, side="right"))
            last = int(np.searchsorted(tokens.starts, stop))
            if self._ends.isdisjoint(tokens.ids[first:last].tolist()):
                count("target without an end token")
        suffix = "" if rendering.turn is None else f"@{rendering.turn}"
        return Piece(
            suffix=suffix,
            tokens=tokens,
            loss_mask=loss_mask,
            text=rendering.text,
            cuts=tuple(rendering.prompts),
        )
