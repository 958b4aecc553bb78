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

PARENT = "gateway"  # the folder of all commands in a container's delegated tree
MARKER = "GATEWAY_EXEC"  # a command's environment names its group by this, so that what left it can be found
_FOLDERS = 1000  # a tenant may make more below its exec; they die with it, but are not counted
_HELD = 64  # processes held open at a time
_LISTED = 100  # processes that are told by name
_ROUNDS = 20  # that forking processes outside of their group have, before they are left as survivors
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


@dataclass(frozen=True, slots=True)
class Member:
    """A process of a command's tree: its number as the tenant sees it, and what it calls itself."""

    pid: int
    name: str


def members(path: Path) -> list[Member]:
    """Return the processes in a group and below it, but for those beyond a hundred. Takes no root."""
    found: list[Member] = []
    for pid in pids(path)[:_LISTED]:
        try:
            status = Path(f"/proc/{pid}/status").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue  # it has ended
        facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        found.append(Member(int(facts.get("NSpid", "0").split()[-1]), facts.get("Name", "")))
    return found


def catch(path: Path) -> None:
    """Bring back what left the group, which takes the tenant's root: `su -` in its own session does it too.

    Found are the processes of the container that carry the group's name in their environment, that descend
    from one of the group, or that share a session of the container with one.
    """
    for pid in _strays(path):
        _bring_back(path, pid)


def freeze(path: Path) -> None:
    """Have all processes stand still, in a moment: `frozen` says when they do."""
    _write(path / "cgroup.freeze", "1")


def frozen(path: Path) -> bool:
    """Return whether all stand still, or never will here. Takes no root."""
    try:
        return "frozen 0" not in (path / "cgroup.events").read_text()
    except OSError:
        return True


def thaw(path: Path) -> None:
    _write(path / "cgroup.freeze", "0")


def terminate(path: Path) -> None:
    """Send TERM to every process."""
    found = pids(path)
    for first in range(0, len(found), _HELD):
        with contextlib.ExitStack() as stack:
            held: dict[int, int] = {}
            for pid in found[first : first + _HELD]:
                with contextlib.suppress(OSError):  # it has ended
                    held[pid] = os.pidfd_open(pid)
                    stack.callback(os.close, held[pid])
            # a pid may have been reused since it was read: look again, now that they are held
            for pid in held.keys() & set(pids(path)):
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(held[pid], signal.SIGTERM)


def end(path: Path) -> None:
    """Send KILL to all processes at once, to those that left the group too.

    The group is frozen first, so that what is brought back, by several rounds where it forks, stays.
    """
    if strays := _strays(path):
        _write(path / "cgroup.freeze", "1")
        for _ in range(_ROUNDS):
            for pid in strays:
                if not _bring_back(path, pid):
                    _send(pid, signal.SIGKILL, lambda pid: pid in _strays(path))
            if not (strays := _strays(path)):
                break
    _write(path / "cgroup.kill", "1")


def remove(path: Path) -> None:
    """Remove the group where it is empty."""
    for folder in reversed(folders(path)):
        with contextlib.suppress(OSError):  # a process is left, or is just dying
            folder.rmdir()


STEPS = {
    "catch": catch,
    "freeze": freeze,
    "terminate": terminate,
    "thaw": thaw,
    "end": end,
    "remove": remove,
}


def _strays(path: Path) -> set[int]:
    """Return the processes of a command that are in its container, but no longer in its group."""
    container = next((up.parent for up in path.parents if up.name == PARENT), None)
    if container is None or container == mount_point():  # this machine's own tree is no container's
        return set()
    group = set(pids(path))
    facts = {pid: found for pid in pids(container) if (found := stat(pid)) is not None}
    name = f"{MARKER}={path.relative_to(container / PARENT)}".encode()
    mine = group | {pid for pid in facts.keys() - group if _carries(pid, name)}
    sessions = {facts[pid].session for pid in mine if pid in facts} & facts.keys()
    grown = True
    while grown:
        more = {
            pid
            for pid, found in facts.items()
            if pid not in mine and (found.parent in mine or found.session in sessions)
        }
        mine |= more
        grown = bool(more)
    return mine - group


def _carries(pid: int, name: bytes) -> bool:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(word == name or word.startswith(name + b"/") for word in words)


def _bring_back(path: Path, pid: int) -> bool:
    with contextlib.suppress(OSError):  # another gateway's, or ours that ended: its group is gone
        path.mkdir()
    return _write(path / "cgroup.procs", str(pid))


def _send(pid: int, number: signal.Signals, still: Callable[[int], bool]) -> None:
    # a pid may have been reused since it was read: hold the process first, then look again
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if still(pid):
            signal.pidfd_send_signal(descriptor, number)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> bool:
    try:
        path.write_text(text)
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Stat:
    """What proc(5) tells of a process, in numbers as the reader of /proc sees them."""

    parent: int
    group: int
    session: int


def stat(pid: int) -> Stat | None:
    """Return the facts of a process; None where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return Stat(*map(int, file.read().rpartition(b")")[2].split()[1:4]))
    except (OSError, ValueError, TypeError):
        return None
