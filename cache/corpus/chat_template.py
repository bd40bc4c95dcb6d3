"""Records as text, with the characters that are training targets.

    record               tokenized texts        `mask`: the targets
    messages             the rendered chat      `assistant`: each assistant turn, from the end of
                         template               the generation prompt through its end-of-turn
                                                token; `completion`: the last such turn; `all`:
                                                everything
    prompt + completion  prompt, completion     `completion`: the completion; `all`: everything
    text                 text                   `all`: everything

`auto` is the first mask in the record's row.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from carryon.cache.corpus.records import Record
from carryon.cache.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mask = Literal["auto", "assistant", "completion", "all"]

_KINDS: dict[type, tuple[str, tuple[str, ...]]] = {
    list: ("messages", ("assistant", "completion", "all")),
    tuple: ("prompt and completion", ("completion", "all")),
    str: ("text", ("all",)),
}
"""Name and masks of each kind of record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A text that is tokenized separately: no token reaches across its ends."""

    text: str
    targets: list[tuple[int, int]] | None
    """(start, stop) of the target characters in `text`; None: all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """A record's parts, in order."""

    parts: list[Part]
    is_framed: bool
    """Whether to add the tokenizer's start tokens and the end-of-text token. A chat template
    already contains them."""


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Find the tokens that may end a turn."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | {tokenizer.eos_token or ""}
        names = sorted(filter(None, special), key=len, reverse=True)
        any_special = "|".join(map(re.escape, names)) or "(?!)"
        self._closing = re.compile(rf"({any_special})(?:{any_special}|\s)*\Z")

    def render(self, record: Record, *, mask: Mask) -> Rendering:
        """Return the texts of a record and their targets.

        Raises:
            InputError: `mask` does not fit the record, the chat template is missing or refuses
                the record, or the record is not valid Unicode.
        """
        content = record.content
        kind, masks = _KINDS[type(content)]
        if mask not in ("auto", *masks):
            raise InputError(
                f"{record.where}: mask {mask!r} does not fit {kind}: "
                f"expected auto or {' or '.join(masks)}"
            )
        chosen = masks[0] if mask == "auto" else mask
        if isinstance(content, str):
            parts = [Part(text=content, targets=None)]
        elif isinstance(content, tuple):
            prompt, completion = content
            parts = [
                Part(text=prompt, targets=None if chosen == "all" else []),
                Part(text=completion, targets=None),
            ]
        else:
            parts = [self._render_messages(record.where, content, mask=chosen)]
        for part in parts:
            _refuse_surrogates(part.text, record.where)
        return Rendering(parts=parts, is_framed=not isinstance(content, list))

    def _render_messages(
        self, where: str, messages: Sequence[dict[str, Any]], *, mask: str
    ) -> Part:
        if not self._tokenizer.chat_template:
            raise InputError(
                f"{where}: has messages, but the tokenizer {self._tokenizer.name_or_path!r} has "
                "no chat template: give records with prompt and completion"
            )
        whole = self._apply(where, messages)
        if mask == "all":
            return Part(text=whole, targets=None)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if mask == "completion":
            turns = turns[-1:]
        if turns and turns[0] == 0:
            raise InputError(
                f"{where}: messages[0]: expected a system or user message before the first "
                "assistant turn that is a target: add one, or set mask to all"
            )
        targets = []
        for turn in turns:
            opened = self._apply(where, messages[:turn], add_generation_prompt=True)
            closed = self._apply(where, messages[: turn + 1])
            if not (whole.startswith(closed) and closed.startswith(opened)):
                advice = "completion (the last turn only) or all" if mask == "assistant" else "all"
                raise InputError(
                    f"{where}: messages[{turn}]: the chat template rewrites earlier turns when "
                    f"later ones follow, so the position of this turn is unknown: set mask to "
                    f"{advice}, or give prompt and completion"
                )
            targets.append((len(opened), self._end_of_turn(closed, len(opened))))
        return Part(text=whole, targets=targets)

    def _end_of_turn(self, text: str, start: int) -> int:
        """Return the end of the end-of-turn token of the turn at `text[start:]`.

        Generation stops there: a newline or an end-of-text token that the template writes behind
        it is never generated. A template without an end-of-turn token keeps all of the turn.
        """
        closing = self._closing.search(text, start)
        return closing.end(1) if closing else len(text)

    def _apply(
        self, where: str, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:  # raised by templates
            raise InputError(f"{where}: the chat template refuses the messages: {error}") from error
        assert isinstance(text, str)
        return text


def _refuse_surrogates(text: str, where: str) -> None:
    # JSON can spell half of a surrogate pair, which no tokenizer accepts
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: expected valid Unicode, got half a surrogate pair {text[error.start]!a} "
            f"at character {error.start}: remove it"
        ) from error
