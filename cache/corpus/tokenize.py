"""Texts as tokens, each with its end in the text.

No token reaches over the place where generation begins: what stands before it is tokenized as the
prompt of an engine, and what follows as a continuation, without the blank that some tokenizers put
before any text. Long texts are tokenized window by window, with the same tokens as in one piece.

Letters: T tokens of a text.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.byte_offsets import count_bytes, find_places
from carryon.cache.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

WINDOW_CHARS = 1 << 18
"""Characters of a long text that are tokenized at once."""
_MARGIN_CHARS = 4096
"""Characters at the end of a window whose tokens depend on what follows."""
_CACHED_CHARS, _CACHED_TEXTS = 200, 4096
Request = tuple[str, Sequence[int]]
"""A text, and the characters in it that no token may reach over."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """Tokens of a text."""

    ids: NDArray[np.int32]
    """[T] int32."""
    starts: NDArray[np.int32]
    """[T] int32: first character of the token in the text."""
    ends: NDArray[np.int32]
    """[T] int32: end of the token in the text. Never decreases."""

    @classmethod
    def at(cls, ids: NDArray[np.int32], place: int) -> "Tokens":
        """Return tokens of no width at a character, such as start tokens."""
        places = np.full(len(ids), place, dtype=np.int32)
        return cls(ids=ids, starts=places, ends=places)

    def part(self, start: int, stop: int) -> "Tokens":
        """Return some of the tokens."""
        return Tokens(
            ids=self.ids[start:stop], starts=self.starts[start:stop], ends=self.ends[start:stop]
        )

    def shifted(self, num_chars: int) -> "Tokens":
        """Return the same tokens, `num_chars` characters further on."""
        starts, ends = self.starts + np.int32(num_chars), self.ends + np.int32(num_chars)
        return Tokens(ids=self.ids, starts=starts, ends=ends)


class Encoder:
    """A tokenizer that adds no special tokens, and knows those that the original adds."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Copy a tokenizer.

        Raises:
            InputError: not a fast tokenizer, so it gives no offsets of tokens in the text.
        """
        original: Any = get_backend(tokenizer)
        # A copy, 0.1 s at V = 49,152: without the post-processor, which may trim blanks off the
        # offsets (GPT-NeoX's does), and without truncation and padding, which may be switched on
        self._first: Tokenizer = type(original).from_str(original.to_str())
        self._first.post_processor = None
        self._first.no_truncation()
        self._first.no_padding()
        added = self._first.get_added_tokens_decoder()
        rules = json.loads(self._first.to_str())
        self._num_bytes = count_bytes(rules, added)
        self.has_prefix = _drop_prefix(rules)
        """Whether it puts a blank before any text."""
        self._next: Tokenizer = (
            type(original).from_str(json.dumps(rules)) if self.has_prefix else self._first
        )
        self._added = frozenset(added)
        names = sorted((token.content for token in added.values()), key=len, reverse=True)
        self._any_added = re.compile("|".join(map(re.escape, names)) or "(?!)")
        # The tokens that the original puts before any text, read off a text of one letter
        letter = tokenizer("a", return_special_tokens_mask=True)
        num_start = [*letter["special_tokens_mask"], 0].index(0)
        self.start = np.array(letter["input_ids"][:num_start], dtype=np.int32)
        """Tokens before a text, such as a begin-of-text token."""
        self.end: int | None = tokenizer.eos_token_id
        """The end-of-text token, None where the tokenizer has none."""
        self.name_of = tokenizer.convert_ids_to_tokens
        self._cache: dict[str, list[int]] = {}

    def backend(self, *, is_next: bool) -> "Tokenizer":
        """Return the tokenizer of a text, or of one that continues another."""
        return self._next if is_next else self._first

    @property
    def required_end(self) -> int:
        """Return the end-of-text token.

        Raises:
            InputError: the tokenizer has none.
        """
        if self.end is None:
            raise InputError(
                "the tokenizer has no end-of-text token, with which prompt + completion and text "
                "records end: set its eos_token, or give messages"
            )
        return self.end

    def encode(self, text: str) -> Tokens:
        """Return the tokens of a text."""
        return self._encode_each([text])[0]

    def encode_all(self, requests: Sequence[Request]) -> list[Tokens]:
        """Return the tokens of texts, none of which reaches over a cut."""
        bounds = [[0, *sorted({x for x in cuts if 0 < x < len(t)}), len(t)] for t, cuts in requests]
        texts = [
            [text[start:stop] for start, stop in pairwise(each)]
            for (text, _), each in zip(requests, bounds, strict=True)
        ]
        if self.has_prefix:
            parts = [
                part
                for first, *others in texts
                for part in (self.encode(first), *map(self.encode_next, others))
            ]
        else:
            parts = self._encode_each([text for each in texts for text in each])
        found, at = [], 0
        for each in bounds:
            own = parts[at : at + len(each) - 1]
            at += len(own)
            own = [
                part.shifted(start) if start else part
                for start, part in zip(each, own, strict=False)
            ]
            found.append(join(own) if len(own) > 1 else own[0])
        return found

    def _encode_each(self, texts: list[str]) -> list[Tokens]:
        """Return the tokens of each text, as if it stood by itself."""
        if self._num_bytes is None:
            return [_tokens(x) for x in self._first.encode_batch(texts, add_special_tokens=False)]
        encodings = self._first.encode_batch_fast(texts, add_special_tokens=False)
        found = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            places = find_places(text, ids, self._num_bytes)
            found.append(
                Tokens(ids=ids, starts=places[0], ends=places[1])
                if places
                else _tokens(self._first.encode(text, add_special_tokens=False))
            )
        return found

    def encode_next(self, text: str) -> Tokens:
        """Return the tokens of a text that continues another."""
        if not self.has_prefix:
            return self.encode(text)
        # behind an added token a blank is put as in any text
        added = self._any_added.search(text)
        length = added.start() if added else len(text)
        first = _tokens(self._next.encode(text[:length], add_special_tokens=False))
        return join([first, self.encode(text[length:]).shifted(length)]) if added else first

    def ends_a_prompt(self, text: str, tokens: Tokens, cut: int, *, since: int) -> bool:
        """Tell whether the tokens of a whole text begin as those of the prompt `text[:cut]`.

        What follows may change the last tokens of a prompt: "\\n\\n" is one token at its end, and
        two before a letter. Only the last of them are compared, from an added token or `since` on.

        Args:
            text: the whole text.
            tokens: of the whole text.
            cut: end of the prompt.
            since: a character where a token is known to begin whatever follows.
        """
        stop = int(np.searchsorted(tokens.starts, cut))
        first = int(np.searchsorted(tokens.starts, since))
        if stop and tokens.ids[stop - 1] in self._added:
            return True  # whatever follows; it may take in the blanks behind it
        if stop and tokens.ends[stop - 1] > cut:
            return False
        is_next = since > 0
        for number in range(stop - 1, first - 1, -1):
            if int(tokens.ids[number]) in self._added:
                # encoded with the added token: the text behind it depends on it
                first, since, is_next = number, int(tokens.starts[number]), False
                break
        expected = self._cached_ids(text[since:cut], is_next=is_next)
        return bool(expected == tokens.ids[first:stop].tolist())

    def _cached_ids(self, text: str, *, is_next: bool) -> list[int]:
        key = f"{is_next:d}{text}"
        if key not in self._cache:
            ids: list[int] = (self.encode_next if is_next else self.encode)(text).ids.tolist()
            if len(text) > _CACHED_CHARS or len(self._cache) >= _CACHED_TEXTS:
                return ids
            self._cache[key] = ids
        return self._cache[key]

    def mark(self, tokens: Tokens, targets: Sequence[tuple[int, int]] | None) -> NDArray[np.uint8]:
        """Return, [T] uint8, 1 for tokens that overlap a target character (None: all of them).

        An added token that begins before a target and takes in blanks of it is none.
        """
        if targets is None:
            return np.ones(len(tokens.ids), dtype=np.uint8)
        loss_mask = np.zeros(len(tokens.ids), dtype=np.uint8)
        # a token of no width, such as a blank that a normalizer adds, goes with the one before it
        starts = np.minimum(tokens.starts, tokens.ends - 1)
        for start, stop in targets:
            first = int(np.searchsorted(tokens.ends, start, side="right"))
            last = int(np.searchsorted(starts, stop))
            is_before = first < last and starts[first] < start
            loss_mask[first + (is_before and int(tokens.ids[first]) in self._added) : last] = 1
        return loss_mask

    def iter_encode(self, text: str) -> Iterator[Tokens]:
        """Yield the tokens of a text, a window at a time; the same as of `encode`."""
        if len(text) <= WINDOW_CHARS:
            yield self.encode(text)
            return
        first, size = 0, WINDOW_CHARS
        while True:
            window = text[first : first + size]
            backend = self._next if first else self._first
            encoding = backend.encode(window, add_special_tokens=False)
            tokens = _tokens(encoding)
            if first + size >= len(text):
                yield tokens.shifted(first)
                return
            kept = _last_boundary(tokens, encoding.word_ids, window)
            if not kept:  # one long word: look further
                size *= 2
                continue
            yield Tokens(
                ids=tokens.ids[:kept], starts=tokens.starts[:kept], ends=tokens.ends[:kept]
            ).shifted(first)
            first, size = first + int(tokens.starts[kept]), WINDOW_CHARS


def get_backend(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer":
    """Return the fast tokenizer behind a tokenizer of transformers.

    Raises:
        InputError: there is none, so it gives no offsets of tokens in the text.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r}: expected a fast tokenizer, which gives the "
            f"offset of each token in the text, got {type(tokenizer).__name__}"
        )
    return backend


def join(parts: Sequence[Tokens]) -> Tokens:
    """Return the tokens of consecutive parts of a text."""
    ids, starts, ends = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("ids", "starts", "ends")
    )
    return Tokens(ids=ids, starts=starts, ends=np.maximum.accumulate(ends))


def _tokens(encoding: Any) -> Tokens:  # noqa: ANN401 -- of the library tokenizers
    offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
    return Tokens(
        ids=np.array(encoding.ids, dtype=np.int32),
        starts=offsets[:, 0],
        # never decreases, even where a normalizer has reordered characters
        ends=np.maximum.accumulate(offsets[:, 1]) if len(offsets) else offsets[:, 1],
    )


def _last_boundary(tokens: Tokens, words: Sequence[int | None], window: str) -> int:
    """Return the number of tokens before the last word that begins well within a window.

    A word begins with a blank behind a letter, and where the tokenizer splits text into words.
    0: there is none.
    """
    has_words = len(set(words)) > 1
    last = int(np.searchsorted(tokens.starts, len(window) - _MARGIN_CHARS))
    for index in range(min(last, len(words) - 1), 0, -1):
        start = int(tokens.starts[index])
        is_word = words[index] != words[index - 1] or not has_words
        is_blank = window[start].isspace() and not window[start - 1].isspace()
        if is_word and is_blank and tokens.ends[index - 1] <= start:
            return index
    return 0


def _drop_prefix(rules: dict[str, Any]) -> bool:
    """Take out of a tokenizer's rules the blank before any text; tell whether there was one."""
    had_prefix = False
    for name in ("normalizer", "pre_tokenizer"):
        steps = rules.get(name)
        for step in _steps(steps):
            if step.get("type") == "Prepend":
                step.update({"type": "Replace", "pattern": {"String": "\0"}, "content": "\0"})
                step.pop("prepend", None)
                had_prefix = True
            elif step.get("prepend_scheme", "never") != "never":
                step["prepend_scheme"] = "never"
                had_prefix = True
            elif step.get("add_prefix_space"):
                step["add_prefix_space"] = False
                had_prefix = True
    return had_prefix


def _steps(rules: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401 -- JSON of any tokenizer
    if isinstance(rules, dict):
        yield rules
        for key in ("normalizers", "pretokenizers"):
            for step in rules.get(key) or ():
                yield from _steps(step)
