"""Run the Caddy in front of all sites of this host: choose its ports, start it, stop it.

Its configuration comes from `gateway.caddy`. Started by root, it runs as the user `caddy` of Debian's package
with the single capability to bind ports below 1024, because it parses what hostile sites answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Final

from gateway.caddy import Caddy, CaddyFailed, socket_of
from gateway.host import PROC, HostError, find_process, outside_containers, run
from gateway.host.daemon import systemd_runs
from gateway.settings import Settings
from gateway.storage.state_dir import private

UNIT: Final = "incus-gateway-caddy.service"
_UNITS: Final = Path("/etc/systemd/system")
USER: Final = "caddy"
START_TIMEOUT: Final = 60.0  # seconds
POLL: Final = 0.05
_UNIX_PATH: Final = 100  # bytes; a unix socket's path of this length works on every system
_ROOT: Final = 1024  # ports below need root
_BIND: Final = "+net_bind_service"
_ADMIN: Final = "caddy.sock"
# the usual port, and the first one to try if that is taken
_PORTS: Final = {"caddy_http": (80, 8081), "caddy_https": (443, 8443), "caddy_ask": (2020, 2021)}


def chosen(settings: Settings) -> dict[str, Any]:
    """Return values for the unset settings of Caddy's addresses, at which it can listen now."""
    found: dict[str, Any] = {}
    peers = int(settings.peer_listen.rpartition(":")[2])  # where a gateway of a cluster will listen
    for name, (usual, more) in _PORTS.items():
        if name not in settings.model_fields_set:
            others = (getattr(settings, other) for other in _PORTS if other != name)
            taken = {*found.values(), *others, peers}
            first = () if usual < _ROOT and os.geteuid() != 0 else (usual,)
            for port in (*first, *range(more, more + 200)):
                if port not in taken - {usual} and not in_use(port):
                    found[name] = port
                    break
    if "caddy_dir" not in settings.model_fields_set and _user() is not None:
        state = settings.state_dir.absolute()
        found["caddy_dir"] = state.with_name(f"{state.name}-caddy")  # that user cannot enter the state dir
    if "caddy_admin" not in settings.model_fields_set:
        path = found.get("caddy_dir", settings.caddy_folder.absolute()) / "admin" / _ADMIN
        if len(os.fsencode(path)) < _UNIX_PATH:
            found["caddy_admin"] = str(path)
    return found


def hand_over(settings: Settings) -> str | None:
    """Give the folders of the routes to the user of a gateway without root; return what was changed, or None.

    Removes the contents left by another user; the gateway writes its routes again. If there is no such user,
    the broker serves only root's gateway, and nothing is changed.
    """
    try:
        user = pwd.getpwnam(settings.broker_user)
    except KeyError:
        return None
    folder = Caddy(settings).folder.absolute()
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    if folder.stat().st_uid == user.pw_uid:
        return None
    changed = False
    for name in ("routes", "targets", "away", "peers"):
        place = folder / name
        if place.exists() and place.stat().st_uid == user.pw_uid:
            continue
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o755, exist_ok=True)
        reader = _user() if name == "peers" else None
        os.chown(place, user.pw_uid, user.pw_gid if reader is None else pwd.getpwnam(reader).pw_gid)
        if reader is not None:
            place.chmod(0o2755)  # the key in it gets Caddy's group
        changed = True
    return f"given to {user.pw_name}" if changed else None


def in_use(port: int, host: str = "") -> str | None:
    """Return why a port cannot be listened on now, or None."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None


class CaddyService:
    """The Caddy process that belongs to a gateway's state dir."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.caddy = Caddy(settings)
        self.folder = self.caddy.folder.absolute()
        self.config = self.folder / "Caddyfile"
        self.log = self.folder / "caddy.log"

    def pid(self) -> int | None:
        """Return the pid of the Caddy that runs this configuration, found in the process table."""
        if not Path("/proc/self/stat").exists():
            said = subprocess.run(
                ["ps", "-axo", "pid=,command="], check=False, capture_output=True, text=True
            )
            found = [line for line in said.stdout.splitlines() if f"run --config {self.config}" in line]
            return int(found[0].split()[0]) if found else None
        return find_process(self._is_ours)

    def _is_ours(self, pid: int) -> bool:
        if not outside_containers(pid):
            return False
        process = PROC / str(pid)
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        named = words[0].rpartition(b"/")[2] == b"caddy"  # not a process that is about to exec it
        ours = words[1:4] == [b"run", b"--config", os.fsencode(self.config)]
        return named and ours and state not in "ZX"

    def others(self) -> bool:
        """Return whether another Caddy answers at the configured admin address."""
        return "caddy_admin" in self.settings.model_fields_set and self.pid() is None and self.answers()

    def answers(self) -> bool:
        """Return whether the admin API answers."""
        return self.running() is not None

    def running(self) -> dict[str, Any] | None:
        """Return the configuration that the admin API reports, or None if it does not answer."""
        path = socket_of(self.settings.caddy_admin)
        host, _, port = self.settings.caddy_admin.split("://")[-1].rstrip("/").rpartition(":")
        try:
            connection = http.client.HTTPConnection(host or "127.0.0.1", int(port) if path is None else 80, 5)
            with contextlib.closing(connection):
                if path is not None:
                    connection.sock = socket.socket(socket.AF_UNIX)
                    connection.sock.settimeout(5)
                    connection.sock.connect(path)
                # on a unix socket Caddy accepts any host and requires that there is no origin
                connection.request("GET", "/config/", headers={} if path is None else {"Host": ""})
                answer = connection.getresponse()
                found = json.loads(answer.read()) if answer.status == 200 else None
        except (OSError, ValueError, http.client.HTTPException):
            return None
        # null from a Caddy started without a configuration
        return found if isinstance(found, dict) else {} if answer.status == 200 else None

    def taken(self) -> dict[int, str]:
        """Return each configured port that cannot be listened on now, with the reason."""
        found = {port: in_use(port) for port in (getattr(self.settings, name) for name in _PORTS)}
        return {port: reason for port, reason in found.items() if reason is not None}

    def start(self, units: Path) -> str:
        """Make sure that Caddy runs with the current configuration; return what was done.

        `units` is the folder with the systemd unit. Raises `HostError`.
        """
        running = self.pid()
        program = shutil.which("caddy")
        if program is None:
            raise HostError("caddy is not installed; install it: apt-get install caddy")
        by_unit = systemd_runs() and os.geteuid() == 0
        unit_is_new = by_unit and _text(_UNITS / UNIT) != self._unit(program, units)
        if running is not None and not unit_is_new and self.answers():
            # loaded, not restarted, so that no request fails
            loaded = asyncio.run(self._load())
            return f"{'loaded the new configuration' if loaded else 'already running'}, pid {running}"
        if running is not None:
            self.stop()
        self._check_ports()
        self._lay()
        if by_unit:
            self._start_unit(self._unit(program, units))
            process = None
        else:
            process = self._start_process(program)
        self._await(process)
        return f"{'restarted' if running is not None else 'started'}, pid {self.pid()}"

    def _lay(self) -> None:
        """Write the configuration, and create the folders that Caddy itself writes to."""
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.caddy.write()
        for name in ("admin", "data"):
            place = self.folder / name
            place.mkdir(mode=0o700, exist_ok=True)
            if (user := _user()) is not None:
                shutil.chown(place, user, user)

    async def _load(self) -> bool:
        try:
            async with self.caddy as caddy:
                return await caddy.ensure()
        except CaddyFailed as error:
            raise HostError(f"{error.message}; the old configuration stays in force") from error

    def _unit(self, program: str, units: Path) -> str:
        text = (units / UNIT).read_text()
        state = self.settings.state_dir.absolute()
        if state in self.folder.parents:  # as if Caddy had no user of its own
            text = text.replace(" -/var/lib/incus-gateway\n", "\n")
        text = re.sub("/var/lib/incus-gateway-caddy(?![-\\w])", lambda _: str(self.folder), text)
        text = re.sub(" -/var/lib/incus-gateway\n", lambda _: f" -{state}\n", text)
        text = text.replace("/usr/bin/caddy", program)
        return text if _user() is not None else re.sub("^(User|Group)=.*\n", "", text, flags=re.MULTILINE)

    def _start_unit(self, text: str) -> None:
        target = _UNITS / UNIT
        if _text(target) != text:
            target.write_text(text)
            run(["systemctl", "daemon-reload"], fix="see: journalctl -xe")
        run(["systemctl", "enable", "--quiet", UNIT], fix=f"see: journalctl -u {UNIT}")
        run(["systemctl", "restart", UNIT], fix=f"see: journalctl -u {UNIT}")

    def _start_process(self, program: str) -> subprocess.Popen[bytes]:
        words = [program, "run", "--config", str(self.config), "--adapter", "caddyfile"]
        if _user() is not None:
            who = ("--reuid", USER, "--regid", USER, "--init-groups")
            words = ["setpriv", *who, "--inh-caps", _BIND, "--ambient-caps", _BIND, "--", *words]
        home = str(self.folder / "data")
        environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": home, "XDG_CONFIG_HOME": home}
        with open(self.log, "ab", opener=private) as log:
            return subprocess.Popen(
                words,
                env={**environment, "XDG_DATA_HOME": home},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )

    def _check_ports(self) -> None:
        for name in _PORTS:
            port = getattr(self.settings, name)
            reason = in_use(port)
            if reason is not None:
                raise HostError(
                    f"Caddy cannot listen on port {port}: {reason}; free it or choose another: "
                    f"GATEWAY_{name.upper()}={port + 1 if port > _ROOT else port + 8000} deploy/quickstart"
                )

    def _await(self, process: subprocess.Popen[bytes] | None) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not self.answers() or self.pid() is None:
            ended = process is not None and process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise HostError(f"Caddy did not start; {self.last_words()}")
            time.sleep(POLL)
        if process is not None:
            process.returncode = 0  # it outlives us: Popen must not wait for it or warn about it

    def last_words(self) -> str:
        """Describe where the log is; if it is a file, with its last lines."""
        if systemd_runs() and os.geteuid() == 0:
            return f"see: journalctl -u {UNIT}"
        lines = [line for line in (_text(self.log) or "").splitlines() if line.strip()]
        return f"its log {self.log} ends: {' | '.join(lines[-2:]) or 'nothing'}"

    def stop(self) -> bool:
        """Stop Caddy; return whether it was running."""
        pid = self.pid()
        if systemd_runs() and os.geteuid() == 0 and (_UNITS / UNIT).exists():
            run(["systemctl", "disable", "--quiet", "--now", UNIT], fix=f"see: journalctl -u {UNIT}")
        if pid is None:
            return False
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + 10.0
            while self._runs(pid) and time.monotonic() < deadline:
                time.sleep(POLL)
            if not self._runs(pid):
                break
        return True

    def _runs(self, pid: int) -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # if this process started it
        return self.pid() == pid


def _user() -> str | None:
    """Return the user as which root starts Caddy; None if it runs as the current user."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return None
    try:
        return pwd.getpwnam(USER).pw_name
    except KeyError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
