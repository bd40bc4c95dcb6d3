"""Records as samples of an anchor, each with the tree of another base's tokens.

Both bases read the same record, each with its own tokenizer and chat template. Letters: T tokens
of a sample.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from carryon.cache.alignment.boundaries import BoundaryRules, read_rules
from carryon.cache.alignment.contents import common_places, locate, mark_chat, with_own_blanks
from carryon.cache.alignment.known_text import (
    Known,
    Span,
    begins_with,
    begins_with_prefix,
    broken_tokens,
    find_known,
    map_known,
    refuse_other_contents,
)
from carryon.cache.alignment.prefixes import NotStableError, PrefixTokenizer
from carryon.cache.alignment.spelling import read_spelling
from carryon.cache.alignment.tree import TokenTree, grow_tree
from carryon.cache.corpus.chat.chat_template import ChatTemplate, UnfitError
from carryon.cache.corpus.chat.turns import Conversation
from carryon.cache.corpus.conversion import parse_variables
from carryon.cache.corpus.lengths import Cutter
from carryon.cache.corpus.record_tokens import Asks, Piece, RecordTokens
from carryon.cache.corpus.records import Chat, Pair, Record, Text
from carryon.cache.corpus.report import Tally
from carryon.cache.corpus.samples import Sample
from carryon.cache.corpus.tokenize import Encoder
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHECKED_SAMPLES, _CHECKED_ROWS, _CHECKED_CHARS = 32, 6, 2000
"""The last row of a sample, and rows of its first characters: each costs its whole beginning."""


class BaseTexts:
    """A base's reading of records: its tokenizer and its chat template."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        name: str,
        settings: CorpusSettings,
        max_tokens: int,
        end_tokens: Sequence[int],
        vocab_size: int | None,
    ) -> None:
        """Read the tokenizer.

        Args:
            tokenizer: of the base.
            name: of the base, for errors.
            settings: of the corpus, for this base; see `resolve_settings`.
            max_tokens: of a sample.
            end_tokens: ids at which generation with the base stops.
            vocab_size: rows of its embedding. None: the tokenizer's length.

        Raises:
            InputError: the tokenizer cannot be aligned.
        """
        self.encoder, self.settings = Encoder(tokenizer), settings
        self.rules: BoundaryRules = read_rules(self.encoder, name=name)
        self._spelling = read_spelling(self.encoder)
        self.name = name
        template = ChatTemplate(
            tokenizer,
            variables=parse_variables(settings.chat_template_kwargs),
            today=settings.template_date,
            end_tokens=end_tokens,
        )
        self._template = template
        ends = [end for end in (*end_tokens, tokenizer.eos_token_id) if end is not None]
        self._tokens = RecordTokens(
            self.encoder, template, settings=settings, max_tokens=max_tokens, end_tokens=ends
        )
        self.cutter = Cutter(
            max_tokens=max_tokens,
            policy=settings.long,
            start_pieces=settings.start_pieces,
            encoder=self.encoder,
            held_out=(),
            vocab_size=vocab_size or len(tokenizer),
        )

    def pieces(self, record: Record) -> list[Piece]:
        """Return a record as samples of any length."""
        return _drive(self._tokens.pieces(record, Tally()), self.encoder)

    def render(self, chat: Chat, suffix: str) -> tuple[str, tuple[int, ...]] | None:
        """Return the text of a conversation and where generation begins in it.

        Args:
            chat: the conversation.
            suffix: of the sample's id; `@3` is the turn of message 3, without what follows.

        Returns:
            None where the chat template rewrites earlier turns.

        Raises:
            UnfitError: the chat template refuses it or does not write all of it.
        """
        turn = suffix.partition("@")[2]
        if turn:
            stop = int(turn) + 1
            is_trained = [index == stop - 1 for index in range(stop)]
            chat = replace(chat, messages=chat.messages[:stop], is_trained=is_trained)
        is_last = bool(suffix) or self.settings.turns == "last"
        is_last = is_last or self.settings.mask == "completion"
        conversation = Conversation(chat, self._template, only_last=is_last)
        is_all = self.settings.mask == "all"
        rendering = conversation.render_shared() if conversation.trained else None
        if rendering is None and len(conversation.trained) == 1 and not is_all:
            rendering = next(conversation.render_turns())
        if is_all and (rendering is not None or not conversation.trained):
            rendering = conversation.render_all()
        return None if rendering is None else (rendering.text, tuple(rendering.prompts))

    def refuse_normalized(self, text: str, *, sample: str) -> None:
        """Check that the tokenizer's normalizer leaves a text as it is.

        Raises:
            InputError: it does not; names the sample.
        """
        if self.rules.is_nfc and not unicodedata.is_normalized("NFC", text):
            raise InputError(
                f"sample {sample!r}: expected text in Unicode's form NFC, as the tokenizer of "
                f"{self.name} changes it otherwise, got other text. Fix: normalize the data, or "
                "leave the record out"
            )

    def refuse_lost(self, text: str, *, sample: str) -> None:
        """Check that equal tokens mean an equal text.

        Raises:
            InputError: the tokenizer does not write a character as it is; names the sample.
        """
        if char := self._spelling.first_lost(text):
            raise InputError(
                f"sample {sample!r}: expected text that the tokens of {self.name} spell, got "
                f"U+{ord(char):04X}, which they do not: another text may have the same tokens. "
                "Fix: give the very files that the anchor was made of, or leave the record out"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AlignedSample:
    """A sample of the anchor, and the other base's tokens."""

    sample: Sample
    """As the anchor reads it."""
    tree: TokenTree
    """Of the other base, with a row for each of the anchor's tokens."""
    text_sha256: bytes
    """Of the UTF-8 of the anchor's text, up to the sample's end."""


class Aligner:
    """Aligns records; keeps the other tokenizer's cache."""

    def __init__(self, anchor: BaseTexts, other: BaseTexts, *, is_same_data: bool = False) -> None:
        """Start with an empty cache.

        Args:
            anchor: reading of the anchor's base.
            other: of the base that is aligned.
            is_same_data: whether the records are known to be the anchor's. Else equal tokens have
                to prove it, which those of some texts do not.
        """
        self._anchor, self._other, self._is_same_data = anchor, other, is_same_data
        self._broken = broken_tokens(anchor.encoder)
        self._tokenizer = PrefixTokenizer(other.encoder, other.rules)
        self._num_samples = 0

    def align(self, record: Record) -> Iterator[AlignedSample]:
        """Yield the samples of a record.

        Raises:
            InputError: the two bases do not read the same text, or a tokenizer's normalizer
                changes it; names the sample.
            NotStableError: the other tokenizer cannot be aligned.
        """
        if isinstance(record.content, Text):
            yield from self._align_text(record, record.content.text)
            return
        for piece in self._anchor.pieces(record):
            text, cuts = self._other_text(record, piece)
            own, text, places, cuts = self._contents(record, piece, text, cuts)
            start = self._other.encoder.start
            if _chat_of(record, piece.role) is not None or begins_with(
                start, text, self._other.encoder
            ):
                start = start[:0]  # the text has them
            for number, sample in enumerate(self._anchor.cutter.cut(record, piece, Tally())):
                if number:
                    raise InputError(
                        f"sample {sample.id!r}: expected a whole conversation or its beginning, "
                        "got a later piece. Fix: extract the anchor with --long truncate"
                    )
                known = self._known(sample, piece.text)
                stop = int(known.ends.max(initial=0))
                mapped = map_known(known, own, places, list(zip(piece.cuts, cuts, strict=True)))
                yield self._grow(sample, text, cuts, mapped, start, read=piece.text[:stop])

    def answer_start(self, record: Record) -> int:
        """Return the character at which generation begins in the anchor's text of a record."""
        return self._anchor.pieces(record)[0].cuts[0]

    def _align_text(self, record: Record, text: str) -> Iterator[AlignedSample]:
        anchor, encoder = self._anchor, self._other.encoder
        if not text.strip():
            return
        first = 0
        samples = anchor.cutter.cut_text(
            record, anchor.encoder.iter_encode(text), len(text), Tally()
        )
        for number, sample in enumerate(samples):
            has_start = number == 0 or self._other.settings.start_pieces
            is_written = number == 0 and begins_with(encoder.start, text, encoder)
            start = encoder.start if has_start and not is_written else encoder.start[:0]
            known = self._known(sample, text, start=first)
            own = Known(ends=known.ends - first, partial=known.partial)
            stop = max(int(sample.char_end.max(initial=0)), first)
            read = text[first:stop]
            self._refuse_unproven(read, sample=sample.id)
            yield self._grow(sample, read, (), own, start, read=read)
            first = stop

    def _known(self, sample: Sample, text: str, *, start: int = 0) -> Known:
        """Return what is known at each token of a sample that begins at a character of a text."""
        known = find_known(sample.tokens, sample.char_end, self._broken, start=start)
        if not start and begins_with_prefix(text, self._anchor.encoder):
            known.ends[np.argmax(sample.char_end > 0)] = 0
        return known

    def _other_text(self, record: Record, piece: Piece) -> tuple[str, tuple[int, ...]]:
        """Return the other base's rendering of a piece, and where generation begins in it."""
        chat = _chat_of(record, piece.role)
        if chat is None:
            return piece.text, piece.cuts
        rendering = self._other.render(chat, piece.suffix)
        if rendering is None:
            raise InputError(
                f"sample {record.id + piece.suffix!r}: expected a chat template of "
                f"{self._other.name} that writes each turn as before it went on, got one that "
                "rewrites earlier turns. Fix: extract the anchor with --turns last, or give "
                "--chat-template FILE"
            )
        return rendering

    def _contents(
        self, record: Record, piece: Piece, text: str, cuts: tuple[int, ...]
    ) -> tuple[list[Span], str, list[Span], tuple[int, ...]]:
        """Return the places of the contents in both texts; the other with the anchor's blanks."""
        name = record.id + piece.suffix
        chat = _chat_of(record, piece.role)
        if chat is None:  # prompt and completion
            bounds = [0, *piece.cuts, len(piece.text)]
            spans = [(a, b) for a, b in pairwise(bounds) if a < b]
            found: tuple[list[Span], list[Span]] | None = (spans, spans)
        else:
            found = self._places(chat, piece, text)
        if found is None or len(cuts) != len(piece.cuts):
            raise InputError(
                f"sample {name!r}: expected chat templates that write the texts of messages as "
                "they are and in one order, got others. Fix: --chat-template FILE"
            )
        own = found[0]
        text, places, cuts = with_own_blanks(piece.text, own, text, found[1], cuts)
        refuse_other_contents(piece.text, own, text, places, sample=name)
        for start, stop in own:
            self._refuse_unproven(piece.text[start:stop], sample=name)
        return own, text, places, cuts

    def _refuse_unproven(self, text: str, *, sample: str) -> None:
        """Check that the anchor's tokens of a text are those of no other text."""
        self._anchor.refuse_normalized(text, sample=sample)
        if not self._is_same_data:
            self._anchor.refuse_lost(text, sample=sample)

    def _places(self, chat: Chat, piece: Piece, text: str) -> tuple[list[Span], list[Span]] | None:
        for whole_arguments, with_blanks in product((True, False), repeat=2):
            marks = mark_chat(chat, whole_arguments=whole_arguments, with_blanks=with_blanks)
            try:
                own = self._anchor.render(marks.chat, piece.suffix)
                other = self._other.render(marks.chat, piece.suffix)
            except UnfitError:
                continue
            if own is None or other is None:
                continue
            first = locate(own[0], piece.text, marks)
            second = locate(other[0], text, marks)
            if first is None or second is None:
                continue
            # a prompt is known as a whole, and its template trims it when answers are generated
            trimmed = (
                set() if self._anchor.settings.mask == "all" else {*marks.texts} - marks.answers
            )
            found = common_places(first, second, piece.text, text, trimmed=trimmed)
            if found is not None:
                pairs = [(a, b) for a, b in zip(*found, strict=True) if a[0] < a[1]]
                if any(piece.text[a:b].strip() for (a, b), _ in pairs):
                    return [a for a, _ in pairs], [b for _, b in pairs]
        return None

    def _grow(
        self,
        sample: Sample,
        text: str,
        cuts: Sequence[int],
        known: Known,
        start: NDArray[np.int32],
        *,
        read: str,
    ) -> AlignedSample:
        stop = int(known.ends.max(initial=0))
        self._other.refuse_normalized(text[:stop], sample=sample.id)
        try:
            tree = grow_tree(
                text, cuts, known.ends, known.partial, start=start, tokenizer=self._tokenizer
            )
            self._num_samples += 1
            if self._num_samples <= _CHECKED_SAMPLES:
                check_tree(tree, text, cuts, known.ends, encoder=self._other.encoder)
        except NotStableError as error:
            raise NotStableError(f"sample {sample.id!r}: {error}") from error
        digest = hashlib.sha256(read.encode("utf-8", "surrogatepass")).digest()
        return AlignedSample(sample=sample, tree=tree, text_sha256=digest)


def check_tree(
    tree: TokenTree,
    text: str,
    cuts: Sequence[int],
    ends: NDArray[np.int64],
    *,
    encoder: Encoder,
    num_rows: int = _CHECKED_ROWS,
) -> None:
    """Compare some paths of a tree with the tokens of the beginnings themselves.

    Raises:
        NotStableError: one is another.
    """
    num_short = max(1, int(np.searchsorted(ends, _CHECKED_CHARS, side="right")))
    rows = np.linspace(0, num_short - 1, num_rows - 1).astype(int)
    for row in np.unique([*rows, len(ends) - 1]).tolist():
        end = int(ends[row])
        known = [(text[:end], list(cuts))] if end else []
        expected = [int(x) for tokens in encoder.encode_all(known) for x in tokens.ids]
        path = path_to(tree, int(tree.exact[row]))
        if expected != path[len(path) - len(expected) :]:
            raise NotStableError(
                f"token {row}: expected the tokens of its text alone, got others. Fix: use another "
                "base, as this tokenizer cannot be aligned"
            )


def path_to(tree: TokenTree, node: int) -> list[int]:
    """Return the tokens from the first node of a tree to this one."""
    path = []
    while node >= 0:
        path.append(int(tree.tokens[node]))
        node = int(tree.parents[node])
    return path[::-1]


def _drive(asks: Asks, encoder: Encoder) -> list[Piece]:
    """Answer what a record asks for."""
    try:
        request = next(asks)
        while True:
            request = asks.send(encoder.encode_all([request])[0])
    except StopIteration as end:
        pieces: list[Piece] = end.value
        return pieces


def _chat_of(record: Record, role: int) -> Chat | None:
    content = record.content
    if isinstance(content, Pair):
        content = content.chosen if role == 1 else content.rejected
    return content if isinstance(content, Chat) else None
