"""Records as the texts that are tokenized, with the characters that are training targets.

    record               tokenized texts        `mask`: the targets
    messages             the chat template's    `assistant`: each assistant turn, from the end of
                                                the generation prompt to the end of what the
                                                template closes the turn with; `completion`: the
                                                last such turn; `all`: everything
    prompt + completion  prompt, completion     `completion`: the completion; `all`: everything
    text                 text                   `all`: everything

`auto` is the first that stands here for the record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from carryon.cache.corpus.records import Messages, PromptCompletion, Record, Text
from carryon.cache.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mask = Literal["auto", "assistant", "completion", "all"]

_FITTING: dict[type, tuple[str, ...]] = {
    Messages: ("assistant", "completion", "all"),
    PromptCompletion: ("completion", "all"),
    Text: ("all",),
}
_NAMES = {Messages: "messages", PromptCompletion: "prompt and completion", Text: "text"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A text that is tokenized on its own, so that no token reaches across its ends."""

    text: str
    targets: list[tuple[int, int]] | None
    """Begin and end, in characters of `text`, of what is to be learned; None: all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """A record's parts, in order."""

    parts: list[Part]
    is_framed: bool
    """Whether the tokenizer's start tokens and the end-of-text token are still to be put around
    the parts. A chat template has put in its own."""


def render(record: Record, tokenizer: "PreTrainedTokenizerBase", *, mask: Mask) -> Rendering:
    """Return the texts of a record and their targets.

    Raises:
        InputError: `mask` does not fit the record, the chat template is missing or refuses the
            record, or the record cannot be written as UTF-8.
    """
    content = record.content
    fitting = _FITTING[type(content)]
    if mask not in ("auto", *fitting):
        raise InputError(
            f"{record.where}: mask {mask!r} does not fit {_NAMES[type(content)]}: "
            f"expected auto or {' or '.join(fitting)}"
        )
    chosen = fitting[0] if mask == "auto" else mask
    if isinstance(content, Messages):
        parts = [_render_messages(record.where, content.messages, tokenizer, mask=chosen)]
    elif isinstance(content, PromptCompletion):
        parts = [
            Part(text=content.prompt, targets=None if chosen == "all" else []),
            Part(text=content.completion, targets=None),
        ]
    else:
        parts = [Part(text=content.text, targets=None)]
    for part in parts:
        _refuse_surrogates(part.text, record.where)
    return Rendering(parts=parts, is_framed=not isinstance(content, Messages))


def _render_messages(
    where: str,
    messages: Sequence[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    mask: str,
) -> Part:
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: has messages, but the tokenizer {tokenizer.name_or_path!r} has no chat "
            "template: give records with prompt and completion"
        )
    whole = _apply_template(where, messages, tokenizer, is_open=False)
    if mask == "all":
        return Part(text=whole, targets=None)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if mask == "completion":
        turns = turns[-1:]
    if turns and turns[0] == 0:
        raise InputError(
            f"{where}: messages[0]: expected a system or user message before the first assistant "
            "turn that is to be learned: add one, or set mask to all"
        )
    targets = []
    for turn in turns:
        opened = _apply_template(where, messages[:turn], tokenizer, is_open=True)
        closed = _apply_template(where, messages[: turn + 1], tokenizer, is_open=False)
        if not (whole.startswith(closed) and closed.startswith(opened)):
            advice = "completion (the last turn only) or all" if mask == "assistant" else "all"
            raise InputError(
                f"{where}: messages[{turn}]: the chat template rewrites earlier turns when later "
                "ones follow, so it cannot be told where this one lies: set mask to "
                f"{advice}, or give prompt and completion"
            )
        targets.append((len(opened), len(closed)))
    return Part(text=whole, targets=targets)


def _apply_template(
    where: str,
    messages: Sequence[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    is_open: bool,
) -> str:
    # is_open: with the generation prompt at the end, as generation sees it
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=is_open
        )
    except (TemplateError, TypeError, ValueError) as error:  # whatever a template may raise
        raise InputError(f"{where}: the chat template refuses the messages: {error}") from error
    assert isinstance(text, str)
    return text


def _refuse_surrogates(text: str, where: str) -> None:
    # JSON can spell half of a surrogate pair, which no tokenizer takes
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: expected valid Unicode, got half a surrogate pair {text[error.start]!a} "
            f"at character {error.start}: remove it"
        ) from error
