"""Detect what a folder is in a process of its own, which can do nothing but answer.

Takes clues on its standard input and answers with what was found, as JSON. It is sealed before it reads the
first byte: it opens and runs nothing, and ends after some seconds of CPU.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

import orjson

from gateway.detection import Clues, detect
from gateway.rootfs.confine import seal

_MEMORY = 1 << 30  # bytes of address space; most of it is what Python itself reserves
_SECONDS = 5  # of CPU


def main() -> None:
    if sys.platform == "linux":
        seal(_MEMORY, _SECONDS)
    found = detect(Clues.unpacked(sys.stdin.buffer.read()))
    sys.stdout.buffer.write(orjson.dumps(asdict(found)))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
