"""Detect what a folder is, in a sandboxed process.

Reads clues as JSON from standard input and prints the result as JSON. The sandbox is closed before the first
byte is read: the process can open no files and run no programs, and ends after some seconds of CPU time.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

import orjson

from gateway.detection import Clues, detect
from gateway.rootfs.confine import seal

_MEMORY = 1 << 30  # bytes of address space; Python itself reserves most of it
_SECONDS = 5  # of CPU time time


def main() -> None:
    if sys.platform == "linux":
        seal(_MEMORY, _SECONDS)
    found = detect(Clues.unpacked(sys.stdin.buffer.read()))
    sys.stdout.buffer.write(orjson.dumps(asdict(found)))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
