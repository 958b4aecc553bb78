"""Waits for Incus, and limits of snapshots and logs."""

from __future__ import annotations

from pydantic import BaseModel, Field


class LifecycleSettings(BaseModel):
    incus_timeout: float = Field(
        30.0, gt=0, description="seconds that an Incus request may take, unless it waits for an operation"
    )
    lifecycle_timeout: float = Field(
        60.0, gt=0, description="seconds that a tenant's start, stop or removal may take"
    )
    stop_grace: float = Field(
        15.0,
        gt=0,
        description="seconds that a tenant has to shut down before it is stopped by force; its site has 10",
    )
    max_snapshots: int = Field(20, gt=0, description="maximum number of snapshots of one tenant")
    snapshot_bytes: int = Field(
        0, ge=0, description="maximum size of one tenant's snapshots in bytes; 0: the size of its disk"
    )
    pool_reserve: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the storage pool that must stay free for a snapshot, clone or new tenant to "
        "be made",
    )
    reconcile_interval: float = Field(30.0, gt=0, description="seconds between two checks of all instances")
    shutdown_timeout: float = Field(
        20.0, gt=0, description="seconds from SIGTERM until the gateway ends at the latest"
    )
    upgrade_patience: float = Field(
        300.0,
        ge=0,
        description="seconds that an upgrade waits for running deployments before it stops with nothing "
        "changed",
    )
