"""The steps on a command's cgroup that need root: signal all processes, kill all, remove the cgroup.

They are separate from `command_cgroup`, which waits between them, so that the broker can run them for a
gateway without root. Only cgroups created by the gateway in containers are touched.

A tenant controls how many processes and cgroups its container has, and what an environment contains, so
everything is examined only up to a limit. All functions block on the kernel; none is for the event loop.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from gateway.rootfs.kernel import O_PATH, read_part

PARENT = "gateway"  # the folder of all commands in a container's delegated tree
MARKER = "GATEWAY_EXEC"  # variable that names a command's cgroup, so that processes that left it can be found
_FOLDERS = 1000  # cgroups; a tenant may create more below its exec, which are killed but not counted
_HELD = 64  # pidfds held at a time
_ROUNDS = 20  # attempts to kill forking processes outside of their cgroup, before they count as survivors
_ENDING = 1.0  # seconds for these attempts
_PIDS = 256 << 10  # bytes of a cgroup's list of processes
_ENVIRONMENT = 2 << 20  # bytes of an environment to search; our commands have at most half of that
_PIECE = 64 << 10
_LOOKING = 0.25  # seconds to search all environments of a container; 400 ordinary processes take 10 ms
PART = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def mount_point() -> Path | None:
    """Return where the v2 tree is mounted: at the top on pure hosts, at `unified` on hybrid ones."""
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
    """Return the root cgroup of the container with the init process `pid`, or None."""
    mount = mount_point()
    if mount is None:
        return None
    try:
        lines = read_part(f"/proc/{pid}/cgroup", _PIECE).decode("utf-8", "surrogateescape").split("\n")
    except OSError:
        return None
    path = next((line[3:].strip() for line in lines if line.startswith("0::")), None)
    if path is None:
        return None
    return mount / path.removesuffix("/init.scope").lstrip("/")


def of_command(container: Path, group: str) -> Path:
    """Return the cgroup of a command, `OWN/EXEC`, or of one gateway's commands, `OWN`, in a container.

    Raises `ValueError` for other names. cgroupfs has no links.
    """
    parts = group.split("/")
    if len(parts) > 2 or not all(PART.fullmatch(part) and part not in (".", "..") for part in parts):
        raise ValueError("not a command's cgroup")
    return container.joinpath(PARENT, *parts)


def children(path: Path) -> Iterator[Path]:
    """Yield the cgroups in a cgroup, up to a limit."""
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        folders = (entry for entry in entries if entry.is_dir(follow_symlinks=False))
        for entry in itertools.islice(folders, _FOLDERS):
            yield path / entry.name


def folders(path: Path) -> list[Path]:
    """Return a cgroup and all below it, which a tenant's root may create; parents come first."""
    found = [path]
    for folder in found:
        for inner in children(folder):
            if len(found) >= _FOLDERS:
                return found
            found.append(inner)
    return found


def pids(path: Path) -> list[int]:
    """Return the processes in a cgroup and below it. Needs no root."""
    found: list[int] = []
    for folder in folders(path):
        # gone, also between open and read (ENODEV)
        with contextlib.suppress(OSError):
            text = read_part(folder / "cgroup.procs", _PIDS)
            found += map(int, text[: text.rfind(b"\n") + 1].split())
    return found


def catch(path: Path) -> None:
    """Move processes back that have left the cgroup, for which they need the tenant's root, such as `su -`.

    Finds the processes of the container that have the cgroup's name in their environment, descend from a
    process in it, or share a session with one.
    """
    for pid in _strays(path):
        _bring_back(path, pid)


def freeze(path: Path) -> None:
    """Start freezing all processes; `command_cgroup` waits until it is done."""
    _write(path / "cgroup.freeze", "1")


def thaw(path: Path) -> None:
    _write(path / "cgroup.freeze", "0")


def send(path: Path, number: int) -> None:
    """Send a signal to every process."""
    found = pids(path)
    for first in range(0, len(found), _HELD):
        with contextlib.ExitStack() as stack:
            held: dict[int, int] = {}
            for pid in found[first : first + _HELD]:
                with contextlib.suppress(OSError):  # it has ended
                    held[pid] = os.pidfd_open(pid)
                    stack.callback(os.close, held[pid])
            # a pid may have been reused since it was read: check again, now that they are held
            for pid in held.keys() & set(pids(path)):
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(held[pid], number)


def end(path: Path) -> None:
    """Send KILL to all processes at once, including those that have left the cgroup.

    Freezes the cgroup first, so that processes moved back stay there. Repeats this if they fork.
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
    """Remove the cgroup if it is empty."""
    for folder in reversed(folders(path)):
        with contextlib.suppress(OSError):  # a process is left or still dying
            folder.rmdir()


STEPS: dict[str, Callable[[Path], None]] = {
    "catch": catch,
    "freeze": freeze,
    "thaw": thaw,
    "end": end,
    "remove": remove,
    **{f"signal {number}": functools.partial(send, number=number) for number in range(1, signal.NSIG)},
}


def _strays(path: Path) -> set[int]:
    """Return a command's processes in its container that are no longer in its cgroup."""
    container = next((up.parent for up in path.parents if up.name == PARENT), None)
    if container is None or container == mount_point():  # the host's own tree is not a container
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
    """Return whether an environment names a cgroup or one below it; False once `until` has passed."""
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
    with contextlib.suppress(OSError):  # of another or an ended gateway, whose cgroup is gone
        path.mkdir()
    return _write(path / "cgroup.procs", str(pid))


def _kill(path: Path, found: Iterable[int]) -> None:
    """Send KILL to processes outside of their cgroup, taking care of reused pids."""
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
    """Facts about a process from proc(5); pids as seen by the reader."""

    parent: int
    group: int
    session: int


def stat(pid: int) -> Stat | None:
    """Return the facts about a process, None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return Stat(*map(int, file.read().rpartition(b")")[2].split()[1:4]))
    except (OSError, ValueError, TypeError):
        return None


_LOOKS = 16  # processes of a command to look at: the kernel lists the one that incusd started first
_FIRST_PIDS = 256  # bytes of these processes' list
_OUTPUTS = ("fd/4", "fd/5")  # of `incusd forkexec`: standard output and error, as incusd made them
_HELPER = b"forkexec"
_WORDS = 4096  # bytes of its command line, of which the second word counts


def output_pipes(path: Path) -> list[int]:
    """Return descriptors for the outputs of the command in a cgroup, standard output first; [] if unknown.

    They are those of incusd's helper, the parent of the command's first process: what the command has as its
    own may be anything by now. Needs root. Quick enough for the event loop: bounded, and without any disk.
    """
    for pid in _first(path):
        found = stat(pid)
        try:
            # a folder of /proc is of one process, even if its pid is used again
            helper = os.open(f"/proc/{found.parent if found else 0}", os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if read_part(f"/proc/self/fd/{helper}/cmdline", _WORDS).split(b"\0")[1:2] == [_HELPER]:
                return _open_pipes(helper)
        except OSError:  # it has ended
            pass
        finally:
            os.close(helper)
    return []


def _first(path: Path) -> list[int]:
    """Return the first processes in a cgroup; not of those below it, which only a tenant makes."""
    try:
        text = read_part(path / "cgroup.procs", _FIRST_PIDS)
    except OSError:  # it is gone
        return []
    return [int(word) for word in text[: text.rfind(b"\n") + 1].split()][:_LOOKS]


def _open_pipes(helper: int) -> list[int]:
    """Open the outputs of a process. Raises `OSError` if one is no pipe: a tenant may imitate the helper."""
    found: list[int] = []
    try:
        for name in _OUTPUTS:
            named = os.open(name, O_PATH | os.O_CLOEXEC, dir_fd=helper)  # which opens nothing yet
            try:
                if not os.readlink(f"/proc/self/fd/{named}").startswith("pipe:["):
                    raise OSError("not a pipe")
                found.append(os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            finally:
                os.close(named)
    except OSError:
        for descriptor in found:
            os.close(descriptor)
        raise
    return found
