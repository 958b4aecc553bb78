"""The demo of quickstart: a tenant, a token for it, and its site where Caddy can serve one."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gateway.auth.issuing import caller
from gateway.caddy import shipped, site_url
from gateway.host import run
from gateway.host.gateway_process import POLL, GatewayProcess
from gateway.host.incus import Incus
from gateway.host.local_gateway import ask, expires
from gateway.host.place import Place, write_private
from gateway.host.setup import pin
from gateway.settings import Settings
from gateway.terminal import out

TENANT = "demo"
DOMAIN = "demo.localhost"  # browsers resolve it to this machine
TEMPLATE = "static"
SCOPES = "files:read files:write exec deploy manage events"
TOKEN_DAYS = 30
SITE_TIMEOUT = 30.0  # seconds for an already deployed site to answer

say = out.say


class Demo:
    """The demo of a running gateway. What is there already stays as it is."""

    def __init__(self, settings: Settings, place: Place, gateway: GatewayProcess) -> None:
        self.settings, self.place, self.gateway = settings, place, gateway

    def is_there(self) -> bool:
        """Return whether Incus has its instance, on whichever member of a cluster."""
        found = Incus(self.settings.incus_socket, self.settings.incus_project).instances()
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
