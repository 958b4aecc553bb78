"""Has ripgrep name the files of a large tree that Grep then looks into.

It is faster at leaving out what does not match; what an answer says of the rest stays Grep's own. It runs
as a worker does, in the tenant's workspace alone, and only names come back from it.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Final, NoReturn

import orjson

from gateway.rootfs.operation import Workspace
from gateway.rootfs.worker import receive_request
from gateway.tools.call import Call
from gateway.tools.schemas import checked
from gateway.tools.search.query import overrides, type_globs

_FLAGS: Final = (
    *("--no-config", "--no-messages", "--color=never", "--files-with-matches", "--null"),
    *("--hidden", "--no-ignore-global", "--no-mmap"),
)


def command(given: dict[str, Any], start: str, threads: int = 1) -> list[str]:
    """Return the command line for a Grep's checked input whose search begins at the workspace's `start`."""
    words = ["rg", *_FLAGS, f"--threads={threads}"]
    if given.get("-i"):
        words.append("--ignore-case")
    if given.get("multiline"):
        words += ["--multiline", "--multiline-dotall"]
    words += [f"--glob={glob}" for glob in overrides(given, start)]
    if given.get("type"):
        # under a name of its own: what a type of ripgrep's is changes from one version to the next
        words += [f"--type-add=asked:{glob}" for glob in type_globs(given["type"])]
        words.append("--type=asked")
    # no --max-filesize: it looks at each file once more, and would leave out large ones without a word
    return [*words, f"--regexp={given['pattern']}", "--", "./"]


def sift(connection: socket.socket, workspace: Workspace) -> NoReturn:
    """Become ripgrep for one request; names go to the socket, the exit status to the broker."""
    request = receive_request(connection)
    if request is None or workspace.program is None:
        raise EOFError
    asked = orjson.loads(request)
    given = checked("Grep", asked["input"])
    call = Call("Grep", workspace, given, asked["cwd"], None, False)
    start = call.locate(given.get("path") or ".")
    folder = call.tree.open(start, os.O_RDONLY | os.O_DIRECTORY)
    words = command(given, start, asked.get("threads", 1))
    os.fchdir(folder)
    # Something must be there for input and errors; a folder takes and gives nothing.
    for number, descriptor in enumerate((folder, connection.fileno(), folder)):
        os.dup2(descriptor, number)
    os.execve(workspace.program, words, {})  # noqa: S606 - the program that the operator put there
