"""The holder of a gateway's commands: become one, start one for a gateway without systemd, stop it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Final, NoReturn

import gateway
from gateway.host import HostError
from gateway.settings import Settings
from gateway.storage.state_dir import private

_TIMEOUT: Final = 10.0  # seconds for a holder to start or stop
_LOOK: Final = 0.02

# without site-packages, which it does not need: a tenth of the memory
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from gateway.holder.holding import main; main()"


def run(settings: Settings) -> NoReturn:
    """Become a holder that serves until SIGTERM. Raises `OSError`."""
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    words = command(settings)
    os.execve(words[0], words, {"LANG": "C.UTF-8"})  # noqa: S606 - our own interpreter with our own words


def command(settings: Settings) -> list[str]:
    """Return the command line of a holder."""
    source = str(Path(gateway.__file__ or "").parents[1])
    return [sys.executable, "-ISBc", _BOOT, source, str(settings.holder_socket), str(settings.hold)]


def ensure(settings: Settings, log: Path) -> str:
    """Make sure that a holder runs, as a process that outlives this one; return what was done, for a person.

    Raises `HostError`.
    """
    if (pid := running(settings)) is not None:
        return f"already running, pid {pid}"
    words = command(settings)
    with open(log, "ab", opener=private) as file:
        # not `Popen`, which expects to wait for its child
        pid = os.posix_spawn(
            words[0],
            words,
            {"LANG": "C.UTF-8"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, file.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, file.fileno(), 2),
            ],
            setsid=True,
        )
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG)[0] == 0:
        if running(settings) == pid:
            return f"started, pid {pid}"
        time.sleep(_LOOK)
    raise HostError(f"the holder of commands did not start; see the end of {log}")


def stop(settings: Settings) -> bool:
    """Stop the holder, which ends the commands it holds; return whether one was running."""
    if (pid := running(settings)) is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _TIMEOUT
    while running(settings) is not None and time.monotonic() < deadline:
        time.sleep(_LOOK)
    with contextlib.suppress(ChildProcessError):  # not our child
        os.waitpid(pid, 0)
    return True


def running(settings: Settings) -> int | None:
    """Return the pid of the listening holder, or None."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(settings.holder_socket))
        except OSError:
            return None
        # struct ucred: pid, uid, gid of the listener
        pid, uid, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid) if uid in (0, os.geteuid()) else None
