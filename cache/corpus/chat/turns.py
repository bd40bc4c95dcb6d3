"""The targets of a conversation: what the model has to produce at each assistant turn.

A turn is rendered as an engine sees it: the messages before it with the generation prompt, then
all through the turn. What the second has behind their common beginning, through the stop token, is
the target. Where the rendering of the whole conversation holds every turn like this, the
conversation is one sample; where the template rewrites earlier turns, each turn is one.

A template may open the reasoning in its generation prompt, and cut it out of the finished turn: the
turn is then its prompt, its content and what the template writes behind a content.

    stop token                              example
    special token behind the text           ChatML's <|im_end|>; a newline behind it is no target
    first token of what follows the turn    GLM's <|user|>; appended where nothing follows
    none                                    the turn as it is; counted
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property

from carryon.cache.corpus.chat.chat_template import ChatTemplate, UnfitError
from carryon.cache.corpus.chat.fidelity import (
    refuse_lost_texts,
    refuse_lost_tools,
    refuse_unread_fields,
    structure_of,
)
from carryon.cache.corpus.chat.message_forms import (
    OPENED_CHARS,
    TEXT_FIELDS,
    Message,
    continuation,
    end_of_text,
    is_answer,
    other_forms,
    says_nothing,
    shows_python,
)
from carryon.cache.corpus.chat.rendering import Rendering, Turn, common_length, notes_of
from carryon.cache.corpus.records import Chat

_HEAD_ROLES = ("system", "developer")
_MOST_EXACT = 32
"""Messages of a conversation of which each turn is rendered from the beginning; a longer one is
rendered in windows, so that time stays linear."""
_WINDOW_TURNS = 8
_LEAST_ENDING = 8
"""Characters at the end of a prompt by which it is found in a finished turn."""
_PROBES = ({"role": "tool", "content": "x"}, {"role": "user", "content": "x"})
_OTHER = "\1"
"""A text in place of what a message says."""
_FAR = 64
"""Messages behind the beginning of a window at which any user message begins the next."""


class Conversation:
    """A conversation and its template; finds targets."""

    def __init__(self, chat: Chat, template: ChatTemplate, *, only_last: bool) -> None:
        """Choose the turns that are learned.

        Args:
            chat: the conversation.
            template: of the base.
            only_last: learn the last of its assistant turns only.
        """
        self._chat, self._template = chat, template
        self._messages = messages = self._readable(chat.messages)
        self.notes: list[str] = []
        """Reasons to be counted, as in report.NOTES."""
        trained = []
        for index, message in enumerate(messages):
            if not chat.is_trained[index]:
                continue
            if says_nothing(message):
                self.notes.append("empty assistant text, not learned")
            elif index == 0:
                self.notes.append("assistant speaks first, turn not learned")
            else:
                trained.append(index)
        self.trained = trained[-1:] if only_last else trained
        """Messages that are learned."""

    @cached_property
    def whole(self) -> str:
        """Return the rendering of all messages."""
        return self._render(self._messages)

    def render_all(self) -> Rendering:
        """Return the whole conversation with everything as target.

        Raises:
            UnfitError: the template refuses it, or drops some of it.
        """
        everything = [
            Turn(
                index=i,
                closed=self.whole,
                start=0,
                stop=len(self.whole),
                length=0,
                is_prompt_kept=True,
                moved=0,
                is_continued=False,
            )
            for i in range(len(self._messages))
            if is_answer(self._messages[i])
        ]
        self._refuse_losses(self.whole, everything, len(self._messages))
        return Rendering(text=self.whole, targets=None, prompts=(), turn=None, notes=())

    def render_shared(self) -> Rendering | None:
        """Return the conversation as one sample, or None where the template rewrites turns.

        Raises:
            UnfitError: the template refuses it, or drops some of it.
        """
        turns = self._place_turns()
        if turns is None:
            return None
        self._refuse_losses(self.whole, turns, len(self._messages))
        last = turns[-1]
        is_last = self.trained[-1] == len(self._messages) - 1
        text = self.whole + last.closed[last.length :] if is_last else self.whole
        marks = self._marks(self._messages)
        targets = [self._targets(turn, marks, text) for turn in turns]
        return Rendering(
            text=text,
            targets=[span for spans in targets for span in spans],
            prompts=[turn.start for turn in turns],
            turn=None,
            notes=notes_of(turns, targets),
        )

    def render_turns(self) -> Iterator[Rendering]:
        """Yield each turn that is learned as a sample, rendered as generation would see it.

        Raises:
            UnfitError: the template refuses it, or drops some of it.
        """
        for index in self.trained:
            turn = self._read_turn(self._messages, index)
            self._refuse_losses(turn.closed, [turn], index + 1)
            marks = self._marks(self._messages[: index + 1])
            targets = self._targets(turn, marks, turn.closed)
            yield Rendering(
                text=turn.closed[: turn.stop],
                targets=targets,
                prompts=[turn.start],
                turn=index,
                notes=notes_of([turn], [targets]),
            )

    def _readable(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages in a form that the template writes.

        A content of None and arguments of tool calls as dicts are the usual form. Some templates
        write "None" and the dict as Python does, or refuse them, and want "" and JSON texts.
        """
        is_odd = any(
            message["content"] is None or message.get("tool_calls") for message in messages
        )
        if not is_odd:
            return messages
        for form in (messages, *other_forms(messages)):
            try:
                text = self._render(form)
            except UnfitError:
                continue
            if not shows_python(text, form):
                return form
        return messages

    def _place_turns(self) -> list[Turn] | None:
        """Return the learned turns with their places in `whole`; None if one is not in it."""
        if len(self._messages) > _MOST_EXACT:
            try:
                return self._place_in_windows()
            except UnfitError:
                pass  # a window alone may be refused
        turns = [self._read_turn(self._messages, index) for index in self.trained]
        return turns if all(map(self._stands_in_whole, turns)) else None

    def _stands_in_whole(self, turn: Turn) -> bool:
        if len(self.whole) == turn.length:  # the last message: a stop token may be appended to it
            return self.whole == turn.closed[: turn.length]
        return self.whole.startswith(turn.closed[: turn.stop])

    def _place_in_windows(self) -> list[Turn] | None:
        """Find the turns of a long conversation from renderings of a few messages.

        Each window begins with a turn whose place is known and ends some turns behind it; they
        must stand in `whole` as in the window. Turns at the half, the quarter, ... and the end
        are rendered from the beginning too: a template that rewrites earlier turns differs there.
        """
        messages, trained = self._messages, self.trained
        checked = {trained[len(trained) >> shift] for shift in range(1, len(trained).bit_length())}
        for index in (*sorted(checked), trained[-1]):
            if not self._stands_in_whole(self._read_turn(messages, index)):
                return None
        roles = [message["role"] not in _HEAD_ROLES for message in messages]
        head = roles.index(True)
        turns: list[Turn] = []
        while len(turns) < len(trained):
            known = len(turns)
            first = self._window_start(trained[known - 1], head) if known else head
            chosen = trained[max(known - 1, 0) : known + _WINDOW_TURNS]
            window = [*messages[:head], *messages[first : chosen[-1] + 1]]
            read = [self._read_turn(window, index - first + head) for index in chosen]
            place = read.pop(0).stop if known else 0
            shift = turns[-1].stop - place if known else 0
            for turn in read:
                written = turn.closed[place : turn.stop]
                text = self.whole + turn.closed[turn.length :]
                if not text.startswith(written, place + shift):
                    return None
                turns.append(
                    replace(
                        turn,
                        index=turn.index + first - head,
                        start=turn.start + shift,
                        stop=turn.stop + shift,
                    )
                )
        return turns

    def _window_start(self, index: int, head: int) -> int:
        """Return the user message that begins the turn `index`, an even number behind the head.

        Templates check that roles alternate by the parity of their position.
        """
        for is_even in (True, False):
            for first in range(index, max(head, index - _FAR) - 1, -1):
                is_user = self._messages[first]["role"] == "user"
                if is_user and (not is_even or (first - head) % 2 == 0):
                    return first
        return head

    def _read_turn(self, messages: Sequence[Message], index: int) -> Turn:
        """Return an assistant turn of messages."""
        prompt = self._render(messages[:index], add_generation_prompt=True)
        is_whole = messages is self._messages and index == len(messages) - 1
        closed = self.whole if is_whole else self._render(messages[: index + 1])
        start = common_length(prompt, closed)
        text = continuation(messages[index], prompt, closed, start)
        if text and (ending := self._ending(messages, index)) is not None:
            closed = prompt + text + ending
            return Turn(
                index=index,
                closed=closed,
                start=len(prompt),
                stop=len(closed),
                length=len(closed),
                is_prompt_kept=True,
                moved=0,
                is_continued=True,
            )
        moved = 0
        if start < len(prompt):
            if start < common_length(prompt, self._render(messages[:index])):
                # the finished turn changes what stands before it: only its own text is of use
                own = self._own_place(messages, index, prompt, closed)
                closed, start, moved = prompt + closed[own:], len(prompt), len(prompt) - own
            for text in (prompt, closed):
                for token in self._template.added.finditer(text):
                    if token.start() < start < token.end():
                        start = token.start()
        stop, appended = self._find_stop(closed, start, messages, index)
        return Turn(
            index=index,
            closed=closed + appended if stop > len(closed) else closed,
            start=start,
            stop=stop,
            length=len(closed),
            is_prompt_kept=start == len(prompt),
            moved=moved,
            is_continued=False,
        )

    def _ending(self, messages: Sequence[Message], index: int) -> str | None:
        """Return what the template writes behind the content of a turn; None: it writes none."""
        asked = list(messages)
        asked[index] = {**messages[index], "content": _OTHER}
        written = self._render(asked[: index + 1])
        if _OTHER not in written:
            return None
        place = written.rfind(_OTHER) + len(_OTHER)
        stop, appended = self._find_stop(written, place, asked, index)
        return (written + appended)[place:stop]

    def _own_place(self, messages: Sequence[Message], index: int, prompt: str, closed: str) -> int:
        """Return where a turn's own text begins in `closed`: behind the end of its prompt.

        Rendered with other texts, the turn has all in common with `closed` that stands before its
        first text. The last place in it that ends as the prompt does is the beginning.
        """
        message = messages[index]
        other = {field: _OTHER for field in TEXT_FIELDS if message.get(field)}
        changed = self._render([*messages[:index], {**message, **other}])
        head = closed[: common_length(closed, changed)]
        length, most = 0, len(prompt)
        while length < most:  # an ending that stands in it has all shorter ones in it
            middle = (length + most + 1) // 2
            is_in = prompt[len(prompt) - middle :] in head
            length, most = (middle, most) if is_in else (length, middle - 1)
        if len(head) == len(closed) or length < min(_LEAST_ENDING, len(prompt)):
            raise UnfitError(
                f"messages[{index}]: {self._template.name} writes the messages before this turn in "
                "another way once the turn is there. Fix: --chat-template FILE, or --drop-unfit to "
                "leave such records out"
            )
        return head.rfind(prompt[len(prompt) - length :]) + length

    def _find_stop(
        self, closed: str, start: int, messages: Sequence[Message], index: int
    ) -> tuple[int, str]:
        """Return the end of the stop token of the turn at `closed[start:]`, and text to append."""
        special, template = self._template.special, self._template
        begin = end_of_text(messages[index], closed, start)
        run = re.compile(rf"(?:{special})(?:{special}|\s)*\Z").search(closed, begin)
        text = run.group() if run else ""
        tokens = list(re.finditer(special, text))
        # an end-of-text token behind a newline may end the text and not the turn
        reach = len(text) if template.knows_ends else len("".join(text.split()[:1]))
        ends = [x for x in tokens if x.group() in template.end_names and x.start() < reach]
        if run and (ends or not template.knows_ends):
            return run.start() + (ends or tokens)[0].end(), ""
        probes = messages[index + 1 : index + 2] or _PROBES[not messages[index].get("tool_calls") :]
        for following in probes:
            with suppress(UnfitError):
                followed = self._render([*messages[: index + 1], following])
                token = re.compile(rf"\s*({special})").match(followed, len(closed))
                is_stop = token is not None and token.group(1) in template.end_names
                if token and is_stop and followed.startswith(closed):
                    return token.end(), token.group()
        if run:
            return run.start() + tokens[0].end(), ""
        return len(closed), ""

    def _marks(self, messages: Sequence[Message]) -> list[tuple[int, int]] | None:
        if not self._template.has_marks(self._chat):
            return None
        return self._template.marks(self._chat, messages)

    def _targets(
        self, turn: Turn, marks: Sequence[tuple[int, int]] | None, text: str
    ) -> list[tuple[int, int]]:
        """Return the targets of a turn in `text`: what the template marks, with the stop token."""
        if marks is None or turn.is_continued:
            return [(turn.start, turn.stop)]
        spans = [
            (max(start + turn.moved, turn.start), min(stop + turn.moved, turn.stop))
            for start, stop in marks
            if start + turn.moved < turn.stop and stop + turn.moved > turn.start
        ]
        if spans and re.fullmatch(
            rf"\s*(?:{self._template.special})", text[spans[-1][1] : turn.stop]
        ):
            spans[-1] = (spans[-1][0], turn.stop)
        return spans

    def _refuse_losses(self, text: str, turns: Sequence[Turn], count: int) -> None:
        """Check that a rendering holds all that is said in the first `count` messages.

        Of assistant turns only those that are learned: others a template may shorten.
        """
        name, messages = self._template.name, self._messages[:count]
        said = [i for i, message in enumerate(messages) if not is_answer(message)]
        refuse_lost_texts(text, messages, said, template=name)
        for turn in turns:
            # the prompt may have opened the turn with its first few characters
            reply = text[max(0, turn.start - OPENED_CHARS) : turn.stop]
            refuse_lost_texts(reply, messages, [turn.index], template=name)
        if self._chat.tools:
            refuse_lost_tools(text, self._chat.tools, template=name)
        indices = sorted({*said, *(turn.index for turn in turns)})
        key = (structure_of(messages), tuple(indices[:32]), bool(self._chat.tools))
        if key not in (known := self._template.sound_structures):
            is_moved = any(turn.moved for turn in turns)
            render = self._render_both if is_moved else self._render
            refuse_unread_fields(render, messages, indices, template=name)
            known.add(key)

    def _render_both(self, messages: Sequence[Message]) -> str:
        """Return the prompt of a turn and the finished turn, which has not all of the prompt."""
        prompt = self._render(messages[:-1], add_generation_prompt=True)
        return prompt + self._render(messages)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return self._template.render(
            self._chat, messages, add_generation_prompt=add_generation_prompt
        )
