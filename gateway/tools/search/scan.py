"""Names the files of a large tree that hold a pattern, in several workers, each for its share of the folders.

A file costs three system calls and a look by RE2: first for a literal, which most patterns have in all that
they match. Only names come back; what an answer says of the files stays Grep's.
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
from gateway.rootfs.operation import NAMED_MAX, SCANNED, Workspace
from gateway.rootfs.walk import Walk
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
# How many folders down a whole one is one worker's, from the workspace and from the start at least: what npm
# and pnpm make is parted then, and what all workers walk through is little.
_PARTED, _PARTED_BELOW = 3, 2
_ROOM = 256 << 10  # bytes of a file that are read at once
_LOOK = 256  # files between two looks at the clock
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEEDLE_MIN = 3  # characters; what is shorter is in too many files
_COMMON = " etrnosaicpdlumfhg.,(=;\"'"  # what source code has most of; what is not here is rarer
_LINE_END = 0x0A
_FIRST_ODD = 0xEF  # the lowest byte that a mark of another encoding begins with


class Share:
    """Chooses as another chooser does, of all folders those that are `number`'s of `count`."""

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
        """Say whether a folder is of this share, or, if `above`, what lies below it may be."""
        parts = (self._base + path).split("/", self._parted)
        if above and len(parts) < self._parted:
            return True
        return crc32(os.fsencode("/".join(parts[: self._parted]))) % self._count == self._number


def needles(given: dict[str, Any]) -> tuple[str, ...]:
    """Return literals of which one is in all that a Grep matches; none where some are short or unknown.

    Raises `PatternError`.
    """
    if given.get("-i"):
        return ()
    literals = translate(given["pattern"], multiline=bool(given.get("multiline"))).literals
    return literals if min(map(len, literals)) >= _NEEDLE_MIN else ()


def scan(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Return the names of the files below a Grep's start that match, of one share of the folders.

    They are relative to the start, in no order, each with a NUL after it and all after `SCANNED`. Files that
    are too large to be looked into are among them. Without that mark a walk is to answer, which has words for
    what is wrong. Raises `Timeout`.
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
    # of what is left out a walk has words to tell
    return None if walk.truncated or walk.deep else found


_buffer = bytearray(_ROOM)
_view = memoryview(_buffer)


def _literal(needle: str) -> Find:
    """Return what finds a literal, or as much of it as begins with what is rare.

    RE2 goes from one place that has the first byte to the next: up to 20 GB/s, or 1 where these are many.
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
    """Return which of the names in a folder are those of files that match."""
    found = []
    room, views, find = _buffer, [_view], search.find
    for i, name in enumerate(names):
        if not i % _LOOK and time.monotonic() > deadline:
            raise Timeout("the search took too long", reason="timeout")
        try:
            descriptor = os.open(name, _FLAGS, dir_fd=folder)
        except OSError:
            continue  # gone, or not to be read
        try:
            # not readv: what a FIFO that took the file's place holds would be lost to its reader
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
        # what is large, in another encoding or binary is looked at as Grep does
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
