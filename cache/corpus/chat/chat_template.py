"""A chat template as inference engines render it.

transformers compiles the template in its sandbox; today's date is the one that is given here.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import date
from typing import TYPE_CHECKING, Any

from carryon.cache.corpus.chat.template_limits import MAX_SECONDS, compile_limited
from carryon.cache.corpus.records import Chat
from carryon.cache.errors import InputError
from carryon.cache.time_limit import limited_time

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "thinking")
"""Names under which templates read a message's reasoning; records have the first."""
_PROBE = "qz0jv"
"""A text that no template writes by itself."""


class UnfitError(InputError):
    """A conversation that the chat template refuses, or does not write in full."""


class ChatTemplate:
    """Renders conversations to text."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        variables: Mapping[str, Any],
        today: str,
        end_tokens: Collection[int],
    ) -> None:
        """Read the template and the tokens that may end a turn.

        Args:
            tokenizer: of the base.
            variables: for the template; a record's own come before them.
            today: date, YYYY-MM-DD, that the template prints as today; empty: none is printed.
            end_tokens: ids at which generation with the base stops. Empty: the tokenizer's
                end-of-text token.
        """
        self._tokenizer = tokenizer
        special_tokens = tokenizer.special_tokens_map
        self._variables = {**special_tokens, "strftime_now": self._strftime_now, **variables}
        self._today = date.fromisoformat(today) if today else None
        added = tokenizer.added_tokens_decoder
        special = {token.content for token in added.values() if token.special}
        ends = {str(tokenizer.convert_ids_to_tokens(token)) for token in end_tokens}
        self.knows_ends = bool(ends)
        """Whether the base says at which tokens generation stops."""
        self.end_names = frozenset(ends or filter(None, [tokenizer.eos_token]))
        """Tokens at which generation with the base stops, as they are written."""
        self.sound_structures: set[Any] = set()
        """Structures of conversations that the template is known to write in full."""
        names = special | self.end_names | {tokenizer.eos_token or ""}
        ordered = sorted(filter(None, names), key=len, reverse=True)
        self.special = "|".join(map(re.escape, ordered)) or "(?!)"
        """Regular expression of a special token."""
        every = sorted((token.content for token in added.values()), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, every)) or "(?!)")
        """Regular expression of an added token, special or not: it is never cut."""
        self._takes_parts: dict[str, bool] = {}  # by source

    @property
    def name(self) -> str:
        """Return the template as errors name it."""
        return f"the chat template of {self._tokenizer.name_or_path or 'the tokenizer'}"

    def has_marks(self, chat: Chat) -> bool:
        """Tell whether the template marks what the model generates."""
        return bool(_MARKS.search(self._source(chat)))

    def render(
        self, chat: Chat, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> str:
        """Return the text of messages, with the tools and variables of `chat`.

        Raises:
            UnfitError: the template refuses them.
        """
        return self._run(chat, messages, None, add_generation_prompt=add_generation_prompt)

    def marks(self, chat: Chat, messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
        """Return (start, stop), in characters, of what the template marks in the text of messages.

        Raises:
            UnfitError: the template refuses them.
        """
        spans: list[tuple[int, int]] = []
        self._run(chat, messages, spans, add_generation_prompt=False)
        return spans

    def _source(self, chat: Chat) -> str:
        if not self._tokenizer.chat_template:
            raise InputError(
                f"the tokenizer {self._tokenizer.name_or_path!r} has no chat template, which "
                "messages need. Fix: --chat-template FILE, or records of prompt and completion"
            )
        tools = list(map(dict, chat.tools)) if chat.tools else None
        try:
            return self._tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            raise InputError(f"{self.name}: {error}. Fix: --chat-template FILE") from error

    def _run(
        self,
        chat: Chat,
        messages: Sequence[Mapping[str, Any]],
        spans: list[tuple[int, int]] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        source = self._source(chat)
        if source not in self._takes_parts:
            self._takes_parts[source] = self._needs_parts(source)
        form = _with_parts if self._takes_parts[source] else _with_reasoning
        variables: dict[str, Any] = {
            **self._variables_of(chat),
            "messages": [form(message) for message in messages],
            "tools": list(chat.tools) if chat.tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with limited_time(MAX_SECONDS):
                template: Any = compile_limited(source)
                if spans is None:
                    return str(template.render(**variables))
                blocks: list[str] = []
                with template.environment.activate_tracker(blocks, spans):
                    blocks.extend(template.generate(**variables))
                return "".join(blocks)
        except Exception as error:  # a template is a program, which may raise anything
            raise UnfitError(f"{self.name} refuses the messages: {error}") from error

    def _variables_of(self, chat: Chat) -> dict[str, Any]:
        return {**self._variables, **chat.template_kwargs}

    def _needs_parts(self, source: str) -> bool:
        """Tell whether a template writes contents only as a list of parts, as of vision models."""
        probe = {"role": "user", "content": _PROBE}
        for message, answer in ((probe, False), (_with_parts(probe), True)):
            chat = Chat(messages=[probe], is_trained=[False])
            variables = self._variables_of(chat) | {"messages": [message], "tools": None}
            with suppress(Exception), limited_time(MAX_SECONDS):  # a template may raise anything
                template = compile_limited(source)
                if _PROBE in template.render(**variables, add_generation_prompt=False):
                    return answer
        return False

    def _strftime_now(self, form: str) -> str:
        if self._today is None:
            raise ValueError("it prints today's date. Fix: --template-date YYYY-MM-DD")
        return self._today.strftime(form)


def prints_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Tell whether a chat template of the tokenizer asks for today's date."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def _with_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    message = _with_reasoning(message)
    content = message["content"]
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {**dict.fromkeys(_REASONING, reasoning), **message}
