"""The gateway of this machine as a process: start, find, replace, upgrade and stop it.

It runs as a systemd unit if possible, otherwise as a separate process.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway.host import PROC, HostError, Report, find_process, outside_containers, run
from gateway.host.daemon import systemd_runs
from gateway.host.services import ensure_holder, stop_holder
from gateway.notify import VARIABLE, notify, settled
from gateway.settings import Settings
from gateway.storage.state_dir import private


class _LocalConnection(http.client.HTTPConnection):
    """A connection to the gateway's own address, ignoring proxies in the environment."""

    def __init__(self, listen: str, timeout: float) -> None:
        host, _, port = listen.rpartition(":")
        self._path = listen if "/" in listen else None
        host = {"0.0.0.0": "127.0.0.1", "[::]": "::1", "": "127.0.0.1"}.get(host, host.strip("[]"))  # noqa: S104 - compared, not bound
        super().__init__("localhost" if self._path else host, 80 if self._path else int(port), timeout)

    def connect(self) -> None:
        if self._path is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(
    listen: str,
    method: str,
    path: str,
    token: str = "",
    body: Any = None,
    timeout: float = 30.0,
    host: str = "",
) -> tuple[int, Any]:
    """Send a request to the gateway; return the status and the answer's JSON, or its text if it is not JSON.

    Raises `OSError` if nothing answers, or the answer is not HTTP.
    """
    connection = _LocalConnection(listen, timeout)
    try:
        headers = {"Content-Type": "application/json"}
        if host:
            headers["Host"] = host
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text.decode(errors="replace")
    except http.client.HTTPException as error:
        raise OSError(f"not HTTP: {error!r}") from error
    finally:
        connection.close()


def base_url(listen: str) -> str:
    """Return the gateway's URL for a browser on this machine."""
    if "/" in listen:
        return f"unix:{listen}"
    host, _, port = listen.rpartition(":")
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '[::]', '') else host}:{port}"  # noqa: S104 - compared, not bound


def expires(token: str) -> float:
    """Return a JWT's expiry in seconds since the epoch, 0 if it is not a JWT. Does not verify it."""
    try:
        payload = token.split(".")[1]
        return float(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"])
    except (ValueError, IndexError, KeyError, TypeError):
        return 0.0


# --- quickstart's files -------------------------------------------------------------------------------------


# What clients read. Kept for the gateway, a token would limit the operator's own commands to its tenants.
CLIENTS: Final = ("GATEWAY_TOKEN", "GATEWAY_URL")


@dataclass(frozen=True, slots=True)
class QuickstartFiles:
    """The files of quickstart in the state dir."""

    root: Path

    @property
    def pidfile(self) -> Path:
        return self.root / "gateway.pid"

    @property
    def log(self) -> Path:
        return self.root / "gateway.log"

    @property
    def token(self) -> Path:
        return self.root / "quickstart.token"

    @property
    def command(self) -> Path:
        """A wrapper of `incus-gateway` with this gateway's settings, written by `deploy/quickstart`."""
        return self.root / "incus-gateway"

    @property
    def environment(self) -> Path:
        return self.root / "quickstart.env"

    @property
    def stamp(self) -> Path:
        """The version of code and settings from which the running gateway was started."""
        return self.root / "quickstart.stamp"

    @property
    def incus_is_ours(self) -> Path:
        """Exists if quickstart started incusd, so that `stop` stops it too."""
        return self.root / "quickstart.incus"


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically, with mode 0600 from the start."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def format_environment(variables: dict[str, str]) -> str:
    """Format variables for systemd's EnvironmentFile (systemd.exec(5)): quoted, one per line."""
    lines = []
    for key, value in sorted(variables.items()):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
        lines.append(f'{key}="{escaped}"\n')
    return "".join(lines)


def parse_environment(text: str) -> dict[str, str]:
    """Parse the output of `format_environment`."""
    found = re.findall(r'^(\w+)="((?:[^"\\]|\\.)*)"$', text, re.MULTILINE | re.DOTALL)
    return {key: re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL) for key, value in found}


def environment_of(state_dir: Path) -> dict[str, str]:
    """Return the settings of the gateway with this state dir: those of the last run, and what is set now.

    So `stop` and a second run address the same gateway.
    """
    saved: dict[str, str] = {}
    with contextlib.suppress(OSError):
        saved = parse_environment(QuickstartFiles(state_dir).environment.read_text())
    given = {key: value for key, value in os.environ.items() if key.startswith("GATEWAY_")}
    every = {**saved, **given, "GATEWAY_STATE_DIR": str(state_dir)}
    return {name: value for name, value in every.items() if name not in CLIENTS}


# --- Python environments ------------------------------------------------------------------------------------


class Environments:
    """The environments of one state dir, as `deploy/quickstart` makes them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.link = root / "venv"
        self._before = root / "venv.previous"
        self._all = root / "venvs"

    @property
    def current(self) -> Path | None:
        """The environment in use; None if there is none yet."""
        return self._target(self.link)

    @property
    def previous(self) -> Path | None:
        """The environment that was in use before, or None."""
        return self._target(self._before)

    def switch(self, to: Path) -> None:
        """Switch to another environment. If killed, either that one or the previous one is in use."""
        to, before = to.resolve(), self.current
        if to == before:
            return
        if before is not None:
            self._point(self._before, before)
        self._point(self.link, to)

    def reset(self, current: Path, previous: Path | None) -> None:
        """Undo a switch."""
        self._point(self.link, current)
        if previous is not None:
            self._point(self._before, previous)
        else:
            self._before.unlink(missing_ok=True)

    def holds(self, environment: Path) -> bool:
        """Return whether an environment is one of these, so that it can be switched to."""
        return environment.resolve().parent == self._all.resolve()

    def tidy(self) -> None:
        """Remove all but the current and the previous environment."""
        kept = {self.current, self.previous}
        with contextlib.suppress(OSError):
            for folder in self._all.iterdir():
                if folder.resolve() not in kept:
                    shutil.rmtree(folder, ignore_errors=True)

    def _target(self, link: Path) -> Path | None:
        if not link.is_symlink() or not link.is_dir():
            return None
        return link.resolve()

    def _point(self, link: Path, to: Path) -> None:
        new = link.with_name(link.name + ".new")
        new.unlink(missing_ok=True)
        new.symlink_to(os.path.relpath(to, link.parent))
        new.rename(link)


# --- successors ---------------------------------------------------------------------------------------------


_BOOT_TIMEOUT: Final = 120.0  # seconds, in addition to the wait for deployments
_BARRIER_TIMEOUT: Final = 5.0
_MESSAGE: Final = 4096  # bytes
# Orphaned at once, so that the first process becomes its parent. systemd watches only its own children.
_ORPHAN: Final = '"$@" >&2 </dev/null & echo $!'


def can_hand_over(state_dir: Path) -> bool:
    """Return whether the gateway of a state dir is running and can hand over."""
    if sys.platform != "linux":
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(state_dir / "handover.sock"))
        except OSError:
            return False
    return True


def start_successor(
    program: Path, variables: Mapping[str, str], log: Path | None, report: Report, *, patience: float
) -> int:
    """Start a gateway of `program` that takes over; return its pid once it serves.

    `variables` are its environment. It logs to `log`, or else to our stderr, and waits up to `patience`
    seconds for deployments. Raises `HostError` with its reason; the old gateway then keeps running.
    """
    with _notify_socket() as (socket_, address):
        pid = _spawn_orphan(program, {**variables, VARIABLE: address}, log)
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            raise HostError(_why(_last_status(socket_), log)) from None
        try:
            return _await_served(socket_, process, pid, log, report, patience + _BOOT_TIMEOUT)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            raise
        finally:
            os.close(process)


@contextlib.contextmanager
def _notify_socket() -> Iterator[tuple[socket.socket, str]]:
    """Yield a socket to which a gateway reports its state, and the socket's address."""
    with tempfile.TemporaryDirectory(prefix="incus-gateway-") as folder:  # only our own user can reach it
        address = f"{folder}/notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling:
            telling.bind(address)
            yield telling, address


def _spawn_orphan(program: Path, variables: Mapping[str, str], log: Path | None) -> int:
    words = ["/bin/sh", "-c", _ORPHAN, "sh", str(program), "serve", "--take-over"]
    with contextlib.ExitStack() as stack:
        to = None if log is None else stack.enter_context(open(log, "ab", opener=private))
        done = subprocess.run(
            words,
            env=variables,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=to,
            cwd="/",
            start_new_session=True,
        )
    return int(done.stdout)


def _await_served(
    told: socket.socket, process: int, pid: int, log: Path | None, report: Report, seconds: float
) -> int:
    """Follow a successor's reports until it serves and the old gateway knows. Raises `HostError`."""
    poll = select.poll()
    poll.register(told, select.POLLIN)
    poll.register(process, select.POLLIN)
    deadline, status, serves = time.monotonic() + seconds, "", False
    while (left := deadline - time.monotonic()) > 0:
        ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
        if told.fileno() in ready:
            lines, barriers = _received(told)
            for line in lines:
                if line.startswith("STATUS=") and line.removeprefix("STATUS=") != status:
                    status = line.removeprefix("STATUS=")
                    if not serves and status != "serves":
                        report(status)
                serves |= line == "READY=1"
            if "READY=1" in lines:
                notify(f"MAINPID={pid}")  # if we run as a unit's ExecReload=
                settled(_BARRIER_TIMEOUT)
            for barrier in barriers:
                os.close(barrier)  # now the old gateway may end
            if serves and barriers:
                return pid
        elif process in ready:
            raise HostError(_why(status, log))
    raise HostError(f"it was not ready within {seconds:.0f} s; {_where(log)}")


def _received(told: socket.socket) -> tuple[list[str], list[int]]:
    data, descriptors, _, _ = socket.recv_fds(told, _MESSAGE, 4)
    return data.decode(errors="replace").splitlines(), list(descriptors)


def _last_status(told: socket.socket) -> str:
    """Return the last reason reported by a process that has ended."""
    told.setblocking(False)
    status = ""
    with contextlib.suppress(BlockingIOError):
        while True:
            for line in _received(told)[0]:
                status = line.removeprefix("STATUS=") if line.startswith("STATUS=") else status
    return status


def _why(status: str, log: Path | None) -> str:
    return status or f"it ended before it was ready; {_where(log)}"


def _where(log: Path | None) -> str:
    return "its log says why" if log is None else f"see the end of {log}"


# --- the process --------------------------------------------------------------------------------------------


UNIT = "incus-gateway.service"
HOLD = "incus-gateway-hold.service"
UNITS = Path("/etc/systemd/system")
READY_TIMEOUT = 60.0  # seconds; after a reboot incusd may still be restarting instances
POLL = 0.1


class GatewayProcess:
    """The gateway of one state dir: start it, find it, stop it."""

    def __init__(
        self,
        settings: Settings,
        place: QuickstartFiles,
        checkout: Path | None,
        command: Path,
        environment: dict[str, str],
    ) -> None:
        """`command` is the installed `incus-gateway`; `environment` holds its settings.

        Without a `checkout` the units are left alone.
        """
        self.command = command
        self._settings, self._place, self._checkout = settings, place, checkout
        self._environment = environment
        self._environments = Environments(place.root)
        self._process: subprocess.Popen[bytes] | None = None

    def ensure(self, stamp: str, report: Report = lambda line: None) -> str:
        """Make sure that the gateway runs with these settings and is ready; return what was done.

        A gateway started from another `stamp` is replaced without a gap for its clients; if the new one does
        not serve, the old one keeps running. One that cannot hand over is restarted. Raises `HostError`.
        """
        running = self.pid()
        current = self._place.stamp.read_text() if self._place.stamp.exists() else ""
        if running is not None and current == stamp:
            self._await_ready()
            return f"already running, pid {running}"
        if running is not None and self.can_be_replaced():
            try:
                self.replace(Path(sys.prefix), report)
            except HostError as error:
                why = f"the new gateway does not start, the old one keeps running: {error.message}"
                raise HostError(why) from error
            self._await_ready()
            write_private(self._place.stamp, stamp)
            return f"replaced, pid {self.pid()}"
        if running is not None:
            self._end(signal.SIGUSR1)  # its commands keep running
        self._check_port()
        self._place.stamp.unlink(missing_ok=True)
        if self._environments.holds(Path(sys.prefix)):
            self._environments.switch(Path(sys.prefix))
        if _as_unit():
            self._write_units()
            self._start_unit()
        else:
            self._start_process()
        self._await_ready()
        write_private(self._place.stamp, stamp)
        return f"{'restarted' if running is not None else 'started'}, pid {self.pid()}"

    # --- replacement --------------------------------------------------------------------------------

    def can_be_replaced(self) -> bool:
        """Return whether the running gateway can hand over to a successor."""
        return can_hand_over(Path(self.folders().get("GATEWAY_STATE_DIR", self._settings.state_dir)))

    def replace(self, environment: Path, report: Report) -> None:
        """Replace the gateway by that of a Python environment, or change nothing and raise `HostError`."""
        old, before, previous = self.pid(), self._environments.current, self._environments.previous
        program = environment / "bin" / "incus-gateway"
        ours = self._environments.holds(environment)
        if ours:
            self._environments.switch(environment)
        try:
            if self._unit_pid() is not None:
                self._write_units()
                _reload_unit()
            else:
                patience = self._settings.upgrade_patience
                log = self._place.log if self._place.pidfile.exists() else None
                if log is not None and self._settings.runtime == "incus":
                    ensure_holder(self._settings, log)
                pid = start_successor(program, self.variables(), log, report, patience=patience)
                if log is not None:
                    self._place.pidfile.write_text(f"{pid}\n")
        except BaseException:
            if ours and before is not None:
                self._environments.reset(before, previous)
            raise
        if old is not None:  # wait: it is still sending its last answers
            self._await_end(old, self._settings.shutdown_timeout + 5.0)
        self._reap(POLL * 100)
        self._process = None  # the successor is not our child
        if ours:
            self._environments.tidy()

    def back(self, report: Report) -> str:
        """Go back to the previous version; return its path. Raises `HostError`, as `replace`."""
        previous = self._environments.previous
        if previous is None:
            raise HostError("there is no earlier version to go back to: an upgrade keeps one")
        self.replace(previous, report)
        self._place.stamp.unlink(missing_ok=True)  # so that the next quickstart checks everything
        return str(previous)

    # --- the end ------------------------------------------------------------------------------------

    def stop(self) -> bool:
        """Stop the gateway; return whether it was running."""
        pid = self.pid()
        if _as_unit() and (UNITS / UNIT).exists():
            run(["systemctl", "disable", "--quiet", "--now", UNIT], fix=f"see: journalctl -u {UNIT}")
        self._end(signal.SIGTERM)
        if _as_unit() and (UNITS / HOLD).exists():
            run(["systemctl", "disable", "--quiet", "--now", HOLD], fix=f"see: journalctl -u {HOLD}")
        stop_holder(self._settings)
        return pid is not None

    def _end(self, first: signal.Signals) -> None:
        """End the gateway's process, if any: send `first`, later SIGKILL."""
        pid = self.pid()
        if pid is not None:
            limit = self._settings.shutdown_timeout + 5.0
            for number, seconds in ((first, limit), (signal.SIGKILL, 10.0)):
                if not self._is_ours(pid):
                    break
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                self._await_end(pid, seconds)
        # a dying process loses its environment, by which it is recognised, shortly before it is gone
        self._reap(POLL * 100)
        self._place.pidfile.unlink(missing_ok=True)

    def _await_end(self, pid: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._is_ours(pid) and time.monotonic() < deadline:
            time.sleep(POLL)

    def pid(self) -> int | None:
        """Return the pid of the gateway that serves this state dir, or None.

        The pid file alone is not enough: it may be stale, or missing if a run was killed right after it
        started the gateway. So the process table is searched too.
        """
        with contextlib.suppress(OSError, ValueError):
            recorded = int(self._place.pidfile.read_text())
            if self._is_ours(recorded):
                return recorded
        found = find_process(self._is_ours) if Path("/proc/self/stat").exists() else None
        return found or self._unit_pid()

    def last_words(self) -> str:
        """Describe where the gateway's log is; if it is a file, with its last lines."""
        if _as_unit():
            return f"see: journalctl -u {UNIT}"
        try:
            lines = [
                line for line in self._place.log.read_text(errors="replace").splitlines() if line.strip()
            ]
        except OSError:
            lines = []
        return f"its log {self._place.log} ends: {' | '.join(lines[-3:]) or 'nothing'}"

    def variables(self) -> dict[str, str]:
        """Return an environment with this gateway's settings."""
        return {**os.environ, **self._environment}

    def folders(self) -> dict[str, str]:
        """Return the folders set in the running gateway's environment; with its own user it has others."""
        try:
            variables = (Path("/proc") / str(self.pid()) / "environ").read_bytes().split(b"\0")
        except OSError:
            return {}
        places = [
            os.fsdecode(v) for v in variables if v.startswith((b"GATEWAY_STATE_DIR=", b"GATEWAY_CADDY_DIR="))
        ]
        return dict(place.split("=", 1) for place in places)

    def _write_units(self) -> None:
        if self._checkout is None:
            return
        for unit in (HOLD, UNIT):
            target = UNITS / unit
            text = (self._checkout / "deploy" / unit).read_text()
            text = text.replace("/var/lib/incus-gateway", str(self._place.root))
            if not target.exists() or target.read_text() != text:
                target.write_text(text)
                run(["systemctl", "daemon-reload"], fix="see: journalctl -xe")

    def _start_unit(self) -> None:
        run(["systemctl", "enable", "--quiet", "--now", HOLD], fix=f"see: journalctl -u {HOLD}")
        run(["systemctl", "enable", "--quiet", UNIT], fix=f"see: journalctl -u {UNIT}")
        run(["systemctl", "restart", UNIT], fix=f"see: journalctl -u {UNIT}")

    def _start_process(self) -> None:
        self._reap()
        if self._settings.runtime == "incus":
            ensure_holder(self._settings, self._place.log)
        with open(self._place.log, "ab", opener=private) as log:
            process = subprocess.Popen(
                [str(self.command), "serve"],
                env=self.variables(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        self._place.pidfile.write_text(f"{process.pid}\n")
        self._process = process

    def _reap(self, seconds: float = 0.0) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def _await_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT
        reason: object = "no answer"
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                break
            try:
                status, reason = ask(self._settings.listen, "GET", "/readyz", timeout=5.0)
                if status == 200:
                    return
            except OSError as error:
                reason = error
            time.sleep(POLL)
        detail = reason.get("detail", reason) if isinstance(reason, dict) else reason
        raise HostError(f"the gateway is not ready: {detail}; {self.last_words()}")

    def _check_port(self) -> None:
        """Raise `HostError` if the gateway's address is in use, before the gateway fails on it."""
        listen = self._settings.listen
        if "/" in listen:
            return
        host, _, port = listen.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host.strip("[]"), int(port)))
            except (OSError, ValueError) as error:
                other = f"GATEWAY_LISTEN=127.0.0.1:{int(port) + 1 if port.isdigit() else 8081}"
                raise HostError(
                    f"cannot listen on {listen}: {error}; free it, "
                    f"or choose another: {other} deploy/quickstart"
                ) from error

    def _unit_pid(self) -> int | None:
        """Return the pid of the unit's gateway; a drop-in may give it another user and state dir."""
        try:
            ours = f"{self._place.root}/" in (UNITS / UNIT).read_text()
        except OSError:
            return None
        if not ours or not _as_unit():
            return None
        show = ["systemctl", "show", "--property=MainPID", "--value", UNIT]
        said = subprocess.run(show, check=False, capture_output=True, text=True).stdout.strip()
        return int(said) if said.isdigit() and said != "0" else None

    def _is_ours(self, pid: int) -> bool:
        if not Path("/proc/self/stat").exists():  # not Linux: ask ps
            said = subprocess.run(
                ["ps", "-o", "command=", "-p", str(pid)], check=False, capture_output=True, text=True
            )
            return f"{self.command} serve" in said.stdout
        if not outside_containers(pid):
            return False
        process = PROC / str(pid)
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if not _is_gateway(words):
                return False
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            variables = (process / "environ").read_bytes().split(b"\0")
            of_parent = (Path("/proc") / parent / "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        # The same command may serve another state dir, and a fork of the gateway, which has the same
        # command line, is not the gateway.
        place = next((v[18:] for v in variables if v.startswith(b"GATEWAY_STATE_DIR=")), b"")
        return state not in "ZX" and place == os.fsencode(self._place.root) and not _is_gateway(of_parent)


def _is_gateway(words: list[bytes]) -> bool:
    """Return whether a command line is that of a gateway of any version; each has its own environment."""
    return b"serve" in words and any(word.endswith(b"/incus-gateway") for word in words)


def _as_unit() -> bool:
    return systemd_runs() and os.geteuid() == 0


def _reload_unit() -> None:
    try:
        run(["systemctl", "reload", UNIT], fix="")
    except HostError as error:
        show = ["systemctl", "show", "--property=StatusText", "--value", UNIT]
        said = subprocess.run(show, check=False, capture_output=True, text=True).stdout.strip()
        raise HostError(f"{said or error.message}; see: journalctl -u {UNIT}") from error


# --- upgrades -----------------------------------------------------------------------------------------------


def upgrade_gateway(settings: Settings, report: Report, *, back: bool) -> None:
    """Have this installation take over with the current settings or, with `back`, the previous installation.

    Raises `HostError` with the reason if the new gateway does not serve; the old one then keeps running.
    """
    process = GatewayProcess(settings, QuickstartFiles(settings.state_dir), None, _program(), {})
    if not process.can_be_replaced():
        raise HostError(
            f"no running gateway of {settings.state_dir} can be replaced; start one: deploy/quickstart"
        )
    try:
        if back:
            report(f"back in {process.back(report)}")
        else:
            process.replace(Path(sys.prefix), report)
    except HostError as error:
        raise HostError(f"nothing has changed, the old gateway keeps running: {error.message}") from error
    report(f"replaced, pid {process.pid()}")


def reload_gateway(settings: Settings, report: Report) -> None:
    """Start the successor inside the unit, for its `ExecReload=`. Raises `HostError`."""
    if not can_hand_over(settings.state_dir):
        raise HostError("no running gateway can be replaced; restart the unit")
    start_successor(_program(), os.environ, None, report, patience=settings.upgrade_patience)


def _program() -> Path:
    return Path(sys.executable).with_name("incus-gateway")
