"""Inspects, stops and starts a site's old service, using systemd and the kernel.

Finds out where a domain leads its visitors.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import orjson

from gateway.caddy import Caddy
from gateway.host import HostError, run

_PROC: Final = Path("/proc")
_LISTENS: Final = "0A"  # state of a socket in /proc/net/tcp
_LOOPBACK: Final = "127.0.0.1"
_EVERY: Final = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
# variables that systemd sets for services (systemd.exec(5)), and those that the tenant sets itself
_SYSTEMDS: Final = re.compile(
    r"PATH|HOME|LOGNAME|USER|SHELL|LANG|TERM|INVOCATION_ID|JOURNAL_STREAM|SYSTEMD_EXEC_PID|MEMORY_PRESSURE_.*"
    r"|NOTIFY_SOCKET|LISTEN_.*|WATCHDOG_.*|(RUNTIME|STATE|CACHE|LOGS|CONFIGURATION|CREDENTIALS)_DIRECTORY|MAINPID"
)
_TENANTS: Final = frozenset({"PORT", "HOST", "HOSTNAME"})
_SHELLS: Final = frozenset({"sh", "bash", "dash", "zsh"})
_USERS: Final = frozenset({"sudo", "su", "runuser", "doas"})
_HOSTS: Final = re.compile(r"(?P<before>(?:--?[A-Za-z-]+=)?)(?:127\.0\.0\.1|localhost|::1)")


@dataclass(frozen=True, slots=True)
class Owner:
    """The ids on disk that the workspace's user has inside."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Old:
    """A running old service. `environment` contains secrets: only its names are ever printed."""

    words: tuple[str, ...]
    folder: Path  # its working folder at the start
    uid: int
    pids: tuple[int, ...]
    address: str
    port: int
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit's state according to the service manager."""

    pid: int
    words: tuple[str, ...]
    enabled: bool


class Units(Protocol):
    """The host's service manager. Raises `HostError`."""

    def unit(self, name: str) -> Unit: ...

    def stop(self, name: str) -> None: ...

    def start(self, name: str) -> None: ...

    def enable(self, name: str, on: bool) -> None: ...


class Systemctl:
    """systemd, through its commands. `before` is put before each, to reach a systemd in a container."""

    def __init__(self, before: Sequence[str] = ()) -> None:
        self._before = tuple(before)

    def unit(self, name: str) -> Unit:
        """Return the state of a loaded unit."""
        wanted = "LoadState,MainPID,UnitFileState"
        said = self._run("systemctl", "show", f"--property={wanted}", "--", name)
        facts = dict(line.partition("=")[::2] for line in said.splitlines())
        if facts.get("LoadState") != "loaded":
            raise HostError(f"systemd cannot load a unit {name}; see: systemctl status {name}")
        words: tuple[str, ...] = ()
        # the exact words; `systemctl show` joins them with spaces
        with contextlib.suppress(HostError, ValueError, LookupError, TypeError):
            bus, manager = "org.freedesktop.systemd1", "org.freedesktop.systemd1.Service"
            path = f"/org/freedesktop/systemd1/unit/{bus_label(name)}"
            told = self._run("busctl", "--json=short", "get-property", bus, path, manager, "ExecStart")
            words = tuple(map(str, orjson.loads(told)["data"][-1][1]))
        return Unit(int(facts.get("MainPID") or 0), words, facts.get("UnitFileState") == "enabled")

    def stop(self, name: str) -> None:
        self._run("systemctl", "stop", "--", name)

    def start(self, name: str) -> None:
        self._run("systemctl", "start", "--", name)

    def enable(self, name: str, on: bool) -> None:
        self._run("systemctl", "--quiet", "enable" if on else "disable", "--", name)

    def _run(self, *words: str) -> str:
        return run([*self._before, *words], fix=f"see: systemctl status {words[-1]}")


class OldServices:
    """The sites' old services, found by their unit or, without one, by what runs in their folder."""

    def __init__(self, units: Units) -> None:
        self._units = units

    def find(self, folder: Path, unit: str | None, port: int | None, names: Sequence[str]) -> Old:
        """Return a running one; if it has no unit, with the variables `names`. Raises `HostError`."""
        if unit is None:
            return of_folder(folder, port, names)
        return of_unit(self._units.unit(unit), unit, port)

    def pause(self, folder: Path, unit: str | None, port: int) -> None:
        """Stop its unit, or its processes with a signal, so that it writes nothing more."""
        if unit is not None:
            self._units.stop(unit)
        else:
            # looked up again, since its pids may have been reused
            signalled(of_folder(folder, port).pids, signal.SIGSTOP)

    def resume(self, folder: Path, unit: str | None) -> None:
        """Undo `pause`."""
        if unit is not None:
            self._units.start(unit)
        else:
            self.let_go(folder, unit)

    def let_go(self, folder: Path, unit: str | None) -> None:
        """Continue paused processes, so that they can be ended; a stopped unit stays stopped."""
        if unit is None:
            signalled(started_in(folder), signal.SIGCONT)

    def disable(self, unit: str | None) -> None:
        """Keep a unit from starting with the host."""
        if unit is not None:
            self._units.enable(unit, False)


def bus_label(name: str) -> str:
    """Return a unit's name in the form of systemd's bus paths (sd_bus_path_encode(3))."""
    return "".join(
        letter
        if letter.isascii() and (letter.isalpha() or (letter.isdigit() and at))
        else f"_{ord(letter):02x}"
        for at, letter in enumerate(name)
    )


def of_unit(unit: Unit, name: str, port: int | None) -> Old:
    """Return the old service of a unit. Raises `HostError` if it is not running."""
    if not unit.pid:
        raise HostError(f"{name} is not running; start it: its processes show where it listens")
    found = _old(unit.pid, tuple(below(unit.pid)), port, unit.words)
    kept = {
        key: value
        for key, value in found.environment.items()
        if not _SYSTEMDS.fullmatch(key) and key not in _TENANTS
    }
    return Old(found.words, found.folder, found.uid, found.pids, found.address, found.port, kept)


def of_folder(folder: Path, port: int | None, names: Sequence[str] = ()) -> Old:
    """Return the service that listens and was started in a folder; see `find`. Raises `HostError`."""
    inside = started_in(folder)
    listening = {pid for pid in inside for _ in listens((pid,))}
    ours = set(_above(os.getpid()))
    heads = {_head(pid, set(inside) - ours) for pid in listening}
    if not heads:
        raise HostError(
            f"no listening service was started in {folder}; start the old service, or name its unit with "
            "--unit"
        )
    if port is not None:
        heads = {head for head in heads if any(found[1] == port for found in listens(tuple(below(head))))}
    if len(heads) != 1:
        raise HostError(f"{len(heads)} services run in {folder}; choose the site's with --port")
    head = heads.pop()
    found = _old(_unwrapped(head), tuple(below(head)), port, ())
    kept = {key: value for key, value in found.environment.items() if key in names}
    return Old(found.words, found.folder, found.uid, found.pids, found.address, found.port, kept)


def started_in(folder: Path) -> list[int]:
    """Return the processes whose working folder is this one or one below it."""
    return [pid for pid in _pids() if _within(_cwd(pid), folder)]


def _old(pid: int, pids: tuple[int, ...], port: int | None, words: tuple[str, ...]) -> Old:
    process = _PROC / str(pid)
    try:
        said = tuple(os.fsdecode(word) for word in (process / "cmdline").read_bytes().split(b"\0") if word)
        pairs = [
            entry.partition(b"=")[::2] for entry in (process / "environ").read_bytes().split(b"\0") if entry
        ]
        uid = process.stat().st_uid
        folder = (process / "cwd").readlink()
    except OSError as error:
        raise HostError(f"process {pid} of the old service cannot be inspected: {error.strerror}") from error
    # npm and others overwrite their arguments, with spaces
    words = words or (tuple(shlex.split(said[0])) if len(said) == 1 else said)
    environment = {os.fsdecode(key): os.fsdecode(value) for key, value in pairs}
    places = sorted(set(listens(pids)), key=lambda found: found[1])
    wanted = port or int(_number(environment.get("PORT")) or 0)
    chosen = [found for found in places if found[1] == wanted] or ([] if port else places)
    if not chosen or len({found[1] for found in chosen}) > 1:
        seen = ", ".join(f"{address}:{number}" for address, number in places) or "nothing"
        raise HostError(f"the old service listens on {seen}; choose the site's port with --port")
    address, number = chosen[0]
    if address == "::1":
        raise HostError(f"the old service listens on [::1]:{number} alone; make it listen on {_LOOPBACK}")
    if address in _EVERY:
        address = _LOOPBACK
    return Old(words, folder, uid, pids, address, number, environment)


def _number(text: str | None) -> str:
    return text if text is not None and text.isdigit() else ""


def below(pid: int) -> Iterator[int]:
    """Yield a process and all its running descendants."""
    children: dict[int, list[int]] = {}
    for other in _pids():
        children.setdefault(_parent_and_group(other)[0], []).append(other)
    pending = [pid]
    while pending:
        yield (one := pending.pop())
        pending += children.get(one, ())


def listens(pids: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield the TCP addresses and ports on which processes listen."""
    for pid in pids:
        inodes = set()
        with contextlib.suppress(OSError):
            for entry in os.scandir(_PROC / str(pid) / "fd"):
                with contextlib.suppress(OSError):
                    inodes.add(str(Path(entry.path).readlink()))
        for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            with contextlib.suppress(OSError):
                for line in (_PROC / str(pid) / "net" / table).read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == _LISTENS and f"socket:[{fields[9]}]" in inodes:
                        address, _, port = fields[1].partition(":")
                        words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
                        packed = struct.pack(f"={len(words)}I", *words)
                        yield socket.inet_ntop(family, packed), int(port, 16)


def signalled(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to processes, ignoring those that have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def in_tenant(words: Sequence[str], started: Path, folder: Path, workspace: str) -> tuple[str, ...]:
    """Return a start command for the tenant's workspace.

    A program of the host is replaced by the tenant's of that name, and loopback by all addresses. Paths below
    the folder stay, since they lead to the workspace there.
    """
    first, *rest = words
    if first.startswith("/") and not _within(Path(first), folder):
        first = Path(first).name
    changed = (first, *(_HOSTS.sub(r"\g<before>0.0.0.0", w) if _HOSTS.fullmatch(w) else w for w in rest))
    if started == folder or not _within(started, folder):
        return changed
    below = f"{workspace}/{started.relative_to(folder)}"
    return ("/usr/bin/env", f"--chdir={below}", *changed)


def _within(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _head(pid: int, among: set[int]) -> int:
    """Return the outermost of these processes that is in their process group.

    A terminal's shell starts each command in a separate group, so the shell itself is not included.
    """
    parent, group = _parent_and_group(pid)
    while parent in among and _parent_and_group(parent)[1] == group:
        pid, (parent, _) = parent, _parent_and_group(parent)
    return pid


def _above(pid: int) -> Iterator[int]:
    """Yield a process and all its ancestors."""
    while pid:
        yield pid
        pid = _parent_and_group(pid)[0]


def _unwrapped(pid: int) -> int:
    """Return the process that was started through a mere shell line or change of user.

    The tenant has another user and listens on other addresses than such a line says.
    """
    while True:
        with contextlib.suppress(OSError):
            program, *words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
            name = os.fsdecode(program).rpartition("/")[2].removeprefix("-")
            children = [one for one in below(pid) if _parent_and_group(one)[0] == pid]
            line = name in _SHELLS and re.fullmatch(rb"-[a-z]*c", words[0])
            if len(children) == 1 and (line or name in _USERS):
                pid = children[0]
                continue
        return pid


def _parent_and_group(pid: int) -> tuple[int, int]:
    """Return two fields of /proc/PID/stat (proc(5)); zeros for a process that has ended."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[1]), int(fields[2])
    except (OSError, IndexError, ValueError):
        return 0, 0


def _pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir(_PROC) if entry.name.isdigit()]


def _cwd(pid: int) -> Path:
    try:
        return (_PROC / str(pid) / "cwd").readlink()
    except OSError:
        return Path("/")


_LED: Final = 20.0  # seconds for the gateway to follow a change in Incus; it usually takes 0.1
_LOOK: Final = 0.02


async def led(caddy: Caddy, domain: str, target: str | None) -> None:
    """Wait until the gateway routes a domain there, or nowhere. Raises `HostError`."""
    until = time.monotonic() + _LED
    while caddy.get(domain) != target:
        if time.monotonic() > until:
            raise HostError(
                f"the gateway has not routed {domain} to {target}: it must be running, and the domain must "
                "be this tenant's (incus-gateway doctor says what is wrong); then run the command again"
            )
        await asyncio.sleep(_LOOK)  # another process does it and notifies nobody


def own_block(running: Mapping[str, Any] | None, domain: str, ours: str) -> bool:
    """Return whether a Caddy's configuration has a block for a domain that precedes the gateway's routes.

    `ours` is the folder of the gateway's routes, which is named in its own blocks.
    """
    servers = ((running or {}).get("apps") or {}).get("http", {}).get("servers", {})
    names = {domain, f"*.{domain.partition('.')[2]}"}
    for server in servers.values():
        for route in server.get("routes") or ():
            hosts = {host for match in route.get("match") or () for host in match.get("host") or ()}
            if hosts & names and ours not in orjson.dumps(route).decode():
                return True
    return False
