"""The routes that Caddy looks up: where each domain leads, as links in a folder.

A route is a link, `routes/DOMAIN`, to a folder with one file that is named after the site's address. Caddy
looks for it at each request, so changing a route is a rename. Nothing is reloaded, which would cut every
websocket at once (Caddy before 2.7 has no `stream_close_delay`). The route of a sleeping site is marked, and
Caddy then asks the gateway before it passes a request on.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.errors import GatewayError, Unavailable
from gateway.hostnames import PROBE, DomainReserved, gateway_names, normalized, plain, reserved
from gateway.settings import Settings

log = logging.getLogger(__name__)

TARGET: Final = re.compile(r"(?:asleep_)?[0-9.]+:[0-9]+")
_ASLEEP: Final = "asleep_"
_ELSEWHERE: Final = "peer_"


def asleep(target: str) -> str:
    """Return the target that stands for a sleeping site, which is at `target` once it is awake."""
    return _ASLEEP + target.removeprefix(_ASLEEP)


def elsewhere(address: str) -> str:
    """Return the target of a site that another member's Caddy serves at HOST:PORT."""
    return _ELSEWHERE + address


class Routes:
    """The routes of one gateway. Each change is one rename; safe between threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._own = gateway_names(settings)
        self.folder = settings.caddy_folder
        self.routes = self.folder / "routes"
        self.away = self.folder / "away"  # has a file for each domain whose site hangs
        self._targets = self.folder / "targets"
        # a target is created before its route, and must not be removed as unused between the two
        self._setting = threading.Lock()
        # held while deciding what routes should be and setting them
        self.changing = asyncio.Lock()
        self._held: dict[str, asyncio.Event] = {}

    def route_own_domain(self) -> None:
        """Route the gateway's own domain to the gateway."""
        if self._settings.domain is not None and ":" in self._settings.listen:
            self._route(self._own_domain(), self.gateway())

    def create_folders(self) -> None:
        """Create the folders of the routes. Raises `CaddyFailed` if this user may not write to them."""
        for folder in (self.routes, self._targets, self.away):
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

    def join(self, address: str, secret: str) -> None:
        """Answer the Caddys of the cluster's other members at HOST:PORT, from the next `ensure` on.

        Raises `CaddyFailed` if this user may not write the files for that.
        """
        try:
            write_peer_files(self.folder, address, secret)
        except OSError as error:
            raise CaddyFailed(
                f"the gateway's user cannot write {self.folder / 'peers'}: {error.strerror}; "
                "`incus-gateway setup` as root gives it to that user",
                reason="caddy_denied",
            ) from error

    def leave(self) -> None:
        """Answer no other member's Caddy, and route to none, from the next `ensure` on. Idempotent."""
        with contextlib.suppress(OSError):
            remove_peer_files(self.folder)

    def _own_domain(self) -> str:
        """Return the gateway's own domain as Caddy looks it up, "" if there is none."""
        domain = self._settings.domain or ""
        return plain(domain) or domain.lower()

    def gateway(self) -> str:
        """Return the address at which Caddy reaches the gateway itself."""
        listen = self._settings.listen
        if listen.startswith("/"):
            return f"unix/{listen}"
        host, _, port = listen.rpartition(":")
        host = "127.0.0.1" if host in ("0.0.0.0", "") else host  # noqa: S104 - compared, not bound
        return f"{host}:{port}"

    def set(self, domain: str, target: str) -> str | None:
        """Route a tenant's domain to `ADDRESS:PORT`; return its target before. Atomic.

        Raises `DomainReserved` for a domain of the gateway's own.
        """
        if reserved(domain, self._own):
            raise DomainReserved(domain)
        if normalized(domain) != domain:
            raise ValueError(f"{domain!r} is not a normalized domain")
        return self._route(domain, asleep(target) if domain in self._held else target)

    def hold(self, domain: str) -> None:
        """Have visitors of a domain wait for `release`, whatever they ask and wherever it leads. Idempotent.

        Caddy asks the gateway before it passes a request on, as for a sleeping site.
        """
        self._held.setdefault(domain, asyncio.Event())
        if (target := self.get(domain)) is not None:
            self._route(domain, asleep(target))

    def release(self, domain: str) -> None:
        """Let held visitors go on to where their domain leads by now. Idempotent."""
        if (held := self._held.pop(domain, None)) is not None:
            if (target := self.get(domain)) is not None:
                self._route(domain, target.removeprefix(_ASLEEP))
            held.set()

    async def released(self, domain: str) -> None:
        """Wait until a domain is not held."""
        if (held := self._held.get(domain)) is not None:
            await held.wait()

    def _route(self, domain: str, target: str) -> str | None:
        peer = target.startswith(_ELSEWHERE) and is_address(target.removeprefix(_ELSEWHERE))
        if not peer and not TARGET.fullmatch(target):
            raise ValueError(f"{target!r} is not a target of a route")
        with self._setting:
            place = self._targets / target
            place.mkdir(mode=0o755, exist_ok=True)
            if not (place / target).exists():  # root may own it, if the gateway used to run as root
                (place / target).touch(mode=0o644)
            before = self.get(domain)
            if before != target:
                new = self._targets / f".new-{secrets.token_hex(6)}"
                new.symlink_to(f"../targets/{target}")
                new.replace(self.routes / domain)
        return before

    def get(self, domain: str) -> str | None:
        """Return the target of a domain, or None."""
        try:
            return os.path.basename(os.readlink(f"{self.routes}/{domain}"))
        except OSError:
            return None

    def unset(self, domain: str) -> None:
        """Remove the route of a domain. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            (self.routes / domain).unlink()

    def show_error_page(self, domain: str, away: bool) -> None:
        """Answer new requests for a domain with a page instead of its site, or no longer. Idempotent.

        Requests in progress are not affected.
        """
        if plain(domain) != domain:  # written into Incus by hand
            return
        if away:
            (self.away / domain).touch(mode=0o644)
        else:
            (self.away / domain).unlink(missing_ok=True)

    def clear_error_pages(self) -> None:
        """Remove all such pages. For the gateway's start, when it has seen no site hang yet."""
        for place in list(self.away.iterdir()):
            place.unlink(missing_ok=True)

    def sleeps(self, domain: str) -> bool:
        """Return whether Caddy asks the gateway before it passes on a request for this domain."""
        return (self.get(domain) or "").startswith(_ASLEEP)

    def remote_domains(self) -> frozenset[str]:
        """Return the domains that lead to other members of the cluster."""
        return frozenset(domain for domain, target in self.listed().items() if target.startswith(_ELSEWHERE))

    def listed(self) -> dict[str, str]:
        """Return the target of each domain."""
        found = {name: self.get(name) for name in os.listdir(self.routes) if name != PROBE}
        return {domain: target for domain, target in found.items() if target is not None}

    def reconcile(self, wanted: Mapping[str, str], leave: Collection[str]) -> list[str]:
        """Set the routes as wanted, except for the domains in `leave`; return the domains that changed."""
        changed = []
        leave = {*leave, self._own_domain(), PROBE}
        for domain, target in wanted.items():
            healthy = self.get(domain) == target and os.path.exists(f"{self._targets}/{target}/{target}")
            if domain not in leave and not healthy:
                try:
                    self.set(domain, target)
                except (GatewayError, ValueError) as error:
                    log.warning("cannot route %r: %s", domain, error)
                else:
                    changed.append(domain)
        for name in os.listdir(self.routes):
            if (name not in wanted or reserved(name, self._own)) and name not in leave:
                self.unset(name)
                changed.append(name)
        with self._setting:
            used = {*self.listed().values(), self.get(PROBE)}
            for name in {*os.listdir(self._targets)} - used:
                place = self._targets / name
                if place.is_symlink():  # left by a gateway that was killed before it was a route
                    place.unlink()
                else:
                    shutil.rmtree(place, ignore_errors=True)
        return changed


class CaddyFailed(Unavailable):
    """Caddy is down, refuses, or is not ours.

    `facts["reason"]` is `caddy_down`, `caddy_denied`, `caddy_foreign` or `caddy_refused`.
    """


NAME: Final = "sites.gateway.internal"
"""The name in the certificate. It is no host's."""

_PEERS_FOLDER: Final = "peers"
_ADDRESS: Final = re.compile(r"(?P<host>[0-9A-Za-z.-]+|\[[0-9a-f:]+\]):(?P<port>[0-9]{1,5})")
_SINCE: Final = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_UNTIL: Final = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class PeerEndpoint:
    """Where this Caddy answers the other members', and the files of the common certificate."""

    host: str
    port: int
    certificate: Path
    key: Path


def peer_endpoint(folder: Path) -> PeerEndpoint | None:
    """Return what `write_peer_files` laid into Caddy's folder; None if this is no member of a cluster."""
    try:
        match = _ADDRESS.fullmatch((folder / _PEERS_FOLDER / "address").read_text().strip())
    except OSError:
        return None
    if match is None:
        return None
    certificate, key = folder / _PEERS_FOLDER / "certificate.pem", folder / _PEERS_FOLDER / "key.pem"
    return PeerEndpoint(match["host"], int(match["port"]), certificate, key)


def is_address(text: str) -> bool:
    """Return whether a text is HOST:PORT as Caddy takes it from a route."""
    return _ADDRESS.fullmatch(text) is not None


def write_peer_files(folder: Path, address: str, secret: str) -> None:
    """Have Caddy answer other members at HOST:PORT once its configuration is loaded. Raises `OSError`.

    Only the gateway and Caddy can read the key: it has the group of Caddy's `data`, if root lays it.
    """
    if not is_address(address):
        raise ValueError(f"{address!r} is not HOST:PORT")
    place = folder / _PEERS_FOLDER
    place.mkdir(mode=0o755, parents=True, exist_ok=True)
    certificate, key = certified(secret)
    _put(place / "key.pem", key, 0o640, _group(folder))
    _put(place / "certificate.pem", certificate, 0o644)
    _put(place / "address", f"{address}\n".encode(), 0o644)


def remove_peer_files(folder: Path) -> None:
    """Have Caddy answer no other member. Idempotent. Raises `OSError`."""
    for name in ("address", "key.pem", "certificate.pem"):
        (folder / _PEERS_FOLDER / name).unlink(missing_ok=True)


def certified(secret: str) -> tuple[bytes, bytes]:
    """Return certificate and key in PEM, always the same ones for a secret (Ed25519, RFC 8032)."""
    # brings OpenSSL, which a gateway without a cluster does without
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    seed = HKDF(hashes.SHA256(), 32, None, b"incus-gateway sites of peers").derive(secret.encode())
    key = Ed25519PrivateKey.from_private_bytes(seed)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, _SINCE, _UNTIL)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(usages, critical=False)
        .sign(key, None)
    )
    pem = serialization.Encoding.PEM
    hidden = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem), hidden


def _group(folder: Path) -> int:
    try:
        return (folder / "data").stat().st_gid
    except OSError:
        return -1


def _put(path: Path, content: bytes, mode: int, group: int = -1) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)
        if os.geteuid() == 0 and group != -1:
            os.fchown(file.fileno(), -1, group)
    new.replace(path)
