"""One call of a file tool inside a worker: its input, what its session has seen, and texts of refusals."""

from __future__ import annotations

import time
from typing import Any

from gateway.errors import GatewayError, InvalidParams
from gateway.rootfs.paths import show
from gateway.rootfs.refusals import NO_SPACE
from gateway.rootfs.worker import Workspace
from gateway.tools.answer import Seen, ToolFailure

_NAMES_MAX = 5000  # names in a folder that are compared for a "Did you mean"


class Call:
    """One call. `cwd` is absolute inside the tenant, `seen` what the session has seen of the named file.

    A `brief` call blocks others, so it ends with `Timeout` if it would take long. `named` are the names that
    `gateway.tools.search.scan` found, in Latin-1 (a character for each byte), each followed by a NUL.
    """

    def __init__(
        self,
        tool: str,
        workspace: Workspace,
        given: dict[str, Any],
        cwd: str,
        seen: list[Any] | None,
        read_first: bool,
        *,
        brief: bool = False,
        named: str | None = None,
    ) -> None:
        self.tool = tool
        self.root = workspace.root
        self.limits = workspace.limits
        self.brief = brief
        self.named = named
        self.given = given
        self.cwd = cwd
        self.seen = Seen(*seen) if seen else None
        self.read_first = read_first
        self.deadline = time.monotonic() + self.limits.tool_timeout

    def locate(self, path: str) -> str:
        """Return the relative path for a `path` of the input."""
        return self.root.locate(meant(path), self.cwd)

    def absolute(self, path: str) -> str:
        """Return a relative path as text, absolute."""
        return show(self.root.absolute(path))

    def shown(self, path: str) -> str:
        """Return a relative path as results list it: relative to the working directory if it is below it."""
        if self.cwd == self.root.workspace:
            return show(path or self.cwd)
        absolute = self.root.absolute(path)
        cwd = self.cwd.rstrip("/") + "/"
        return show(absolute[len(cwd) :] if absolute.startswith(cwd) else absolute)

    def all_shown(self, paths: list[str]) -> list[str]:
        """Return each as `shown` does."""
        if self.cwd == self.root.workspace and "".join(paths).isprintable():  # the usual case
            return paths
        return [self.shown(path) for path in paths]

    @property
    def where(self) -> str:
        return f"Note: your current working directory is {show(self.cwd)}."


def meant(path: str) -> str:
    """Return the path of a call's input: stripped of white space; if empty, the working directory."""
    return path.strip() or "."


def failure(tool: str, error: GatewayError) -> ToolFailure:
    """Return the generic failure for an error that the tool has no text for."""
    words = f"Error calling tool ({tool}): {error.message}"
    facts = {key: value for key, value in error.facts.items() if key != "reason" or value == NO_SPACE}
    return ToolFailure(error.code, words, **facts)


def timed_out(seconds: float) -> ToolFailure:
    """Return the failure of a search that did not finish."""
    words = f"Search timed out after {seconds:g} seconds. Try a more specific path or pattern."
    return ToolFailure("timeout", words, tagged=False)


def outside(call: Call, verb: str, path: str, error: GatewayError) -> ToolFailure:
    """Return the failure for a refused path: it leads outside, its links do not resolve, or it is invalid."""
    if error.facts.get("reason") == "too_long":
        absolute = path if path.startswith("/") else f"{call.cwd}/{path}"
        words = f"ENAMETOOLONG: name too long, {'open' if call.tool == 'Read' else 'stat'} '{show(absolute)}'"
        if call.tool in ("Write", "Edit"):
            return ToolFailure(error.code, f"Error calling tool ({call.tool}): {words}")
        return ToolFailure(error.code, words, tagged=False)
    if isinstance(error, InvalidParams):
        return ToolFailure(error.code, f"Error calling tool ({call.tool}): {error.message}")
    if error.facts.get("reason") == "loop":
        why = (
            "where it leads on disk could not be determined (a link on the way could not be examined, "
            "or the links do not resolve)."
        )
    else:
        why = f"it is outside the workspace {call.root.workspace}, which is all that the file tools serve."
    return ToolFailure(error.code, f"Refusing to {verb} {show(path[:1000])}: {why}", tagged=False)


def missing(call: Call, path: str) -> str:
    """Return the text for a missing file, with a guess at what was meant."""
    words = f"File does not exist. {call.where}"
    guess = below_cwd(call, path) or _similar(call, path)
    return f"{words} Did you mean {guess}?" if guess else words


def _similar(call: Call, path: str) -> str | None:
    """Return the name of a file in the same folder that differs in its extension only."""
    folder, _, name = path.rpartition("/")
    stem = name.rpartition(".")[0] or name
    try:
        names = call.root.names(folder, _NAMES_MAX)
    except GatewayError:
        return None
    found = [other for other in names if other != name and (other.rpartition(".")[0] or other) == stem]
    return show(min(found)) if found else None


def below_cwd(call: Call, path: str) -> str | None:
    """Return the file at that path below the working directory, if that part of the path was left out."""
    absolute = call.root.absolute(path)
    above = call.cwd.rpartition("/")[0] + "/"
    if not absolute.startswith(above) or absolute.startswith(call.cwd + "/"):
        return None
    candidate = f"{call.cwd}/{absolute[len(above) :]}"
    try:
        call.root.status(call.locate(candidate))
    except GatewayError:
        return None
    return show(candidate)
