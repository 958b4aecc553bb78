"""Waits for Incus, and limits of snapshots and logs."""

from __future__ import annotations

from pydantic import BaseModel, Field


class LifecycleSettings(BaseModel):
    incus_timeout: float = Field(30.0, gt=0, description="seconds of one Incus request that is not a wait")
    lifecycle_timeout: float = Field(60.0, gt=0, description="seconds of a tenant's start, stop or destroy")
    stop_grace: float = Field(
        5.0,
        gt=0,
        description="seconds in which a tenant may shut down before it is stopped by force",
    )
    max_snapshots: int = Field(20, gt=0, description="snapshots of one tenant")
    snapshot_bytes: int = Field(
        0, ge=0, description="bytes that one tenant's snapshots may hold; 0: as many as its disk"
    )
    pool_reserve: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the storage pool below which no snapshot, clone or new tenant is made",
    )
    logs_max: int = Field(10_000, gt=0, description="lines of a site's log that are asked for at once")
    max_followers: int = Field(8, gt=0, description="readers of one tenant's log at a time")
    reconcile_interval: float = Field(30.0, gt=0, description="seconds between two looks at all instances")
    shutdown_timeout: float = Field(20.0, gt=0, description="seconds from SIGTERM to the end, at most")
