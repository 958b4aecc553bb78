"""Output for the operator: the only way to print, and the log's format.

Tenants write names, log lines, file names and error texts. To a terminal some characters are commands: ESC
moves the cursor, overwrites earlier output and types answers; others reverse the reading order. Here they all
become visible escapes. Nothing else in the gateway writes to standard output, standard error or the log,
except the bytes of `exec`, which belong to a command, as with ssh. `drawing` cleans its output likewise.
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

# C0 except tab and line feed, DEL, C1; soft hyphen, directional marks, invisible joiners and fillers,
# line and paragraph separators, lone surrogates, tags. Of Unicode's format characters the visible ones stay,
# and the two joiners, which emoji and some scripts need.
_CONTROL: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)
_COLOUR: Final = re.compile("\x1b\\[[0-9;:]{0,64}m")
# what may be the beginning of a colour or line end that continues in the next piece
_HALF: Final = re.compile("(?:\r|\x1b(?:\\[[0-9;:]{0,64})?)\\Z")


def clean(text: str) -> str:
    """Return `text` with terminal control characters as visible escapes, and without colours."""
    if text.isascii() and text.isprintable():
        return text
    return _CONTROL.sub(_visible, _COLOUR.sub("", text).replace("\r\n", "\n"))


def line(text: str) -> str:
    """Return `text` as `clean` does, on one line."""
    return clean(text).replace("\n", "\\n").replace("\t", "\\t")


def encoded(value: Any, *, indent: bool = False) -> str:
    """Return `value` as JSON without terminal control characters."""
    text = orjson.dumps(value, option=orjson.OPT_INDENT_2 if indent else None).decode()
    # such a character can only be inside a string, where JSON can escape it
    return _CONTROL.sub(_in_json, text)


def set_in(text: str) -> str:
    """Return `text` as `clean` does, with all lines but the first indented: none looks like a new entry."""
    return clean(text).replace("\n", "\n    ")


def _visible(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _in_json(found: re.Match[str]) -> str:
    code = ord(found[0])
    units = (code,) if code < 0x10000 else (0xD7C0 + (code >> 10), 0xDC00 + (code & 0x3FF))
    return "".join(f"\\u{unit:04x}" for unit in units)


class OutputClosed(Exception):
    """Nobody reads our output any more, as when piped to `head`."""


class TerminalOutput:
    """Standard output or error. Texts are cleaned, but never cut or wrapped, wherever they go."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._name = "stderr" if stderr else "stdout"

    @property
    def file(self) -> TextIO:
        """The current file. Raises `OutputClosed` if it was closed before we started."""
        file: TextIO | None = getattr(sys, self._name)
        if file is None:
            raise OutputClosed
        return file

    @property
    def is_terminal(self) -> bool:
        return self.file.isatty()

    def say(self, text: str, end: str = "\n") -> None:
        """Print lines at once, however long: tokens, JSON, output for programs."""
        with _closing():
            self.file.write(clean(text) + end)
            self.file.flush()

    def json(self, value: Any, *, indent: bool = False) -> None:
        self.say(encoded(value, indent=indent))

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print rows below their titles, each column as wide as its contents."""
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


class LogCleaner:
    """A log that arrives in pieces, cleaned for a terminal."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = ""

    def cleaned(self, piece: bytes, *, last: bool = False) -> bytes:
        """Return what can be shown so far. What may continue in the next piece waits for it."""
        text = self._held + self._decoder.decode(piece, last)
        half = None if last else _HALF.search(text, max(0, len(text) - 80))
        self._held = half[0] if half else ""
        return clean(text[: len(text) - len(self._held)]).encode()


out: Final = TerminalOutput()
err: Final = TerminalOutput(stderr=True)


def copy(piece: bytes, *, to_stderr: bool = False) -> None:
    """Write bytes unchanged: a command's output, or a log requested raw."""
    target = (err if to_stderr else out).file.buffer
    with _closing():
        target.write(piece)
        target.flush()


def leave(code: int) -> NoReturn:
    """End the process, after running its exit handlers and flushing its output.

    This skips the interpreter's finalization, which takes a fifth of a short command's time.
    """
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        for file in filter(None, (sys.stdout, sys.stderr)):
            file.flush()
    os._exit(code)


# --- the log ------------------------------------------------------------------------------------------


class LogFormatter(logging.Formatter):
    """Formats a record as one line with its traceback indented, so that no text looks like another record."""

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
    """Log every record of `level` and above, including Python's warnings, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
