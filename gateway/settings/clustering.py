"""A gateway among others: on the members of an Incus cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field


class ClusterSettings(BaseModel):
    peer_listen: str = Field(
        ":8444",
        pattern=r"^.*:[0-9]{1,5}$",
        description="address to listen on for other members' gateways: HOST:PORT; without a host, this "
        "member's address in the cluster",
    )
    advertise: str | None = Field(
        None, description="URL at which clients reach this member's gateway directly; reported as `home`"
    )
    placement: Literal["spread", "local"] = Field(
        "spread",
        description="member that gets a new tenant: the one with the smallest share of its memory in use "
        "(`spread`), or the one that is asked (`local`)",
    )
    local_member: Path | None = Field(
        None,
        description="file of this gateway in a folder through which gateways of the runtime `local` on one "
        "machine find one another, each as a cluster member named like its file",
    )
    cluster_project: str = Field(
        "gateway-keys",
        description="Incus project for the keys that the gateways of a cluster share, and for nothing else",
    )
    standby: float = Field(
        0.0,
        ge=0,
        description="seconds between two copies of each tenant to another member, from which `incus-gateway "
        "cluster recover` brings it back if its own member is lost; 0: none. `user.gateway.standby` of an "
        "instance overrides it",
    )
    standby_project: str = Field(
        "gateway-standby", description="Incus project for these copies, and for nothing else"
    )
    # moves of tenants
    moves_at_once: int = Field(
        2, gt=0, description="maximum number of tenants that leave this member at once"
    )
