"""Claude Code's Grep, in one of three ways, of which `FileTools` chooses.

`grep` walks the tree and searches each file; a `brief` call raises `Timeout` instead of searching for long.
For a large tree several workers each run `scan` on a share of the folders and return the names of the files
that match, and `grep` then answers from these names. In `scan` a file costs three system calls and a search
by RE2, first for a literal if all matches of the pattern must contain one.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Collection, Iterator
from string import ascii_lowercase, ascii_uppercase
from typing import Any, Final
from unicodedata import normalize

from gateway.errors import GatewayError, Timeout
from gateway.rootfs import kernel
from gateway.rootfs.root import Root
from gateway.rootfs.walk import Walk, settled
from gateway.rootfs.worker import NAMED_MAX, SCANNED, Workspace
from gateway.tools.call import Call, ToolAnswer, ToolFailure, text, timed_out
from gateway.tools.globs import TYPES, GlobError, Globs
from gateway.tools.patterns import Find, PatternError, compiled, literal
from gateway.tools.schemas import checked
from gateway.tools.search import (
    BRIEF_BYTES,
    GrepFilter,
    bad_folder,
    bounded,
    hidden,
    rejected,
    start_of,
    too_deep,
)

FILE_MAX = 16 << 20  # bytes of a file that Grep searches; larger ones are skipped and counted
CACHE_MAX = 16 << 20  # bytes of file contents that a worker caches between calls
CACHE_FILE_MAX = 1 << 20
BLOCK = 1 << 16  # bytes that ripgrep reads at once
COLUMNS_MAX = 500  # UTF-16 units of one line of output; longer ones are omitted
_CONTROL: Final = (".git", ".svn", ".hg", ".bzr", ".jj", ".sl")
_LOOKS: Final = 64  # matches in one file between two checks of the clock

# Of a scan:
_NOT_HERE: Final = b"-"
_ROOM: Final = 256 << 10  # bytes read from a file at once
_FILES: Final = 256  # files between two checks of the clock
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LINE_END: Final = 0x0A
_FIRST_ODD: Final = 0xEF  # the lowest first byte of a byte order mark
_buffer = bytearray(_ROOM)
_view = memoryview(_buffer)


def grep(call: Call) -> ToolAnswer:
    """ToolAnswer a Grep: by a walk, or from a given list of files."""
    _check_numbers(call.given)
    search = GrepSearch(call)
    try:
        search.run()
    except Timeout:
        raise timed_out(call.limits.tool_timeout) from None
    except GatewayError as error:
        raise bad_folder(call, call.given.get("path") or ".", search.start, error) from None
    return search.output.answer()


def scan(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Return the names of the matching files below a Grep's start, in one share of the folders.

    They are relative to the start, unordered, each followed by a NUL, and all preceded by `SCANNED`. Files
    that are too large to search are included. Without that mark a walk must answer, which has texts for
    errors. Raises `Timeout`.
    """
    number, count = arguments["share"]
    try:
        given = {**checked("Grep", arguments["input"]), "output_mode": "files_with_matches"}
        call = Call("Grep", workspace, given, arguments["cwd"], None, False)
        return GrepSearch(call, (number, count)).scan()
    except Timeout:
        raise
    except (GatewayError, ToolFailure):
        return _NOT_HERE


def _check_numbers(given: dict[str, Any]) -> None:
    """Refuse invalid numbers, with Claude Code's texts."""
    for name, hint in (("head_limit", " Pass 0 for unlimited."), ("offset", "")):
        number = given.get(name, 0)
        if number < 0 or number != int(number):
            words = f"{name} must be a whole number of 0 or more, got {number}.{hint}"
            raise ToolFailure("invalid_params", words)
    for flag, number in _around(given):
        if number < 0 or number != int(number):
            raise rejected(
                f"error parsing flag {flag}: value is not a valid number: invalid digit found in string"
            )


def _around(given: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the requested context as ripgrep's flags; only mode `content` has any."""
    if given.get("output_mode") != "content":
        return []
    for name in ("context", "-C"):
        if name in given:
            return [("-C", given[name])]
    return [(name, given[name]) for name in ("-B", "-A") if name in given]


def _overrides(given: dict[str, Any], start: str) -> list[str]:
    """Return the globs that take precedence over ignore files; the last that matches decides."""
    patterns = [f"!{name}" for name in _CONTROL]
    for word in str(given.get("glob", "")).split():
        # A comma separates two globs, unless there are braces; `#` begins a comment.
        parts = [word] if "{" in word and "}" in word else word.split(",")
        patterns += [part for part in parts if part and not part.startswith("#")]
    ours = hidden(start)
    return [*patterns, f"!/{ours}"] if ours else patterns


def _types(kind: str) -> Globs:
    """Return the globs of a file type; for `all`, those of all types."""
    if kind == "all":
        return Globs([glob for globs in TYPES.values() for glob in globs])
    if kind not in TYPES:
        raise rejected(f"unrecognized file type: {kind[:100]}".rstrip())
    return Globs(TYPES[kind])


class GrepSearch:
    """One Grep: searches files, and adds the matches to `output`. `share` is its part of the folders."""

    def __init__(self, call: Call, share: tuple[int, int] = (0, 1)) -> None:
        given = call.given
        self._call = call
        self.start = start_of(call, given.get("path") or ".")
        self._prefix = self.start + "/" if self.start else ""
        try:
            self._pattern = compiled(given["pattern"], bool(given.get("-i")), bool(given.get("multiline")))
            types = _types(given["type"]) if given.get("type") else None
            globs = Globs(_overrides(given, self.start))
        except (PatternError, GlobError) as error:
            raise rejected(str(error)) from None
        self._chooser = GrepFilter(call.root, self.start, globs, types, share)
        self._mode: str = given.get("output_mode", "files_with_matches")
        self._only: bool = bool(given.get("-o"))
        context = dict(_around(given))
        self._before = context.get("-C", context.get("-B", 0))
        self._after = context.get("-C", context.get("-A", 0))
        # Groups are separated if any context was asked for, even if the one that counts is 0.
        self._parted = any(given.get(name, 0) > 0 for name in ("context", "-C", "-B", "-A"))
        self._left = BRIEF_BYTES if call.brief else sys.maxsize
        self.output = GrepOutput(call, self._mode)

    def run(self) -> None:
        """Search one file, the files of a list, or those of a walk."""
        call = self._call
        status = _status(call.root, self.start)
        if stat.S_ISREG(status.st_mode):
            self._file(self.start, status, explicit=True)
        elif call.named is not None:
            self._named(call.named)
        else:
            # in order, unless the answer sorts the files
            walk = self._walk(ordered=self._mode != "files_with_matches")
            for name, status in walk:
                self._file(self._prefix + name, status)
                if self.output.full:
                    break
            self.output.note = bounded(walk, call)

    def _walk(self, *, ordered: bool) -> Walk:
        call = self._call
        return Walk(
            call.root,
            self.start,
            self._chooser,
            state=self._chooser.above(),
            maximum=call.limits.visit_max,
            deadline=call.deadline,
            ordered=ordered,
        )

    def _hurry(self) -> None:
        if time.monotonic() > self._call.deadline:
            raise Timeout("the search took too long", reason="timeout")

    def _named(self, found: str) -> None:
        """Search a given list of files, in the order of a walk.

        If only names are asked for, nothing is searched again, since all of them are known to match.
        """
        root = self._call.root
        names = [os.fsdecode(name).removeprefix("./") for name in found.encode("latin-1").split(b"\0")[:-1]]
        names.sort()
        for name in names:
            path = self._prefix + name
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
            if self._mode != "files_with_matches" or status.st_size > FILE_MAX:
                self._file(path, status)
            else:
                self.output.files.append((-status.st_mtime_ns, path))
            self._hurry()
            if self.output.full:
                break

    def _file(self, path: str, status: os.stat_result, *, explicit: bool = False) -> None:
        """Search one file at a path in the workspace; `explicit` if the call names it."""
        self._left -= status.st_size
        if self._left < 0:
            raise Timeout("too much for a brief search", reason="timeout")
        if status.st_size > FILE_MAX:
            self.output.skipped += 1
            return
        data, nul = _content(self._call, path, status)
        cut = nul >= 0 and not explicit
        if cut:
            data = _before_nul(data, nul)
        if not data:
            return
        self._hurry()
        if self._mode == "files_with_matches":
            start, _ = self._pattern.find(data, 0)
            # an empty match after the last line end is on no line
            if start >= 0 and (start < len(data) or not data.endswith(b"\n")):
                self.output.files.append((-status.st_mtime_ns, path))
            return
        if self._mode == "count":
            # ripgrep counts lines, but counts matches if these may span lines
            count = sum(1 for _ in self._spans(data, every=self._pattern.spanning))
            if count and not cut:
                self.output.files.append((count, path))
                self.output.matches += count
            return
        found, binary = self._lines(data, "" if explicit else self._call.display(path), nul >= 0)
        if found and (cut or binary or 0 <= nul < BLOCK):
            where = "" if explicit else f"{self._call.display(path)}:"
            self.output.row(f'{where}binary file matches (found "\\0" byte around offset {nul})')

    def _spans(self, data: bytes, *, every: bool = False) -> Iterator[tuple[int, int]]:
        """Yield start and end of each match, one for each line that matches or `every` one.

        Raises `Timeout`: one file may have millions of them, each in a line of megabytes.
        """
        at, end = 0, len(data)
        before = -1  # end of the previous match; an empty match there does not count
        find, tried = self._pattern.find, 0
        while at < end:
            tried += 1
            if tried % _LOOKS == 0:
                self._hurry()
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

        for start, stop in self._spans(data, every=self._only or self._pattern.spanning):
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

    def scan(self) -> bytes:
        """Return the names of the files that match, as `scan` does."""
        walk = self._walk(ordered=False)
        needles = [literal(needle) for needle in self._pattern.needles]
        found = bytearray()
        for path, folder, names in walk.folders():
            prefix = path + "/" if path else ""
            for name in self._holding(needles, self._prefix + prefix, folder, names):
                found += os.fsencode(prefix + name) + b"\0"
            if len(found) > NAMED_MAX:
                return _NOT_HERE
        # only a walk can report what it leaves out
        return _NOT_HERE if walk.truncated or walk.deep else SCANNED + found

    def _holding(self, needles: list[Find], prefix: str, folder: int, names: Collection[str]) -> list[str]:
        """Return the names in a folder whose files match."""
        found = []
        room, views, find = _buffer, [_view], self._pattern.find
        for i, name in enumerate(names):
            if not i % _FILES:
                self._hurry()
            try:
                descriptor = os.open(name, _FLAGS, dir_fd=folder)
            except OSError:
                continue  # gone, or unreadable
            try:
                # not readv: if a FIFO has taken the file's place, its reader would lose the bytes
                length = os.preadv(descriptor, views, 0)
            except OSError:
                continue
            finally:
                os.close(descriptor)
            if length < _ROOM and room[0] < _FIRST_ODD:
                data = _view[:length]
                if needles and all(holds(data, 0)[0] < 0 for holds in needles):
                    continue
                at, _ = find(data, 0)
                # an empty match after the last line end is on no line
                if at < 0 or (at == length and (not length or room[length - 1] == _LINE_END)):
                    continue
                if room.find(b"\0", 0, length) < 0:
                    found.append(name)
                    continue
            # large, binary and otherwise encoded files are searched as in a walk
            if self._matches(prefix + name, name, folder):
                found.append(name)
        return found

    def _matches(self, path: str, name: str, folder: int) -> bool:
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        if not stat.S_ISREG(status.st_mode):
            return False
        if status.st_size > FILE_MAX:
            return True
        before = len(self.output.files)
        self._file(path, status)
        return len(self.output.files) > before


def _status(root: Root, path: str) -> os.stat_result:
    """Return the status of the target of `path`."""
    descriptor = root.open(path, kernel.O_PATH or os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def _line(data: bytes, position: int) -> tuple[bytes, int]:
    """Return the line at `position` without its end, and where the next begins."""
    end = data.find(b"\n", position)
    if end < 0:
        return data[position:], len(data)
    return data[position:end], end + 1


# Contents as UTF-8, and the position of the first NUL, by device, inode, ctime and size. First in, first out,
# since each search reads all of it.
_cache: dict[tuple[int, int, int, int], tuple[bytes, int]] = {}
_cached = 0


def forget() -> None:
    """Drop the cache."""
    global _cached
    _cache.clear()
    _cached = 0


def _content(call: Call, path: str, status: os.stat_result) -> tuple[bytes, int]:
    """Return a file's bytes and the position of the first NUL; empty if it cannot be read."""
    global _cached
    key = (status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size)
    kept = _cache.get(key)
    if kept is not None:
        return kept
    lasting = settled(status)
    try:
        read, _ = call.root.read_file(path, FILE_MAX)
    except GatewayError:
        return b"", -1
    data = _as_utf8(read)
    kept = data, data.find(b"\0")
    if lasting and len(data) <= CACHE_FILE_MAX and len(read) == status.st_size:
        _cache[key] = kept
        _cached += len(data)
        while _cached > CACHE_MAX:
            dropped, _ = _cache.pop(next(iter(_cache)))
            _cached -= len(dropped)
    return kept


def _before_nul(data: bytes, nul: int) -> bytes:
    """Return the part of a binary file that ripgrep searches if the file was not named.

    It reads in blocks, each up to its last line end, and stops at the one with the NUL.
    """
    searched = 0
    while searched + BLOCK <= nul:
        end = data.rfind(b"\n", searched, searched + BLOCK) + 1
        if not end:
            break
        searched = end
    return data[:searched]


def _as_utf8(data: bytes) -> bytes:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace").encode("utf-8", "replace")
    return data[3:] if data.startswith(b"\xef\xbb\xbf") else data


class GrepOutput:
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
        row = head + _display_line(line, mark)
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

    def answer(self) -> ToolAnswer:
        """Return the requested page."""
        facts: dict[str, Any] = {"mode": self._mode}
        if self.skipped:
            facts["skippedLargeFiles"] = self.skipped
        if self._mode == "files_with_matches":
            page, words = self._page(_in_order(self.files)[self._offset :])
            page = self._call.display_all(page)
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
            page, words = self._page([f"{self._call.display(path)}:{count}" for count, path in files_here])
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


def _display_line(line: bytes, mark: str) -> str:
    """Return a line for the output, without a carriage return at its end."""
    if len(line) <= 3 * COLUMNS_MAX:  # the most bytes of a UTF-16 unit
        shown = line.decode("utf-8", "replace").removesuffix("\r")
        if len(line) <= COLUMNS_MAX or len(shown.encode("utf-16-le", "surrogatepass")) <= 2 * COLUMNS_MAX:
            return shown
    return "[Omitted long matching line]" if mark == ":" else "[Omitted long context line]"
