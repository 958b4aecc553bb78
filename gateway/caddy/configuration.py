"""Fills in Caddy's configuration files, and recognises our own running configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gateway.caddy.admin import socket_of
from gateway.caddy.peers import NAME, Peers, peers
from gateway.caddy.routes import Routes
from gateway.settings import Settings

MAIN: Final = "Caddyfile"
_SITE: Final = "site.caddy"
_PEERS: Final = "peers.caddy"


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


def rendered(settings: Settings, routes: Routes, streams: str = "") -> dict[str, str]:
    """Return the files of the configuration with this gateway's values in them, the main one first."""
    members = peers(routes.folder)
    values = _values(settings, routes, streams) | _of_peers(routes.folder, members)
    site = _text_of(_SITE)
    files = {MAIN: _text_of(MAIN), _SITE: site}
    if members is not None:
        files[_SITE] += "\n" + _text_of("elsewhere.caddy")
        # peers are asked by visitors, and say which
        trusting = site.replace("{$GATEWAY_CADDY_TRUSTED}", "trusted_proxies 0.0.0.0/0 ::/0")
        files[_PEERS] = re.sub(r"(\(|import )(site)", r"\1peer_\2", trusting) + "\n" + _text_of(_PEERS)
        values["ELSEWHERE"] = "import site_elsewhere"
        files[_PEERS] = files[_PEERS].replace("{$GATEWAY_CADDY_ELSEWHERE}", "import peer_site_elsewhere")
    return {name: _filled(text, values) for name, text in files.items()}


def joined(folder: Path, files: Mapping[str, str]) -> str:
    """Return the files of a configuration as one text."""
    text = files[MAIN]
    for name, more in files.items():
        text = text.replace(f"import {folder / name}\n", more)
    return text


def _text_of(name: str) -> str:
    return shipped("caddy").joinpath(name).read_text()


def _filled(text: str, values: Mapping[str, str]) -> str:
    for key, value in values.items():
        text = text.replace("{$GATEWAY_CADDY_" + key + "}", value)
    return text


def _of_peers(folder: Path, members: Peers | None) -> dict[str, str]:
    if members is None:
        return {"PEERS": "", "TRUSTED": "", "ELSEWHERE": ""}
    return {
        "PEERS": f"import {folder / _PEERS}",
        "PEER_HOST": members.host.strip("[]"),
        "PEER_PORT": str(members.port),
        "PEER_CERTIFICATE": str(members.certificate),
        "PEER_KEY": str(members.key),
        "PEER_NAME": NAME,
        "TRUSTED": "",
    }


def _values(settings: Settings, routes: Routes, streams: str) -> dict[str, str]:
    return {
        "ADMIN": _caddy_address(settings.caddy_admin),
        "DATA": str(routes.folder / "data"),
        "HTTP": str(settings.caddy_http),
        "HTTPS": str(settings.caddy_https),
        "HTTPS_SUFFIX": "" if settings.caddy_https == 443 else f":{settings.caddy_https}",
        "ASK": str(settings.caddy_ask),
        "ISSUER": "internal" if settings.caddy_issuer == "internal" else settings.caddy_email,
        "ROUTES": str(routes.routes),
        "AWAY": str(routes.away),
        "GATEWAY": routes.gateway(),
        "KEEPALIVE": f"{settings.caddy_keepalive:g}s",
        "RETRY": f"{settings.caddy_retry:g}s",
        "WAKE_TIMEOUT": f"{settings.wake_timeout:g}s",
        "SITE": str(routes.folder / "site.caddy"),
        "STREAMS": streams,
    }


def written(folder: Path) -> dict[str, str | None]:
    """Return the configuration's files as they are on disk; None for one that cannot be read.

    The one for peers exists in a cluster only.
    """
    found = {name: _text(folder / name) for name in (MAIN, _SITE, _PEERS)}
    return {name: text for name, text in found.items() if name != _PEERS or text is not None}


def write(folder: Path, files: Mapping[str, str]) -> Path:
    """Write the files of a configuration; return its main file."""
    for name, text in files.items():
        new = folder / f".{name}.new"
        new.write_text(text)
        new.replace(folder / name)
    if _PEERS not in files:
        (folder / _PEERS).unlink(missing_ok=True)
    return folder / MAIN


def ours(folder: Path, running: Mapping[str, Any]) -> bool:
    """Return whether a running configuration belongs to the gateway with this folder."""
    root = running.get("storage", {}).get("root")
    if "apps" not in running or root is None:
        return False
    # it may name the same folder by its former path
    return Path(root).resolve() == (folder / "data").resolve()


def _caddy_address(address: str) -> str:
    path = socket_of(address)
    return f"unix/{path}" if path is not None else address.split("://")[-1].rstrip("/")


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
