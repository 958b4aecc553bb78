"""Knows Claude Code's Glob and Grep: what it makes of ripgrep, on our own walk and RE2.

The semantics of names, ignore files and types are in `patterns`. Patterns of Grep are RE2's, nearly those of
ripgrep: neither has look-around or back-references.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from string import ascii_lowercase, ascii_uppercase
from typing import Any
from unicodedata import normalize

import re2

from gateway.errors import GatewayError, Timeout
from gateway.rootfs import kernel
from gateway.rootfs.operation import Limits
from gateway.rootfs.root import Root, show
from gateway.rootfs.walk import Walk, forget, settled
from gateway.tools import outputs
from gateway.tools.answer import Answer, ToolFailure, text
from gateway.tools.call import Call, failure, outside, timed_out
from gateway.tools.patterns import GlobError, Globs, Named, Sought
from gateway.tools.reading import below_cwd
from gateway.tools.regexes import PatternError, translate
from gateway.tools.types import TYPES

GLOB_LIMIT = 100  # paths of one Glob
COLUMNS_MAX = 500  # UTF-16 units of one line of Grep's output; longer ones are left out
PATTERN_MAX = 4000  # characters
FILE_MAX = 16 << 20  # bytes of a file that Grep looks into; larger ones are skipped and counted
CACHE_MAX = 16 << 20  # bytes of file contents that a worker keeps between two calls
CACHE_FILE_MAX = 1 << 20
BRIEF_BYTES = 1 << 20  # of files that a brief Grep may look into; with the limits of `brief`
BRIEF_VISITS = 1000
BRIEF_SECONDS = 0.02
_REGEX_MEMORY = 8 << 20  # bytes; with re2's own 64 MB default a worker grew to 114 MB
_REJECTED = "Search failed — ripgrep rejected the pattern, glob, or file type without searching:\nrg: "
_BLOCK = 1 << 16  # bytes that ripgrep reads at once
_LOOKS = 64  # matches in one file between two looks at the clock
Find = Callable[[bytes | memoryview, int], tuple[int, int]]
_CONTROL = (".git", ".svn", ".hg", ".bzr", ".jj", ".sl")


def _rejected(words: str) -> ToolFailure:
    return ToolFailure("invalid_params", _REJECTED + words, tagged=False)


def brief(limits: Limits) -> Limits:
    """Return the limits of a search that is to be over at once, or to be left to another worker."""
    visits, seconds = min(BRIEF_VISITS, limits.visit_max), min(BRIEF_SECONDS, limits.tool_timeout)
    return replace(limits, visit_max=visits, tool_timeout=seconds)


# Glob


def glob(call: Call) -> Answer:
    pattern: str = call.given["pattern"].rstrip()
    if not pattern or pattern.startswith("#"):
        pattern = "**"  # an empty line or a comment, to ripgrep
    path: str = call.given.get("path") or "."
    absolute = pattern.startswith("/")
    if absolute:
        path, pattern = _split_absolute(pattern)
    start = start_of(call, path)
    if not absolute and "path" in call.given:
        pattern = _named_once(call, start, pattern)
    try:
        literal = _literal_folder(pattern)
        named = Named(Globs([_below(pattern, literal)]), literal, _depth(pattern), _hidden(start, pattern))
    except GlobError as error:
        raise _rejected(str(error)) from None
    walk = Walk(
        call.tree,
        start,
        named,
        maximum=call.limits.visit_max,
        deadline=call.deadline,
        ordered=False,
        first=literal.rstrip("/"),
    )
    prefix = start + "/" if start else ""
    try:
        found = [(status.st_mtime_ns, prefix + name) for name, status in walk]
        note = _bounded(walk, call)
    except Timeout:
        raise timed_out(call.limits.tool_timeout) from None
    except GatewayError as error:
        if absolute and error.facts.get("reason") == "missing":
            return text("No files found", {"files": [], "total": 0, "truncated": False})
        raise _bad_folder(call, path, start, error) from None
    found.sort()
    total = len(found)
    names = call.all_shown([name for _, name in found[:GLOB_LIMIT]])
    facts = {"files": names, "total": total, "truncated": total > len(names) or walk.truncated}
    if not names:
        return text("No files found" + note, facts)
    lines = "\n".join(names)
    if total > GLOB_LIMIT:
        lines += (
            f"\n(Showing {GLOB_LIMIT} of {total} matching files; {total - GLOB_LIMIT} more are not listed. "
            "Narrow the pattern or path to see the rest.)"
        )
    return text(lines + note, facts)


def _bounded(walk: Walk, call: Call) -> str:
    note = _too_deep(call) if walk.deep else ""
    if not walk.truncated:
        return note
    if call.brief:
        raise Timeout("too much for a brief search", reason="timeout")
    return f"\n(The search stopped after {call.limits.visit_max} files and folders. Narrow the path.){note}"


def _too_deep(call: Call) -> str:
    return f"\n(Folders more than {call.tree.depth} deep were left out.)"


def _split_absolute(pattern: str) -> tuple[str, str]:
    """Split an absolute glob into the folder before its first wildcard and the rest."""
    parts = pattern.split("/")
    for i, part in enumerate(parts):
        if any(char in part for char in "*?[{"):
            return "/".join(parts[:i]) or "/", "/".join(parts[i:])
    folder, _, name = pattern.rstrip("/").rpartition("/")
    return folder or "/", name


def _named_once(call: Call, start: str, pattern: str) -> str:
    """Return the glob without the folder that is searched, where it was named there once more."""
    parts = _literal_folder(pattern).split("/")[:-1]
    above = call.tree.absolute(start).split("/")
    for count in range(len(parts), 0, -1):
        if above[-count:] == parts[:count] and not _exists(call.tree, f"{start}/{parts[0]}".lstrip("/")):
            return "/".join(pattern.split("/")[count:])
    return pattern


def _literal_folder(pattern: str) -> str:
    """Return the folders at a pattern's beginning that hold no wildcard, with the slash after them.

    Nothing for odd ones, such as `./src`: those match no path, which is for the glob to find out.
    """
    if "/" not in pattern or pattern.startswith("!"):
        return ""
    head = re.split(r"[*?\[\]{}\\]", pattern, maxsplit=1)[0].lstrip("/")
    folders = head.rpartition("/")[0]
    return "" if {"", ".", ".."} & set(folders.split("/")) else folders + "/"


def _below(pattern: str, literal: str) -> str:
    """Return a glob that says of paths below the folder `literal` what `pattern` does, the quicker one.

    Of a plain name in that folder it does where no folder further down is entered, see `_depth`.
    """
    below = pattern.lstrip("/")[len(literal) :]
    flat = below[:1] not in ("", "!") and "/" not in below and _depth(pattern) is not None
    return below if literal and (flat or below.startswith("**/")) else pattern


def _depth(pattern: str) -> int | None:
    """Return how many folders a match has above it; None where that is open."""
    if (
        pattern.startswith("!")
        or "/" not in pattern.strip("/")
        or "**" in pattern
        or any(char in pattern for char in "{[\\")
    ):
        return None
    return pattern.strip("/").count("/")


def start_of(call: Call, path: str) -> str:
    try:
        return call.locate(path)
    except GatewayError as error:
        raise outside(call, _VERBS[call.tool], path, error) from None


def _bad_folder(call: Call, path: str, start: str, error: GatewayError) -> ToolFailure:
    shown = show(path)
    match error.facts.get("reason"):
        case "missing":
            guess = below_cwd(call, start)
            kind = "Directory" if call.tool == "Glob" else "Path"
            words = f"{kind} does not exist: {shown}. {call.where}" + (
                f" Did you mean {guess}?" if guess else ""
            )
            return ToolFailure("not_found", words, tagged=False)
        case "through_file" | "special":
            words = f"Path is not a directory: {shown}"
            if not _exists(call.tree, start):
                words = f"ENOTDIR: not a directory, stat '{call.absolute(start)}'"
            return ToolFailure("not_a_file", words, tagged=False)
        case "outside" | "loop":
            return outside(call, _VERBS[call.tool], call.absolute(start), error)
        case _:
            return failure(call.tool, error)


_VERBS = {"Glob": "search", "Grep": "read"}


def _exists(tree: Root, path: str) -> bool:
    try:
        tree.status(path)
    except GatewayError:
        return False
    return True


# Grep


def grep(call: Call) -> Answer:
    given = call.given
    _check_numbers(given)
    path: str = given.get("path") or "."
    start = start_of(call, path)
    regex, spanning = compiled(given["pattern"], bool(given.get("-i")), bool(given.get("multiline")))
    globs, types = filters(given, start)
    search = Search(call, start, regex, spanning)
    try:
        status, file = _kind(call.tree, start)
        if file:
            search.file(start, start, status, explicit=True)
        else:
            prefix = start + "/" if start else ""
            if call.sifted is not None:
                search.named(prefix, call.sifted)
                return search.answer(single=False)
            sought = Sought(call.tree, start, globs, types)
            walk = Walk(
                call.tree,
                start,
                sought,
                state=sought.above(),
                maximum=call.limits.visit_max,
                deadline=call.deadline,
                ordered=search.ordered,
            )
            for name, entry in walk:
                search.file(prefix + name, name, entry, explicit=False)
                if search.full:
                    break
            search.note = _bounded(walk, call)
    except Timeout:
        raise timed_out(call.limits.tool_timeout) from None
    except GatewayError as error:
        raise _bad_folder(call, path, start, error) from None
    return search.answer(single=file)


def _check_numbers(given: dict[str, Any]) -> None:
    """Refuse numbers that count nothing, each in the words of who finds them in Claude Code."""
    for name, hint in (("head_limit", " Pass 0 for unlimited."), ("offset", "")):
        number = given.get(name, 0)
        if number < 0 or number != int(number):
            words = f"{name} must be a whole number of 0 or more, got {number}.{hint}"
            raise ToolFailure("invalid_params", words)
    for flag, number in _around(given):
        if number < 0 or number != int(number):
            raise _rejected(
                f"error parsing flag {flag}: value is not a valid number: invalid digit found in string"
            )


def _around(given: dict[str, Any]) -> list[tuple[str, int]]:
    """Return how much context is asked for, as flags of ripgrep. Only matching lines have any."""
    if given.get("output_mode") != "content":
        return []
    for name in ("context", "-C"):
        if name in given:
            return [("-C", given[name])]
    return [(name, given[name]) for name in ("-B", "-A") if name in given]


def _kind(tree: Root, path: str) -> tuple[os.stat_result, bool]:
    """Return the status of what `path` leads to, and whether that is a regular file."""
    descriptor = tree.open(path, kernel.O_PATH or os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return status, status.st_mode & 0o170000 == 0o100000


def _hidden(start: str, pattern: str = "") -> str | None:
    """Return the gateway's own folder where a search would come by it without having named it."""
    return None if start or pattern.startswith(outputs.HOME) else outputs.HOME


def overrides(given: dict[str, Any], start: str) -> list[str]:
    """Return the globs that go before ignore files, the last that matches deciding."""
    patterns = [f"!{name}" for name in _CONTROL]
    for word in str(given.get("glob", "")).split():
        # A comma separates two globs, unless there are braces; `#` begins a comment.
        parts = [word] if "{" in word and "}" in word else word.split(",")
        patterns += [part for part in parts if part and not part.startswith("#")]
    hidden = _hidden(start)
    return [*patterns, f"!/{hidden}"] if hidden else patterns


def type_globs(kind: str) -> list[str]:
    """Return the globs of a file type, those of all types for `all`."""
    if kind not in TYPES and kind != "all":
        raise _rejected(f"unrecognized file type: {kind[:100]}".rstrip())
    return (" ".join(TYPES.values()) if kind == "all" else TYPES[kind]).split()


def filters(given: dict[str, Any], start: str) -> tuple[Globs, Globs | None]:
    types = Globs(type_globs(given["type"])) if given.get("type") else None
    try:
        return Globs(overrides(given, start)), types
    except GlobError as error:
        raise _rejected(str(error)) from None


@lru_cache(8)
def compiled(pattern: str, ignore_case: bool, multiline: bool) -> tuple[Any, bool]:
    """Compile a pattern of Grep, and say whether a match of it may span lines.

    Without `multiline` nothing in it matches a line end, not even `\\s`.
    """
    if len(pattern) > PATTERN_MAX:
        raise _rejected("regex parse error:\nerror: the pattern is too long")
    try:
        translated = translate(pattern, multiline=multiline)
    except PatternError as error:
        raise _rejected(error.words) from None
    if translated.names_line_end and not multiline:
        raise _rejected(
            'the literal "\\n" is not allowed in a regex\n\nConsider enabling multiline mode with the '
            "--multiline flag (or -U for short).\nWhen multiline mode is enabled, new line characters can be "
            "matched."
        )
    options = re2.Options()
    options.max_mem = _REGEX_MEMORY
    options.log_errors = False
    options.case_sensitive = not ignore_case
    options.dot_nl = multiline
    options.never_nl = not multiline
    try:
        regex = re2.compile(b"(?m)" + translated.text.encode(), options)
    except re2.error as error:
        raise _rejected(PatternError.of(pattern, str(error)).words) from None
    return regex, multiline and translated.meets_line_end


def finder(regex: Any) -> Find:
    """Return what finds the next match from a position on: its start and end, -1 where there is none.

    The wrapper's `search` makes a generator and an object for each match, which takes longer than the search
    of a usual file; what it calls itself has no other name.
    """
    match, unanchored = regex._regexp.Match, re2._Anchor.UNANCHORED

    def find(data: bytes | memoryview, at: int) -> tuple[int, int]:
        span: tuple[int, int] = match(unanchored, data, at, len(data))[0]
        return span

    return find


# What was read, as UTF-8, and where its first NUL is, by device, inode, ctime and size. What came first goes
# first: each search comes by all of it.
_cache: dict[tuple[int, int, int, int], tuple[bytes, int]] = {}
_cached = 0


def idle() -> None:
    """Let go of what is kept between calls. Called by the worker after a while without one."""
    global _cached
    _cache.clear()
    _cached = 0
    forget()
    compiled.cache_clear()


def _content(call: Call, path: str, status: os.stat_result) -> tuple[bytes, int]:
    """Return a file's bytes and where the first NUL is; nothing where it cannot be read."""
    global _cached
    key = (status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size)
    kept = _cache.get(key)
    if kept is not None:
        return kept
    lasting = settled(status)
    try:
        read, _ = call.tree.read_file(path, FILE_MAX)
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


class Search:
    """The state of one Grep: what was found, in the mode's own form, and when it is enough."""

    def __init__(self, call: Call, start: str, regex: Any, spanning: bool) -> None:
        given = call.given
        self._spanning = spanning
        self._call = call
        self.find = finder(regex)
        self._start = start
        self._mode: str = given.get("output_mode", "files_with_matches")
        self._numbers: bool = given.get("-n", True)
        self._only: bool = bool(given.get("-o"))
        around = dict(_around(given))
        self._before = around.get("-C", around.get("-B", 0))
        self._after = around.get("-C", around.get("-A", 0))
        # What is between two groups also where the context that counts is none.
        self._parted = any(given.get(name, 0) > 0 for name in ("context", "-C", "-B", "-A"))
        self._limit: int = given.get("head_limit", 250)
        self._offset: int = given.get("offset", 0)
        self._passed = 0  # lines in front of the page: they are counted, and take no room
        # With one more line than is shown it is known that there are more.
        self._enough = self._limit + 1 if self._limit else 1 << 60
        self._room = call.limits.result_max
        self._rows: list[str] = []
        self._files: list[tuple[int, str]] = []  # with the negative of their mtime, or with a count
        self._matches = 0
        self._skipped = 0
        self._left = BRIEF_BYTES if call.brief else sys.maxsize
        self._cut = False
        self.note = ""

    @property
    def ordered(self) -> bool:
        """Whether files are to be searched in their order; else the answer brings them into its own."""
        return self._mode != "files_with_matches"

    @property
    def full(self) -> bool:
        return self._mode == "content" and (len(self._rows) >= self._enough or self._cut)

    @property
    def found(self) -> int:
        """How many files are to be listed."""
        return len(self._files)

    def file(self, path: str, name: str, status: os.stat_result, *, explicit: bool) -> None:
        """Search one file. `path` is its place in the workspace."""
        self._left -= status.st_size
        if self._left < 0:
            raise Timeout("too much for a brief search", reason="timeout")
        if status.st_size > FILE_MAX:
            self._skipped += 1
            return
        data, nul = _content(self._call, path, status)
        cut = nul >= 0 and not explicit
        if cut:
            data = _before_nul(data, nul)
        if not data:
            return
        if time.monotonic() > self._call.deadline:
            raise Timeout("the search took too long", reason="timeout")
        if self._mode == "files_with_matches":
            start, _ = self.find(data, 0)
            # an empty match after the last line end is on no line
            if start >= 0 and (start < len(data) or not data.endswith(b"\n")):
                self._files.append((-status.st_mtime_ns, path))
            return
        if self._mode == "count":
            # ripgrep counts lines, but matches where these may span lines
            count = sum(1 for _ in self._spans(data, every=self._spanning))
            if count and not cut:
                self._files.append((count, path))
                self._matches += count
            return
        found, binary = self._lines(data, "" if explicit else self._call.shown(path), nul >= 0)
        if found and (cut or binary or 0 <= nul < _BLOCK):
            where = "" if explicit else f"{self._call.shown(path)}:"
            self._put(f'{where}binary file matches (found "\\0" byte around offset {nul})')

    def named(self, prefix: str, sifted: str) -> None:
        """Search the files that were named, in the order of a walk.

        Where only names are asked for nothing is searched again: that they match is known already, or
        ripgrep's word, which Claude Code goes by.
        """
        tree, deadline = self._call.tree, self._call.deadline
        names = [os.fsdecode(name).removeprefix("./") for name in sifted.encode("latin-1").split(b"\0")[:-1]]
        names.sort()
        for name in names:
            path = prefix + name
            if path.count("/") > tree.depth:
                self.note = _too_deep(self._call)
                continue
            try:
                # as in `Walk`: a link on the way may lead elsewhere, but nothing is opened here
                status = os.stat(path, dir_fd=tree.descriptor, follow_symlinks=False)
            except OSError:
                continue  # gone
            if not stat.S_ISREG(status.st_mode):
                continue
            if self.ordered or status.st_size > FILE_MAX:
                self.file(path, name, status, explicit=False)
            else:
                self._files.append((-status.st_mtime_ns, path))
            if time.monotonic() > deadline:
                raise Timeout("the search took too long", reason="timeout")
            if self.full:
                break

    def _spans(self, data: bytes, *, every: bool = False) -> Iterator[tuple[int, int]]:
        """Yield start and end of each match, one for each line that matches or `every` one.

        Raises `Timeout`: one file may have millions of them, and each cost a look at a line of megabytes.
        """
        at, end = 0, len(data)
        before = -1  # where the match before ended; an empty one there is no match of its own
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
        """Put out what matched in one file with its context; `name` stands before each line.

        Of a `binary` one no line with a NUL is shown. Returns whether anything matched, and whether a line
        was left out.
        """
        number, counted = 1, 0  # the line number at position `counted`
        last = -1  # the last line that was put out
        pending_after = 0
        position = 0  # where the line after `last` begins
        # between two files as between two groups
        separator_due = self._parted and bool(self._rows or self._passed)
        matched = left_out = False

        def add(number: int, mark: str, line: bytes) -> None:
            nonlocal left_out
            if binary and b"\0" in line:
                left_out = True
            else:
                self._add(name, number, mark, line)

        for start, stop in self._spans(data, every=self._only or self._spanning):
            matched = True
            line_start = data.rfind(b"\n", 0, start) + 1
            number += data.count(b"\n", counted, line_start)
            counted = line_start
            self._matches += 1
            if self._parted:
                first = number
                lines_before: list[bytes] = []
                begin = line_start
                # What follows the match before, as far as it is asked for.
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
                    self._put("--")
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
            if self.full:
                return True, left_out
        while matched and pending_after and position < len(data):
            line, position = _line(data, position)
            last += 1
            pending_after -= 1
            add(last, "-", line)
        return matched, left_out

    def _add(self, name: str, number: int, mark: str, line: bytes) -> None:
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

    def _put(self, row: str) -> None:
        if self._passed < self._offset:
            self._passed += 1
        else:
            self._rows.append(row)

    def answer(self, *, single: bool) -> Answer:
        """Return what was found, cut to the page that was asked for."""
        facts: dict[str, Any] = {"mode": self._mode}
        if self._skipped:
            facts["skippedLargeFiles"] = self._skipped
        if self._mode == "files_with_matches":
            page, words = self._page(_in_order(self._files)[self._offset :])
            page = self._call.all_shown(page)
            facts |= {"files": page, "total": len(self._files)}
            if not page:
                none = "No files found"
                if self._offset and self._files:
                    none = f"No entries at this offset. [Showing results with pagination = {words}]"
                return text(none + self.note, facts)
            noun = "file" if len(page) == 1 else "files"
            head = f"Found {len(page)} {noun}" + (f" {words}" if words else "")
            return text("\n".join((head, *page)) + self.note, facts)
        if self._mode == "count":
            files_here = self._files[self._offset :]
            page, words = self._page([f"{self._call.shown(path)}:{count}" for count, path in files_here])
            total, files = self._matches, len(self._files)
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
        """Return what of the rows from the offset on is asked for, and the words for limit and offset."""
        words = []
        if self._limit and len(page) > self._limit:
            page = page[: self._limit]
            words.append(f"limit: {self._limit}")
        if self._offset:
            words.append(f"offset: {self._offset}")
        return page, ", ".join(words)


# ASCII in the order of Unicode's collation, whatever the case of a letter; what is beyond comes after it.
_COLLATED = "\t\n\v\f\r _-,;:!?.'\"()[]{}@*/\\&#%`^+<=>|~$0123456789"
_PLACES = bytes.maketrans(
    (_COLLATED + ascii_uppercase).encode(), bytes(range(1, len(_COLLATED) + 1)) + ascii_lowercase.encode()
)


def _in_order(files: list[tuple[int, str]]) -> list[str]:
    """Return the names of files, the newest first; of one age by name, as people sort."""
    if not files:
        return []
    ages, names = zip(*files, strict=True)
    # all at once: there may be tens of thousands
    joined = "\0".join(names)
    letters = os.fsencode(joined if joined.isascii() else normalize("NFD", joined))
    places, cases = letters.translate(_PLACES).split(b"\0"), letters.swapcase().split(b"\0")
    return [name for *_, name in sorted(zip(ages, places, cases, names, strict=True))]


def _shown_line(line: bytes, mark: str) -> str:
    """Return a line as it is listed, without a carriage return at its end."""
    if len(line) <= 3 * COLUMNS_MAX:  # no UTF-16 unit takes more bytes
        shown = line.decode("utf-8", "replace").removesuffix("\r")
        if len(line) <= COLUMNS_MAX or len(shown.encode("utf-16-le", "surrogatepass")) <= 2 * COLUMNS_MAX:
            return shown
    return "[Omitted long matching line]" if mark == ":" else "[Omitted long context line]"


def _before_nul(data: bytes, nul: int) -> bytes:
    """Return what ripgrep searches of a binary file that was not named.

    It reads block by block, each to its last line end, and stops at the one that has the NUL.
    """
    searched = 0
    while searched + _BLOCK <= nul:
        end = data.rfind(b"\n", searched, searched + _BLOCK) + 1
        if not end:
            break
        searched = end
    return data[:searched]


def _line(data: bytes, position: int) -> tuple[bytes, int]:
    """Return the line at `position` without its end, and where the next begins."""
    end = data.find(b"\n", position)
    if end < 0:
        return data[position:], len(data)
    return data[position:end], end + 1


def _as_utf8(data: bytes) -> bytes:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace").encode("utf-8", "replace")
    return data[3:] if data.startswith(b"\xef\xbb\xbf") else data
