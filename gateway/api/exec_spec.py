"""Turns a client's command into the runtime's `ExecSpec`, for websocket and HTTP."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.errors import InvalidParams
from gateway.protocol import PtySize
from gateway.runtime import ExecSpec, Pty


def exec_spec(
    argv: list[str] | None,
    command: str | None,
    cwd: str | None,
    env: Mapping[str, str],
    user: str | int | None,
    pty: PtySize | None,
    stdin: bool,
    helper: bool,
) -> ExecSpec:
    """Return the command to run: `argv`, or else the line `command` by bash. Raises `InvalidParams`."""
    if argv is not None and not argv[0]:
        raise InvalidParams("argv: the first entry, the program's name, is empty", field="argv")
    words = tuple(argv) if argv is not None else ("/bin/bash", "-c", command or "")
    size = None if pty is None else Pty(pty.cols, pty.rows)
    return ExecSpec(
        words,
        cwd=cwd,
        env=dict(env),
        user=user,
        pty=size,
        stdin=stdin or pty is not None,
        work="helper" if helper else "client",
    )
