"""A conversation as an inference engine builds it, turn by turn: what training has to repeat.

Nothing here calls the code under test: prompts and finished turns are rendered by transformers'
own `apply_chat_template`, tokens made by the tokenizer itself.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

Message = Mapping[str, Any]


@dataclass(frozen=True)
class EngineTurn:
    """One reply behind its prompt."""

    index: int
    """Of the message."""
    prompt: str
    """What prompt and finished turn have in common."""
    reply: str
    """What the model has to produce, stop token included."""
    prompt_tokens: list[int]
    reply_tokens: list[int]
    is_ended: bool
    """Whether the reply ends with a stop token: its last tokens depend on nothing behind it."""


def engine_turns(
    tokenizer: PreTrainedTokenizerFast,
    record: Mapping[str, Any],
    *,
    stops: Sequence[str],
    only_last: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[EngineTurn]:
    """Return the replies of a record that are to be learned.

    Args:
        tokenizer: with a chat template.
        record: `messages`, `tools`.
        stops: tokens at which generation stops.
        only_last: the last reply only.
        variables: for the template.
    """
    turns = []
    messages = record["messages"]

    def apply(shown: Sequence[Message], *, is_prompt: bool, is_parsed: bool) -> str:
        text = tokenizer.apply_chat_template(
            [_plain(message, is_parsed=is_parsed) for message in shown],
            tools=record.get("tools"),
            tokenize=False,
            add_generation_prompt=is_prompt,
            **(variables or {}),
        )
        assert isinstance(text, str)
        return text

    def render(shown: Sequence[Message], *, is_prompt: bool = False) -> str:
        try:
            return apply(shown, is_prompt=is_prompt, is_parsed=True)
        except TypeError:  # DeepSeek's add the arguments of tools to a text
            return apply(shown, is_prompt=is_prompt, is_parsed=False)

    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0 or not _says(message):
            continue
        prompt = render(messages[:index], is_prompt=True)
        finished = render(messages[: index + 1])
        if _loses_reasoning(finished, message):  # what the engine returned is the turn
            opened = prompt.rstrip().endswith("<think>")
            said = message["content"].removeprefix("<think>") if opened else message["content"]
            said = said.lstrip() if prompt[-1].isspace() else said
            turns.append(_tokenize(tokenizer, index, prompt, said + stops[0], stops))
            continue
        kept = _common(prompt, finished, tokenizer)
        reply = finished[len(kept) :]
        history = render(messages[:index])
        if len(kept) < len(os.path.commonprefix([prompt, history])):
            # the finished turn writes earlier ones in another way than the prompt did
            kept, last = prompt, _says(messages[index - 1])[-1]
            ending = prompt[prompt.rfind(last) :]
            reply = finished[finished.rindex(ending) + len(ending) :]
        end = _stop(reply, _says(message), stops)
        if end is None:  # the next speaker's token may be what ends a turn
            following = [*messages[index + 1 :], {"role": "user", "content": "Go on."}][0]
            behind = render([*messages[: index + 1], following])[len(finished) :]
            reply += next((stop for stop in stops if behind.startswith(stop)), "")
            end = len(reply)
        turns.append(_tokenize(tokenizer, index, kept, reply[:end], stops))
    return turns[-1:] if only_last else turns


def _loses_reasoning(finished: str, message: Message) -> bool:
    content = message.get("content") or ""
    before = content.partition("</think>")[0].split()
    return "</think>" in content and before[-1] not in finished.split("</think>")[0].split()


def _plain(message: Message, *, is_parsed: bool) -> dict[str, Any]:
    """Return a message as engines pass it on, arguments of tool calls parsed or not."""
    plain = {key: item for key, item in message.items() if key != "weight"}
    if "tool_calls" in plain:
        plain["tool_calls"] = [
            {
                **call,
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.loads(call["function"]["arguments"])
                    if is_parsed
                    else call["function"]["arguments"],
                },
            }
            for call in plain["tool_calls"]
        ]
    return plain


def _says(message: Message) -> list[str]:
    """Return the texts of a message in the order of writing; none for an empty one."""
    texts = [message.get("reasoning_content"), message.get("content")]
    for call in message.get("tool_calls") or ():
        function = call["function"]
        texts += [function["name"], *map(str, json.loads(function["arguments"]).values())]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _common(prompt: str, finished: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the common beginning; no added token that both contain or one does is cut."""
    kept = os.path.commonprefix([prompt, finished])
    if kept == prompt:
        return kept
    names = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()]
    for text in (prompt, finished):
        for token in re.finditer("|".join(names), text):
            if token.start() < len(kept) < token.end():
                kept = text[: token.start()]
    return kept


def _stop(reply: str, says: Sequence[str], stops: Sequence[str]) -> int | None:
    """Return the end of the first stop token behind what the message says."""
    behind = max((reply.rfind(text) + len(text) for text in says if text in reply), default=0)
    found = [(reply.index(stop, behind), stop) for stop in stops if reply.find(stop, behind) >= 0]
    if not found:
        return None
    place, stop = min(found)
    return place + len(stop)


def _tokenize(
    tokenizer: PreTrainedTokenizerFast, index: int, prompt: str, reply: str, stops: Sequence[str]
) -> EngineTurn:
    first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    both = tokenizer(prompt + reply, add_special_tokens=False)["input_ids"]
    is_kept = both[: len(first)] == first
    rest = both[len(first) :] if is_kept else _continue(tokenizer, reply)
    return EngineTurn(index, prompt, reply, list(first), list(rest), reply.endswith(tuple(stops)))


def _continue(tokenizer: PreTrainedTokenizerFast, reply: str) -> list[int]:
    """Return the tokens of a reply as they follow a token: no blank is put before them."""
    border = "\x01"  # one token in every tokenizer here, which merges with nothing
    head = tokenizer(border, add_special_tokens=False)["input_ids"]
    both = tokenizer(border + reply, add_special_tokens=False)["input_ids"]
    assert both[: len(head)] == head
    return list(both[len(head) :])
