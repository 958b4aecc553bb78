"""Keeps Caddy on the gateway's configuration, and asks sites through it.

The configuration is loaded through the admin API, only if it differs, and never over one that is not ours. A
gateway that may not use that API, such as one without root, requests one of its own routes through Caddy
instead, and leaves the configuration to whoever started Caddy.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import orjson

from gateway.caddy import configuration
from gateway.caddy.admin import Admin
from gateway.caddy.errors import CaddyFailed
from gateway.caddy.routes import Routes
from gateway.hostnames import PROBE
from gateway.runtime.probe import ask
from gateway.settings import Settings

log = logging.getLogger(__name__)

_CONNECT: Final = 5.0  # seconds for Caddy to accept a connection
_STREAMS: Final = "stream_close_delay"  # of reverse_proxy, since Caddy 2.7
_STREAMS_STAY: Final = f"{_STREAMS} 24h"


class Caddy(Routes):
    """The Caddy of one gateway, with its routes. Use as an async context manager."""

    def __init__(self, settings: Settings, admin: str | None = None) -> None:
        """`admin` is the running Caddy's API address, if the settings already name a later one."""
        super().__init__(settings)
        self._admin = Admin(admin or settings.caddy_admin)
        self._loading = asyncio.Lock()
        self._streams_can_stay: bool | None = None  # None: not known yet

    async def __aenter__(self) -> Caddy:
        await asyncio.to_thread(self.lay)
        self._admin.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._admin.close()

    # --- the configuration --------------------------------------------------------------------------

    def write(self) -> Path:
        """Write the configuration to start a Caddy with; return its main file."""
        return configuration.write(self.folder, self.rendered())

    def serves(self, running: Mapping[str, Any]) -> bool:
        """Return whether a Caddy's configuration is ours, or an operator's that uses our routes."""
        return self._ours(running) or str(self.routes) in orjson.dumps(running).decode()

    def rendered(self, streams: str = "") -> dict[str, str]:
        """Return the files of the configuration with this gateway's values in them."""
        return configuration.rendered(self._settings, self, streams)

    def _ours(self, running: Mapping[str, Any]) -> bool:
        return configuration.ours(self.folder, running)

    async def ensure(self) -> bool:
        """Make Caddy run our configuration; return whether it had to be loaded. Raises `CaddyFailed`.

        Never replaces a foreign configuration. If Caddy refuses ours, the old one and its files stay.
        """
        async with self._loading:
            try:
                running = await self._admin.ask("GET", "/config/") or {}
            except CaddyFailed as error:
                if error.facts["reason"] != "caddy_denied":
                    raise
                await self._look()
                return False
            if "apps" in running and not self._ours(running):
                self.write()  # for it to import
                if self.serves(running):
                    return False  # an operator's own
                raise CaddyFailed(
                    f"the Caddy at {self._admin.address} serves something else, which is left as it is; "
                    "make it import the gateway's sites, as docs/operations.md says, or start a separate "
                    "Caddy "
                    "(deploy/quickstart does) with another GATEWAY_CADDY_ADMIN",
                    reason="caddy_foreign",
                )
            before = configuration.written(self.folder)
            same = self._ours(running) and before == self.rendered()
            stay = _STREAMS in orjson.dumps(running).decode()
            if same and stay == self._streams_can_stay:
                return False
            adapted = await self._adapted()
            if same and stay == self._streams_can_stay:
                return False
            self.write()
            try:
                await self._admin.ask("POST", "/load", adapted)
            except CaddyFailed:
                for name, text in before.items():
                    if text is not None:
                        (self.folder / name).write_text(text)
                raise
            return True

    async def _look(self) -> None:
        """Check with a test route that Caddy finds our routes. Raises `CaddyFailed`."""
        self._lead(PROBE, "127.0.0.1:9")  # nothing listens there (RFC 863)
        status = await self._site(self._settings.caddy_ask, "127.0.0.1", f"/?domain={PROBE}", 10.0)
        if status != 200:
            raise CaddyFailed(
                f"the Caddy at port {self._settings.caddy_ask} does not find the routes in {self.routes}: it "
                "reads another folder, or has no access to this one; set GATEWAY_CADDY_DIR, and see "
                "docs/operations.md",
                reason="caddy_foreign",
            )
        if configuration.written(self.folder) != self.rendered():
            log.warning("Caddy's configuration does not match these settings; run deploy/quickstart as root")

    async def _adapted(self) -> Any:
        """Return the configuration as Caddy's own JSON.

        Directives that older Caddys do not know are only in here and not in the files, from which an older
        Caddy may be started. It is JSON because Caddy 2.6 answers 200 to a Caddyfile with a warning even if
        it then refuses the file.
        """
        for streams in ("",) if self._streams_can_stay is False else (_STREAMS_STAY, ""):
            text = configuration.joined(self.folder, self.rendered(streams))
            try:
                adapted = (await self._admin.ask("POST", "/adapt", text))["result"]
            except CaddyFailed as error:
                if error.facts["reason"] != "caddy_refused" or not streams:
                    raise
            else:
                self._streams_can_stay = bool(streams)
                return adapted
        raise AssertionError("one of the two was returned or raised")

    # --- sites as visitors see them -----------------------------------------------------------------

    def url(self, domain: str) -> str:
        return configuration.site_url(domain, self._settings)

    async def ask(self, domain: str, path: str, timeout: float) -> int:
        """Request a site through Caddy's listener without certificates; return the status.

        Raises `CaddyFailed`.
        """
        return await self._site(self._settings.caddy_ask, domain, path, timeout)

    async def certify(self, domain: str, timeout: float) -> str | None:
        """Request a site by HTTPS, which makes Caddy get a certificate; return what went wrong, or None."""
        try:
            await self._site(self._settings.caddy_https, domain, "/", timeout, _any_certificate())
        except CaddyFailed as error:
            return error.message
        return None

    @staticmethod
    async def _site(
        port: int, domain: str, path: str, timeout: float, tls: ssl.SSLContext | None = None
    ) -> int:
        # the request goes to this machine's Caddy, but a tenant's site answers
        try:
            return await ask("127.0.0.1", port, path, _CONNECT, timeout, host=domain, tls=tls)
        except (OSError, ValueError) as error:
            what = "does not answer" if tls is None else "has no certificate for it yet"
            raise CaddyFailed(f"Caddy {what}: {type(error).__name__}", reason="caddy_down") from error


def _any_certificate() -> ssl.SSLContext:
    # visitors check who signed it; here it only matters that there is one: no authorities are loaded (6 ms)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
