"""Where the gateway listens, where its tenants live, and which pages may ask it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, SecretStr

from gateway.settings.client import LISTEN, STATE_DIR
from gateway.settings.lists import Names, Origins


class ServerSettings(BaseModel):
    listen: str = Field(LISTEN, description="address to listen on: HOST:PORT, or the path of a unix socket")
    runtime: Literal["incus", "local"] = Field(
        "incus",
        description="where tenants run: in Incus containers, or as `local` processes, which are not isolated",
    )
    incus_socket: Path = Field(Path("/var/lib/incus/unix.socket"), description="unix socket of incusd")
    incus_project: str = Field("default", description="Incus project of the tenants")
    state_dir: Path = Field(
        Path(STATE_DIR), description="folder for the secret, the records and local tenants"
    )
    secret: SecretStr | None = Field(
        None, description="key that signs tokens; unset: one is created in the state dir"
    )
    hold: float = Field(
        60.0,
        gt=0,
        description="seconds that the holder keeps running commands for a gateway that was restarted or "
        "killed",
    )
    origins: Origins = Field(
        (), description="origins of web pages that may use the gateway besides its own, comma-separated"
    )
    hosts: Names = Field(
        (),
        description="host names that the gateway answers to besides IP addresses, `localhost`, "
        "GATEWAY_DOMAIN and the hosts of GATEWAY_LISTEN and GATEWAY_ORIGINS, comma-separated; "
        "`*` for any",
    )
