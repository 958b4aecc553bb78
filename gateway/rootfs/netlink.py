"""Requests to the Linux kernel through netlink(7)."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final

# linux/netlink.h
REQUEST, ACK, DUMP, CREATE, REPLACE = 1, 4, 0x300, 0x400, 0x100
ATTRIBUTE: Final = struct.Struct("=HH")  # length including this header, kind
_ERROR, _DONE = 2, 3
_HEADER: Final = struct.Struct("=IHHII")
_WAIT: Final = 5.0  # seconds for an answer, which takes a millisecond
_FRAME: Final = 1 << 18  # bytes of one answer; the kernel's have at most 32 KiB


def asked(protocol: int, kind: int, flags: int, message: bytes) -> Iterator[memoryview]:
    """Send a request and yield the messages of the kernel's answer. Raises `OSError`."""
    if sys.platform != "linux":
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, protocol) as own:
        own.settimeout(_WAIT)
        own.send(_HEADER.pack(_HEADER.size + len(message), kind, flags, 1, 0) + message)
        while True:
            said = memoryview(own.recv(_FRAME))
            while said:
                length, answer, *_ = _HEADER.unpack_from(said)
                if answer == _ERROR:
                    (code,) = struct.unpack_from("=i", said, _HEADER.size)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                if answer in (_ERROR, _DONE):
                    return
                yield said[_HEADER.size : length]
                said = said[(length + 3) & ~3 :]
