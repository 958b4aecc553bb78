"""Knows how workers look through a large tree themselves: which files hold a pattern, each for its share.

RE2 finds what begins with a literal as fast as memory is read, and a file then costs three system calls: less
than in ripgrep, which `sifting` starts for all other patterns. As there, only names come back; what an answer
says of the files stays Grep's.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Collection, Hashable, Sequence
from typing import Any, Final
from zlib import crc32

from gateway.errors import GatewayError, Timeout
from gateway.rootfs.operations import SCANNED, Workspace
from gateway.rootfs.walk import Walk
from gateway.tools.answer import ToolFailure
from gateway.tools.call import Call
from gateway.tools.patterns import Sought
from gateway.tools.schemas import checked
from gateway.tools.searching import FILE_MAX, Search, compiled, filters, start_of

_NOT_HERE: Final = b"-"
_PARTED = 3  # folders above what is one worker's: what npm, pnpm and monorepos lie in is parted still
_ROOM = 256 << 10  # bytes of a file that are read at once
_LOOK = 256  # files between two looks at the clock
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# What a pattern begins with where it begins with a literal; a letter after a backslash is none.
_LITERAL: Final = re.compile(r"(?:[\w \-'\"=:;,<>/@#%&!~`]|\\[\\.()\[\]{}+*?^$|/\"'-])*")
_LITERAL_MIN = 3  # characters
_FIRST_ODD = 0xEF  # the lowest byte that a mark of another encoding begins with


class Share:
    """Chooses as another chooser does, of all folders those that are `number`'s of `count`."""

    def __init__(self, chooser: Sought, base: str, number: int, count: int) -> None:
        self._chooser = chooser
        self._base = base
        self._number = number
        self._count = count

    def question(self, path: str, state: Any) -> Hashable:
        return self._number, self._count, self._chooser.question(path, state)

    def enter(self, path: str, hidden: Collection[str], state: Any) -> Any:
        return self._chooser.enter(path, hidden, state)

    def folder(self, path: str, state: Any) -> bool:
        return self._mine(path, above=True) and self._chooser.folder(path, state)

    def files(self, prefix: str, names: Sequence[str], state: Any) -> Collection[str]:
        return self._chooser.files(prefix, names, state) if self._mine(prefix.rstrip("/")) else ()

    def _mine(self, path: str, *, above: bool = False) -> bool:
        """Say whether a folder is of this share, or, if `above`, what lies below it may be."""
        parts = (self._base + path).split("/", _PARTED)
        if above and len(parts) < _PARTED:
            return True
        return crc32(os.fsencode("/".join(parts[:_PARTED]))) % self._count == self._number


def quick(given: dict[str, Any]) -> bool:
    """Say whether RE2 is quick with a Grep's pattern. It is only about time."""
    pattern: str = given["pattern"]
    # an `s` and a `k` have a third case beyond ASCII, with which RE2 does not begin as quickly
    if "|" in pattern or (given.get("-i") and pattern.lower().startswith(("s", "k"))):
        return False
    literal = _LITERAL.match(pattern)
    assert literal is not None
    length = len(literal.group().replace("\\", ""))
    return length - pattern[literal.end() : literal.end() + 1].startswith(("*", "?", "{")) >= _LITERAL_MIN


def scan(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
    """Return the names of the files below a Grep's start that match, of one share of the folders.

    They are relative to the start, in no order, each with a NUL after it and all after `SCANNED`. Files that
    are too large to be looked into are among them. Without that mark it is to be asked in another way,
    where errors find their words. Raises `Timeout`.
    """
    try:
        given = checked("Grep", arguments["input"])
        found = _found(workspace, given, arguments) if quick(given) else None
    except Timeout:
        raise
    except (GatewayError, ToolFailure):
        return _NOT_HERE
    return _NOT_HERE if found is None else SCANNED + b"".join(os.fsencode(name) + b"\0" for name in found)


def _found(workspace: Workspace, given: dict[str, Any], arguments: dict[str, Any]) -> list[str] | None:
    number, count = arguments["share"]
    given = {**given, "output_mode": "files_with_matches"}
    call = Call("Grep", workspace, given, arguments["cwd"], None, False)
    start = start_of(call, given.get("path") or ".")
    search = Search(
        call, start, *compiled(given["pattern"], bool(given.get("-i")), bool(given.get("multiline")))
    )
    sought = Sought(call.tree, start, *filters(given, start))
    base = start + "/" if start else ""
    walk = Walk(
        call.tree,
        start,
        Share(sought, base, number, count),
        state=sought.above(),
        maximum=call.limits.visit_max,
        deadline=call.deadline,
        ordered=False,
    )
    found: list[str] = []
    for path, folder, names in walk.folders():
        prefix = path + "/" if path else ""
        found += [prefix + name for name in _holding(search, base + prefix, folder, names, call.deadline)]
    if walk.truncated or walk.deep:
        return None  # it would leave out what ripgrep does not
    return found


_buffer = bytearray(_ROOM)
_view = memoryview(_buffer)


def _holding(search: Search, prefix: str, folder: int, names: Collection[str], deadline: float) -> list[str]:
    """Return which of the names in a folder are those of files that match."""
    found = []
    room, find, views = _buffer, search.find, [_view]
    for i, name in enumerate(names):
        if not i % _LOOK and time.monotonic() > deadline:
            raise Timeout("the search took too long", reason="timeout")
        try:
            descriptor = os.open(name, _FLAGS, dir_fd=folder)
        except OSError:
            continue  # gone, or not to be read
        try:
            length = os.readv(descriptor, views)
        except OSError:
            continue
        finally:
            os.close(descriptor)
        if length < _ROOM and room[0] < _FIRST_ODD:
            if find(_view[:length], 0)[0] < 0:
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
