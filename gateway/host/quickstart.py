"""Brings a gateway up on this machine from its checkout, says how it stands, and takes it down again.

`deploy/quickstart` installs packages and a Python environment, then hands over to this module. Nothing is
remembered that can be asked of the machine: a run that was killed anywhere is simply run again. In the
state dir it keeps the token for the demo (mode 0600), the settings it was started with, a pid file, a log.
Where Caddy listens is chosen once, and is then one of those settings.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gateway import settings as settings_module
from gateway.caddy import shipped, site_url
from gateway.host import HostError, caddy_service, image, run
from gateway.host.caddy_service import CaddyService
from gateway.host.daemon import Daemon, systemd_runs
from gateway.host.setup import pin, setup
from gateway.settings import Settings
from gateway.storage.state_dir import close, private
from gateway.terminal import clean, out

TENANT = "demo"
DOMAIN = "demo.localhost"  # browsers resolve it to this machine
TEMPLATE = "static"
UNIT = "incus-gateway.service"
UNITS = Path("/etc/systemd/system")
SCOPES = "files:read files:write exec deploy events"
TOKEN_DAYS = 30
SITE_TIMEOUT = 30.0  # seconds in which a site that was deployed before must answer
READY_TIMEOUT = 60.0  # seconds; incusd may just be starting again what ran before a reboot
POLL = 0.1


say = out.say


@dataclass(frozen=True, slots=True)
class Place:
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
        """`incus-gateway` with this gateway's settings, made by `deploy/quickstart`."""
        return self.root / "incus-gateway"

    @property
    def environment(self) -> Path:
        return self.root / "quickstart.env"

    @property
    def stamp(self) -> Path:
        """What the running gateway was started from: code and settings."""
        return self.root / "quickstart.stamp"

    @property
    def incus_is_ours(self) -> Path:
        """Exists if quickstart started incusd, so that `stop` stops it."""
        return self.root / "quickstart.incus"


def write_private(path: Path, text: str) -> None:
    """Replace a file as a whole, mode 0600 from its first byte."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def format_environment(variables: dict[str, str]) -> str:
    """Write variables as systemd's EnvironmentFile wants them (systemd.exec(5)): quoted, one a line."""
    lines = []
    for key, value in sorted(variables.items()):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
        lines.append(f'{key}="{escaped}"\n')
    return "".join(lines)


def parse_environment(text: str) -> dict[str, str]:
    """Read what `format_environment` wrote."""
    found = re.findall(r'^(\w+)="((?:[^"\\]|\\.)*)"$', text, re.MULTILINE | re.DOTALL)
    return {key: re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL) for key, value in found}


class _Local(http.client.HTTPConnection):
    """HTTP to the gateway's own address, past any proxy that the environment names."""

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
    """Send one request to the gateway; return status and the JSON answer (its text where it is none).

    Raises `OSError` where nobody answers, or not in HTTP.
    """
    connection = _Local(listen, timeout)
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
    """Return the URL at which a browser on this machine finds the gateway."""
    if "/" in listen:
        return f"unix:{listen}"
    host, _, port = listen.rpartition(":")
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '[::]', '') else host}:{port}"  # noqa: S104 - compared, not bound


def expires(token: str) -> float:
    """Return when a JWT ends, in seconds since the epoch; 0 where it is none. Does not check it."""
    try:
        payload = token.split(".")[1]
        return float(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"])
    except (ValueError, IndexError, KeyError, TypeError):
        return 0.0


class Quickstart:
    """One run of `deploy/quickstart`: settings, checkout, and the installed command."""

    def __init__(self, settings: Settings, checkout: Path, stamp: str, environment: dict[str, str]) -> None:
        self.settings = settings
        self.checkout = checkout
        self.place = Place(settings.state_dir)
        self.environment = environment
        self._code = stamp
        self.command = Path(sys.executable).with_name("incus-gateway")

    @property
    def stamp(self) -> str:
        return f"{self._code}\n{format_environment(self.environment)}"

    @property
    def front(self) -> CaddyService:
        return CaddyService(self.settings)

    # starting

    def start(self) -> None:
        """Do all that is missing until the demo stands. Raises `HostError` with what to do."""
        if self.settings.runtime == "incus":
            self._step("Incus", self._incus)
            self._step("host", lambda: self._report(setup(self.settings, _indented)))
            self._step("base image", lambda: self._report(image.build(self.settings, _indented)))
        self._settle_ports()
        caddy_service.move_out(self.settings)
        write_private(self.place.environment, format_environment(self.environment))
        served = self._served()
        if served:
            self._step("Caddy", self._caddy)
        close(self.settings)  # now that no Caddy of another user looks for anything in it
        self._step("gateway", self._gateway)
        if served:
            self._step(f"site {DOMAIN}", self._site)
        else:
            self._step(f"tenant {TENANT}", self._tenant)
        self._token()

    def _settle_ports(self) -> None:
        """Choose where Caddy listens, once: what an earlier start chose is a setting by now."""
        choice = caddy_service.chosen(self.settings)
        self.environment |= {f"GATEWAY_{name.upper()}": str(value) for name, value in choice.items()}
        self.settings = self.settings.model_copy(update=choice)

    def _served(self) -> bool:
        """Say whether sites can be served here; it takes a Caddy, which only the packages of a host bring."""
        if self.settings.runtime == "incus" or shutil.which("caddy") or self.front.others():
            return True
        say("note: caddy is not installed, so that no site is served; install it and run this again")
        return False

    def _caddy(self) -> str:
        if self.front.others():
            return f"another's at {self.settings.caddy_admin} is used"
        return self.front.start(self.checkout / "deploy")

    @staticmethod
    def _report(changes: list[Any]) -> str:
        changed = sum(change.changed for change in changes)
        return f"{changed} of {len(changes)} steps changed something" if changed else "nothing to change"

    @staticmethod
    def _step(name: str, work: Callable[[], str]) -> None:
        begun = time.monotonic()
        said = work()
        say(f"==> {name}: {said} ({time.monotonic() - begun:.1f} s)")

    def _incus(self) -> str:
        daemon = Daemon.at(self.settings.incus_socket)
        if daemon.pid() is None:
            # Before the start: a run that is killed in between has still started it.
            self.place.incus_is_ours.touch()
        return "started" if daemon.ensure(_indented) else "runs already"

    def _gateway(self) -> str:
        running = self._pid()
        current = self.place.stamp.read_text() if self.place.stamp.exists() else ""
        if running is not None and current == self.stamp:
            self._await_ready()
            return f"runs already, pid {running}"
        if running is not None:
            self._stop_gateway()
        self._check_port()
        self.place.stamp.unlink(missing_ok=True)
        if systemd_runs() and os.geteuid() == 0:
            self._start_unit()
        else:
            self._start_process()
        self._await_ready()
        write_private(self.place.stamp, self.stamp)
        return f"{'restarted' if running is not None else 'started'}, pid {self._pid()}"

    def _start_unit(self) -> None:
        target = UNITS / UNIT
        text = (self.checkout / "deploy" / UNIT).read_text()
        text = text.replace("/var/lib/incus-gateway", str(self.place.root))
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
            run(["systemctl", "daemon-reload"], fix="see: journalctl -xe")
        run(["systemctl", "enable", "--quiet", UNIT], fix=f"see: journalctl -u {UNIT}")
        run(["systemctl", "restart", UNIT], fix=f"see: journalctl -u {UNIT}")

    def _start_process(self) -> None:
        self._reap()
        with open(self.place.log, "ab", opener=private) as log:
            process = subprocess.Popen(
                [str(self.command), "serve"],
                env=self._child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        self.place.pidfile.write_text(f"{process.pid}\n")
        self._process = process

    _process: subprocess.Popen[bytes] | None = None

    def _reap(self, seconds: float = 0.0) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def _child_environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def _await_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT
        reason: object = "no answer"
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                break
            try:
                status, reason = ask(self.settings.listen, "GET", "/readyz", timeout=5.0)
                if status == 200:
                    return
            except OSError as error:
                reason = error
            time.sleep(POLL)
        detail = reason.get("detail", reason) if isinstance(reason, dict) else reason
        raise HostError(f"the gateway is not ready: {detail}; {self.last_words()}")

    def last_words(self) -> str:
        """Say where the gateway's log is, and how it ends where it is a file."""
        if systemd_runs() and os.geteuid() == 0:
            return f"see: journalctl -u {UNIT}"
        try:
            lines = [line for line in self.place.log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            lines = []
        return f"its log {self.place.log} ends: {' | '.join(lines[-3:]) or 'nothing'}"

    def _check_port(self) -> None:
        """Refuse an address that something else serves, before the gateway fails on it."""
        listen = self.settings.listen
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

    def _pid(self) -> int | None:
        """Return the pid of the gateway that serves this state dir, or None.

        Asked of the process table, not of the pid file alone: that may be stale, or be missing where a run
        was killed right after it started the gateway.
        """
        with contextlib.suppress(OSError, ValueError):
            recorded = int(self.place.pidfile.read_text())
            if self._is_ours(recorded):
                return recorded
        if Path("/proc/self/stat").exists():
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and self._is_ours(int(entry.name)):
                    return int(entry.name)
        return self._unit_pid()

    def _unit_pid(self) -> int | None:
        """Return the pid of the unit's gateway; a drop-in may have given it another user and state dir."""
        try:
            ours = f"{self.place.root}/" in (UNITS / UNIT).read_text()
        except OSError:
            return None
        if not ours or not systemd_runs() or os.geteuid() != 0:
            return None
        show = ["systemctl", "show", "--property=MainPID", "--value", UNIT]
        said = subprocess.run(show, check=False, capture_output=True, text=True).stdout.strip()
        return int(said) if said.isdigit() and said != "0" else None

    def _is_ours(self, pid: int) -> bool:
        if not Path("/proc/self/stat").exists():  # not Linux: ps knows the command
            said = subprocess.run(
                ["ps", "-o", "command=", "-p", str(pid)], check=False, capture_output=True, text=True
            )
            return f"{self.command} serve" in said.stdout
        process = Path("/proc") / str(pid)
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(self.command) not in words or b"serve" not in words:
                return False
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            variables = (process / "environ").read_bytes().split(b"\0")
            of_parent = (Path("/proc") / parent / "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        # The same command may serve another state dir; and a fork of the gateway (which has its command
        # line too) is not the gateway.
        place = next((v[18:] for v in variables if v.startswith(b"GATEWAY_STATE_DIR=")), b"")
        return (
            state not in "ZX"
            and place == os.fsencode(self.place.root)
            and os.fsencode(self.command) not in of_parent
        )

    def _cli(self, *words: str, timeout: float = 120.0) -> str:
        return run(
            [self.command, *words],
            env=self._child_environment() | self._moved(),
            fix=f"try it by hand: {self.command.name} {' '.join(words)}",
            timeout=timeout,
        )

    def _moved(self) -> dict[str, str]:
        """Return which folders the gateway was given: as a user of its own it has a state dir of its own."""
        try:
            variables = (Path("/proc") / str(self._pid()) / "environ").read_bytes().split(b"\0")
        except OSError:
            return {}
        places = [
            os.fsdecode(v) for v in variables if v.startswith((b"GATEWAY_STATE_DIR=", b"GATEWAY_CADDY_DIR="))
        ]
        return dict(place.split("=", 1) for place in places)

    def _tenant(self) -> str:
        listed = json.loads(self._cli("list", "--json") or "[]")
        rows = listed.get("tenants", []) if isinstance(listed, dict) else listed
        found = next((row for row in rows if row["name"] == TENANT), None)
        if found is not None and found["status"] == "running":
            return "runs already"
        self._cli("create" if found is None else "start", TENANT)
        self._pin()
        return "made" if found is None else "started"

    def _pin(self) -> None:
        if self.settings.runtime == "incus":
            pin(self.settings)

    def _token(self) -> str:
        """Return the stored token while it is good for another day, else make one and store it."""
        with contextlib.suppress(OSError):
            token = self.place.token.read_text().strip()
            if expires(token) > time.time() + 86400 and self._accepts(token):
                return token
        token = self._cli("token", "--tenant", TENANT, "--scope", SCOPES, "--ttl", f"{TOKEN_DAYS}d").strip()
        write_private(self.place.token, token + "\n")
        return token

    def _accepts(self, token: str) -> bool:
        try:
            return ask(self.settings.listen, "GET", f"/v1/tenants/{TENANT}", token)[0] == 200
        except OSError:
            return False

    def _site(self) -> str:
        """Have the demo deployed and answer; a site that is there already stays as it is."""
        listed = json.loads(self._cli("list", "--json") or "[]")
        found = next((row for row in listed if row["name"] == TENANT), None)
        if found is not None and found["domain"] not in (None, DOMAIN):
            return f"{TENANT} has the domain {found['domain']}, which stays"
        began = "runs already"
        if found is not None and found["status"] != "running":
            self._cli("start", TENANT)
            self._pin()
            began = "started"
        if found is not None and found["domain"] == DOMAIN:
            if self._site_answers():
                return f"{began} at {self.site_url}"
            say(f"    {DOMAIN} does not answer, it is deployed again")
        with self._template() as template:
            self._cli("deploy", DOMAIN, "--template", template, "--tenant", TENANT, timeout=600.0)
        self._pin()
        return f"deployed, see {self.site_url}"

    @property
    def site_url(self) -> str:
        return site_url(DOMAIN, self.settings)

    def _site_answers(self) -> bool:
        deadline = time.monotonic() + SITE_TIMEOUT
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if ask(f"127.0.0.1:{self.settings.caddy_ask}", "GET", "/", host=DOMAIN, timeout=5.0)[0] < 400:
                    return True
            time.sleep(POLL)
        return False

    @contextlib.contextmanager
    def _template(self) -> Iterator[str]:
        """Give the word for the demo's template: its name, or a folder where tenants have no Bun."""
        if self.settings.runtime == "incus":
            yield TEMPLATE
            return
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / TEMPLATE
            shutil.copytree(shipped("deploy") / "templates" / TEMPLATE / "public", folder / "public")
            serve = f'exec "{sys.executable}" -m http.server --bind 127.0.0.1 --directory public "$PORT"'
            (folder / "site.toml").write_text(f"start = {json.dumps(['sh', '-c', serve])}\n")
            yield str(folder)

    # asking and stopping

    def status(self) -> dict[str, Any]:
        """Return `{running, runtime, url, editor_url, site_url, tenant, token}`.

        The token is null where none was made, the site's address where no Caddy serves it.
        """
        try:
            running = ask(self.settings.listen, "GET", "/readyz", timeout=5.0)[0] == 200
        except OSError:
            running = False
        try:
            token: str | None = self.place.token.read_text().strip()
        except OSError:
            token = None
        url = base_url(self.settings.listen)
        return {
            "running": running and self._pid() is not None,
            "runtime": self.settings.runtime,
            "url": url,
            # a fragment stays in the browser; the editor takes the token out of the address at once
            "editor_url": f"{url}/#tenant={TENANT}&token={token}" if token else f"{url}/#{TENANT}",
            "site_url": self.site_url if self.front.answers() else None,
            "tenant": TENANT,
            "token": token,
        }

    def stop(self) -> list[str]:
        """Stop the gateway, its Caddy, and incusd with its tenants where quickstart started it; say what."""
        stopped = []
        if self._stop_gateway():
            stopped.append("gateway")
        if self.front.stop():
            stopped.append("Caddy")
        if self.settings.runtime == "incus" and self.place.incus_is_ours.exists():
            if Daemon.at(self.settings.incus_socket).stop():
                stopped.append("Incus with its tenants")
            self.place.incus_is_ours.unlink(missing_ok=True)
        return stopped

    def _stop_gateway(self) -> bool:
        pid = self._pid()
        if systemd_runs() and os.geteuid() == 0 and (UNITS / UNIT).exists():
            run(["systemctl", "disable", "--quiet", "--now", UNIT], fix=f"see: journalctl -u {UNIT}")
        if pid is not None:
            limit = self.settings.shutdown_timeout + 5.0
            for number, seconds in ((signal.SIGTERM, limit), (signal.SIGKILL, 10.0)):
                if not self._is_ours(pid):
                    break
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                deadline = time.monotonic() + seconds
                while self._is_ours(pid) and time.monotonic() < deadline:
                    time.sleep(POLL)
        # it may have let go of its environment, by which it is known, a moment before it is gone
        self._reap(POLL * 100)
        self.place.pidfile.unlink(missing_ok=True)
        return pid is not None


def _indented(line: str) -> None:
    say(f"    {line}")


def command_word(place: Place) -> str:
    """Return how to call the command: by its name where that is this gateway's, else by its path."""
    found = shutil.which("incus-gateway")
    ours = found is not None and Path(found).resolve() == place.command.resolve()
    return "incus-gateway" if ours else str(place.command)


def farewell(state: dict[str, Any], command: str, script: Path) -> str:
    """Return what a person wants to know at the end: where it is, how to get in, what to try."""
    look = "whoami; uname -a; bun --version" if state["runtime"] == "incus" else "whoami; pwd; ls"
    return f"""
The gateway runs at {state["url"]} ({state["runtime"]} runtime), with the tenant {state["tenant"]}.
Site:    {state["site_url"] or "not served, Caddy does not run"}
Editor:  {state["editor_url"]}
Token:   {state["token"]}

Try:
  {command} exec {state["tenant"]} -- sh -c '{look}'
  curl -s -H "Authorization: Bearer $({script} token)" {state["url"]}/v1/tenants/{state["tenant"]}
  {command} events
Stop it with {script} stop."""


def main(words: list[str]) -> int:
    """Do `start|status|status --json|token|stop CHECKOUT STAMP`; return the exit code.

    0 done, 1 failed, 2 wrong usage; `status` exits 1 where the gateway does not run.
    """
    try:
        action, checkout, stamp, *options = words
    except ValueError:
        return 2
    state_dir = Path(os.environ.get("GATEWAY_STATE_DIR", "/var/lib/incus-gateway"))
    try:
        return _main(action, Path(checkout), stamp, options, state_dir)
    except ValidationError as error:
        for problem in error.errors():
            field = "_".join(str(part) for part in problem["loc"]).upper()
            say(f"failed: setting GATEWAY_{field}: {problem['msg']}")
        return 1
    except HostError as error:
        say(f"failed: {error.message}")
        say("Nothing needs undoing: mend that, then run deploy/quickstart again.")
        return 1
    except KeyboardInterrupt:
        say("interrupted; run deploy/quickstart again to go on from here")
        return 130
    except Exception as error:
        log = state_dir / "quickstart.log"
        with contextlib.suppress(OSError):
            write_private(log, clean(traceback.format_exc()))
        say(f"failed: {type(error).__name__}: {error}; this is a fault of quickstart, details: {log}")
        return 1


def _main(action: str, checkout: Path, stamp: str, options: list[str], state_dir: Path) -> int:
    saved: dict[str, str] = {}
    with contextlib.suppress(OSError):
        saved = parse_environment(Place(state_dir).environment.read_text())
    given = {key: value for key, value in os.environ.items() if key.startswith("GATEWAY_")}
    # What an earlier run was told stays in force, so that `stop` and a second run mean the same gateway.
    environment = {**saved, **given, "GATEWAY_STATE_DIR": str(state_dir)}
    os.environ.update(environment)
    quickstart = Quickstart(settings_module.load(), checkout, stamp, environment)
    script = checkout / "deploy" / "quickstart"
    match action:
        case "start":
            begun = time.monotonic()
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            quickstart.start()
            say(farewell(quickstart.status(), command_word(quickstart.place), script))
            say(f"Ready after {time.monotonic() - begun:.1f} s.")
            return 0
        case "status":
            state = quickstart.status()
            if "--json" in options:
                say(json.dumps(state))
            elif state["running"]:
                say(farewell(state, command_word(quickstart.place), script))
            else:
                say(f"not running; start it with deploy/quickstart; {quickstart.last_words()}")
            return 0 if state["running"] else 1
        case "token":
            token = quickstart.status()["token"]
            say(token or "no token was made yet; run deploy/quickstart")
            return 0 if token else 1
        case "stop":
            stopped = quickstart.stop()
            say(f"stopped: {', '.join(stopped)}" if stopped else "nothing to stop")
            return 0
        case _:
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
