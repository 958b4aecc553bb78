"""Knows the steps on the cgroup of a command's tree that take root: signals to all, KILL to all, removing it.

They are apart from `cgroups`, which waits between them, so that the broker can do them for a gateway without
root. Only groups that the gateway makes in containers are touched.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PARENT = "gateway"  # the folder of all commands in a container's delegated tree, see `runtime.wrapper`
_FOLDERS = 1000  # a tenant may make more below its exec; they die with it, but are not counted
_PART = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def mount_point() -> Path | None:
    """Return where the v2 tree is mounted: the top on pure hosts, `unified` on hybrid ones."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            if right.startswith("cgroup2 "):
                return Path(left.split(" ")[4])
    return None


def of_init(pid: int) -> Path | None:
    """Return the root group of the container whose first process is `pid`; None where there is none."""
    mount = mount_point()
    if mount is None:
        return None
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as lines:
            path = next((line[3:].strip() for line in lines if line.startswith("0::")), None)
    except OSError:
        return None
    if path is None:
        return None
    return mount / path.removesuffix("/init.scope").lstrip("/")


def of_command(container: Path, group: str) -> Path:
    """Return the group of a command, `OWN/EXEC`, or of one gateway's commands, `OWN`, below a container's.

    Raises `ValueError` for what is neither. cgroupfs has no links.
    """
    parts = group.split("/")
    if len(parts) > 2 or not all(_PART.fullmatch(part) and part not in (".", "..") for part in parts):
        raise ValueError("not a command's cgroup")
    return container.joinpath(PARENT, *parts)


def folders(path: Path) -> list[Path]:
    """Return a group and those below it, for a tenant's root can make some there."""
    return [Path(folder) for folder, _, _ in itertools.islice(os.walk(path), _FOLDERS)]


def pids(path: Path) -> list[int]:
    """Return the processes in a group and below it. Takes no root."""
    found: list[int] = []
    for folder in folders(path):
        # gone, or removed between open and read (ENODEV)
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    return found


def terminate(path: Path) -> None:
    """Send TERM to every process."""
    _send(path, signal.SIGTERM, lambda pid: True)


def _send(path: Path, number: signal.Signals, chosen: Callable[[int], bool]) -> None:
    for pid in filter(chosen, pids(path)):
        # a pid may have been reused since it was read: hold the process first, then look again
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            if pid in pids(path):
                signal.pidfd_send_signal(descriptor, number)
        except OSError:
            pass
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Stat:
    """What proc(5) tells of a process, in numbers as the reader of /proc sees them."""

    parent: int
    group: int
    session: int
    terminal: int
    front: int  # the group in front on its terminal


def stat(pid: int) -> Stat | None:
    """Return the facts of a process; None where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return Stat(*map(int, file.read().rpartition(b")")[2].split()[1:6]))
    except (OSError, ValueError, TypeError):
        return None


def end(path: Path) -> None:
    """Send KILL to all processes at once."""
    with contextlib.suppress(OSError):
        (path / "cgroup.kill").write_text("1")


def remove(path: Path) -> None:
    """Remove the group where it is empty."""
    for folder in reversed(folders(path)):
        with contextlib.suppress(OSError):  # a process is left, or is just dying
            folder.rmdir()


STEPS = {"terminate": terminate, "end": end, "remove": remove}
