"""Samples for people: in colours, in brackets, as HTML."""

import io
from collections.abc import Sequence
from html.parser import HTMLParser

import pytest

from carryon.cache.corpus.pieces import Piece
from carryon.tools.commands.pages.samples import make_sample_page
from carryon.tools.commands.pages.shown_samples import (
    ShownSample,
    format_sample,
    has_colours,
    visible,
)


def piece(text: str, *flags: str) -> Piece:
    """Return a piece that is what `flags` say."""
    names = ("is_target", "is_special", "is_stop")
    return Piece(text=text, **{name: name in flags for name in names})


PIECES = [
    piece("<s>", "is_special"),
    piece("ask\n"),
    piece("tell", "is_target"),
    piece("</s>", "is_target", "is_special", "is_stop"),
]


def shown(pieces: Sequence[Piece] = PIECES, *, name: str = "id-1") -> ShownSample:
    """Return a sample."""
    return ShownSample(
        kind="messages",
        id=name,
        where="data.jsonl:1",
        num_tokens=1234,
        num_targets=2,
        marks=["held out"],
        pieces=pieces,
    )


def test_without_colours_brackets_tell_what_is_learned() -> None:
    assert format_sample(shown(), is_coloured=False) == (
        "--- messages  id-1  1,234 tokens, 2 targets, held out  (data.jsonl:1)\n"
        "{<s>}ask\n[[tell{</s> = stop}]]"
    )


def test_in_colours_the_prompt_is_grey_and_targets_are_green() -> None:
    assert format_sample(shown(), is_coloured=True) == (
        "\x1b[1mmessages  id-1  1,234 tokens, 2 targets, held out  (data.jsonl:1)\x1b[0m\n"
        "\x1b[90m\x1b[7m<s>\x1b[0m\x1b[90mask\n\x1b[0m\x1b[32mtell\x1b[0m"
        "\x1b[32m\x1b[7m</s> = stop\x1b[0m"
    )


@pytest.mark.parametrize(
    ("text", "shown_as"),
    [
        ("a\tb\n\u00e9", "a\tb\n\u00e9"),
        ("\x1b[31m\r", "\\x1b[31m\\r"),
        ("a\u202eb\u200b\u2028", "a\\u202eb\\u200b\\u2028"),
    ],
)
def test_characters_that_do_not_show_are_shown_by_their_codes(text: str, shown_as: str) -> None:
    assert visible(text) == shown_as
    sample = shown([piece(text), piece(text, "is_special")], name=text)
    for form in (format_sample(sample, is_coloured=False), make_sample_page([sample], title=text)):
        assert not set(form) & set("\x1b\r\u202e\u200b\u2028")


def test_the_middle_of_long_parts_is_left_out_and_counted() -> None:
    text = format_sample(shown([piece("a" * 600 + "b" * 5000 + "c" * 600)]), is_coloured=False)
    assert text.count("b") < 10
    assert "[... 5,000 characters are not shown here ...]" in text
    parts = [piece("<s>", "is_special")] * 1000
    for is_coloured in (False, True):
        text = format_sample(shown(parts), is_coloured=is_coloured)
        assert text.count("<s>") == 400
        assert "[... 600 parts are not shown here ...]" in text


class Reader(HTMLParser):
    """Collects the classes and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[str | None, str]] = []
        self.tags: set[str] = set()
        self._class: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._class = dict(attrs).get("class")

    def handle_data(self, data: str) -> None:
        self.spans.append((self._class, data))


def test_the_page_marks_the_same_parts() -> None:
    reader = Reader()
    reader.feed(make_sample_page([shown()], title="T", table="a table"))
    for part in [("special", "<s>"), ("target", "tell"), ("target special stop", "</s>")]:
        assert part in reader.spans
    assert "a table" in [text for _, text in reader.spans]


def test_hostile_text_is_no_part_of_the_page() -> None:
    hostile = '<script>alert(1)</script><img src=x onerror="a">&lt;"\'{{}}{body}'
    sample = shown([piece(hostile), piece(hostile, "is_special", "is_target")], name=hostile)
    page = make_sample_page([sample], title=hostile, table=hostile)
    reader = Reader()
    reader.feed(page)
    assert not reader.tags & {"script", "img"}
    assert "default-src 'none'" in page
    assert [text for _, text in reader.spans].count(hostile) == 5  # title twice, text, token, table


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_colours(Terminal())
    assert not has_colours(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colours(Terminal())
