"""Claude Code's Grep."""

from __future__ import annotations

import os

from gateway.errors import GatewayError, Timeout
from gateway.rootfs import kernel
from gateway.rootfs.root import Root
from gateway.rootfs.walk import Walk
from gateway.tools.answer import Answer
from gateway.tools.call import Call, timed_out
from gateway.tools.search.filters import GrepFilter
from gateway.tools.search.matcher import compiled
from gateway.tools.search.query import check_numbers, filters
from gateway.tools.search.scope import bad_folder, bounded, start_of
from gateway.tools.search.search import Search


def grep(call: Call) -> Answer:
    """Answer a Grep: by a walk, or from a given list of files."""
    given = call.given
    check_numbers(given)
    path: str = given.get("path") or "."
    start = start_of(call, path)
    regex, spanning = compiled(given["pattern"], bool(given.get("-i")), bool(given.get("multiline")))
    globs, types = filters(given, start)
    search = Search(call, regex, spanning)
    try:
        status, file = _kind(call.root, start)
        if file:
            search.file(start, start, status, explicit=True)
        else:
            prefix = start + "/" if start else ""
            if call.named is not None:
                search.named(prefix, call.named)
                return search.output.answer()
            chooser = GrepFilter(call.root, start, globs, types)
            walk = Walk(
                call.root,
                start,
                chooser,
                state=chooser.above(),
                maximum=call.limits.visit_max,
                deadline=call.deadline,
                ordered=search.ordered,
            )
            for name, entry in walk:
                search.file(prefix + name, name, entry, explicit=False)
                if search.output.full:
                    break
            search.output.note = bounded(walk, call)
    except Timeout:
        raise timed_out(call.limits.tool_timeout) from None
    except GatewayError as error:
        raise bad_folder(call, path, start, error) from None
    return search.output.answer()


def _kind(root: Root, path: str) -> tuple[os.stat_result, bool]:
    """Return the status of the target of `path`, and whether it is a regular file."""
    descriptor = root.open(path, kernel.O_PATH or os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return status, status.st_mode & 0o170000 == 0o100000
