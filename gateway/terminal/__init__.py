"""What the operator sees: the only way to print, and the form of the log.

Tenants write names, log lines, file names and error texts. To a terminal some characters are commands: ESC
moves the cursor, rewrites what was printed and types answers; others reverse the reading order. Here they all
become visible escapes. Nothing else of the gateway writes to standard output, standard error or the log,
except the bytes of `exec`, which belong to a command, as with ssh; `drawing` cleans what it draws alike.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, NoReturn, TextIO

import orjson

# C0 but tab and line end, DEL, C1; soft hyphen, marks and orders of direction, invisible joins and fillers,
# line and paragraph separators, lone surrogates, tags. Of Unicode's format characters the two joiners stay,
# which emoji and scripts need, and those that can be seen.
_CONTROL: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)
_COLOUR: Final = re.compile("\x1b\\[[0-9;:]{0,64}m")
# what may be the begin of a colour or of a line's end, whose rest is yet to come
_HALF: Final = re.compile("(?:\r|\x1b(?:\\[[0-9;:]{0,64})?)\\Z")


def clean(text: str) -> str:
    """Return `text` with what would steer a terminal as visible escapes; colours are left out."""
    if text.isascii() and text.isprintable():
        return text
    return _CONTROL.sub(_visible, _COLOUR.sub("", text).replace("\r\n", "\n"))


def line(text: str) -> str:
    """Return `text` as `clean` does, on one line."""
    return clean(text).replace("\n", "\\n").replace("\t", "\\t")


def encoded(value: Any, *, indent: bool = False) -> str:
    """Return JSON that means `value`, in which nothing steers a terminal."""
    text = orjson.dumps(value, option=orjson.OPT_INDENT_2 if indent else None).decode()
    # such a character can only stand in a string, where JSON has another way to write it
    return _CONTROL.sub(_in_json, text)


def set_in(text: str) -> str:
    """Return `text` as `clean` does, all lines but the first set in: none passes for a new one."""
    return clean(text).replace("\n", "\n    ")


def _visible(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _in_json(found: re.Match[str]) -> str:
    code = ord(found[0])
    units = (code,) if code < 0x10000 else (0xD7C0 + (code >> 10), 0xDC00 + (code & 0x3FF))
    return "".join(f"\\u{unit:04x}" for unit in units)


class OutputClosed(Exception):
    """Nobody reads what we print any more: `head` has seen enough."""


class Output:
    """One of the two outputs. What is said is cleaned; nothing is cut or folded, wherever it goes."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._name = "stderr" if stderr else "stdout"

    @property
    def file(self) -> TextIO:
        """Where it goes now. Raises `OutputClosed` where it was closed before we began."""
        file: TextIO | None = getattr(sys, self._name)
        if file is None:
            raise OutputClosed
        return file

    @property
    def is_terminal(self) -> bool:
        return self.file.isatty()

    def say(self, text: str, end: str = "\n") -> None:
        """Print lines at once and as they are, however long: tokens, JSON, what programs read."""
        with _closing():
            self.file.write(clean(text) + end)
            self.file.flush()

    def json(self, value: Any, *, indent: bool = False) -> None:
        self.say(encoded(value, indent=indent))

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print rows below their titles, each column as wide as what is in it."""
        cells = [titles, *([line(cell) for cell in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        padded = (map(str.ljust, row, widths) for row in cells)
        self.say("\n".join("  ".join(row).rstrip() for row in padded))


@contextlib.contextmanager
def _closing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise OutputClosed from None


class Lines:
    """A log that comes in pieces, cleaned for a terminal."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = ""

    def cleaned(self, piece: bytes, *, last: bool = False) -> bytes:
        """Return what can be shown of all pieces by now. What may be cut in two waits for the next piece."""
        text = self._held + self._decoder.decode(piece, last)
        half = None if last else _HALF.search(text, max(0, len(text) - 80))
        self._held = half[0] if half else ""
        return clean(text[: len(text) - len(self._held)]).encode()


out: Final = Output()
err: Final = Output(stderr=True)


def copy(piece: bytes, *, to_stderr: bool = False) -> None:
    """Hand on bytes as they are: what a command prints, or a log that was asked for raw."""
    target = (err if to_stderr else out).file.buffer
    with _closing():
        target.write(piece)
        target.flush()


def leave(code: int) -> NoReturn:
    """End the process. What is registered for its end is run, and what is printed is written out.

    The interpreter does not take itself apart then, module by module: that takes a fifth of a short command.
    """
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        for file in filter(None, (sys.stdout, sys.stderr)):
            file.flush()
    os._exit(code)


# --- the log ------------------------------------------------------------------------------------------


class Records(logging.Formatter):
    """A record is one line, its traceback is set in: no text can pass for another record."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return line(super().formatMessage(record))

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        return set_in(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return set_in(super().formatStack(stack_info))


def log_to_stderr(level: str) -> None:
    """Have every record of `level` and above, warnings of Python among them, written to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(Records())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
