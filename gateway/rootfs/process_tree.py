"""The steps on the cgroup of a command's tree that need root: signal all, kill all, remove it.

They are apart from `cgroups`, which waits between them, so that the broker can do them for a gateway without
root. Only groups that the gateway makes in containers are touched.

How many processes and groups a container has, and what an environment holds, is up to its tenant: all of it
is looked through up to a limit only. Every function here waits for the kernel, none is for an event loop.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import signal
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from gateway.bounds import part

PARENT = "gateway"  # the folder of all commands in a container's delegated tree
MARKER = "GATEWAY_EXEC"  # a command's environment names its group by this, so that what left it can be found
_FOLDERS = 1000  # a tenant may make more below its exec; they die with it, but are not counted
_LIVES = 32  # of one gateway; each of them ends what the one before left
_HELD = 64  # processes held open at a time
_LISTED = 100  # processes that are told by name
_ROUNDS = 20  # that forking processes outside of their group have, before they are left as survivors
_ENDING = 1.0  # seconds of these rounds
_PIDS = 256 << 10  # bytes of a group's list of processes
_STATUS = 1 << 20  # bytes of a process' status: it lists up to 65 536 groups of users
_ENVIRONMENT = 2 << 20  # bytes of an environment that are looked through; a command of ours has half of that
_PIECE = 64 << 10
_LOOKING = 0.25  # seconds for all environments of a container; those of 400 plain processes take 10 ms
_PART = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_INNER = re.compile(rb"^NSpid:.*?(\d{1,10})$", re.MULTILINE)
_NAME = re.compile(rb"^Name:\t(.{0,64})", re.MULTILINE)


def mount_point() -> Path | None:
    """Return where the v2 tree is mounted: the top on pure hosts, `unified` on hybrid ones."""
    try:
        return _mounted()
    except LookupError:
        return None


@functools.cache
def _mounted() -> Path:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            if right.startswith("cgroup2 "):
                return Path(left.split(" ")[4])
    raise LookupError("not mounted, or not yet")


def of_init(pid: int) -> Path | None:
    """Return the root group of the container whose first process is `pid`; None if there is none."""
    mount = mount_point()
    if mount is None:
        return None
    try:
        lines = part(f"/proc/{pid}/cgroup", _PIECE).decode("utf-8", "surrogateescape").split("\n")
    except OSError:
        return None
    path = next((line[3:].strip() for line in lines if line.startswith("0::")), None)
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


def lives(container: Path, own: str) -> list[str]:
    """Return the groups below a container's that are called as lives of one gateway, `OWN-LIFE`."""
    names = (folder.name for folder in _inner(container / PARENT))
    return [name for name in names if name.startswith(f"{own}-") and _PART.fullmatch(name)][:_LIVES]


def commands(container: Path, life: str) -> list[str]:
    """Return the groups of one life's commands, `LIFE/COMMAND`."""
    names = (folder.name for folder in _inner(container / PARENT / life))
    return [f"{life}/{name}" for name in names if _PART.fullmatch(name)]


def _inner(path: Path) -> Iterator[Path]:
    """Yield the groups in one, up to a limit."""
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        folders = (entry for entry in entries if entry.is_dir(follow_symlinks=False))
        for entry in itertools.islice(folders, _FOLDERS):
            yield path / entry.name


def folders(path: Path) -> list[Path]:
    """Return a group and those below it, for a tenant's root can make some there; each before its own."""
    found = [path]
    for folder in found:
        for inner in _inner(folder):
            if len(found) >= _FOLDERS:
                return found
            found.append(inner)
    return found


def pids(path: Path) -> list[int]:
    """Return the processes in a group and below it. Takes no root."""
    found: list[int] = []
    for folder in folders(path):
        # gone, or removed between open and read (ENODEV)
        with contextlib.suppress(OSError):
            text = part(folder / "cgroup.procs", _PIDS)
            found += map(int, text[: text.rfind(b"\n") + 1].split())
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
            status = part(f"/proc/{pid}/status", _STATUS)
        except OSError:
            continue  # it has ended
        inner, name = _INNER.search(status), _NAME.search(status)
        found.append(
            Member(
                0 if inner is None else int(inner[1]),
                "" if name is None else name[1].decode("utf-8", "replace"),
            )
        )
    return found


def catch(path: Path) -> None:
    """Move processes back that left the group, which takes the tenant's root: `su -` does it, for one.

    Finds the processes of the container that have the group's name in their environment, descend from one of
    the group, or share a session of the container with one.
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
    """Send KILL to all processes at once, including those that left the group.

    Freezes the group first, so that processes that were moved back stay; several rounds are made if they
    fork.
    """
    if strays := _strays(path):
        _write(path / "cgroup.freeze", "1")
        until = monotonic() + _ENDING
        for _ in range(_ROUNDS):
            _kill(path, [pid for pid in strays if not _bring_back(path, pid)])
            if monotonic() > until or not (strays := _strays(path)):
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
    until = monotonic() + _LOOKING
    mine = group | {pid for pid in facts.keys() - group if _carries(pid, name, until)}
    sessions = {facts[pid].session for pid in mine if pid in facts} & facts.keys()
    children = defaultdict[int, list[int]](list)
    for pid, found in facts.items():
        children[found.parent].append(pid)
        if found.session in sessions:
            mine.add(pid)
    pending = list(mine)
    while pending:
        more = [pid for pid in children.pop(pending.pop(), ()) if pid not in mine]
        mine.update(more)
        pending += more
    return mine - group


def _carries(pid: int, name: bytes, until: float) -> bool:
    """Return whether an environment names a group, or one below it; False where `until` has passed first."""
    words = (b"\0" + name + b"\0", b"\0" + name + b"/")
    left, text = _ENVIRONMENT, b"\0"
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            while left > 0 and monotonic() < until:
                piece = file.read(_PIECE)
                text = text[-len(words[0]) :] + (piece or b"\0")
                if any(word in text for word in words):
                    return True
                if not piece:
                    break
                left -= len(piece)
    except OSError:
        pass  # it has ended
    return False


def _bring_back(path: Path, pid: int) -> bool:
    with contextlib.suppress(OSError):  # another gateway's, or ours that ended: its group is gone
        path.mkdir()
    return _write(path / "cgroup.procs", str(pid))


def _kill(path: Path, found: Iterable[int]) -> None:
    """Send KILL to processes outside of their group. Their numbers may be others' since they were read."""
    with contextlib.ExitStack() as stack:
        held: dict[int, int] = {}
        for pid in list(found)[:_HELD]:
            with contextlib.suppress(OSError):  # it has ended
                held[pid] = os.pidfd_open(pid)
                stack.callback(os.close, held[pid])
        for pid in held.keys() & _strays(path) if held else ():
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(held[pid], signal.SIGKILL)


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
    """Return the facts of a process; None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return Stat(*map(int, file.read().rpartition(b")")[2].split()[1:4]))
    except (OSError, ValueError, TypeError):
        return None
