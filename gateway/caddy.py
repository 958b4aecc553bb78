"""The Caddy in front of all sites: its configuration, and the routes that it looks up.

A route is a link, `routes/DOMAIN` to a folder with one file that is named by where the site answers. Caddy
looks for it at each request, so that changing one is a rename: nothing is reloaded, which would cut every
websocket at once (Caddy before 2.7 has no `stream_close_delay`). Of a site that is asleep the route says so,
and Caddy asks the gateway before it hands a request on. The configuration itself is loaded through the admin
API, only where it differs, and never over one that is not ours. A gateway that may not use that API, as one
without root, asks Caddy for a route of its own instead, and leaves the configuration to whoever started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import ssl
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import aiohttp
import orjson

from gateway.errors import GatewayError, Unavailable
from gateway.hostnames import PROBE, DomainReserved, normalized, own_names, plain, reserved
from gateway.runtime.probe import ask
from gateway.settings import Settings

log = logging.getLogger(__name__)

TARGET: Final = re.compile(r"(?:asleep_)?(?:[0-9.]+:[0-9]+|[a-z0-9.-]+\.sock)")
_ASLEEP: Final = "asleep_"  # no tenant, and so no socket, has an underscore in its name
_ADMIN_TIMEOUT: Final = aiohttp.ClientTimeout(total=10)
_CONNECT: Final = 5.0  # seconds until Caddy takes a connection
_STREAMS: Final = "stream_close_delay"  # of reverse_proxy, since Caddy 2.7
_STREAMS_STAY: Final = f"{_STREAMS} 24h"


class CaddyFailed(Unavailable):
    """Caddy does not do its part; `facts["reason"]` is `caddy_down`, `caddy_denied`, `caddy_foreign` or
    `caddy_refused`.
    """


def asleep(target: str) -> str:
    """Return the target of a site that is reached at `target` once the gateway has woken it."""
    return _ASLEEP + target.removeprefix(_ASLEEP)


def shipped(name: str) -> Path:
    """Return a file or folder that comes with the gateway, from its package or its checkout."""
    package = Path(__file__).parent
    inside = package / "shipped" / name
    return inside if inside.exists() else package.parent / name


def site_url(domain: str, settings: Settings) -> str:
    """Return the address of a site for people."""
    if domain.endswith(".localhost"):
        return f"http://{domain}" + ("" if settings.caddy_http == 80 else f":{settings.caddy_http}")
    return f"https://{domain}" + ("" if settings.caddy_https == 443 else f":{settings.caddy_https}")


class Caddy:
    """The routes of one gateway and the admin API of its Caddy. Use as an async context manager."""

    def __init__(self, settings: Settings, admin: str | None = None) -> None:
        """`admin` is where the running Caddy is asked, if that is not where it is to answer from now on."""
        self._settings = settings
        self._address = admin or settings.caddy_admin
        self._own = own_names(settings)
        self.folder = settings.caddy_folder
        self.routes = self.folder / "routes"
        self.sockets = self.folder / "sockets"
        self._targets = self.folder / "targets"
        self._away = self.folder / "away"  # a file for each domain whose site hangs
        self._admin: aiohttp.ClientSession | None = None
        self._loading = asyncio.Lock()
        self._streams_can_stay: bool | None = None  # not known yet
        # a target is made before its route: nobody may find it unused in between
        self._setting = threading.Lock()
        # held by whoever finds out what routes should be and then makes them so
        self.changing = asyncio.Lock()

    async def __aenter__(self) -> Caddy:
        await asyncio.to_thread(self.lay)
        path = socket_of(self._address)
        connector = aiohttp.TCPConnector() if path is None else aiohttp.UnixConnector(path)
        self._admin = aiohttp.ClientSession(connector=connector, timeout=_ADMIN_TIMEOUT)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._admin is not None:
            await self._admin.close()

    def lead_home(self) -> None:
        """Lead the gateway's own domain to the gateway."""
        if self._settings.domain is not None and ":" in self._settings.listen:
            self._lead(self._home(), self._gateway())

    def lay(self) -> None:
        """Make the folders of the routes. Raises `CaddyFailed` where this user may not write them."""
        for folder in (self.routes, self._targets, self.sockets, self._away):
            try:
                folder.mkdir(mode=0o755, parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK):
                    raise PermissionError
            except PermissionError:
                raise CaddyFailed(
                    f"the gateway's user cannot write {folder}; `incus-gateway setup`, run as root with "
                    "GATEWAY_BROKER_SOCKET and GATEWAY_BROKER_USER set, gives it to that user; or set "
                    "GATEWAY_CADDY_DIR",
                    reason="caddy_denied",
                ) from None

    def _home(self) -> str:
        """Return the gateway's own domain as Caddy looks it up, "" for none."""
        domain = self._settings.domain or ""
        return plain(domain) or domain.lower()

    def _gateway(self) -> str:
        """Return where Caddy reaches the gateway itself."""
        listen = self._settings.listen
        if listen.startswith("/"):
            return f"unix/{listen}"
        host, _, port = listen.rpartition(":")
        host = "127.0.0.1" if host in ("0.0.0.0", "") else host  # noqa: S104 - compared, not bound
        return f"{host}:{port}"

    # --- routes -------------------------------------------------------------------------------------

    def set(self, domain: str, target: str) -> str | None:
        """Lead a tenant's domain to `ADDRESS:PORT` or `NAME.sock`; return where it led before. Atomic.

        Raises `DomainReserved` for one of the gateway's own, whoever says that it is a tenant's.
        """
        if reserved(domain, self._own):
            raise DomainReserved(domain)
        if normalized(domain) != domain:
            raise ValueError(f"{domain!r} is no domain as Caddy looks it up")
        return self._lead(domain, target)

    def _lead(self, domain: str, target: str) -> str | None:
        if not TARGET.fullmatch(target):
            raise ValueError(f"{target!r} is no target of a route")
        with self._setting:
            place = self._targets / target
            place.mkdir(mode=0o755, exist_ok=True)
            if not (place / target).exists():  # it may be root's, of before the gateway had its own user
                (place / target).touch(mode=0o644)
            before = self.get(domain)
            if before != target:
                new = self._targets / f".new-{secrets.token_hex(6)}"
                new.symlink_to(f"../targets/{target}")
                new.replace(self.routes / domain)
        return before

    def get(self, domain: str) -> str | None:
        """Return where a domain leads, or None."""
        try:
            return (self.routes / domain).readlink().name
        except OSError:
            return None

    def unset(self, domain: str) -> None:
        """Lead a domain nowhere. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            (self.routes / domain).unlink()

    def excuse(self, domain: str, away: bool) -> None:
        """Answer visitors of a domain by a page instead of its site, or no longer. Idempotent.

        What has begun goes on: only what comes from now on sees the page.
        """
        if plain(domain) != domain:  # as somebody wrote it into Incus by hand
            return
        if away:
            (self._away / domain).touch(mode=0o644)
        else:
            (self._away / domain).unlink(missing_ok=True)

    def excuse_nobody(self) -> None:
        """Take down all pages, as a gateway does when it starts: it has seen no site hang yet."""
        for place in list(self._away.iterdir()):
            place.unlink(missing_ok=True)

    def sleeps(self, domain: str) -> bool:
        """Say whether Caddy asks the gateway before it hands on what comes to a domain."""
        return (self.get(domain) or "").startswith(_ASLEEP)

    def listed(self) -> dict[str, str]:
        """Return every domain with where it leads."""
        found = {entry.name: self.get(entry.name) for entry in self.routes.iterdir() if entry.name != PROBE}
        return {domain: target for domain, target in found.items() if target is not None}

    def reconcile(
        self, wanted: Mapping[str, str], leave: Collection[str], sockets: Collection[str]
    ) -> list[str]:
        """Make the routes what they should be, but for the domains in `leave`; return what was changed.

        Of the sockets only those that are named stay: Incus leaves the file of one that it no longer needs.
        """
        changed = []
        leave = {*leave, self._home(), PROBE}
        for domain, target in wanted.items():
            healthy = self.get(domain) == target and (self._targets / target / target).exists()
            if domain not in leave and not healthy:
                try:
                    self.set(domain, target)
                except (GatewayError, ValueError) as error:
                    log.warning("%r leads nowhere: %s", domain, error)
                else:
                    changed.append(domain)
        for entry in list(self.routes.iterdir()):
            if (entry.name not in wanted or reserved(entry.name, self._own)) and entry.name not in leave:
                self.unset(entry.name)
                changed.append(entry.name)
        for entry in list(self.sockets.iterdir()):
            if entry.name not in sockets:
                entry.unlink(missing_ok=True)
        with self._setting:
            used = {*self.listed().values(), self.get(PROBE)}
            for place in list(self._targets.iterdir()):
                if place.is_symlink():  # of a gateway that was killed before it became a route
                    place.unlink()
                elif place.name not in used:
                    shutil.rmtree(place, ignore_errors=True)
        return changed

    # --- the configuration --------------------------------------------------------------------------

    def rendered(self, streams: str = "") -> dict[str, str]:
        """Return the files of the configuration with this gateway's values in them."""
        settings = self._settings
        values = {
            "ADMIN": _caddy_address(settings.caddy_admin),
            "DATA": str(self.folder / "data"),
            "HTTP": str(settings.caddy_http),
            "HTTPS": str(settings.caddy_https),
            "HTTPS_SUFFIX": "" if settings.caddy_https == 443 else f":{settings.caddy_https}",
            "ASK": str(settings.caddy_ask),
            "ISSUER": "internal" if settings.caddy_issuer == "internal" else settings.caddy_email,
            "ROUTES": str(self.routes),
            "SOCKETS": str(self.sockets),
            "AWAY": str(self._away),
            "GATEWAY": self._gateway(),
            "KEEPALIVE": f"{settings.caddy_keepalive:g}s",
            "WAKE_TIMEOUT": f"{settings.wake_timeout:g}s",
            "SITE": str(self.folder / "site.caddy"),
            "STREAMS": streams,
        }
        files = {}
        for name in ("Caddyfile", "site.caddy"):
            text = shipped("caddy").joinpath(name).read_text()
            for key, value in values.items():
                text = text.replace("{$GATEWAY_CADDY_" + key + "}", value)
            files[name] = text
        return files

    def write(self) -> Path:
        """Write the configuration for a Caddy that is to be started with it; return its main file."""
        for name, text in self.rendered().items():
            new = self.folder / f".{name}.new"
            new.write_text(text)
            new.replace(self.folder / name)
        return self.folder / "Caddyfile"

    def serves(self, running: Mapping[str, Any]) -> bool:
        """Say whether a Caddy's configuration is ours, or an operator's own that looks our routes up."""
        return self._ours(running) or str(self.routes) in orjson.dumps(running).decode()

    def _ours(self, running: Mapping[str, Any]) -> bool:
        root = running.get("storage", {}).get("root")
        if "apps" not in running or root is None:
            return False
        # it may name the same folder by where that was before
        return Path(root).resolve() == (self.folder / "data").resolve()

    async def ensure(self) -> bool:
        """Have Caddy run our configuration; return whether it had to be loaded. Raises `CaddyFailed`.

        A configuration that is not ours is left alone, and one that Caddy refuses changes nothing: the
        old one goes on, its files too.
        """
        async with self._loading:
            try:
                running = await self._ask("GET", "/config/") or {}
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
                    f"the Caddy at {self._address} serves something else, which stays as it is; "
                    "let it import our sites as docs/operations.md says, or start one of our own "
                    "(deploy/quickstart does) with another GATEWAY_CADDY_ADMIN",
                    reason="caddy_foreign",
                )
            before = {name: _text(self.folder / name) for name in ("Caddyfile", "site.caddy")}
            same = self._ours(running) and before == self.rendered()
            stay = _STREAMS in orjson.dumps(running).decode()
            if same and stay == self._streams_can_stay:
                return False
            adapted = await self._adapted()
            if same and stay == self._streams_can_stay:
                return False
            self.write()
            try:
                await self._ask("POST", "/load", adapted)
            except CaddyFailed:
                for name, text in before.items():
                    if text is not None:
                        (self.folder / name).write_text(text)
                raise
            return True

    async def _look(self) -> None:
        """See whether Caddy finds our routes, by one of our own. Raises `CaddyFailed`."""
        self._lead(PROBE, "127.0.0.1:9")  # nothing listens there (RFC 863)
        status = await self._site(self._settings.caddy_ask, "127.0.0.1", f"/?domain={PROBE}", 10.0)
        if status != 200:
            raise CaddyFailed(
                f"the Caddy at port {self._settings.caddy_ask} does not find the routes in {self.routes}: it "
                "looks into another folder, or may not enter this one; set GATEWAY_CADDY_DIR, and see "
                "docs/operations.md",
                reason="caddy_foreign",
            )
        if any(_text(self.folder / name) != text for name, text in self.rendered().items()):
            log.warning("Caddy's configuration is not that of these settings; run deploy/quickstart as root")

    async def _adapted(self) -> Any:
        """Return the configuration as Caddy's own JSON.

        What not every Caddy understands is in there only and never in the files: the next Caddy that starts
        from those may be an older one. JSON, since /load answers a Caddyfile for which it has a mere warning
        with 200 even where it then refuses it (Caddy 2.6).
        """
        main, site = "Caddyfile", "site.caddy"
        for streams in ("",) if self._streams_can_stay is False else (_STREAMS_STAY, ""):
            files = self.rendered(streams)
            text = files[main].replace(f"import {self.folder / site}\n", files[site])
            try:
                adapted = (await self._ask("POST", "/adapt", text))["result"]
            except CaddyFailed as error:
                if error.facts["reason"] != "caddy_refused" or not streams:
                    raise
            else:
                self._streams_can_stay = bool(streams)
                return adapted
        raise AssertionError("one of the two was returned or raised")

    async def _ask(self, method: str, path: str, body: str | dict[str, Any] | None = None) -> Any:
        """Ask the admin API; a text is a Caddyfile, anything else JSON."""
        assert self._admin is not None
        address = self._address
        unix = socket_of(address) is not None
        url = ("http://caddy" if unix else address.rstrip("/")) + path
        # on a unix socket Caddy wants no origin and takes any host
        headers = {"Content-Type": "text/caddyfile" if isinstance(body, str) else "application/json"}
        data = body if body is None or isinstance(body, str) else orjson.dumps(body)
        if unix:
            headers["Host"] = ""
        try:
            async with self._admin.request(method, url, data=data, headers=headers) as answer:
                said = await answer.read()
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
        if answer.status >= 400:
            reason = said.decode(errors="replace")[:500]
            raise CaddyFailed(f"Caddy refuses our configuration: {reason}", reason="caddy_refused")
        try:
            return orjson.loads(said) if said.strip() else None
        except ValueError:
            return None

    # --- sites as the world sees them ---------------------------------------------------------------

    def url(self, domain: str) -> str:
        return site_url(domain, self._settings)

    async def ask(self, domain: str, path: str, timeout: float) -> int:
        """Ask a site through Caddy, by the listener that needs no certificate; return the status.

        Raises `CaddyFailed`.
        """
        return await self._site(self._settings.caddy_ask, domain, path, timeout)

    async def certify(self, domain: str, timeout: float) -> str | None:
        """Ask a site by HTTPS, which makes its certificate; return what went wrong, or None."""
        try:
            await self._site(self._settings.caddy_https, domain, "/", timeout, _any_certificate())
        except CaddyFailed as error:
            return error.message
        return None

    @staticmethod
    async def _site(
        port: int, domain: str, path: str, timeout: float, tls: ssl.SSLContext | None = None
    ) -> int:
        # it is this machine's Caddy that is asked, but a tenant's site that answers
        try:
            return await ask("127.0.0.1", port, path, _CONNECT, timeout, host=domain, tls=tls)
        except (OSError, ValueError) as error:
            what = "does not answer" if tls is None else "has no certificate for it yet"
            raise CaddyFailed(f"Caddy {what}: {type(error).__name__}", reason="caddy_down") from error


def _any_certificate() -> ssl.SSLContext:
    # who signed it is the visitor's question; ours is whether there is one, asked on this machine
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def socket_of(address: str) -> str | None:
    """Return the path of a unix socket in `/PATH`, `unix:/PATH` or Caddy's `unix//PATH`."""
    if address.startswith("/"):
        return address
    match = re.fullmatch(r"unix(?::(?://)?|/)(/.+)", address)
    return None if match is None else match[1]


def _caddy_address(address: str) -> str:
    path = socket_of(address)
    return f"unix/{path}" if path is not None else address.split("://")[-1].rstrip("/")


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
