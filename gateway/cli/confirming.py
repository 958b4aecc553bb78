"""Confirmation by the person at the terminal, and the exception that ends a command with one line."""

from __future__ import annotations

import signal
import sys

from gateway.terminal import err


class Failed(Exception):
    """Ends the command with exit code 1; its text is printed as one line."""


def somebody_is_there() -> bool:
    """Return whether a person can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str, otherwise: str) -> None:
    """Ask the person at the terminal, and raise `Failed(otherwise)` unless the answer is yes.

    Blocks, so call it outside an event loop: inside one Ctrl-C would have no effect until Enter is pressed.
    """
    err.say(f"{question} [y/N]", end=" ")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        answer = sys.stdin.readline()
    finally:
        signal.signal(signal.SIGINT, before)
    if answer.strip().lower() not in ("y", "yes"):
        raise Failed(otherwise)
