"""How a command is displayed: its words and its start time."""

from __future__ import annotations

import time
from typing import Final

from gateway.runtime import ExecSpec, Process

LISTED: Final = 4096  # characters of a command where it is listed beside all others


def listed(spec: ExecSpec) -> list[str]:
    """Return a command's words as `exec/list` has them, as text that JSON can carry."""
    return [word.encode(errors="replace").decode() for word in shortened(spec, LISTED)]


def shortened(spec: ExecSpec, room: int) -> list[str]:
    """Return a command's words, truncated to about `room` characters in all."""
    words = list[str]()
    for word in spec.shown or spec.argv:
        words.append(word if len(word) <= room else word[: max(0, room - 1)] + "…")
        room -= len(word) + 1
        if room < 0:
            break
    return words


def started_at(process: Process) -> str:
    """Return the start time in RFC 3339 format, with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(process.started_at))
    return f"{whole}.{int(process.started_at * 1000) % 1000:03d}Z"
