"""Host names: which are valid, reserved, or allowed by a pattern.

Two spellings of one name compare equal only once both are `normalized`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from gateway.errors import Conflict, Forbidden, InvalidParams
from gateway.protocol.maxima import DOMAIN_MAX as _MAX
from gateway.protocol.maxima import HEADERS

if TYPE_CHECKING:
    from gateway.settings import Settings

PROBE: Final = "probe.invalid"
"""A domain of nobody (RFC 2606), by which Caddy is seen to look routes up."""

_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOST: Final = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(?::[0-9]*)?")
_NAME_MAX: Final = 63


class DomainReserved(Conflict):
    """The domain is the gateway's own or reserved for it; `reason` is `domain_owned`."""

    def __init__(self, domain: str) -> None:
        super().__init__(f"{domain} is the gateway's own; choose another", reason="domain_owned")


def normalized(text: str) -> str:
    """Return a domain in lower case and, if it is not ASCII, in IDNA. Raises `InvalidParams`."""
    # IDNA takes microseconds for each character, and a name never becomes shorter by it
    domain = text.strip().lower().removesuffix(".") if len(text) <= _MAX + 1 else ""
    try:
        domain = domain.encode("ascii" if domain.isascii() else "idna").decode("ascii").lower()
    except UnicodeError:
        domain = ""
    labels = domain.split(".")
    if len(domain) > _MAX or len(labels) < 2 or not all(_LABEL.fullmatch(label) for label in labels):
        raise InvalidParams(f"{text[:100]!r} is not a domain such as shop.example.com", field="domain")
    if labels[-1].isdigit():
        raise InvalidParams(f"{text[:100]!r} is an IP address; a site needs a domain", field="domain")
    return domain


def plain(text: str | None) -> str | None:
    """Return a domain as `normalized` does, or None if it is not valid."""
    try:
        return None if text is None else normalized(text)
    except InvalidParams:
        return None


def tenant_name(domain: str) -> str:
    """Return the tenant name for a domain: dots become dashes, long names are cut and hashed."""
    name = domain.replace(".", "-")
    if not name[0].isalpha():
        name = f"s-{name}"
    if len(name) <= _NAME_MAX:
        return name
    digest = hashlib.sha256(domain.encode()).hexdigest()[:10]
    return f"{name[: _NAME_MAX - 11].rstrip('-')}-{digest}"


# --- patterns ----------------------------------------------------------------------------------------


def pattern(text: str) -> str:
    """Return an entry of a token's `domains` in normal form: a domain, or `*.` and a suffix.

    Raises `InvalidParams`.
    """
    head, star, suffix = text.strip().partition("*.")
    if not star or head:
        return normalized(text)
    # a suffix may have a single label, such as `localhost`; a whole domain may not
    try:
        return f"*.{normalized(f'x.{suffix}').removeprefix('x.')}"
    except InvalidParams:
        raise InvalidParams(
            f"{text[:100]!r} is not a domain, nor a *.suffix of domains", field="domains"
        ) from None


def matches(domain: str, patterns: Iterable[str]) -> bool:
    """Return whether a domain matches one of the patterns; `*.suffix` matches names at any depth."""
    return any(
        domain.endswith(entry[1:]) if entry.startswith("*.") else domain == entry for entry in patterns
    )


# --- the gateway's own -------------------------------------------------------------------------------


class Misdirected(Forbidden):
    """The request was meant for another host."""

    http_status = 421


def gateway_hosts(settings: Settings) -> frozenset[str]:
    """Return the gateway's names in requests, besides addresses and `localhost`; `*` is any."""
    by_socket = "/" in settings.listen
    origins = (urlsplit(origin).hostname for origin in settings.origins)
    given = ("*" if by_socket else settings.listen, settings.domain, *origins, *settings.hosts)
    return frozenset(_host(name) for name in given) - {""}


def host_allowed(host: str | None, own: Collection[str], *, near: bool) -> bool:
    """Return whether a request with this `Host` is for us; this prevents DNS rebinding.

    `own` is the result of `gateway_hosts`. A foreign page whose name resolves to the gateway's address sends
    that name. An IP address cannot be redirected, nor can `localhost` for a client on this machine (`near`).
    A client without a `Host` is not a browser. Browsers send names in ASCII, so IDNA is not tried here.
    """
    if not host or "*" in own:
        return True
    if not host.isascii() or len(host) > HEADERS["host"]:
        return False
    name = _host(host)
    if name in own:
        return True
    if matches(name, ("localhost", "*.localhost")):
        return near
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def gateway_names(settings: Settings) -> frozenset[str]:
    """Return the gateway's own names and its probe's, which no tenant may have."""
    return (gateway_hosts(settings) | {PROBE, "localhost"}) - {"*"}


def reserved(domain: str, own: Collection[str]) -> bool:
    """Return whether a name, in any spelling, is one of `gateway_names`."""
    return matches(_lowered(domain), own)


def _host(text: str | None) -> str:
    """Return the normalized host of `HOST:PORT`, or the text itself if it is invalid."""
    match = _HOST.fullmatch(text or "")
    return _lowered(match[1].strip("[]")) if match else text or ""


def _lowered(name: str) -> str:
    return plain(name) or name.strip().lower().removesuffix(".")
