"""A gateway among others: on the members of an Incus cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from gateway.settings.units import KiB


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
    cluster_patience: float = Field(
        2.0,
        gt=0,
        description="seconds to wait for a decision of the cluster, which cannot decide without a quorum",
    )
    cluster_home_kept: float = Field(
        3600.0,
        gt=0,
        description="seconds for which all requests for a new tenant go to the member that was chosen first",
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
    standby_timeout: float = Field(
        900.0, gt=0, description="seconds that one copy may take; the first one transfers the whole disk"
    )
    cluster_events_ahead: int = Field(
        64 * KiB,
        gt=0,
        description="bytes of each other member's events that are read ahead for one stream of all members' "
        "events",
    )
    # moves of tenants
    moves_at_once: int = Field(
        2, gt=0, description="maximum number of tenants that leave this member at once"
    )
    move_patience: float = Field(
        30.0,
        gt=0,
        description="seconds that a call waits for a tenant that is moving to another member",
    )
    move_waiting: int = Field(
        200, gt=0, description="maximum number of calls and connections that wait for one moving tenant"
    )
    move_calls: float = Field(
        1.0,
        ge=0,
        description="seconds that running calls have to finish before their tenant is stopped for its move",
    )
    move_copy_timeout: float = Field(
        3600.0, gt=0, description="seconds that the copy of a tenant's disk to another member may take"
    )
