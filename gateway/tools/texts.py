"""How text is stored in a file: byte order marks, UTF-8 and UTF-16, line ends, NULs."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARK = b"\xff\xfe"
_UTF16_BIG_MARK = b"\xfe\xff"
_NUL_WINDOW = 8192  # bytes at a file's start in which a NUL makes it binary, as in Claude Code and git


@dataclass(frozen=True, slots=True)
class Text:
    """A file's text with LF line ends, and what it takes to write it back in the same form."""

    text: str
    mark: bytes
    encoding: str
    crlf: bool
    valid: bool
    has_nul: bool

    @property
    def flaw(self) -> str:
        """Return why the file must not be written, in Claude Code's words; empty if it may."""
        if self.mark == _UTF16_BIG_MARK:
            return "File is UTF-16 big-endian (it starts FE FF), which these tools cannot write"
        if self.has_nul:
            return (
                "File has NUL bytes in its first 8 KB: binary data, UTF-16/UTF-32 without a byte-order mark, "
                "or text with embedded NULs"
            )
        if not self.valid:
            return (
                "File is not valid UTF-8: it uses a legacy encoding such as Windows-1252, Shift-JIS or GBK, "
                "or it is binary"
            )
        return ""

    def encode(self, text: str) -> bytes:
        """Encode `text`, which has LF line ends, in this file's form."""
        if self.crlf:
            text = text.replace("\n", "\r\n")
        return self.mark + text.encode(self.encoding)


def decode(data: bytes) -> Text:
    """Decode a file. Invalid bytes become U+FFFD, and `valid` is False.

    CRLF becomes LF; a file with both takes the form of its more frequent line end.
    """
    mark, encoding = b"", "utf-8"
    if data.startswith(_UTF8_MARK):
        mark = _UTF8_MARK
    elif data.startswith(_UTF16_MARK):
        mark, encoding = _UTF16_MARK, "utf-16-le"
    body = data[len(mark) :] if mark else data
    if encoding == "utf-16-le":
        body = body[: len(body) & ~1]  # ignore half a character at the end
    elif data.startswith(_UTF16_BIG_MARK):
        mark = _UTF16_BIG_MARK
    valid = True
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError:
        text, valid = body.decode(encoding, "replace"), False
    has_nul = encoding == "utf-8" and body.find(b"\0", 0, _NUL_WINDOW) >= 0
    crlf = False
    if "\r" in text:
        pairs = text.count("\r\n")
        crlf = pairs > text.count("\n") - pairs
        text = text.replace("\r\n", "\n")
    return Text(text, mark, encoding, crlf, valid, has_nul)


# JavaScript's white space without line ends
_PLAIN = "\t\v\f "
_WHITE = (
    _PLAIN
    + "\u00a0\u1680"
    + "".join(map(chr, range(0x2000, 0x200B)))
    + "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
_TRAILING = re.compile(rf"(?<![{_WHITE}])[{_WHITE}]++(?=[\r\n]|\Z)")  # only at its beginning: linear


def trimmed(path: str, text: str) -> str:
    """Return a model's text without trailing white space, except where it has a meaning."""
    if path.lower().endswith((".md", ".mdx")):
        return text
    white = _PLAIN if text.isascii() else _WHITE
    # Most texts have none, as a few searches for two characters show.
    if not text.endswith(tuple(white)) and not any(char + end in text for char in white for end in "\r\n"):
        return text
    return _TRAILING.sub("", text)
