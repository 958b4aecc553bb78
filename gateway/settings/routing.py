"""Caddy in front of the sites, their domains, and how they are reached."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from gateway.settings.lists import Suffixes


class RouteSettings(BaseModel):
    caddy_dir: Path | None = Field(
        None,
        description="folder of Caddy's configuration and routes; unset: `caddy` in the state dir",
    )
    caddy_admin: str = Field("http://127.0.0.1:2019", description="URL or unix socket of Caddy's admin API")
    caddy_http: int = Field(80, gt=0, lt=65536, description="port where Caddy serves HTTP")
    caddy_https: int = Field(443, gt=0, lt=65536, description="port where Caddy serves HTTPS")
    caddy_ask: int = Field(
        2020,
        gt=0,
        lt=65536,
        description="loopback port of Caddy where it and the gateway look sites up",
    )
    caddy_peers: int = Field(
        8445,
        gt=0,
        lt=65536,
        description="port at a cluster member's address where the other members' Caddys request its sites; "
        "the same on all members",
    )
    caddy_issuer: Literal["acme", "internal"] = Field(
        "acme",
        description="issuer of the sites' certificates: a public authority (`acme`) or Caddy itself "
        "(`internal`)",
    )
    caddy_email: str = Field("", description="email address that the public authority writes to")
    caddy_retry: float = Field(
        2.0,
        ge=0,
        description="seconds that visitors wait for a site that accepts no connections, for example while "
        "its server restarts; 0: not at all",
    )
    domain: str | None = Field(
        None, description="domain of the gateway itself, behind Caddy; needs GATEWAY_LISTEN to be HOST:PORT"
    )
    domain_suffixes: Suffixes = Field(
        ("localhost",),
        description="suffixes under which every token may give its tenants a domain `NAME.SUFFIX`, "
        "comma-separated",
    )
    templates_dir: Path | None = Field(
        None, description="folder with more site templates besides the built-in ones"
    )
