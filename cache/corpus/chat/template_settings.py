"""Settings of a chat template: the file it is in, and the date that it prints as today."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from carryon.cache.corpus.chat.chat_template import prints_date
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MAX_TEMPLATE_BYTES = 1 << 20


def resolve_settings(
    settings: CorpusSettings, tokenizer: "PreTrainedTokenizerBase", *, stored_date: str = ""
) -> "tuple[CorpusSettings, PreTrainedTokenizerBase]":
    """Return settings with the chat template's text and date, and a tokenizer that uses them.

    Args:
        settings: as given; `chat_template` is a file or the text of a template.
        tokenizer: of the base; it is not changed.
        stored_date: the `template_date` of a store that is resumed or appended to.

    Raises:
        InputError: the file cannot be read, or the date is none.
    """
    if settings.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = _read_template(settings.chat_template)
        settings = replace(settings, chat_template=tokenizer.chat_template)
    day = settings.template_date or stored_date
    if day:
        try:
            date.fromisoformat(day)
        except ValueError as error:
            raise InputError(
                f"template_date: expected YYYY-MM-DD, got {day!r}. Fix: --template-date 2026-01-31"
            ) from error
    elif prints_date(tokenizer):
        day = date.today().isoformat()
        logger.info(f"the chat template prints the date: {day}, which the store keeps")
    template = str(tokenizer.chat_template or "")
    for line in unread_variables(template, settings.chat_template_kwargs):
        logger.warning(line)
    return replace(settings, template_date=day), tokenizer


def unread_variables(template: str, options: Sequence[str]) -> list[str]:
    """Return a line for each NAME=VALUE whose name does not stand in a chat template."""
    names = [option.partition("=")[0] for option in options]
    return [
        f"chat_template_kwargs: the chat template reads no {name!a:.80}: without any effect"
        for name in names
        if name not in template
    ]


def _read_template(value: str) -> str:
    if "{" in value:
        return value
    path = Path(value)
    try:
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise InputError(f"{path}: expected a chat template of at most 1 MB, got more")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(
            f"chat_template: {path}: expected a readable file: {reason}. Fix: --chat-template FILE"
        ) from error
    if "{" not in text:
        raise InputError(f"{path}: expected a Jinja template, got a text without any {{")
    return text
