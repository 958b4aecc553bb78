"""Where the gateway listens, where its tenants live, and which pages may ask it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, SecretStr

from gateway.settings.lists import Names, Origins


class ServerSettings(BaseModel):
    listen: str = Field("127.0.0.1:8080", description="HOST:PORT, or the path of a unix socket")
    runtime: Literal["incus", "local"] = Field(
        "incus", description="where tenants live; `local` does not isolate"
    )
    incus_socket: Path = Field(Path("/var/lib/incus/unix.socket"), description="unix socket of incusd")
    incus_project: str = Field("default", description="Incus project of the tenants")
    state_dir: Path = Field(Path("/var/lib/incus-gateway"), description="secret, records and local tenants")
    secret: SecretStr | None = Field(None, description="signs tokens; made in the state dir where unset")
    origins: Origins = Field((), description="allowed browser origins beside same-origin, comma-separated")
    hosts: Names = Field(
        (),
        description="names by which the gateway may be asked, beside addresses, `localhost`, GATEWAY_DOMAIN "
        "and the hosts of GATEWAY_LISTEN and GATEWAY_ORIGINS; `*` for any",
    )
