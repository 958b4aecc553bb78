"""Finds, starts, awaits and stops incusd, with systemd or without.

A daemon is named by its folder (INCUS_DIR), so that tests run one of their own beside the operator's.
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

from gateway.host import HostError, Report, run

DEFAULT_DIR = Path("/var/lib/incus")
INCUSD = Path("/usr/libexec/incus/incusd")
GROUP = "incus-admin"
LXC = Path("/usr/share/lxc/config")  # its common.conf.d is what packages want of every container
SLOW_HOOK = "/usr/share/lxcfs/lxc.reboot.hook"
POLL = 0.05  # seconds; there is no descriptor to wait on before the daemon has made its socket

How = Literal["systemd", "process"]


def systemd_runs() -> bool:
    """Say whether systemd is PID 1 (the test that sd_booted(3) documents)."""
    return Path("/run/systemd/system").is_dir()


def cannot_run() -> str | None:
    """Say in one line why Incus cannot run on this machine, or None if nothing speaks against it."""
    if os.uname().sysname != "Linux":
        return f"Incus needs Linux, this is {os.uname().sysname}"
    if os.geteuid() != 0:
        return "Incus is set up by root, this is an ordinary user"
    mounts = Path("/proc/self/mounts").read_text()
    if not any(line.split()[2] in ("cgroup", "cgroup2") for line in mounts.splitlines()):
        return "Incus needs control groups, none are mounted here"
    if not _may("CapEff", 21):
        return (
            "Incus needs the capability to mount and to make namespaces (CAP_SYS_ADMIN), root lacks it here"
        )
    return None


def _may(field: str, bit: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return bool(int(line.split()[1], 16) >> bit & 1)
    return False


@dataclass(frozen=True, slots=True)
class Daemon:
    """One incusd, known by its folder. Holds no connection and no state: asks the machine each time."""

    root: Path = DEFAULT_DIR

    @classmethod
    def at(cls, sock: Path) -> Daemon:
        """Name the daemon that serves the unix socket `sock`, as in `Settings.incus_socket`."""
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
        """The environment under which `incus` and `incusd` mean this daemon."""
        return {**os.environ, "INCUS_DIR": str(self.root)}

    def answers(self) -> bool:
        """Say whether something accepts connections on the socket and speaks HTTP within 2 s."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(2.0)
            try:
                connection.connect(str(self.socket))
                connection.sendall(b"GET /1.0 HTTP/1.0\r\nHost: incus\r\n\r\n")
                return connection.recv(9).startswith(b"HTTP/1")
            except OSError:
                return False

    def pid(self) -> int | None:
        """Return the process id of the daemon that owns this folder, or None.

        The pid file alone is not believed: it survives a crash, and its number may be another's by now.
        Daemons that someone else started are found by their INCUS_DIR.
        """
        with contextlib.suppress(OSError, ValueError):
            recorded = int(self.pidfile.read_text())
            if self._is_ours(recorded):
                return recorded
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self._is_ours(int(entry.name)):
                return int(entry.name)
        return None

    def _is_ours(self, pid: int) -> bool:
        if pid in _CHILDREN:
            # Asking reaps it too; and while it execs, its command line can still read as empty.
            return _CHILDREN[pid] == self.root and _child_runs(pid)
        try:
            process = Path("/proc") / str(pid)
            command = (process / "cmdline").read_bytes().split(b"\0")
            # Not its helpers (`incusd forkexec …`), which outlive it; the daemon proper takes only options.
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
        """Say whether systemd runs this daemon, as it does only the default one."""
        return "systemd" if systemd_runs() and self.root == DEFAULT_DIR else "process"

    def ensure(self, report: Report, timeout: float = 90.0) -> bool:
        """Have the daemon running and ready; return whether it had to be started.

        `timeout` is in seconds. Raises `HostError` with the end of the daemon's log.
        """
        if self.pid() is not None and self.answers():
            self._wait_ready(timeout)
            return False
        if self.how() == "systemd":
            report("starting Incus by systemd")
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
        """Start the daemon in a session of its own; does not wait until it is ready.

        A socket that a dead daemon left would refuse every caller until the new one replaces it, so it
        goes first. One that is alive but does not answer yet is left to finish its start.
        """
        if self.pid() is not None:
            return
        if not INCUSD.exists():
            raise HostError(f"{INCUSD} is missing; install it: apt-get install incus-base")
        for folder in (self.root, self.logfile.parent):
            folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        command: list[str] = [str(INCUSD), "--logfile", str(self.logfile)]
        if _group_exists(GROUP):
            command += ["--group", GROUP]
        # Locale and PATH as a service has them: a venv or pyenv on PATH is no business of the daemon's.
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
        process.returncode = 0  # it outlives us: Popen must neither wait for it nor warn of it
        temporary = self.pidfile.with_suffix(".new")
        temporary.write_text(f"{process.pid}\n")
        temporary.replace(self.pidfile)

    def _lxc_config(self) -> Path:
        """Write what packages want of every container, without lxcfs's reboot hook; return the folder.

        That hook sleeps half a second at each stop, for the control groups that lxcfs showed to containers
        before kernels had namespaces for them (lxc/lxcfs#53).
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
        """Stop the daemon, with its instances and networks or without; return whether one ran.

        Those that ran are started again with the next daemon. Waits `timeout` seconds, then KILL.
        """
        if self.how() == "systemd":
            active = subprocess.run(["systemctl", "is-active", "--quiet", "incus.service"], check=False)
            # The instances are ended by the startup unit's stop; without it they outlive the daemon.
            units = ["incus-startup.service"] if instances else []
            for unit in (*units, "incus.service", "incus.socket"):
                run(["systemctl", "stop", unit], fix=f"see: journalctl -u {unit}")
            return active.returncode == 0
        pid = self.pid()
        if pid is None:
            return False
        # PWR is incusd's "the host goes down": instances and bridges stop. TERM leaves both running.
        self._signal(pid, signal.SIGPWR if instances else signal.SIGTERM)
        if not self._gone(timeout):
            self._signal(pid, signal.SIGKILL)
            self._gone(10.0)
        for left in (self.pidfile, self.socket):
            left.unlink(missing_ok=True)
        return True

    def kill(self) -> int:
        """End the daemon by SIGKILL, as a crash would, and return its pid. Socket and pid file stay."""
        pid = self.pid()
        if pid is None:
            raise HostError(f"no incusd runs on {self.root}")
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
        """Remove everything of a daemon that does not run: its mounts, its bridges' DHCP servers, its files.

        For tests and for starting afresh; refuses while the daemon runs.
        """
        if self.pid() is not None:
            raise HostError(f"incusd still runs on {self.root}; stop it first")
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in reversed(mounts):
            if Path(mount).is_relative_to(self.root):
                subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
        for pidfile in self.root.glob("networks/*/dnsmasq.pid"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                number = int(pidfile.read_text().split("pid:")[-1].split()[0])
                command = (Path("/proc") / str(number) / "cmdline").read_bytes()
                if os.fsencode(self.root) in command:
                    os.kill(number, signal.SIGTERM)
        shutil.rmtree(self.root, ignore_errors=True)


# Children of this process must be reaped, or a killed daemon would stay as a zombie.
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
    """Say whether an incusd command line names no subcommand."""
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
