"""Where a search begins, its limits, and the texts of its refusals."""

from __future__ import annotations

from dataclasses import replace

from gateway.errors import GatewayError, Timeout
from gateway.rootfs.messages import Limits
from gateway.rootfs.paths import HOME, show
from gateway.rootfs.root import Root
from gateway.rootfs.walk import Walk
from gateway.tools.answer import ToolFailure
from gateway.tools.call import Call, below_cwd, failure, outside

BRIEF_BYTES = 1 << 20  # bytes of files that a brief Grep may search, with the limits of `brief`
BRIEF_VISITS = 1000
BRIEF_SECONDS = 0.02
_REJECTED = "Search failed — ripgrep rejected the pattern, glob, or file type without searching:\nrg: "
_VERBS = {"Glob": "search", "Grep": "read"}


def rejected(words: str) -> ToolFailure:
    return ToolFailure("invalid_params", _REJECTED + words, tagged=False)


def brief(limits: Limits) -> Limits:
    """Return the limits of a search that must end at once, or be left to another worker."""
    visits, seconds = min(BRIEF_VISITS, limits.visit_max), min(BRIEF_SECONDS, limits.tool_timeout)
    return replace(limits, visit_max=visits, tool_timeout=seconds)


def bounded(walk: Walk, call: Call) -> str:
    note = too_deep(call) if walk.deep else ""
    if not walk.truncated:
        return note
    if call.brief:
        raise Timeout("too much for a brief search", reason="timeout")
    return f"\n(The search stopped after {call.limits.visit_max} files and folders. Narrow the path.){note}"


def too_deep(call: Call) -> str:
    return f"\n(Folders more than {call.root.depth} deep were left out.)"


def start_of(call: Call, path: str) -> str:
    try:
        return call.locate(path)
    except GatewayError as error:
        raise outside(call, _VERBS[call.tool], path, error) from None


def bad_folder(call: Call, path: str, start: str, error: GatewayError) -> ToolFailure:
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
            if not exists(call.root, start):
                words = f"ENOTDIR: not a directory, stat '{call.absolute(start)}'"
            return ToolFailure("not_a_file", words, tagged=False)
        case "outside" | "loop":
            return outside(call, _VERBS[call.tool], call.absolute(start), error)
        case _:
            return failure(call.tool, error)


def exists(root: Root, path: str) -> bool:
    try:
        root.status(path)
    except GatewayError:
        return False
    return True


def hidden(start: str, pattern: str = "") -> str | None:
    """Return the gateway's own folder if a search would visit it without having named it."""
    return None if start or pattern.startswith(HOME) else HOME
