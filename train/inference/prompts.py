"""Prompts as token ids, framed as the texts that a carry-on was trained on."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, Any

from carryon.cache.base.identity import digest_chat_template
from carryon.cache.corpus.chat.chat_template import ChatTemplate
from carryon.cache.corpus.chat.template_settings import unread_variables
from carryon.cache.corpus.conversion import parse_variables
from carryon.cache.corpus.records import Chat
from carryon.cache.errors import InputError
from carryon.cache.format.framing import Framing
from carryon.train.inference.generate_settings import ChatChoice, GenerateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, which is a user turn; or messages, the last of them a user's."""


def uses_template(
    tokenizer: "PreTrainedTokenizerBase",
    framing: Framing,
    chat: ChatChoice,
) -> bool:
    """Return whether prompts go through a chat template.

    Args:
        tokenizer: of the base.
        framing: of the carry-on's training texts.
        chat: true or false, or `auto`: as in training, or if that is not known, where the base
            has a template.
    """
    if isinstance(chat, bool):
        return chat
    has_template = bool(framing.chat_template or tokenizer.chat_template)
    return has_template and framing.is_chat is not False


def with_variables(framing: Framing, settings: GenerateSettings) -> Framing:
    """Return how prompts stand: as in training, but for variables of the chat template if given."""
    given = settings.chat_template_kwargs
    return replace(framing, chat_template_kwargs=tuple(given)) if given else framing


def framing_warnings(
    tokenizer: "PreTrainedTokenizerBase", framing: Framing, settings: GenerateSettings
) -> list[str]:
    """Return in which respects prompts will stand otherwise than texts did in training.

    Args:
        tokenizer: of the base.
        framing: of the carry-on's training texts.
        settings: how prompts are answered.

    Raises:
        InputError: a variable of the chat template is not of the form NAME=VALUE.
    """
    asked = with_variables(framing, settings)
    before, after = (parse_variables(each.chat_template_kwargs) for each in (framing, asked))
    is_chat = uses_template(tokenizer, framing, settings.chat)
    if framing.is_chat is not None and is_chat != framing.is_chat:
        trained = "conversations, through a chat template" if framing.is_chat else "plain text"
        given = "the chat template" if is_chat else "plain text"
        return [
            f"the carry-on was trained on {trained}, and now gets {given}. Fix: leave out --chat"
        ]
    if not is_chat:
        given = " ".join(settings.chat_template_kwargs)
        line = f"chat_template_kwargs: prompts go through no chat template: {given} has no effect"
        return [line] if given else []
    template = framing.chat_template or str(tokenizer.chat_template or "")
    lines = unread_variables(template, settings.chat_template_kwargs)
    if framing.is_chat and after != before:
        named = " ".join(framing.chat_template_kwargs) or "none"
        lines.append(
            f"the carry-on was trained with other variables of the chat template ({named}), and "
            f"now gets {' '.join(asked.chat_template_kwargs)}. Fix: leave out "
            "--chat-template-kwargs"
        )
    is_other = (
        framing.is_chat
        and not framing.chat_template
        and digest_chat_template(tokenizer) != framing.chat_template_sha256
    )
    if is_other:
        lines.append(
            "the base's chat template is another than the one that the carry-on was trained with. "
            "Fix: give the base as it was at extraction"
        )
    return lines


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    *,
    framing: Framing,
    chat: ChatChoice,
) -> list[list[int]]:
    """Return the token ids of each prompt.

    In a chat template a prompt is a user turn, or messages; a plain one stands behind the
    tokenizer's start tokens, messages one after another with an empty line between them.

    Raises:
        InputError: an empty prompt, or no chat template or one that refuses the prompt.
    """
    if uses_template(tokenizer, framing, chat):
        rows = _encode_chats(tokenizer, prompts, framing)
    else:
        rows = [_encode_plain(tokenizer, joined(prompt)) for prompt in prompts]
    if not all(prompts) or not all(rows):
        raise InputError("prompt: expected some text, got none")
    return rows


def _encode_chats(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], framing: Framing
) -> list[list[int]]:
    if framing.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = framing.chat_template
    template = ChatTemplate(
        tokenizer,
        variables=parse_variables(framing.chat_template_kwargs),
        today=framing.template_date or date.today().isoformat(),
        end_tokens=(),
    )
    rows = []
    for prompt in prompts:
        messages: list[Mapping[str, Any]]
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        else:
            messages = list(prompt)
        chat = Chat(messages=messages, is_trained=[False] * len(messages))
        text = template.render(chat, messages, add_generation_prompt=True)
        rows.append(list(tokenizer(text, add_special_tokens=False).input_ids))
    return rows


def joined(prompt: Prompt) -> str:
    """Return a prompt as plain text: of messages their contents, with empty lines between."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(str(message["content"]) for message in prompt)


def _encode_plain(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    # The tokens that are put before any text, read off a text of one letter
    letter = tokenizer("a", return_special_tokens_mask=True)
    num_start = [*letter["special_tokens_mask"], 0].index(0)
    start = list(letter["input_ids"][:num_start])
    ids = list(tokenizer(prompt, add_special_tokens=False).input_ids)
    return ids if ids[:num_start] == start else start + ids
