"""Search files for a Grep's pattern, and pick the lines to show."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterator
from typing import Any

from gateway.errors import Timeout
from gateway.tools.call import Call
from gateway.tools.search.contents import BLOCK, FILE_MAX, before_nul, content
from gateway.tools.search.matcher import finder
from gateway.tools.search.output import Output
from gateway.tools.search.query import around
from gateway.tools.search.scope import BRIEF_BYTES, too_deep

_LOOKS = 64  # matches in one file between two checks of the clock


class Search:
    """Searches the files of one Grep, and adds the matches to `output`."""

    def __init__(self, call: Call, regex: Any, spanning: bool) -> None:
        given = call.given
        self._spanning = spanning
        self._call = call
        self.find = finder(regex)
        self._mode: str = given.get("output_mode", "files_with_matches")
        self._only: bool = bool(given.get("-o"))
        asked = dict(around(given))
        self._before = asked.get("-C", asked.get("-B", 0))
        self._after = asked.get("-C", asked.get("-A", 0))
        # Groups are separated if any context was asked for, even if the one that counts is 0.
        self._parted = any(given.get(name, 0) > 0 for name in ("context", "-C", "-B", "-A"))
        self._left = BRIEF_BYTES if call.brief else sys.maxsize
        self.output = Output(call, self._mode)

    @property
    def ordered(self) -> bool:
        """Whether files must be searched in order; otherwise the answer sorts them."""
        return self._mode != "files_with_matches"

    @property
    def found(self) -> int:
        """The number of files to list."""
        return len(self.output.files)

    def file(self, path: str, name: str, status: os.stat_result, *, explicit: bool) -> None:
        """Search one file. `path` is its place in the workspace."""
        self._left -= status.st_size
        if self._left < 0:
            raise Timeout("too much for a brief search", reason="timeout")
        if status.st_size > FILE_MAX:
            self.output.skipped += 1
            return
        data, nul = content(self._call, path, status)
        cut = nul >= 0 and not explicit
        if cut:
            data = before_nul(data, nul)
        if not data:
            return
        if time.monotonic() > self._call.deadline:
            raise Timeout("the search took too long", reason="timeout")
        if self._mode == "files_with_matches":
            start, _ = self.find(data, 0)
            # an empty match after the last line end is on no line
            if start >= 0 and (start < len(data) or not data.endswith(b"\n")):
                self.output.files.append((-status.st_mtime_ns, path))
            return
        if self._mode == "count":
            # ripgrep counts lines, but counts matches if these may span lines
            count = sum(1 for _ in self._spans(data, every=self._spanning))
            if count and not cut:
                self.output.files.append((count, path))
                self.output.matches += count
            return
        found, binary = self._lines(data, "" if explicit else self._call.shown(path), nul >= 0)
        if found and (cut or binary or 0 <= nul < BLOCK):
            where = "" if explicit else f"{self._call.shown(path)}:"
            self.output.row(f'{where}binary file matches (found "\\0" byte around offset {nul})')

    def named(self, prefix: str, found: str) -> None:
        """Search a given list of files, in the order of a walk.

        If only names are asked for, nothing is searched again, since all of them are known to match.
        """
        root, deadline = self._call.root, self._call.deadline
        names = [os.fsdecode(name).removeprefix("./") for name in found.encode("latin-1").split(b"\0")[:-1]]
        names.sort()
        for name in names:
            path = prefix + name
            if path.count("/") > root.depth:
                self.output.note = too_deep(self._call)
                continue
            try:
                # as in `Walk`: a link in the path may lead elsewhere, but nothing is opened here
                status = os.stat(path, dir_fd=root.descriptor, follow_symlinks=False)
            except OSError:
                continue  # gone
            if not stat.S_ISREG(status.st_mode):
                continue
            if self.ordered or status.st_size > FILE_MAX:
                self.file(path, name, status, explicit=False)
            else:
                self.output.files.append((-status.st_mtime_ns, path))
            if time.monotonic() > deadline:
                raise Timeout("the search took too long", reason="timeout")
            if self.output.full:
                break

    def _spans(self, data: bytes, *, every: bool = False) -> Iterator[tuple[int, int]]:
        """Yield start and end of each match, one for each line that matches or `every` one.

        Raises `Timeout`: one file may have millions of them, each in a line of megabytes.
        """
        at, end = 0, len(data)
        before = -1  # end of the previous match; an empty match there does not count
        find, deadline = self.find, self._call.deadline
        tried = 0
        while at < end:
            tried += 1
            if tried % _LOOKS == 0 and time.monotonic() > deadline:
                raise Timeout("the search took too long", reason="timeout")
            start, stop = find(data, at)
            if start < 0:
                return
            if start >= end and stop >= end and (data.endswith(b"\n") or start > end):
                return  # an empty match after the last line end is on no line
            if not every or stop > start or start != before:
                yield start, stop
            if every:
                at = stop if stop > start else stop + 1
                before = stop
            else:
                line_end = data.find(b"\n", max(stop - 1, start) if stop > start else stop)
                if line_end < 0:
                    return
                at = line_end + 1

    def _lines(self, data: bytes, name: str, binary: bool) -> tuple[bool, bool]:
        """Output the matches in one file with their context; `name` precedes each line.

        Lines of a `binary` file with a NUL are left out. Returns whether anything matched, and whether a line
        was left out.
        """
        number, counted = 1, 0  # the line number at position `counted`
        last = -1  # the last line of the output
        pending_after = 0
        position = 0  # where the line after `last` begins
        # between files as between groups
        separator_due = self._parted and self.output.begun
        matched = left_out = False

        def add(number: int, mark: str, line: bytes) -> None:
            nonlocal left_out
            if binary and b"\0" in line:
                left_out = True
            else:
                self.output.line(name, number, mark, line)

        for start, stop in self._spans(data, every=self._only or self._spanning):
            matched = True
            line_start = data.rfind(b"\n", 0, start) + 1
            number += data.count(b"\n", counted, line_start)
            counted = line_start
            self.output.matches += 1
            if self._parted:
                first = number
                lines_before: list[bytes] = []
                begin = line_start
                # The requested context after the previous match.
                while pending_after and last + 1 < number:
                    line, position = _line(data, position)
                    last += 1
                    pending_after -= 1
                    add(last, "-", line)
                while len(lines_before) < self._before and first - 1 > max(last, 0):
                    begin_of = data.rfind(b"\n", 0, begin - 1) + 1
                    lines_before.append(data[begin_of : begin - 1])
                    begin = begin_of
                    first -= 1
                if separator_due or (last >= 0 and first > last + 1):
                    self.output.row("--")
                    separator_due = False
                for i, line in enumerate(reversed(lines_before)):
                    add(first + i, "-", line)
            if self._only:
                for i, line in enumerate(data[start:stop].split(b"\n")):
                    add(number + i, ":", line)
            position = line_start
            current = number
            until = max(stop, start + 1)
            while True:
                line, position = _line(data, position)
                if current > last:
                    if not self._only:
                        add(current, ":", line)
                    last = current
                current += 1
                if position >= until or position >= len(data):
                    break
            pending_after = self._after
            if self.output.full:
                return True, left_out
        while matched and pending_after and position < len(data):
            line, position = _line(data, position)
            last += 1
            pending_after -= 1
            add(last, "-", line)
        return matched, left_out


def _line(data: bytes, position: int) -> tuple[bytes, int]:
    """Return the line at `position` without its end, and where the next begins."""
    end = data.find(b"\n", position)
    if end < 0:
        return data[position:], len(data)
    return data[position:end], end + 1
