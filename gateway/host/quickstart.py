"""Start a gateway on this machine from its checkout, with a demo site, report its status, and stop it.

`deploy/quickstart` installs packages and a Python environment, then runs this module. It stores nothing that
can be found out from the machine, so a run killed at any point is simply repeated. The state dir has the
demo's token (mode 0600), the settings of the last start, a pid file and a log. Caddy's ports are chosen once
and then stored among those settings.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gateway import settings as settings_module
from gateway.auth.issuing import caller
from gateway.caddy import shipped, site_url
from gateway.host import HostError, caddy_service, run
from gateway.host.caddy_service import CaddyService
from gateway.host.cluster import join_cluster
from gateway.host.daemon import Daemon
from gateway.host.gateway_process import (
    CLIENTS,
    POLL,
    GatewayProcess,
    QuickstartFiles,
    ask,
    base_url,
    environment_of,
    expires,
    format_environment,
    write_private,
)
from gateway.host.image import build_image
from gateway.host.incus import IncusAdmin
from gateway.host.requirements import setup
from gateway.host.setup import pin
from gateway.incus import member_of
from gateway.settings import Settings
from gateway.storage.state_dir import close
from gateway.terminal import clean, out

TENANT = "demo"
DOMAIN = "demo.localhost"  # browsers resolve it to this machine
TEMPLATE = "static"
SCOPES = "files:read files:write exec deploy manage events"
TOKEN_DAYS = 30
SITE_TIMEOUT = 30.0  # seconds for an already deployed site to answer


class Demo:
    """The demo of a running gateway. What is there already stays as it is."""

    def __init__(self, settings: Settings, place: QuickstartFiles, gateway: GatewayProcess) -> None:
        self.settings, self.place, self.gateway = settings, place, gateway

    def is_there(self) -> bool:
        """Return whether Incus has its instance, on whichever member of a cluster."""
        found = IncusAdmin(self.settings.incus_socket, self.settings.incus_project).instances()
        return any(one["name"] == TENANT for one in found)

    def start(self) -> str:
        """Make sure that the tenant exists and runs; say what was done."""
        listed = json.loads(self._cli("list", "--json") or "[]")
        rows = listed.get("tenants", []) if isinstance(listed, dict) else listed
        found = next((row for row in rows if row["name"] == TENANT), None)
        if found is not None and found["status"] == "running":
            return "already running"
        self._cli("create" if found is None else "start", TENANT)
        self._pin()
        return "created" if found is None else "started"

    def serve(self) -> str:
        """Make sure that the demo is deployed and answers; an existing site stays as it is."""
        listed = json.loads(self._cli("list", "--json") or "[]")
        found = next((row for row in listed if row["name"] == TENANT), None)
        if found is not None and found["domain"] not in (None, DOMAIN):
            return f"{TENANT} keeps its domain {found['domain']}"
        began = "already running"
        if found is not None and found["status"] != "running":
            self._cli("start", TENANT)
            self._pin()
            began = "started"
        if found is not None and found["domain"] == DOMAIN:
            if self._site_answers():
                return f"{began} at {self.site_url}"
            say(f"    {DOMAIN} does not answer; deploying it again")
        with self._template() as template:
            self._cli("deploy", DOMAIN, "--template", template, "--tenant", TENANT, timeout=600.0)
        self._pin()
        return f"deployed, see {self.site_url}"

    def token(self) -> str:
        """Return the stored token if it is valid for another day, else create and store a new one."""
        with contextlib.suppress(OSError):
            token = self.place.token.read_text().strip()
            if expires(token) > time.time() + 86400 and self._accepts(token):
                return token
        # the person at this machine, whom the editor shows beside what agents do by tokens of their own
        words = ("--tenant", TENANT, "--scope", SCOPES, "--ttl", f"{TOKEN_DAYS}d", "--subject", caller())
        token = self._cli("token", *words).strip()
        write_private(self.place.token, token + "\n")
        return token

    @property
    def site_url(self) -> str:
        return site_url(DOMAIN, self.settings)

    def _accepts(self, token: str) -> bool:
        try:
            return ask(self.settings.listen, "GET", f"/v1/tenants/{TENANT}", token)[0] == 200
        except OSError:
            return False

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
        """Yield the template to deploy: its name, or a folder if tenants have no Bun."""
        if self.settings.runtime == "incus":
            yield TEMPLATE
            return
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / TEMPLATE
            shutil.copytree(shipped("deploy") / "templates" / TEMPLATE / "public", folder / "public")
            serve = f'exec "{sys.executable}" -m http.server --bind 127.0.0.1 --directory public "$PORT"'
            (folder / "site.toml").write_text(f"start = {json.dumps(['sh', '-c', serve])}\n")
            yield str(folder)

    def _pin(self) -> None:
        if self.settings.runtime == "incus":
            pin(self.settings)

    def _cli(self, *words: str, timeout: float = 120.0) -> str:
        return run(
            [self.gateway.command, *words],
            env=self.gateway.variables() | self.gateway.folders(),
            fix=f"try it by hand: {self.gateway.command.name} {' '.join(words)}",
            timeout=timeout,
        )


# --- quickstart ---------------------------------------------------------------------------------------------


say = out.say


class Quickstart:
    """One run of `deploy/quickstart`."""

    def __init__(
        self, settings: Settings, checkout: Path, stamp: str, environment: dict[str, str], joining: str = ""
    ) -> None:
        """`joining` is the token of a cluster of which this server is to become a member."""
        self.settings = settings
        self._joining = joining
        self.checkout = checkout
        self.place = QuickstartFiles(settings.state_dir)
        self.environment = environment
        self._code = stamp
        command = Path(sys.executable).with_name("incus-gateway")
        self.gateway = GatewayProcess(settings, self.place, checkout, command, environment)

    @property
    def stamp(self) -> str:
        return f"{self._code}\n{format_environment(self.environment)}"

    @property
    def front(self) -> CaddyService:
        return CaddyService(self.settings)

    @property
    def demo(self) -> Demo:
        return Demo(self.settings, self.place, self.gateway)

    # --- starting -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Do everything that is missing until the demo runs. Raises `HostError` with what to do."""
        if self.settings.runtime == "incus":
            self._step("Incus", self._incus)
            if self._joining:
                self._step("cluster", self._join)
            self._step("host", lambda: self._report(setup(self.settings, _indented)))
            self._step("base image", lambda: self._report(build_image(self.settings, _indented)))
        self._settle_ports()
        before = self.place.environment.read_text() if self.place.environment.exists() else None
        write_private(self.place.environment, format_environment(self.environment))
        served = self._served()
        if served:
            self._step("Caddy", self._caddy)
        close(self.settings)  # only now, when no Caddy of another user needs anything in it
        try:
            self._step("gateway", lambda: self.gateway.ensure(self.stamp, _indented))
        except HostError:
            if before is not None and self.gateway.pid() is not None:
                write_private(self.place.environment, before)  # of the one that goes on
            raise
        if self.member and not self.demo.is_there():
            return  # it is one tenant of the whole cluster
        if served:
            self._step(f"site {DOMAIN}", self.demo.serve)
        else:
            self._step(f"tenant {TENANT}", self.demo.start)
        self.demo.token()

    def _settle_ports(self) -> None:
        """Choose Caddy's ports, unless an earlier start has chosen them: those are settings now."""
        choice = caddy_service.chosen(self.settings)
        self.environment.update({f"GATEWAY_{name.upper()}": str(value) for name, value in choice.items()})
        self.settings = self.settings.model_copy(update=choice)

    def _served(self) -> bool:
        """Return whether sites can be served: Caddy is installed together with Incus, but not otherwise."""
        if self.settings.runtime == "incus" or shutil.which("caddy") or self.front.others():
            return True
        say("note: caddy is not installed, so no site is served; install it and run this again")
        return False

    def _caddy(self) -> str:
        if self.front.others():
            return f"using the one at {self.settings.caddy_admin}"
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
            # before the start, in case this run is killed in between
            self.place.incus_is_ours.touch()
        return "started" if daemon.ensure(_indented) else "already running"

    def _join(self) -> str:
        said: list[str] = []
        join_cluster(self.settings, self._joining, said.append)
        return "; ".join(said)

    @property
    def member(self) -> str:
        """The name of this server in its cluster, empty if it is in none."""
        incus = self.settings.runtime == "incus"
        return member_of(IncusAdmin(self.settings.incus_socket).get()) if incus else ""

    # --- status and stopping ------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return `{running, runtime, url, editor_url, site_url, tenant, token}`.

        The token is null if none was created yet, `site_url` if no Caddy serves the site.
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
            "running": running and self.gateway.pid() is not None,
            "runtime": self.settings.runtime,
            "url": url,
            # browsers do not send the fragment, and the editor removes the token from the address at once
            "editor_url": f"{url}/#tenant={TENANT}&token={token}" if token else f"{url}/#{TENANT}",
            "site_url": self.demo.site_url if self.front.answers() else None,
            "tenant": TENANT,
            "token": token,
        }

    def stop(self) -> list[str]:
        """Stop the gateway, its Caddy, and incusd if quickstart started it; return what was stopped."""
        stopped = []
        if self.gateway.stop():
            stopped.append("gateway")
        if self.front.stop():
            stopped.append("Caddy")
        if self.settings.runtime == "incus" and self.place.incus_is_ours.exists():
            if Daemon.at(self.settings.incus_socket).stop():
                stopped.append("Incus with its tenants")
            self.place.incus_is_ours.unlink(missing_ok=True)
        return stopped


def _indented(line: str) -> None:
    say(f"    {line}")


def command_word(place: QuickstartFiles) -> str:
    """Return how to call `incus-gateway`: by name if PATH has this gateway's, else by its full path."""
    found = shutil.which("incus-gateway")
    ours = found is not None and Path(found).resolve() == place.command.resolve()
    return "incus-gateway" if ours else str(place.command)


def farewell(state: dict[str, Any], command: str, script: Path, member: str = "") -> str:
    """Return the closing message: addresses, token, commands; less on a cluster's `member` without a demo."""
    if member and state["token"] is None:
        return f"""
The gateway runs at {state["url"]}, on the member {member} of the cluster; see {command} cluster list.
Stop it with {script} stop."""
    look = "whoami; uname -a; bun --version" if state["runtime"] == "incus" else "whoami; pwd; ls"
    return f"""
The gateway runs at {state["url"]} ({state["runtime"]} runtime), with the tenant {state["tenant"]}.
Site:    {state["site_url"] or "not served: Caddy is not running"}
Editor:  {state["editor_url"]}
Token:   {state["token"]}

Try:
  {command} exec {state["tenant"]} -- sh -c '{look}'
  curl -s -H "Authorization: Bearer $({script} token)" {state["url"]}/v1/tenants/{state["tenant"]}
  {command} events
Stop it with {script} stop."""


def main(words: list[str]) -> int:
    """Run `start [--join TOKEN]|status|status --json|token|stop CHECKOUT STAMP`; return the exit code.

    0: done, 1: failed, 2: wrong usage. `status` returns 1 if the gateway is not running.
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
        say("Nothing needs to be undone: fix that, then run deploy/quickstart again.")
        return 1
    except KeyboardInterrupt:
        say("interrupted; run deploy/quickstart again to continue from here")
        return 130
    except Exception as error:
        log = state_dir / "quickstart.log"
        with contextlib.suppress(OSError):
            write_private(log, clean(traceback.format_exc()))
        say(f"failed: {type(error).__name__}: {error}; this is a bug in quickstart, details: {log}")
        return 1


def _main(action: str, checkout: Path, stamp: str, options: list[str], state_dir: Path) -> int:
    environment = environment_of(state_dir)
    for name in CLIENTS:
        os.environ.pop(name, None)
    os.environ.update(environment)
    joining = options[1] if options[:1] == ["--join"] else ""
    quickstart = Quickstart(settings_module.load(), checkout, stamp, environment, joining)
    script = checkout / "deploy" / "quickstart"
    match action:
        case "start":
            begun = time.monotonic()
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            quickstart.start()
            command = command_word(quickstart.place)
            say(farewell(quickstart.status(), command, script, quickstart.member))
            say(f"Ready after {time.monotonic() - begun:.1f} s.")
            return 0
        case "status":
            state = quickstart.status()
            if "--json" in options:
                say(json.dumps(state))
            elif state["running"]:
                say(farewell(state, command_word(quickstart.place), script))
            else:
                say(f"not running; start it with deploy/quickstart; {quickstart.gateway.last_words()}")
            return 0 if state["running"] else 1
        case "token":
            token = quickstart.status()["token"]
            say(token or "there is no token yet; run deploy/quickstart")
            return 0 if token else 1
        case "stop":
            stopped = quickstart.stop()
            say(f"stopped: {', '.join(stopped)}" if stopped else "nothing to stop")
            return 0
        case _:
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
