"""Caddy in front of the sites, their domains, and how they are reached."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from gateway.settings.lists import Suffixes


class RouteSettings(BaseModel):
    caddy_dir: Path | None = Field(
        None,
        description="Caddy's configuration and routes; unset: `caddy` in the state dir",
    )
    caddy_admin: str = Field("http://127.0.0.1:2019", description="URL or unix socket of Caddy's admin API")
    caddy_http: int = Field(80, gt=0, lt=65536, description="port of Caddy for HTTP")
    caddy_https: int = Field(443, gt=0, lt=65536, description="port of Caddy for HTTPS")
    caddy_ask: int = Field(
        2020,
        gt=0,
        lt=65536,
        description="port of Caddy on loopback, by which it and the gateway look sites up",
    )
    caddy_issuer: Literal["acme", "internal"] = Field(
        "acme", description="who signs sites' certificates: a public authority, or Caddy itself"
    )
    caddy_email: str = Field("", description="address that a public authority writes to")
    caddy_keepalive: float = Field(
        4.0,
        gt=0,
        description="seconds that Caddy keeps an unused connection to a site; fewer than the site does",
    )
    domain: str | None = Field(
        None, description="the gateway's own domain behind Caddy; not with a unix socket to listen on"
    )
    domain_suffixes: Suffixes = Field(
        ("localhost",),
        description="suffixes under which every token may give its tenants `NAME.SUFFIX`, comma-separated",
    )
    expose: Literal["address", "port", "socket"] = Field(
        "address",
        description="how Caddy reaches a site: at its address, by a proxy device's port or by its socket",
    )
    expose_ports: str = Field("20000-29999", description="ports of this host for proxy devices")
    templates_dir: Path | None = Field(None, description="folder of site templates beside the built-in ones")
