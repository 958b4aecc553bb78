"""How text is stored in a file: byte order marks, UTF-8 and UTF-16, line ends, NULs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gateway.tools.call import Call, ToolFailure

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARK = b"\xff\xfe"
_UTF16_BIG_MARK = b"\xfe\xff"
_NUL_WINDOW = 8192  # bytes at a file's start in which a NUL makes it binary, as in Claude Code and git


@dataclass(frozen=True, slots=True)
class FileText:
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


def decode(data: bytes) -> FileText:
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
    return FileText(text, mark, encoding, crlf, valid, has_nul)


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


STALE = (
    "File has been modified since read, either by the user or by a linter. Read it again before attempting "
    "to write it."
)
_SWAPPED = (
    "\n(note: Edit also tried swapping \\uXXXX escapes and their characters; neither form matched, so the "
    "mismatch is likely elsewhere in old_string. Re-read the file and copy the exact surrounding text.)"
)


def replaced(call: Call, form: FileText, old: str, new: str, *, modified: bool) -> tuple[str, int]:
    """Return the new text and the number of replacements."""
    text = form.text
    if not old:
        return new, 1
    old, found, new = _named(text, old, new)
    count = text.count(found) if found is not None else 0
    every = call.given.get("replace_all")
    if modified and count != 1 and not (count and every):
        raise ToolFailure("stale_read", STALE)
    if found is None or not count:
        note = "" if old.isascii() else _SWAPPED
        raise ToolFailure("no_match", f"String to replace not found in file.\nString: {old}{note}")
    if count > 1 and not every:
        raise ToolFailure(
            "ambiguous_match",
            f"Found {count} matches of the string to replace, but replace_all is false. To replace all "
            "occurrences, set replace_all to true. To replace only one occurrence, please provide more "
            f"context to uniquely identify the instance.\nString: {old}",
            matches=count,
        )
    if new == found:  # it differed from `old_string` only in quotes or escapes
        words = "String not found in file. Failed to apply edit."
        raise ToolFailure("no_match", words, tagged=False)
    if form.crlf:
        new = new.replace("\r\n", "\n")  # with LF; the file keeps its own line ends
    if not new and not found.endswith("\n") and found + "\n" in text:
        found += "\n"  # removing all of a line removes its line end too
    return text.replace(found, new), count


def _named(text: str, old: str, new: str) -> tuple[str, str | None, str]:
    """Return `old` as it occurs, the part of `text` that it matches, and `new` in the same form.

    A character and its escape `\\uXXXX` match each other if only the other form occurs.
    """
    found = _find(text, old)
    if found is None and (plain := _unescaped(old)) != old:
        old, new = plain, _unescaped(new)
        found = _find(text, old)
    if found is not None:
        return old, found, new if found == old else _curled(new, found)
    for digits in () if old.isascii() else ("04x", "04X"):
        if (escaped := _escaped(old, digits)) in text:
            return old, escaped, _escaped(new, digits)
    return old, None, new


_STRAIGHT = str.maketrans("‘’“”", "''\"\"")
_ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4})+")


def _unescaped(text: str) -> str:
    def characters(escapes: re.Match[str]) -> str:
        return bytes.fromhex(escapes[0].replace("\\u", "")).decode("utf-16-be", "replace")

    return _ESCAPES.sub(characters, text)


def _escaped(text: str, digits: str) -> str:
    """Return the text in ASCII, with other UTF-16 units as escapes whose number is formatted by `digits`."""
    found = []
    for char in text:
        units = char.encode("utf-16-be", "surrogatepass")
        numbers = [int.from_bytes(units[i : i + 2]) for i in range(0, len(units), 2)]
        found.append(char if char.isascii() else "".join(f"\\u{number:{digits}}" for number in numbers))
    return "".join(found)


def _find(text: str, old: str) -> str | None:
    """Return the part of `text` that `old` matches, if necessary with straight quotes for curly ones."""
    if old in text:
        return old
    straight = old.translate(_STRAIGHT)
    at = text.translate(_STRAIGHT).find(straight)  # one character for one, so positions are the same
    return text[at : at + len(old)] if at >= 0 else None


def _curled(new: str, found: str) -> str:
    """Curl the straight quotes of `new` if the replaced text had curly ones."""
    double = "“" in found or "”" in found
    single = "‘" in found or "’" in found
    out = []
    for i, char in enumerate(new):
        opening = i == 0 or new[i - 1] in " \t\n\r([{—–"
        if char == '"' and double:
            out.append("“" if opening else "”")
        elif char == "'" and single:
            inner = 0 < i < len(new) - 1 and new[i - 1].isalpha() and new[i + 1].isalpha()
            out.append("‘" if opening and not inner else "’")
        else:
            out.append(char)
    return "".join(out)
