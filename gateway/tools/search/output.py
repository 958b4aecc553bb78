"""The answer of a Grep: the matches, formatted by mode and in pages."""

from __future__ import annotations

import os
from string import ascii_lowercase, ascii_uppercase
from typing import Any
from unicodedata import normalize

from gateway.tools.answer import Answer, text
from gateway.tools.call import Call

COLUMNS_MAX = 500  # UTF-16 units of one line of output; longer ones are omitted


class Output:
    """The matches of one Grep, and whether they are enough.

    `files` are the matching files, each with its negated mtime or with a count. `matches` counts matches,
    `skipped` files that are too large to search. `note` is a line below the answer.
    """

    def __init__(self, call: Call, mode: str) -> None:
        given = call.given
        self._call = call
        self._mode = mode
        self._numbers: bool = given.get("-n", True)
        self._limit: int = given.get("head_limit", 250)
        self._offset: int = given.get("offset", 0)
        self._passed = 0  # lines before the page: counted, not stored
        # One line more than is shown tells that there are more.
        self._enough = self._limit + 1 if self._limit else 1 << 60
        self._room = call.limits.result_max
        self._cut = False
        self._rows: list[str] = []
        self.files: list[tuple[int, str]] = []
        self.matches = 0
        self.skipped = 0
        self.note = ""

    @property
    def full(self) -> bool:
        return self._mode == "content" and (len(self._rows) >= self._enough or self._cut)

    @property
    def begun(self) -> bool:
        """Whether there are rows, on this page or before it."""
        return bool(self._rows or self._passed)

    def line(self, name: str, number: int, mark: str, line: bytes) -> None:
        """Add a line of a file; `mark` is `:` for a match and `-` for context."""
        if self._passed < self._offset:
            self._passed += 1
            return
        if self._cut:
            return
        head = f"{name}{mark}" if name else ""
        if self._numbers:
            head += f"{number}{mark}"
        row = head + _shown_line(line, mark)
        self._room -= len(row) + 1
        if self._room < 0:
            self._cut = True
            return
        self._rows.append(row)

    def row(self, row: str) -> None:
        """Add a row that is not a line of a file."""
        if self._passed < self._offset:
            self._passed += 1
        else:
            self._rows.append(row)

    def answer(self) -> Answer:
        """Return the requested page."""
        facts: dict[str, Any] = {"mode": self._mode}
        if self.skipped:
            facts["skippedLargeFiles"] = self.skipped
        if self._mode == "files_with_matches":
            page, words = self._page(_in_order(self.files)[self._offset :])
            page = self._call.all_shown(page)
            facts |= {"files": page, "total": len(self.files)}
            if not page:
                none = "No files found"
                if self._offset and self.files:
                    none = f"No entries at this offset. [Showing results with pagination = {words}]"
                return text(none + self.note, facts)
            noun = "file" if len(page) == 1 else "files"
            head = f"Found {len(page)} {noun}" + (f" {words}" if words else "")
            return text("\n".join((head, *page)) + self.note, facts)
        if self._mode == "count":
            files_here = self.files[self._offset :]
            page, words = self._page([f"{self._call.shown(path)}:{count}" for count, path in files_here])
            total, files = self.matches, len(self.files)
            facts |= {"total": total, "files": files}
            summary = (
                f"Found {total} total {'occurrence' if total == 1 else 'occurrences'} across {files} "
                f"{'file' if files == 1 else 'files'}."
            )
            if words:
                summary += f" with pagination = {words}"
            none = "No entries at this offset" if total else "No matches found"
            return text(("\n".join(page) or none) + f"\n\n{summary}{self.note}", facts)
        page, words = self._page(self._rows)
        facts |= {"lines": len(page), "truncated": self._cut or len(self._rows) > len(page)}
        shown = "\n".join(page)
        if not shown:
            shown = "No entries at this offset" if self._passed else "No matches found"
        elif not shown.strip():
            shown = "(Grep completed with no output)"
        if words:
            shown += f"\n\n[Showing results with pagination = {words}]"
        if self._cut:
            shown += f"\n\n[The output stopped at {self._call.limits.result_max} bytes.]"
        return text(shown + self.note, facts)

    def _page(self, page: list[str]) -> tuple[list[str], str]:
        """Return the requested rows from the offset on, and the text about limit and offset."""
        words = []
        if self._limit and len(page) > self._limit:
            page = page[: self._limit]
            words.append(f"limit: {self._limit}")
        if self._offset:
            words.append(f"offset: {self._offset}")
        return page, ", ".join(words)


# ASCII in the order of Unicode's collation, ignoring case; all other characters come after it.
_COLLATED = "\t\n\v\f\r _-,;:!?.'\"()[]{}@*/\\&#%`^+<=>|~$0123456789"
_PLACES = bytes.maketrans(
    (_COLLATED + ascii_uppercase).encode(), bytes(range(1, len(_COLLATED) + 1)) + ascii_lowercase.encode()
)


def _in_order(files: list[tuple[int, str]]) -> list[str]:
    """Return the names of files, newest first; those of the same age by name, as people sort."""
    if not files:
        return []
    ages, names = zip(*files, strict=True)
    # all at once: there may be tens of thousands
    joined = "\0".join(names)
    letters = os.fsencode(joined if joined.isascii() else normalize("NFD", joined))
    places, cases = letters.translate(_PLACES).split(b"\0"), letters.swapcase().split(b"\0")
    return [name for *_, name in sorted(zip(ages, places, cases, names, strict=True))]


def _shown_line(line: bytes, mark: str) -> str:
    """Return a line for the output, without a carriage return at its end."""
    if len(line) <= 3 * COLUMNS_MAX:  # the most bytes of a UTF-16 unit
        shown = line.decode("utf-8", "replace").removesuffix("\r")
        if len(line) <= COLUMNS_MAX or len(shown.encode("utf-16-le", "surrogatepass")) <= 2 * COLUMNS_MAX:
            return shown
    return "[Omitted long matching line]" if mark == ":" else "[Omitted long context line]"
