"""Records as samples: rendered, tokenized, marked, cut to length, and every loss counted."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.chat_template import ChatTemplate, UnfitError
from carryon.cache.corpus.files import read_shard
from carryon.cache.corpus.records import Chat, Completion, Pair, Record, Text, read_record
from carryon.cache.corpus.report import Tally
from carryon.cache.corpus.rows import BadRow, Row, Shard
from carryon.cache.corpus.samples import ROLES, Sample, SampleWriter, hash_id
from carryon.cache.corpus.tokenize import Encoder, Tokens, join
from carryon.cache.corpus.turns import Conversation, Rendering
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings, DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MASKS = {
    Chat: ("messages", ("assistant", "completion", "all")),
    Completion: ("prompt and completion", ("completion", "all")),
    Text: ("text", ("all",)),
    Pair: ("preference pair", ("assistant", "completion")),
}
"""Name and masks of each kind of record; `auto` is the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """Counts of the samples of a few shards, whose file is written."""

    tally: Tally
    counts: Mapping[str, int]
    """`samples`, `tokens` and `supervised_tokens`."""
    kinds: Mapping[str, int]
    """Samples of each kind of record."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """`where` and `problem` of each row that was left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """A sample to be, before it is cut."""

    suffix: str
    tokens: Tokens
    loss_mask: NDArray[np.uint8]
    role: int = 0


class Converter:
    """Converts shards of rows to files of samples."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        settings: CorpusSettings,
        data_settings: DataSettings,
        max_tokens: int,
        held_out: Container[str],
        end_tokens: Sequence[int],
        vocab_size: int | None,
    ) -> None:
        """Prepare tokenizer and chat template; arguments as of `read_corpus`."""
        self._settings, self._data_settings = settings, data_settings
        self._max_tokens, self._held_out = max_tokens, held_out
        self._vocab_size = vocab_size or len(tokenizer)
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        self._template = ChatTemplate(
            tokenizer,
            variables=parse_variables(settings.chat_template_kwargs),
            today=settings.template_date,
            end_tokens=end_tokens,
        )
        ends = [*end_tokens, tokenizer.eos_token_id]
        self._ends = frozenset(end for end in ends if end is not None)

    def convert(self, shards: Iterable[Shard], path: Path) -> ShardResult:
        """Write the samples of consecutive shards to an Arrow file.

        Raises:
            InputError: a row is wrong, or unfit for the chat template, and is not to be skipped;
                or a setting does not fit a record. The text names the row.
        """
        tally, counts, kinds = Tally(), Counter[str](), Counter[str]()
        skipped: list[dict[str, str]] = []
        with SampleWriter(path) as writer:
            for row in chain.from_iterable(map(read_shard, shards)):
                for kind, sample in self.convert_row(row, tally, skipped):
                    writer.write(sample)
                    counts["samples"] += 1
                    counts["supervised_tokens"] += int(sample.loss_mask.sum())
                    kinds[kind] += 1
        counts["tokens"] = tally.tokens
        return ShardResult(tally=tally, counts=counts, kinds=kinds, skipped=skipped)

    def convert_row(
        self, row: Row | BadRow, tally: Tally, skipped: list[dict[str, str]]
    ) -> Iterator[tuple[str, Sample]]:
        """Yield the kind of a row's record and each of its samples; a row left out is listed.

        Raises:
            InputError: as `convert`.
        """
        tally.records += 1
        num_samples = 0
        try:
            record = _read(row)
            for sample in self.samples_of(record, tally):
                num_samples += 1
                tally.tokens += len(sample.tokens)
                yield _MASKS[type(record.content)][0], sample
        except _RowError as error:
            skipped.append(self._skip(error, tally))
        tally.kept += num_samples > 0

    def samples_of(self, record: Record, tally: Tally) -> Iterator[Sample]:
        """Yield the samples of a record, and count what it loses."""
        try:
            if isinstance(record.content, Text):
                self._check_mask(record)
                yield from self._text_samples(record, record.content.text, tally)
                return
            pieces = list(self._pieces(record, tally))
        except UnfitError as error:
            raise _RowError("unfit for the chat template", record.where, str(error)) from error
        except InputError as error:
            problem = str(error).removeprefix(f"{record.where}: ")
            raise InputError(f"{record.where}: {problem}") from error
        samples = [sample for piece in pieces for sample in self._cut(record, piece, tally)]
        if isinstance(record.content, Pair) and len(samples) < 2:
            tally.count("no target", where=record.where)
            return
        yield from samples

    def _pieces(self, record: Record, tally: Tally) -> Iterator[_Piece]:
        chosen_mask = self._check_mask(record)
        content = record.content
        if isinstance(content, Completion):
            yield from self._completion(content, chosen_mask, record, tally)
        elif isinstance(content, Chat):
            yield from self._chat(content, chosen_mask, record, tally)
        elif isinstance(content, Pair):
            for role, half in enumerate((content.chosen, content.rejected), start=1):
                pieces = (
                    self._chat(half, "completion", record, tally)
                    if isinstance(half, Chat)
                    else self._completion(half, "completion", record, tally)
                )
                for piece in pieces:
                    yield replace(piece, suffix=f"/{ROLES[role]}", role=role)

    def _check_mask(self, record: Record) -> str:
        kind, masks = _MASKS[type(record.content)]
        mask = self._settings.mask
        if mask not in ("auto", *masks):
            raise InputError(
                f"{record.where}: mask {mask!r} does not fit {kind}: "
                f"expected auto or {' or '.join(masks)}"
            )
        return masks[0] if mask == "auto" else mask

    def _completion(
        self, content: Completion, mask: str, record: Record, tally: Tally
    ) -> Iterator[_Piece]:
        if not content.completion:
            tally.count("no target", where=record.where)
            return
        length = len(content.prompt)
        text = content.prompt + content.completion
        tokens = self._framed(self._encoder.encode_split(text, [length]), len(text))
        targets = None if mask == "all" else [(length, len(text) + 1)]
        loss_mask = self._encoder.mark(tokens, targets)
        if targets is None:
            loss_mask[tokens.ends == 0] = 0  # start tokens
        yield _Piece(suffix="", tokens=tokens, loss_mask=loss_mask)

    def _framed(self, tokens: Tokens, num_chars: int) -> Tokens:
        """Add start tokens and the end-of-text token, unless the text has them."""
        start, parts = self._encoder.start, [tokens]
        if len(start) and tokens.ids[: len(start)].tolist() != start.tolist():
            parts.insert(0, _special(start, 0))
        if not len(tokens.ids) or tokens.ids[-1] != self._end():
            parts.append(_special(np.array([self._end()], dtype=np.int32), num_chars))
        return join(parts)

    def _end(self) -> int:
        if self._encoder.end is None:
            raise InputError(
                "the tokenizer has no end-of-text token, with which prompt + completion and text "
                "records end: set its eos_token, or give messages"
            )
        return self._encoder.end

    def _chat(self, chat: Chat, mask: str, record: Record, tally: Tally) -> Iterator[_Piece]:
        only_last = mask == "completion" or self._settings.turns == "last"
        conversation = Conversation(chat, self._template, only_last=only_last)
        count = partial(tally.count, where=record.where)
        for note in conversation.notes:
            count(note)
        if any(
            end in str(message.get("content") or "")
            for end in self._template.end_names
            for message in chat.messages
        ):
            count("control tokens within the text of a message")
        if mask == "all":
            rendering = conversation.render_all()
            tokens = self._encoder.encode(rendering.text)
            yield _Piece(suffix="", tokens=tokens, loss_mask=self._encoder.mark(tokens, None))
            return
        if not conversation.trained:
            count("no target")
            return
        shared = conversation.render_shared()
        num_turns = len(conversation.trained)
        if shared:
            encode = self._encode_turn if num_turns == 1 else self._encode_whole
            if shared_tokens := encode(shared):
                yield self._marked(shared, shared_tokens, count)
                return
        if num_turns > 1:
            count("one sample per turn, as the chat template rewrites earlier turns")
        for number, rendering in enumerate(conversation.render_turns()):
            piece = self._marked(rendering, self._encode_turn(rendering), count)
            if self._is_beyond(piece):  # so are the longer prompts of all later turns
                count("prompt longer than a sample", records=num_turns - number)
                return
            yield piece

    def _is_beyond(self, piece: _Piece) -> bool:
        """Tell whether a piece would lose all its targets by being cut off."""
        first = int(np.argmax(piece.loss_mask)) if piece.loss_mask.any() else 0
        return first >= self._max_tokens and self._settings.long in ("auto", "truncate")

    def _encode_whole(self, rendering: Rendering) -> Tokens | None:
        """Return the tokens of a text, None if a prompt alone would have others."""
        text, encoder = rendering.text, self._encoder
        tokens = encoder.encode(text)
        since = 0
        for start, stop in rendering.targets or ():
            is_prompt = start in rendering.prompts
            if is_prompt and not encoder.ends_a_prompt(text, tokens, start, since=since):
                return None
            if not encoder.ends_a_prompt(text, tokens, stop, since=start if is_prompt else since):
                return None
            since = stop
        return tokens

    def _encode_turn(self, rendering: Rendering) -> Tokens:
        """Return the tokens of a text with one target."""
        encoder = self._encoder
        # behind a prompt some tokenizers put a blank that they would not put by itself
        tokens = self._encode_whole(rendering) if encoder.has_prefix else None
        return tokens or encoder.encode_split(rendering.text, rendering.prompts)

    def _marked(self, rendering: Rendering, tokens: Tokens, count: Any) -> _Piece:  # noqa: ANN401
        for note in rendering.notes:
            count(note)
        loss_mask = self._encoder.mark(tokens, rendering.targets)
        for start, stop in (rendering.targets or ()) if self._ends else ():
            first = int(np.searchsorted(tokens.ends, start, side="right"))
            last = int(np.searchsorted(tokens.starts, stop))
            if self._ends.isdisjoint(tokens.ids[first:last].tolist()):
                count("target without an end token")
        suffix = "" if rendering.turn is None else f"@{rendering.turn}"
        return _Piece(suffix=suffix, tokens=tokens, loss_mask=loss_mask)

    def _cut(self, record: Record, piece: _Piece, tally: Tally) -> Iterator[Sample]:
        """Yield a piece as samples of limited length."""
        num_tokens, limit, policy = len(piece.tokens.ids), self._max_tokens, self._settings.long
        count = partial(tally.count, where=record.where)
        name = record.id + piece.suffix
        ranges = [range(num_tokens)]
        if num_tokens > limit:
            policy = "truncate" if policy == "auto" else policy
            if policy == "error":
                raise self._too_long(record, num_tokens)
            if policy == "skip":
                count("too long, left out", tokens=num_tokens)
                return
            if policy == "truncate":
                count("too long, cut off", tokens=num_tokens - limit)
                ranges = [range(limit)]
            else:
                count("split into pieces")
                ranges = [
                    range(at, min(at + limit, num_tokens)) for at in range(0, num_tokens, limit)
                ]
        for number, part in enumerate(ranges):
            rows = slice(part.start, part.stop)
            suffix = f"#{number}" if len(ranges) > 1 else ""
            sample = self._sample(
                record,
                name + suffix,
                piece.tokens.ids[rows],
                piece.loss_mask[rows],
                piece.tokens.ends[rows],
                role=piece.role,
            )
            if sample.loss_mask.any():
                yield sample
            else:
                count("no target", tokens=len(sample.tokens), records=int(len(ranges) == 1))

    def _text_samples(self, record: Record, text: str, tally: Tally) -> Iterator[Sample]:
        """Yield a text as samples, with a few windows of it in memory."""
        limit, policy = self._max_tokens, self._settings.long
        policy = "split" if policy == "auto" else policy
        start = self._encoder.start if self._settings.start_pieces else self._encoder.start[:0]
        number, num_tokens = 0, 0
        held: list[Tokens] = []
        kept: Tokens | None = None
        for tokens in self._framed_windows(text):
            num_tokens += len(tokens.ids)
            if kept is None or len(kept.ids) < limit or policy == "split":
                held.append(tokens)
                kept = join(held)
                held = [kept]
            while policy == "split" and kept is not None and len(kept.ids) > limit:
                yield self._text_sample(record, f"#{number}", _part(kept, 0, limit))
                place = int(kept.ends[limit - 1])
                kept = join([_special(start, place), _part(kept, limit, len(kept.ids))])
                held = [kept]
                number += 1
        if num_tokens > limit and policy in ("skip", "error"):
            if policy == "error":
                raise self._too_long(record, num_tokens)
            tally.count("too long, left out", where=record.where, tokens=num_tokens)
            return
        assert kept is not None
        if num_tokens > limit and policy == "truncate":
            tally.count("too long, cut off", where=record.where, tokens=num_tokens - limit)
            kept = _part(kept, 0, limit)
        if number:
            tally.count("split into pieces", where=record.where)
        sample = self._text_sample(record, f"#{number}" if number else "", kept)
        if sample.loss_mask.any():
            yield sample
        elif not number:
            tally.count("no target", where=record.where, tokens=len(sample.tokens))

    def _framed_windows(self, text: str) -> Iterator[Tokens]:
        """Yield the tokens of a text with start tokens and end-of-text token."""
        start, end = self._encoder.start, self._end()
        last = -1
        for number, tokens in enumerate(self._encoder.iter_encode(text)):
            has_start = tokens.ids[: len(start)].tolist() == start.tolist()
            if number == 0 and len(start) and not has_start:
                yield _special(start, 0)
            if len(tokens.ids):
                last = int(tokens.ids[-1])
                yield tokens
        if last != end:
            yield _special(np.array([end], dtype=np.int32), len(text))

    def _text_sample(self, record: Record, suffix: str, tokens: Tokens) -> Sample:
        loss_mask = np.ones(len(tokens.ids), dtype=np.uint8)
        num_start = len(self._encoder.start)
        if num_start and tokens.ids[:num_start].tolist() == self._encoder.start.tolist():
            loss_mask[:num_start] = 0
        return self._sample(record, record.id + suffix, tokens.ids, loss_mask, tokens.ends, role=0)

    def _sample(
        self,
        record: Record,
        name: str,
        tokens: NDArray[np.int32],
        loss_mask: NDArray[np.uint8],
        char_end: NDArray[np.int32],
        *,
        role: int,
    ) -> Sample:
        if len(tokens) and (largest := int(tokens.max())) >= self._vocab_size:
            shown = self._tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"{record.where}: sample {name!r}: token {shown!r}: expected an id below "
                f"{self._vocab_size}, the rows of the base's embedding, got {largest}. Fix: use "
                "the base's own tokenizer and chat template"
            )
        loss_mask = loss_mask.copy()
        loss_mask[:1] = 0  # no token before it could predict it
        is_held_out = record.is_held_out or record.id in self._held_out or name in self._held_out
        return Sample(
            id=name,
            tokens=tokens,
            loss_mask=loss_mask,
            char_end=char_end,
            is_held_out=is_held_out,
            group=hash_id(record.id),
            role=role,
        )

    def _too_long(self, record: Record, num_tokens: int) -> InputError:
        return InputError(
            f"{record.where}: sample {record.id!r}: expected at most {self._max_tokens} tokens, "
            f"got {num_tokens}: shorten it, raise max_tokens, or set long to truncate, split or "
            "skip"
        )

    def _skip(self, error: "_RowError", tally: Tally) -> dict[str, str]:
        """Count a row that is left out, or raise if it may not be."""
        is_bad = error.reason == "bad row"
        may_skip = (
            self._data_settings.bad_rows == "skip" if is_bad else self._data_settings.drop_unfit
        )
        if not may_skip:
            raise InputError(f"{error.where}: {error.problem}") from error
        tally.count(error.reason, where=error.where)
        return {"where": error.where, "problem": error.problem}


class _RowError(Exception):
    """A row without samples."""

    def __init__(self, reason: str, where: str, problem: str) -> None:
        super().__init__(reason, where, problem)
        self.reason, self.where, self.problem = reason, where, problem


def parse_variables(options: Sequence[str]) -> dict[str, Any]:
    """Return NAME=VALUE options as values: JSON where it is JSON, else a text.

    Raises:
        InputError: an option is not of this form.
    """
    import json

    variables: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(
                f"chat_template_kwargs: expected NAME=VALUE, got {option!r}. Fix: "
                "--chat-template-kwargs enable_thinking=false"
            )
        try:
            variables[name] = json.loads(value)
        except ValueError:
            variables[name] = value
    return variables


def _read(row: Row | BadRow) -> Record:
    if isinstance(row, BadRow):
        raise _RowError("bad row", row.where, row.problem)
    try:
        return read_record(row)
    except InputError as error:
        problem = str(error).removeprefix(f"{row.where}: ")
        raise _RowError("bad row", row.where, problem) from error


def _special(ids: NDArray[np.int32], place: int) -> Tokens:
    places = np.full(len(ids), place, dtype=np.int32)
    return Tokens(ids=ids, starts=places, ends=places)


def _part(tokens: Tokens, start: int, stop: int) -> Tokens:
    return Tokens(
        ids=tokens.ids[start:stop], starts=tokens.starts[start:stop], ends=tokens.ends[start:stop]
    )
