"""What tests share of the machine."""

from __future__ import annotations

import subprocess
import sys

# all begin to look for a free range at the same place, and keep theirs until they are told to end
_DRAW = """
import random
from tests.live import free_ports

random.seed(1)
print(*free_ports(100), flush=True)
input()
"""


def test_no_two_processes_draw_the_same_port() -> None:
    """Not even one that nobody listens on yet."""
    command = [sys.executable, "-c", _DRAW]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    try:
        drawn = [process.stdout.readline().split() for process in processes if process.stdout is not None]
    finally:
        for process in processes:
            process.communicate("\n")
    assert len({port for ports in drawn for port in ports}) == 400
