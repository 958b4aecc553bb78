"""Starts a gateway that takes over from the running one, and waits until it has or says why it cannot."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from gateway.host import HostError, Report
from gateway.notify import VARIABLE, notify, settled
from gateway.storage.state_dir import private

_BOOT: Final = 120.0  # seconds, in addition to the wait for deployments
_BARRIER: Final = 5.0
_MESSAGE: Final = 4096  # bytes
# Orphaned at once, so that the first process becomes its parent. systemd watches only its own children.
_ORPHAN: Final = '"$@" >&2 </dev/null & echo $!'


def possible(state_dir: Path) -> bool:
    """Return whether the gateway of a state dir is running and can hand over."""
    if sys.platform != "linux":
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(state_dir / "handover.sock"))
        except OSError:
            return False
    return True


def start(
    program: Path, variables: Mapping[str, str], log: Path | None, report: Report, *, patience: float
) -> int:
    """Start a gateway of `program` that takes over; return its pid once it serves.

    `variables` are its environment. It logs to `log`, or else to our stderr, and waits up to `patience`
    seconds for deployments. Raises `HostError` with its reason; the old gateway then keeps running.
    """
    with _told() as (socket_, address):
        pid = _spawn(program, {**variables, VARIABLE: address}, log)
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            raise HostError(_why(_last(socket_), log)) from None
        try:
            return _served(socket_, process, pid, log, report, patience + _BOOT)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            raise
        finally:
            os.close(process)


@contextlib.contextmanager
def _told() -> Iterator[tuple[socket.socket, str]]:
    """Yield a socket to which a gateway reports its state, and the socket's address."""
    with tempfile.TemporaryDirectory(prefix="incus-gateway-") as folder:  # only our own user can reach it
        address = f"{folder}/notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling:
            telling.bind(address)
            yield telling, address


def _spawn(program: Path, variables: Mapping[str, str], log: Path | None) -> int:
    words = ["/bin/sh", "-c", _ORPHAN, "sh", str(program), "serve", "--take-over"]
    with contextlib.ExitStack() as stack:
        to = None if log is None else stack.enter_context(open(log, "ab", opener=private))
        done = subprocess.run(
            words,
            env=variables,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=to,
            cwd="/",
            start_new_session=True,
        )
    return int(done.stdout)


def _served(
    told: socket.socket, process: int, pid: int, log: Path | None, report: Report, seconds: float
) -> int:
    """Follow a successor's reports until it serves and the old gateway knows. Raises `HostError`."""
    poll = select.poll()
    poll.register(told, select.POLLIN)
    poll.register(process, select.POLLIN)
    deadline, status, serves = time.monotonic() + seconds, "", False
    while (left := deadline - time.monotonic()) > 0:
        ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
        if told.fileno() in ready:
            lines, barriers = _received(told)
            for line in lines:
                if line.startswith("STATUS=") and line.removeprefix("STATUS=") != status:
                    status = line.removeprefix("STATUS=")
                    if not serves and status != "serves":
                        report(status)
                serves |= line == "READY=1"
            if "READY=1" in lines:
                notify(f"MAINPID={pid}")  # if we run as a unit's ExecReload=
                settled(_BARRIER)
            for barrier in barriers:
                os.close(barrier)  # now the old gateway may end
            if serves and barriers:
                return pid
        elif process in ready:
            raise HostError(_why(status, log))
    raise HostError(f"it was not ready within {seconds:.0f} s; {_where(log)}")


def _received(told: socket.socket) -> tuple[list[str], list[int]]:
    data, descriptors, _, _ = socket.recv_fds(told, _MESSAGE, 4)
    return data.decode(errors="replace").splitlines(), list(descriptors)


def _last(told: socket.socket) -> str:
    """Return the last reason reported by a process that has ended."""
    told.setblocking(False)
    status = ""
    with contextlib.suppress(BlockingIOError):
        while True:
            for line in _received(told)[0]:
                status = line.removeprefix("STATUS=") if line.startswith("STATUS=") else status
    return status


def _why(status: str, log: Path | None) -> str:
    return status or f"it ended before it was ready; {_where(log)}"


def _where(log: Path | None) -> str:
    return "its log says why" if log is None else f"see the end of {log}"
