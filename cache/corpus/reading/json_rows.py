"""JSON as rows: one object a line, or the elements of an array, in the memory of one of them."""

import codecs
import json
from collections.abc import Iterator
from json.decoder import JSONDecodeError
from typing import Any, BinaryIO, NoReturn

from carryon.cache.errors import InputError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 64 << 20
"""Of one line or element; a file without ends of lines would else be read into memory."""
_LONGEST_WORD = 16
"""An error so near the end of the text read so far may be of a word cut off there."""


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON value")


_LINE_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def too_long(name: str, line: int) -> InputError:
    """Return the error of a record longer than any."""
    return InputError(
        f"{name}:{line}: expected records of less than {MAX_RECORD_BYTES:,} bytes, got a longer "
        "one. Fix: repair the file, or split the record"
    )


def parse_line(line: bytes) -> dict[str, Any]:
    """Return the JSON object in `line`.

    Raises:
        ValueError: it holds something else; the text, one line, says what was expected.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8, got the byte 0x{line[error.start]:02x} at column {error.start + 1}"
        ) from error
    try:
        fields = _LINE_DECODER.decode(text.rstrip())
    except JSONDecodeError as error:
        raise ValueError(
            f"expected one JSON object a line, got malformed JSON: {error.msg} at column "
            f"{error.colno}"
        ) from error
    except RecursionError as error:
        raise ValueError("expected one JSON object a line, got too deep nesting") from error
    except ValueError as error:  # a constant, or a whole number of thousands of digits
        reason = str(error).partition(";")[0]
        raise ValueError(
            f"expected one JSON object a line, got malformed JSON: {reason}"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected one JSON object a line, got {type(fields).__name__}")
    return fields


def iter_values(stream: BinaryIO, name: str) -> Iterator[tuple[dict[str, Any] | str, int]]:
    """Yield each element of a JSON array, and the line that it begins in.

    Objects that follow each other without an array, pretty-printed or not, are read too. In place
    of an element that is no object, its problem is yielded: one line of text.

    Raises:
        InputError: malformed JSON, after which no element can be found; the text names the line.
    """
    text = _Text(stream, name)
    if text.peek() != "[":
        while text.peek():
            line = text.line
            yield text.read_value(), line
        return
    text.skip()
    is_first = True
    while not (is_first and text.peek() == "]"):
        is_first = False
        text.peek()
        line = text.line
        yield text.read_value(), line
        separator = text.peek()
        if separator == "]":
            break
        if separator != ",":
            text.fail("expected , or ] after an element" if separator else "the array has no end")
        text.skip()
    text.skip()
    if text.peek():
        text.fail("expected the end of the file after the array")


class _Text:
    """Text of a stream, of which the part around one value is in memory."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self._at = 0
        self._constants: list[str] = []
        self._parse = json.JSONDecoder(parse_constant=self._constants.append).raw_decode
        self.line = 1
        """Of the next character, counted from 1."""

    def peek(self) -> str:
        """Return the next character that is no white space, without passing it; "" at the end."""
        while True:
            while self._at < len(self._text):
                character = self._text[self._at]
                if character not in " \t\r\n":
                    return character
                self.skip()
            if not self._fill():
                return ""

    def skip(self) -> None:
        """Pass one character."""
        self.line += self._text.startswith("\n", self._at)
        self._at += 1

    def read_value(self) -> dict[str, Any] | str:
        """Return the object that begins here and pass it; of another value its problem."""
        while True:
            self._constants.clear()
            try:
                value, end = self._parse(self._text, self._at)
            except JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string")
                if (is_cut or error.pos >= len(self._text) - _LONGEST_WORD) and self._fill():
                    continue
                self.fail(error.msg, at=error.pos)
            except RecursionError:
                self.fail("too deep nesting")
            except ValueError as error:  # a whole number of thousands of digits
                self.fail(str(error).partition(";")[0])
            if end == len(self._text) and isinstance(value, int | float) and self._fill():
                continue  # a number may go on in the next chunk
            break
        self.line += self._text.count("\n", self._at, end)
        self._at = end
        if self._constants:
            return f"expected a JSON object, got {self._constants[0]}, which is no JSON value"
        if not isinstance(value, dict):
            return f"expected a JSON object, got {type(value).__name__}"
        return value

    def fail(self, reason: str, *, at: int | None = None) -> NoReturn:
        """Raise an InputError that names the line of the character `at`, or of the next one."""
        at = self._at if at is None else at
        line = self.line + self._text.count("\n", self._at, at)
        raise InputError(
            f"{self._name}:{line}: got malformed JSON: {reason}. Fix: repair the file; the rows "
            "after this place cannot be found"
        )

    def _fill(self) -> bool:
        """Read on, at least as much again as is kept, so that a long value costs linear time."""
        kept = self._text[self._at :]
        if len(kept) >= MAX_RECORD_BYTES:
            raise too_long(self._name, self.line)
        try:
            chunk = self._stream.read(max(_CHUNK_BYTES, len(kept)))
            more = self._decode(chunk, not chunk)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._at)
            line += error.object.count(b"\n", 0, error.start)
            byte = error.object[error.start]
            raise InputError(
                f"{self._name}:{line}: expected UTF-8, got the byte 0x{byte:02x}"
            ) from None
        self._text, self._at = kept + more, 0
        return bool(chunk)
