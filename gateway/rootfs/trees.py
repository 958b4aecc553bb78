"""Knows the steps on the cgroup of a command's tree that take root: TERM to all, KILL to all, removing it.

They are apart from `cgroups`, which waits between them, so that the broker can do them for a gateway without
root. Only groups that the gateway makes in containers are touched.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
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


def checked(text: str) -> Path:
    """Return the path of a command's group, or of one gateway's commands. Raises `ValueError` for others.

    It lies below a container's: `MOUNT/CONTAINER…/gateway/OWN[/EXEC]`. cgroupfs has no links.
    """
    mount = mount_point()
    path = Path(text)
    if mount is None or not path.is_relative_to(mount):
        raise ValueError("not a cgroup")
    parts = path.relative_to(mount).parts
    if not all(_PART.fullmatch(part) and part != ".." for part in parts):
        raise ValueError("not a command's cgroup")
    if not any(parts[-back:][0] == PARENT for back in (2, 3) if len(parts) > back):
        raise ValueError("not a command's cgroup")
    return path


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
    for pid in pids(path):
        # a pid may have been reused since it was read: hold the process first, then look again
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            if pid in pids(path):
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        except OSError:
            pass
        finally:
            os.close(descriptor)


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
