"""Edit's replacement: which part of a text `old_string` matches, and what replaces it."""

from __future__ import annotations

import re

from gateway.tools.answer import ToolFailure
from gateway.tools.call import Call
from gateway.tools.texts import Text

STALE = (
    "File has been modified since read, either by the user or by a linter. Read it again before attempting "
    "to write it."
)
_SWAPPED = (
    "\n(note: Edit also tried swapping \\uXXXX escapes and their characters; neither form matched, so the "
    "mismatch is likely elsewhere in old_string. Re-read the file and copy the exact surrounding text.)"
)


def replaced(call: Call, form: Text, old: str, new: str, *, modified: bool) -> tuple[str, int]:
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
