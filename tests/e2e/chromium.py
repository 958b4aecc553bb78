#!/usr/bin/env python3
"""Runs Chromium such that it hears nothing of this machine's network interfaces.

It ends its requests with ERR_NETWORK_CHANGED whenever an interface gets or loses an address. On the machine
that has the containers this happens all the time; a person's browser is elsewhere. Where it can have no
netlink socket, Chromium takes itself to be online and never looks again (net/base/address_tracker_linux.cc).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import sys

_SOCKET = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}  # AUDIT_ARCH_*, and the call's number
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ, BPF_RET
_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2


def refuse_netlink() -> None:
    """Have this process, and what it starts, get EAFNOSUPPORT for each netlink socket."""
    architecture, number = _SOCKET[platform.machine()]
    # struct seccomp_data: the call's number at 0, the architecture at 4, its first argument at 16
    program = (
        *((_LOAD, 0, 0, 4), (_EQUAL, 0, 5, architecture)),
        *((_LOAD, 0, 0, 0), (_EQUAL, 0, 3, number)),
        *((_LOAD, 0, 0, 16), (_EQUAL, 0, 1, socket.AF_NETLINK)),
        (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
        (_RETURN, 0, 0, _ALLOW),
    )
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    for words in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _MODE_FILTER, filter_, 0, 0)):
        if libc.prctl(*words) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    program = os.environ.get("GATEWAY_TEST_CHROMIUM", "/usr/bin/chromium-headless-shell")
    if platform.machine() in _SOCKET:
        refuse_netlink()
    os.execv(program, [program, *sys.argv[1:]])
