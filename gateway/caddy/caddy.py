"""Keeps Caddy on the gateway's configuration, and asks sites through it.

The configuration is loaded through the admin API, only if it differs, and never over one that is not ours. A
gateway that may not use that API, such as one without root, requests one of its own routes through Caddy
instead, and leaves the configuration to whoever started Caddy.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import aiohttp
import orjson

from gateway.caddy.routes import NAME, CaddyFailed, Routes, peer_endpoint
from gateway.hostnames import PROBE
from gateway.runtime.probe import ask
from gateway.settings import Settings

log = logging.getLogger(__name__)

# seconds that Caddy keeps an unused connection to a site; fewer than any server does (Node's: 5)
KEEPALIVE: Final = 4.0
# seconds that a request waits for a sleeping tenant, in Caddy and in the gateway
WAKE_TIMEOUT: Final = 30.0
_MAIN: Final = "Caddyfile"
_SITE: Final = "site.caddy"
_PEERS: Final = "peers.caddy"
_CONNECT: Final = 5.0  # seconds for Caddy to accept a connection
_STREAMS: Final = "stream_close_delay"  # of reverse_proxy, since Caddy 2.7
_STREAMS_STAY: Final = f"{_STREAMS} 24h"


class Caddy(Routes):
    """The Caddy of one gateway, with its routes. Use as an async context manager."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._admin = Admin(settings.caddy_admin)
        self._loading = asyncio.Lock()
        self._streams_can_stay: bool | None = None  # None: not known yet

    async def __aenter__(self) -> Caddy:
        await asyncio.to_thread(self.create_folders)
        self._admin.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._admin.close()

    # --- the configuration --------------------------------------------------------------------------

    def write(self) -> Path:
        """Write the configuration to start a Caddy with; return its main file."""
        files = self.rendered()
        for name, text in files.items():
            new = self.folder / f".{name}.new"
            new.write_text(text)
            new.replace(self.folder / name)
        if _PEERS not in files:
            (self.folder / _PEERS).unlink(missing_ok=True)
        return self.folder / _MAIN

    def _written(self) -> dict[str, str | None]:
        """Return the configuration's files on disk; None for a file that cannot be read.

        The one for peers exists in a cluster only.
        """
        found = dict[str, str | None]()
        for name in (_MAIN, _SITE, _PEERS):
            try:
                found[name] = (self.folder / name).read_text()
            except OSError:
                if name != _PEERS:
                    found[name] = None
        return found

    def serves(self, running: Mapping[str, Any]) -> bool:
        """Return whether a Caddy's configuration is ours, or an operator's that uses our routes."""
        return self._is_ours(running) or str(self.routes) in orjson.dumps(running).decode()

    def _is_ours(self, running: Mapping[str, Any]) -> bool:
        root = running.get("storage", {}).get("root")
        if "apps" not in running or root is None:
            return False
        # it may name the same folder by its former path
        return Path(root).resolve() == (self.folder / "data").resolve()

    def rendered(self, streams: str = "") -> dict[str, str]:
        """Return the files of the configuration with this gateway's values in them, the main one first."""
        settings, admin, endpoint = self._settings, self._settings.caddy_admin, peer_endpoint(self.folder)
        path = socket_of(admin)
        values = {
            "ADMIN": f"unix/{path}" if path is not None else admin.split("://")[-1].rstrip("/"),
            "DATA": str(self.folder / "data"),
            "HTTP": str(settings.caddy_http),
            "HTTPS": str(settings.caddy_https),
            "HTTPS_SUFFIX": "" if settings.caddy_https == 443 else f":{settings.caddy_https}",
            "ASK": str(settings.caddy_ask),
            "ISSUER": "internal" if settings.caddy_issuer == "internal" else settings.caddy_email,
            "ROUTES": str(self.routes),
            "AWAY": str(self.away),
            "GATEWAY": self.gateway(),
            "KEEPALIVE": f"{KEEPALIVE:g}s",
            "RETRY": f"{settings.caddy_retry:g}s",
            "WAKE_TIMEOUT": f"{WAKE_TIMEOUT:g}s",
            "SITE": str(self.folder / _SITE),
            "STREAMS": streams,
            "TRUSTED": "",
            "PEERS": "",
            "ELSEWHERE": "",
        }
        templates = shipped("caddy")
        site = (templates / _SITE).read_text()
        files = {_MAIN: (templates / _MAIN).read_text(), _SITE: site}
        if endpoint is not None:
            values |= {
                "PEERS": f"import {self.folder / _PEERS}",
                "PEER_HOST": endpoint.host.strip("[]"),
                "PEER_PORT": str(endpoint.port),
                "PEER_CERTIFICATE": str(endpoint.certificate),
                "PEER_KEY": str(endpoint.key),
                "PEER_NAME": NAME,
                "ELSEWHERE": "import site_elsewhere",
            }
            files[_SITE] += "\n" + (templates / "elsewhere.caddy").read_text()
            # the other members' Caddys pass on visitors, and say whose request it is
            trusting = site.replace("{$GATEWAY_CADDY_TRUSTED}", "trusted_proxies 0.0.0.0/0 ::/0")
            trusting = re.sub(r"(\(|import )(site)", r"\1peer_\2", trusting)
            trusting = trusting.replace("{$GATEWAY_CADDY_ELSEWHERE}", "import peer_site_elsewhere")
            files[_PEERS] = trusting + "\n" + (templates / _PEERS).read_text()
        for name, text in files.items():
            for key, value in values.items():
                text = text.replace("{$GATEWAY_CADDY_" + key + "}", value)
            files[name] = text
        return files

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
                await self._check_routes()
                return False
            if "apps" in running and not self._is_ours(running):
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
            before = self._written()
            same = self._is_ours(running) and before == self.rendered()
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

    async def _check_routes(self) -> None:
        """Check with a test route that Caddy finds our routes. Raises `CaddyFailed`."""
        self._route(PROBE, "127.0.0.1:9")  # nothing listens there (RFC 863)
        status = await self._site(self._settings.caddy_ask, "127.0.0.1", f"/?domain={PROBE}", 10.0)
        if status != 200:
            raise CaddyFailed(
                f"the Caddy at port {self._settings.caddy_ask} does not find the routes in {self.routes}: it "
                "reads another folder, or has no access to this one; set GATEWAY_CADDY_DIR, and see "
                "docs/operations.md",
                reason="caddy_foreign",
            )
        if self._written() != self.rendered():
            log.warning("Caddy's configuration does not match these settings; run deploy/quickstart as root")

    async def _adapted(self) -> Any:
        """Return the configuration as Caddy's own JSON.

        Directives that older Caddys do not know are only in here and not in the files, from which an older
        Caddy may be started. It is JSON because Caddy 2.6 answers 200 to a Caddyfile with a warning even if
        it then refuses the file.
        """
        for streams in ("",) if self._streams_can_stay is False else (_STREAMS_STAY, ""):
            files = self.rendered(streams)
            text = files[_MAIN]
            for name, more in files.items():
                text = text.replace(f"import {self.folder / name}\n", more)
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
        return site_url(domain, self._settings)

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


def shipped(name: str) -> Path:
    """Return a file or folder that is part of the gateway, in its package or its checkout."""
    package = Path(__file__).parent.parent
    inside = package / "shipped" / name
    return inside if inside.exists() else package.parent / name


def site_url(domain: str, settings: Settings) -> str:
    """Return a site's URL for people."""
    if domain.endswith(".localhost"):
        return f"http://{domain}" + ("" if settings.caddy_http == 80 else f":{settings.caddy_http}")
    return f"https://{domain}" + ("" if settings.caddy_https == 443 else f":{settings.caddy_https}")


_TIMEOUT: Final = aiohttp.ClientTimeout(total=10)
_TRIES: Final = 3
_PAUSE: Final = 0.1  # seconds between two


class Admin:
    """The admin API at `address`. Open it before the first question, and close it after the last."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        path = socket_of(self.address)
        # a connection that is kept would be to the API before
        connector = (
            aiohttp.TCPConnector(force_close=True)
            if path is None
            else aiohttp.UnixConnector(path, force_close=True)
        )
        self._session = aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, method: str, path: str, body: str | dict[str, Any] | None = None) -> Any:
        """Return the JSON of an answer. A `body` of text is sent as a Caddyfile. Raises `CaddyFailed`."""
        address = self.address
        unix = socket_of(address) is not None
        url = ("http://caddy" if unix else address.rstrip("/")) + path
        # on a unix socket Caddy wants no origin and takes any host
        headers = {"Content-Type": "text/caddyfile" if isinstance(body, str) else "application/json"}
        data = body if body is None or isinstance(body, str) else orjson.dumps(body)
        if unix:
            headers["Host"] = ""
        try:
            status, said = await self._answer(method, url, data, headers)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if getattr(error, "errno", None) == errno.EACCES:
                raise CaddyFailed(
                    f"the gateway's user may not use Caddy's admin API at {address}", reason="caddy_denied"
                ) from error
            raise CaddyFailed(
                f"Caddy's admin API at {address} does not answer; start Caddy "
                "(systemctl start incus-gateway-caddy, or deploy/quickstart), or set GATEWAY_CADDY_ADMIN",
                reason="caddy_down",
            ) from error
        if status >= 400:
            reason = said.decode(errors="replace")[:500]
            raise CaddyFailed(f"Caddy refuses the gateway's configuration: {reason}", reason="caddy_refused")
        try:
            return orjson.loads(said) if said.strip() else None
        except ValueError:
            return None

    async def _answer(
        self, method: str, url: str, data: str | bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        assert self._session is not None
        for _ in range(_TRIES - 1):
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with self._session.request(method, url, data=data, headers=headers) as answer:
                    return answer.status, await answer.read()
            await asyncio.sleep(_PAUSE)
        async with self._session.request(method, url, data=data, headers=headers) as answer:
            return answer.status, await answer.read()


def socket_of(address: str) -> str | None:
    """Return the path of a unix socket in `/PATH`, `unix:/PATH` or Caddy's `unix//PATH`."""
    if address.startswith("/"):
        return address
    match = re.fullmatch(r"unix(?::(?://)?|/)(/.+)", address)
    return None if match is None else match[1]
