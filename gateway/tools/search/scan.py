"""Name the files of a large tree that match a pattern, in several workers with a share of the folders each.

A file costs three system calls and a search by RE2: first for a literal, if all matches of the pattern must
contain one. Only names are returned; Grep makes the answer from them.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Hashable, Sequence
from typing import Any, Final
from zlib import crc32

import re2

from gateway.errors import GatewayError, Timeout
from gateway.rootfs.walk import Walk
from gateway.rootfs.worker import NAMED_MAX, SCANNED, Workspace
from gateway.tools.answer import ToolFailure
from gateway.tools.call import Call
from gateway.tools.schemas import checked
from gateway.tools.search.contents import FILE_MAX
from gateway.tools.search.filters import GrepFilter
from gateway.tools.search.matcher import Find, compiled, finder
from gateway.tools.search.query import filters
from gateway.tools.search.regexes import PatternError, translate
from gateway.tools.search.scope import start_of
from gateway.tools.search.search import Search

_NOT_HERE: Final = b"-"
# The depth, below both the workspace and the start, at which a folder goes to one worker as a whole: it
# splits what npm and pnpm create, and all workers walk little.
_PARTED, _PARTED_BELOW = 3, 2
_ROOM = 256 << 10  # bytes read from a file at once
_LOOK = 256  # files between two checks of the clock
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEEDLE_MIN = 3  # characters; shorter literals are in too many files
_COMMON = " etrnosaicpdlumfhg.,(=;\"'"  # the most frequent bytes of source code; all others are rarer
_LINE_END = 0x0A
_FIRST_ODD = 0xEF  # the lowest first byte of a byte order mark


class Share:
    """Chooses like another chooser, but only in folders that belong to worker `number` of `count`."""

    def __init__(self, chooser: GrepFilter, base: str, number: int, count: int) -> None:
        self._chooser = chooser
        self._base = base
        self._number = number
        self._count = count
        self._parted = max(_PARTED, base.count("/") + _PARTED_BELOW)

    def question(self, state: Any) -> Hashable:
        return self._number, self._count, self._chooser.question(state)

    def enter(self, path: str, hidden: Collection[str], state: Any) -> Any:
        return self._chooser.enter(path, hidden, state)

    def folder(self, path: str, state: Any) -> bool:
        return self._mine(path, above=True) and self._chooser.folder(path, state)

    def files(self, prefix: str, names: Sequence[str], state: Any) -> Collection[str]:
        return self._chooser.files(prefix, names, state) if self._mine(prefix.rstrip("/")) else ()

    def _mine(self, path: str, *, above: bool = False) -> bool:
        """Return whether a folder belongs to this share or, if `above`, may contain folders that do."""
        parts = (self._base + path).split("/", self._parted)
        if above and len(parts) < self._parted:
            return True
        return crc32(os.fsencode("/".join(parts[: self._parted]))) % self._count == self._number


def needles(given: dict[str, Any]) -> tuple[str, ...]:
    """Return literals one of which every match of a Grep contains; none if some are short or unknown.

    Raises `PatternError`.
    """
    if given.get("-i"):
        return ()
    literals = translate(given["pattern"], multiline=bool(given.get("multiline"))).literals
    return literals if min(map(len, literals)) >= _NEEDLE_MIN else ()


def scan(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Return the names of the matching files below a Grep's start, in one share of the folders.

    They are relative to the start, unordered, each followed by a NUL, and all preceded by `SCANNED`. Files
    that are too large to search are included. Without that mark a walk must answer, which has texts for
    errors. Raises `Timeout`.
    """
    try:
        given = checked("Grep", arguments["input"])
        found = _found(workspace, given, arguments)
    except Timeout:
        raise
    except (GatewayError, ToolFailure, PatternError):
        return _NOT_HERE
    return _NOT_HERE if found is None else SCANNED + found


def _found(workspace: Workspace, given: dict[str, Any], arguments: dict[str, Any]) -> bytearray | None:
    number, count = arguments["share"]
    given = {**given, "output_mode": "files_with_matches"}
    call = Call("Grep", workspace, given, arguments["cwd"], None, False)
    start = start_of(call, given.get("path") or ".")
    regex = compiled(given["pattern"], bool(given.get("-i")), bool(given.get("multiline")))
    search = Search(call, *regex)
    chooser = GrepFilter(call.root, start, *filters(given, start))
    base = start + "/" if start else ""
    walk = Walk(
        call.root,
        start,
        Share(chooser, base, number, count),
        state=chooser.above(),
        maximum=call.limits.visit_max,
        deadline=call.deadline,
        ordered=False,
    )
    literals = [_literal(needle) for needle in needles(given)]
    found = bytearray()
    for path, folder, names in walk.folders():
        prefix = path + "/" if path else ""
        for name in _holding(search, literals, base + prefix, folder, names, call.deadline):
            found += os.fsencode(prefix + name) + b"\0"
        if len(found) > NAMED_MAX:
            return None
    # only a walk can report what it leaves out
    return None if walk.truncated or walk.deep else found


_buffer = bytearray(_ROOM)
_view = memoryview(_buffer)


def _literal(needle: str) -> Find:
    """Return a search for a literal, or for the rest of it from a rare byte on.

    RE2 jumps from one occurrence of the first byte to the next: at up to 20 GB/s, or 1 if it is frequent.
    """
    last = len(needle) - _NEEDLE_MIN
    rarest = max(range(last + 1), key=lambda at: _COMMON.find(needle[at]) % (len(_COMMON) + 1))
    options = re2.Options()
    options.literal = True
    return finder(re2.compile(needle[rarest:], options))


def _holding(
    search: Search,
    literals: list[Find],
    prefix: str,
    folder: int,
    names: Collection[str],
    deadline: float,
) -> list[str]:
    """Return the names in a folder whose files match."""
    found = []
    room, views, find = _buffer, [_view], search.find
    for i, name in enumerate(names):
        if not i % _LOOK and time.monotonic() > deadline:
            raise Timeout("the search took too long", reason="timeout")
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
            if literals and all(holds(data, 0)[0] < 0 for holds in literals):
                continue
            at, _ = find(data, 0)
            # an empty match after the last line end is on no line
            if at < 0 or (at == length and (not length or room[length - 1] == _LINE_END)):
                continue
            if room.find(b"\0", 0, length) < 0:
                found.append(name)
                continue
        # large, binary and otherwise encoded files are searched as in Grep
        if _matches(search, prefix + name, name, folder):
            found.append(name)
    return found


def _matches(search: Search, path: str, name: str, folder: int) -> bool:
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode):
        return False
    if status.st_size > FILE_MAX:
        return True
    before = search.found
    search.file(path, name, status, explicit=False)
    return search.found > before
