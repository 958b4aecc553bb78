"""Asks the person at the terminal, and ends a command with one line where it must not go on."""

from __future__ import annotations

import signal
import sys

from gateway.terminal import err


class Failed(Exception):
    """Ends the command: its text is printed as one line, and the exit code is 1."""


def somebody_is_there() -> bool:
    """Say whether a person can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str, otherwise: str) -> None:
    """Return once the person at the terminal says yes. Raises `Failed` with `otherwise`.

    Waits for them, and an event loop with it: there Ctrl-C would not be heard before the line's end.
    """
    err.say(f"{question} [y/N]", end=" ")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        answer = sys.stdin.readline()
    finally:
        signal.signal(signal.SIGINT, before)
    if answer.strip().lower() not in ("y", "yes"):
        raise Failed(otherwise)
