"""Become or start the processes that run next to a gateway: the broker, and the holder of its commands."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Final, NoReturn

import orjson

import gateway
from gateway.host import HostError, Report
from gateway.rootfs.broker_client import BOOT, instances
from gateway.settings import Settings
from gateway.storage.state_dir import private

BROKER_OPERATIONS = "gateway.tools.worker_operations"


def become_broker(settings: Settings, report: Report) -> NoReturn:
    """Become a broker that serves until SIGTERM. Raises `HostError` if that is impossible.

    Creates the socket's folder writable by root only, so that nobody else can put a socket there.
    """
    path = settings.broker_socket
    if path is None:
        raise HostError("GATEWAY_BROKER_SOCKET is not set; set it for this command and for `serve`")
    if sys.platform != "linux" or os.geteuid() != 0:
        raise HostError("the broker needs root on Linux; without it leave GATEWAY_BROKER_SOCKET unset")
    uids, gid = [], 0
    try:
        user = pwd.getpwnam(settings.broker_user)
        uids, gid = [user.pw_uid], user.pw_gid
    except KeyError:
        report(f"there is no user {settings.broker_user}: serving only root")
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot create {path.parent}: {error.strerror}") from None
    imports = "\n".join(folder or str(Path.cwd()) for folder in sys.path)
    told = {
        "path": str(path),
        "operations": BROKER_OPERATIONS,
        "tenants": instances(settings).to_dict(),
        "uids": uids,
        "gid": gid,
    }
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8"}
    if "NOTIFY_SOCKET" in os.environ:
        environment["NOTIFY_SOCKET"] = os.environ["NOTIFY_SOCKET"]
    report(f"serving gateways of {', '.join(['root', *([settings.broker_user] if uids else [])])} at {path}")
    words = (
        sys.executable,
        "-ISBc",
        BOOT,
        imports,
        "gateway.rootfs.broker:listening",
        orjson.dumps(told),
    )
    os.execve(sys.executable, words, environment)  # noqa: S606 - our own interpreter with our own words


# --- the holder ---------------------------------------------------------------------------------------------


_TIMEOUT: Final = 10.0  # seconds for a holder to start or stop
_LOOK: Final = 0.02

# without site-packages, which it does not need: a tenth of the memory
_HOLDER_BOOT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from gateway.holder.holding import main; main()"
)


def become_holder(settings: Settings) -> NoReturn:
    """Become a holder that serves until SIGTERM. Raises `OSError`."""
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    words = holder_command(settings)
    os.execve(words[0], words, {"LANG": "C.UTF-8"})  # noqa: S606 - our own interpreter with our own words


def holder_command(settings: Settings) -> list[str]:
    """Return the command line of a holder."""
    source = str(Path(gateway.__file__ or "").parents[1])
    return [sys.executable, "-ISBc", _HOLDER_BOOT, source, str(settings.holder_socket), str(settings.hold)]


def ensure_holder(settings: Settings, log: Path) -> str:
    """Make sure that a holder runs, as a process that outlives this one; return what was done, for a person.

    Raises `HostError`.
    """
    if (pid := running_holder(settings)) is not None:
        return f"already running, pid {pid}"
    words = holder_command(settings)
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
        if running_holder(settings) == pid:
            return f"started, pid {pid}"
        time.sleep(_LOOK)
    raise HostError(f"the holder of commands did not start; see the end of {log}")


def stop_holder(settings: Settings) -> bool:
    """Stop the holder, which ends the commands it holds; return whether one was running."""
    if (pid := running_holder(settings)) is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _TIMEOUT
    while running_holder(settings) is not None and time.monotonic() < deadline:
        time.sleep(_LOOK)
    with contextlib.suppress(ChildProcessError):  # not our child
        os.waitpid(pid, 0)
    return True


def running_holder(settings: Settings) -> int | None:
    """Return the pid of the listening holder, or None."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(settings.holder_socket))
        except OSError:
            return None
        # struct ucred: pid, uid, gid of the listener
        pid, uid, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid) if uid in (0, os.geteuid()) else None
