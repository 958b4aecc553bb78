"""The gateway that quickstart runs: as a systemd unit if possible, else as a separate process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from gateway.host import HostError, Report, holder_process, processes, run, successor
from gateway.host.daemon import systemd_runs
from gateway.host.environments import Environments
from gateway.host.local_gateway import ask
from gateway.host.place import Place, write_private
from gateway.settings import Settings
from gateway.storage.state_dir import private

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
        place: Place,
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
        return successor.possible(Path(self.folders().get("GATEWAY_STATE_DIR", self._settings.state_dir)))

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
                    holder_process.ensure(self._settings, log)
                pid = successor.start(program, self.variables(), log, report, patience=patience)
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
        holder_process.stop(self._settings)
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
        found = processes.find(self._is_ours) if Path("/proc/self/stat").exists() else None
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
            holder_process.ensure(self._settings, self._place.log)
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
        if not processes.outside_containers(pid):
            return False
        process = processes.PROC / str(pid)
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
