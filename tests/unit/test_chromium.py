"""The browser of tests/e2e hears nothing of this machine's interfaces."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[1] / "e2e" / "chromium.py"
TRIES = """
import socket, sys
for family in (socket.AF_INET, socket.AF_UNIX, socket.AF_NETLINK):
    try:
        socket.socket(family, socket.SOCK_DGRAM).close()
        print("has one", end=", ")
    except OSError as error:
        print(error.strerror, end=", ")
print(*sys.argv[1:])
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="has no such sockets"
)
def test_it_may_have_no_netlink_socket_and_all_others() -> None:
    environment = {**os.environ, "GATEWAY_TEST_CHROMIUM": sys.executable}
    words = (sys.executable, LAUNCHER, "-c", TRIES, "--its", "words")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "has one, has one, Address family not supported by protocol, --its words\n"
