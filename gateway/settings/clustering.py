"""A gateway among others: on the members of an Incus cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, Field, model_validator

from gateway.settings.units import KiB

MARGIN: Final = 5.0
"""Seconds from the end of a member's lease until its tenants may run elsewhere, at least."""


class ClusterSettings(BaseModel):
    peer_listen: str = Field(
        ":8444",
        pattern=r"^.*:[0-9]{1,5}$",
        description="address to listen on for the gateways of other members, if there are any: HOST:PORT; "
        "without a host at this member's address in the cluster",
    )
    advertise: str | None = Field(
        None, description="URL at which clients reach this member's gateway directly; told as `home`"
    )
    placement: Literal["spread", "local"] = Field(
        "spread",
        description="member that gets a new tenant: the one with the smallest share of its memory in use "
        "(`spread`), or the one that is asked (`local`)",
    )
    local_member: Path | None = Field(
        None,
        description="file of this gateway in a folder by which gateways of the runtime `local` on one "
        "machine find one another, as if each was a member of a cluster with the file's name",
    )
    cluster_project: str = Field(
        "gateway-keys",
        description="Incus project of the keys that the gateways of a cluster share, and of nothing else",
    )
    cluster_patience: float = Field(
        2.0,
        gt=0,
        description="seconds to wait for a decision of the cluster, which has none without a quorum",
    )
    cluster_home_kept: float = Field(
        3600.0,
        gt=0,
        description="seconds for which all requests for a new tenant go to the member that was chosen first",
    )
    standby: float = Field(
        0.0,
        ge=0,
        description="seconds between two copies of each tenant to another member, from which it comes back "
        "when its own is lost; 0: none. `user.gateway.standby` of an instance overrides it",
    )
    standby_project: str = Field(
        "gateway-standby", description="Incus project of these copies, and of nothing else"
    )
    standby_timeout: float = Field(
        900.0, gt=0, description="seconds that one copy may take, the first one with all of the disk"
    )
    failover: float = Field(
        0.0,
        ge=0,
        description="seconds after the last sign of a member until its tenants are brought back from their "
        "copies on others, five more than GATEWAY_LEASE at least; 0: only once it is removed from the "
        "cluster",
    )
    failover_project: str = Field(
        "gateway-recovered",
        description="Incus project of the tenants that were brought back while their old server may come "
        "back with its instance of them, whose name is taken; and of nothing else",
    )
    lease: float = Field(
        10.0,
        gt=0,
        description="seconds without a word of most members and without a quorum, after which a member "
        "freezes its tenants that others have copies of; with GATEWAY_FAILOVER alone",
    )
    cluster_events_ahead: int = Field(
        64 * KiB,
        gt=0,
        description="bytes that are read ahead of each other member's events, for one stream of the events "
        "of all members",
    )
    # moves of tenants
    moves_at_once: int = Field(2, gt=0, description="number of tenants that leave this member at a time")
    move_patience: float = Field(
        30.0,
        gt=0,
        description="seconds that a call waits for its tenant, which is about to run on another member",
    )
    move_waiting: int = Field(
        200, gt=0, description="maximum number of calls and connections that wait so for one tenant"
    )
    move_calls: float = Field(
        1.0,
        ge=0,
        description="seconds in which calls that are under way may end before their tenant is stopped to "
        "be moved",
    )
    move_copy_timeout: float = Field(
        3600.0, gt=0, description="seconds that the copy of a tenant's disk to another member may take"
    )

    @model_validator(mode="after")
    def _leases_end_first(self) -> Self:
        if self.failover and self.failover < self.lease + MARGIN:
            raise ValueError(
                f"GATEWAY_FAILOVER is 0, or at least {MARGIN:.0f} seconds longer than GATEWAY_LEASE"
            )
        return self
