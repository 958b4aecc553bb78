"""The operations that a worker serves, for file tools and the editor; see `gateway.rootfs.worker`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from gateway.errors import GatewayError
from gateway.files import opening, operations, watcher
from gateway.rootfs import walk
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.root import refusal
from gateway.rootfs.worker import SCAN, Operation, WorkerService, Workspace
from gateway.tools import mirroring, outputs
from gateway.tools.call import Call, ToolAnswer, ToolFailure, failure
from gateway.tools.glob import glob
from gateway.tools.grep import forget, grep, scan
from gateway.tools.patterns import compiled
from gateway.tools.reading import read
from gateway.tools.schemas import checked
from gateway.tools.search import brief
from gateway.tools.writing import edit, write

_TOOLS: dict[str, Callable[[Call], ToolAnswer]] = {
    "Read": read,
    "Write": write,
    "Edit": edit,
    "Glob": glob,
    "Grep": grep,
}


_SEARCHES = ("Glob", "Grep")


def _bound(tool: str, given: dict[str, Any], limits: CallLimits) -> None:
    """Apply the limits of searches to an input; a request for everything becomes one for the maximum."""
    for field in ("pattern", "glob", "type"):
        if len(given.get(field, "")) > limits.pattern_max:
            words = f"The parameter `{field}` has over {limits.pattern_max} characters."
            raise ToolFailure("too_large", words, limit=limits.pattern_max)
    if tool == "Grep":
        asked = given.get("head_limit", 250)
        if asked == 0 or asked > limits.matches_max:
            given["head_limit"] = limits.matches_max


def _bounded(tool: str, reply: bytes, limits: CallLimits) -> bytes:
    """Return the reply of a search, or one that says that it is too large."""
    room = 3 * limits.result_max  # it contains the matches twice, as text and as data, with JSON's escapes
    if len(reply) <= room:
        return reply
    words = (
        f"The result exceeds {limits.result_max} bytes. Narrow the search, or ask for less with head_limit."
    )
    return ToolFailure("too_large", words, tagged=False, limit=limits.result_max).answer().encode()


def _operation(name: str, tool: Callable[[Call], ToolAnswer]) -> Operation:
    def run(workspace: Workspace, arguments: dict[str, Any]) -> bytes:
        try:
            given = checked(name, arguments["input"])
            _bound(name, given, workspace.limits)
            hurried = arguments["brief"]
            if hurried:
                workspace = Workspace(workspace.root, brief(workspace.limits))
            call = Call(
                name,
                workspace,
                given,
                arguments["cwd"],
                arguments["seen"],
                arguments["read_first"],
                brief=hurried,
                named=arguments["named"],
            )
            answer = tool(call)
            if name in _SEARCHES:
                return _bounded(name, answer.encode(), workspace.limits)
        except ToolFailure as error:
            answer = error.answer()
        except GatewayError as error:
            answer = failure(name, error).answer()
        except OSError as error:
            # An error after opening: the disk, a quota, a removed folder.
            answer = failure(name, refusal(error)).answer()
        return answer.encode()

    return run


def idle() -> None:
    """Drop caches between calls. A worker calls it after a while without calls."""
    forget()
    walk.forget()
    compiled.cache_clear()


# One table, because one worker does all writes of a tenant, the tools' and the editor's, in turn.
OPERATIONS: dict[str, Operation] = {
    **{name: _operation(name, tool) for name, tool in _TOOLS.items()},
    **operations.OPERATIONS,
    **opening.OPERATIONS,
    **outputs.OPERATIONS,
    **mirroring.OPERATIONS,
    SCAN: scan,
}

SERVICE: Final = WorkerService(OPERATIONS, idle, watcher.LOOPS)

__all__ = ["OPERATIONS", "SERVICE"]
