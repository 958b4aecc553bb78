"""Find, start, await and stop incusd, with or without systemd.

A daemon is identified by its folder (INCUS_DIR), so that tests can run their own beside the operator's.
"""

from __future__ import annotations

import contextlib
import grp
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gateway.host import PROC, HostError, Report, find_process, outside_containers, run

DEFAULT_DIR = Path("/var/lib/incus")
INCUSD = Path("/usr/libexec/incus/incusd")
GROUP = "incus-admin"
LXC = Path("/usr/share/lxc/config")  # its common.conf.d has what packages add to every container
SLOW_HOOK = "/usr/share/lxcfs/lxc.reboot.hook"
POLL = 0.05  # seconds; before the daemon has created its socket there is nothing to wait on

How = Literal["systemd", "process"]


def systemd_runs() -> bool:
    """Return whether systemd is PID 1, as sd_booted(3) tests it."""
    return Path("/run/systemd/system").is_dir()


def cannot_run() -> str | None:
    """Return in one line why Incus cannot run on this machine, or None if nothing prevents it."""
    if os.uname().sysname != "Linux":
        return f"Incus needs Linux; this is {os.uname().sysname}"
    if os.geteuid() != 0:
        return "setting up Incus needs root; this is an ordinary user"
    mounts = Path("/proc/self/mounts").read_text()
    if not any(line.split()[2] in ("cgroup", "cgroup2") for line in mounts.splitlines()):
        return "Incus needs control groups; none are mounted here"
    if not _may("CapEff", 21):
        return "Incus needs CAP_SYS_ADMIN, to mount and to create namespaces; root does not have it here"
    return None


def _may(field: str, bit: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return bool(int(line.split()[1], 16) >> bit & 1)
    return False


@dataclass(frozen=True, slots=True)
class Daemon:
    """One incusd, identified by its folder. Keeps no connection and no state."""

    root: Path = DEFAULT_DIR

    @classmethod
    def at(cls, sock: Path) -> Daemon:
        """Return the daemon that serves the unix socket `sock`, as in `Settings.incus_socket`."""
        return cls(sock.parent)

    @property
    def socket(self) -> Path:
        return self.root / "unix.socket"

    @property
    def pidfile(self) -> Path:
        return self.root / "incus.pid"

    @property
    def logfile(self) -> Path:
        logs = Path("/var/log/incus") if self.root == DEFAULT_DIR else self.root / "logs"
        return logs / "incus.log"

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which `incus` and `incusd` use this daemon."""
        return {**os.environ, "INCUS_DIR": str(self.root)}

    def answers(self) -> bool:
        """Return whether the socket answers HTTP within 2 s."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(2.0)
            try:
                connection.connect(str(self.socket))
                connection.sendall(b"GET /1.0 HTTP/1.0\r\nHost: incus\r\n\r\n")
                return connection.recv(9).startswith(b"HTTP/1")
            except OSError:
                return False

    def pid(self) -> int | None:
        """Return the pid of the daemon that owns this folder, or None.

        The pid file alone is not trusted: it survives a crash, and the number may have been reused.
        Daemons started by someone else are found by their INCUS_DIR.
        """
        with contextlib.suppress(OSError, ValueError):
            recorded = int(self.pidfile.read_text())
            if self._is_ours(recorded):
                return recorded
        return find_process(self._is_ours)

    def _is_ours(self, pid: int) -> bool:
        if pid in _CHILDREN:
            # Checking also reaps it. And during exec the command line can read as empty.
            return _CHILDREN[pid] == self.root and _child_runs(pid)
        if not outside_containers(pid):
            return False
        try:
            process = PROC / str(pid)
            command = (process / "cmdline").read_bytes().split(b"\0")
            # Not helpers (`incusd forkexec …`), which outlive the daemon: the daemon itself has only options.
            if Path(os.fsdecode(command[0])).name != INCUSD.name or not _only_options(command[1:]):
                return False
            if (process / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return False
            environment = (process / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            return False
        place = next((v[10:] for v in environment if v.startswith(b"INCUS_DIR=")), os.fsencode(DEFAULT_DIR))
        return Path(os.fsdecode(place)) == self.root

    def how(self) -> How:
        """Return whether systemd runs this daemon, which it does only for the default one."""
        return "systemd" if systemd_runs() and self.root == DEFAULT_DIR else "process"

    def ensure(self, report: Report, timeout: float = 90.0) -> bool:
        """Make sure that the daemon is running and ready; return whether it had to be started.

        `timeout` is in seconds. Raises `HostError` with the end of the daemon's log.
        """
        if self.pid() is not None and self.answers():
            self._wait_ready(timeout)
            return False
        if self.how() == "systemd":
            report("starting Incus with systemd")
            run(
                ["systemctl", "enable", "--now", "incus.socket", "incus.service", "incus-startup.service"],
                fix="see: journalctl -u incus",
                timeout=timeout,
            )
        else:
            report(f"starting incusd on {self.root}")
            self.start()
        self._wait_ready(timeout)
        return True

    def start(self) -> None:
        """Start the daemon in its own session, without waiting until it is ready.

        The socket left by a dead daemon would refuse every caller until the new daemon replaces it, so it
        is removed first. A living daemon that does not answer yet is left to finish its start.
        """
        if self.pid() is not None:
            return
        if not INCUSD.exists():
            raise HostError(f"{INCUSD} is missing; install it: apt-get install incus-base")
        for folder in (self.root, self.logfile.parent):
            folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        for pidfile, pid in self._name_servers():
            if pid is None:
                pidfile.unlink()
        command: list[str] = [str(INCUSD), "--logfile", str(self.logfile)]
        if _group_exists(GROUP):
            command += ["--group", GROUP]
        # Locale and PATH as for a service: a venv or pyenv on PATH must not affect the daemon.
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "INCUS_DIR": str(self.root),
            "INCUS_LXC_TEMPLATE_CONFIG": str(self._lxc_config()),
            "LANG": "C.UTF-8",
            "HOME": "/root",
        }
        with open(
            self.logfile.with_name("incusd.out"), "ab", opener=lambda path, flags: os.open(path, flags, 0o600)
        ) as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        _CHILDREN[process.pid] = self.root
        process.returncode = 0  # it outlives us: Popen must not wait for it or warn about it
        temporary = self.pidfile.with_suffix(".new")
        temporary.write_text(f"{process.pid}\n")
        temporary.replace(self.pidfile)

    def _lxc_config(self) -> Path:
        """Write LXC's common configuration without lxcfs's reboot hook; return the folder.

        That hook sleeps half a second at each stop, for the sake of the control groups that lxcfs presented
        to containers before kernels had cgroup namespaces (lxc/lxcfs#53).
        """
        folder = self.root / "gateway-lxc"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "common.conf.d").mkdir(parents=True)
        for file in LXC.glob("common.conf.d/*.conf"):
            lines = [line for line in file.read_text().splitlines() if SLOW_HOOK not in line]
            (folder / "common.conf.d" / file.name).write_text("\n".join([*lines, ""]))
        return folder

    def _wait_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self.answers():
            if self.how() == "process" and self.pid() is None:
                raise HostError(f"incusd ended while starting: {self._last_words()}; log: {self.logfile}")
            if time.monotonic() > deadline:
                raise HostError(f"incusd did not open {self.socket} in {timeout:.0f} s; log: {self.logfile}")
            time.sleep(POLL)
        left = max(1, round(deadline - time.monotonic()))
        run(
            [INCUSD, "waitready", f"--timeout={left}"],
            env=self.environment,
            fix=f"look at its log: {self.logfile}",
            timeout=left + 5.0,
        )

    def _last_words(self) -> str:
        said: list[str] = []
        for log in (self.logfile.with_name("incusd.out"), self.logfile):
            with contextlib.suppress(OSError):
                said += log.read_text(errors="replace").splitlines()[-3:]
        return " | ".join(line.strip() for line in said if line.strip()) or "no message"

    def stop(self, *, instances: bool = True, timeout: float = 120.0) -> bool:
        """Stop the daemon, by default with its instances and networks; return whether it was running.

        Instances that were running start again with the next daemon. Sends SIGKILL after `timeout` seconds.
        """
        if self.how() == "systemd":
            active = subprocess.run(["systemctl", "is-active", "--quiet", "incus.service"], check=False)
            # Stopping the startup unit stops the instances; without that they outlive the daemon.
            units = ["incus-startup.service"] if instances else []
            for unit in (*units, "incus.service", "incus.socket"):
                run(["systemctl", "stop", unit], fix=f"see: journalctl -u {unit}")
            return active.returncode == 0
        pid = self.pid()
        if pid is None:
            return False
        # On PWR ("the host is going down") incusd stops instances and bridges; TERM leaves both running.
        self._signal(pid, signal.SIGPWR if instances else signal.SIGTERM)
        if not self._gone(timeout):
            self._signal(pid, signal.SIGKILL)
            self._gone(10.0)
        for left in (self.pidfile, self.socket):
            left.unlink(missing_ok=True)
        return True

    def kill(self) -> int:
        """Kill the daemon with SIGKILL, like a crash, and return its pid. Socket and pid file stay."""
        pid = self.pid()
        if pid is None:
            raise HostError(f"no incusd is running on {self.root}")
        self._signal(pid, signal.SIGKILL)
        self._gone(10.0)
        return pid

    def _gone(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while self.pid() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    @staticmethod
    def _signal(pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def erase(self) -> None:
        """Remove everything of a stopped daemon: its mounts, its bridges with their DHCP servers, its files.

        For tests and for starting afresh; refuses while the daemon is running.
        """
        if self.pid() is not None:
            raise HostError(f"incusd is still running on {self.root}; stop it first")
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in reversed(mounts):
            if Path(mount).is_relative_to(self.root):
                subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
        for _, pid in self._name_servers():
            if pid is not None:
                self._signal(pid, signal.SIGTERM)
        for bridge in self.root.glob("networks/*"):  # no later daemon would take one over
            if Path("/sys/class/net", bridge.name, "bridge").is_dir():
                subprocess.run(["ip", "link", "delete", bridge.name], check=False, capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)

    def _name_servers(self) -> list[tuple[Path, int | None]]:
        """Return the pid files of the bridges' name servers, each with its pid, None for one that is gone.

        To restart one, incusd kills the process of that number without a look at what it is. After a power
        cut it may be any: a gateway, or incusd itself.
        """
        found: list[tuple[Path, int | None]] = []
        for file in self.root.glob("networks/*/dnsmasq.pid"):
            pid = None
            with contextlib.suppress(OSError, ValueError, IndexError):
                number = int(file.read_text().split("pid:")[-1].split()[0])
                if os.fsencode(self.root) in (PROC / str(number) / "cmdline").read_bytes():
                    pid = number
            found.append((file, pid))
        return found


# Children of this process must be reaped, or a killed daemon stays as a zombie.
_CHILDREN: dict[int, Path] = {}


def _child_runs(pid: int) -> bool:
    try:
        ended = os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        ended = True
    if ended:
        del _CHILDREN[pid]
    return not ended


def _only_options(words: list[bytes]) -> bool:
    """Return whether an incusd command line has no subcommand."""
    takes_value = False
    for word in words:
        if takes_value or not word:
            takes_value = False
        elif word.startswith(b"-"):
            takes_value = word in (b"--group", b"--logfile", b"--syslog-group") and b"=" not in word
        else:
            return False
    return True


def _group_exists(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True
