"""What holds for all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    # a shell has its background jobs ignore interrupts, and they pass that on to what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
