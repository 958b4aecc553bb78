"""Fills in Caddy's configuration files, and says whether a running configuration is ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gateway.caddy.admin import socket_of
from gateway.caddy.routes import Routes
from gateway.settings import Settings

FILES: Final = ("Caddyfile", "site.caddy")


def shipped(name: str) -> Path:
    """Return a file or folder that comes with the gateway, from its package or its checkout."""
    package = Path(__file__).parent.parent
    inside = package / "shipped" / name
    return inside if inside.exists() else package.parent / name


def site_url(domain: str, settings: Settings) -> str:
    """Return the URL of a site that people open."""
    if domain.endswith(".localhost"):
        return f"http://{domain}" + ("" if settings.caddy_http == 80 else f":{settings.caddy_http}")
    return f"https://{domain}" + ("" if settings.caddy_https == 443 else f":{settings.caddy_https}")


def rendered(settings: Settings, routes: Routes, streams: str = "") -> dict[str, str]:
    """Return the files of the configuration with this gateway's values in them."""
    values = {
        "ADMIN": _caddy_address(settings.caddy_admin),
        "DATA": str(routes.folder / "data"),
        "HTTP": str(settings.caddy_http),
        "HTTPS": str(settings.caddy_https),
        "HTTPS_SUFFIX": "" if settings.caddy_https == 443 else f":{settings.caddy_https}",
        "ASK": str(settings.caddy_ask),
        "ISSUER": "internal" if settings.caddy_issuer == "internal" else settings.caddy_email,
        "ROUTES": str(routes.routes),
        "SOCKETS": str(routes.sockets),
        "AWAY": str(routes.away),
        "GATEWAY": routes.gateway(),
        "KEEPALIVE": f"{settings.caddy_keepalive:g}s",
        "WAKE_TIMEOUT": f"{settings.wake_timeout:g}s",
        "SITE": str(routes.folder / "site.caddy"),
        "STREAMS": streams,
    }
    files = {}
    for name in FILES:
        text = shipped("caddy").joinpath(name).read_text()
        for key, value in values.items():
            text = text.replace("{$GATEWAY_CADDY_" + key + "}", value)
        files[name] = text
    return files


def written(folder: Path) -> dict[str, str | None]:
    """Return the files of the configuration as they are on disk, None for one that cannot be read."""
    return {name: _text(folder / name) for name in FILES}


def write(folder: Path, files: Mapping[str, str]) -> Path:
    """Write the files of a configuration; return its main file."""
    for name, text in files.items():
        new = folder / f".{name}.new"
        new.write_text(text)
        new.replace(folder / name)
    return folder / "Caddyfile"


def ours(folder: Path, running: Mapping[str, Any]) -> bool:
    """Say whether a Caddy that runs this configuration is the one of the gateway with this folder."""
    root = running.get("storage", {}).get("root")
    if "apps" not in running or root is None:
        return False
    # it may name the same folder by where that was before
    return Path(root).resolve() == (folder / "data").resolve()


def _caddy_address(address: str) -> str:
    path = socket_of(address)
    return f"unix/{path}" if path is not None else address.split("://")[-1].rstrip("/")


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
