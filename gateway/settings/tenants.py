"""What a tenant is made of, its limits, and how many this host takes."""

from __future__ import annotations

from pydantic import BaseModel, Field


class TenantSettings(BaseModel):
    workspace: str = Field("/srv/site", description="the tenant's project folder inside the container")
    workspace_user: str = Field("site", description="the user that owns the workspace and runs commands")
    workspace_uid: int = Field(
        1000, ge=0, description="that user's uid inside the container; its gid is the same"
    )
    profile: str = Field("gateway-tenant", description="Incus profile of every tenant")
    image: str = Field("gateway-base", description="alias of the base image")
    network: str = Field("gatewaybr0", description="bridge of the tenants")
    network_ipv4: str = Field("10.82.0.1/20", description="the bridge's own address and network")
    pool: str = Field("gateway", description="storage pool of the tenants")
    pool_source: str = Field(
        "", description="block device for a new pool; empty: a sparse file sized to the free disk"
    )
    tenant_cpu: str = Field("1", description="limits.cpu of a tenant")
    tenant_memory: str = Field("1GiB", description="limits.memory of a tenant, hard")
    tenant_processes: int = Field(400, gt=0, description="limits.processes of a tenant")
    tenant_disk: str = Field("4GiB", description="root disk quota of a tenant where the pool can")
    tenant_read: str = Field(
        "250MB", description="limits.read of a tenant's root disk, bytes a second; empty for none"
    )
    overcommit: float = Field(
        8.0,
        ge=0,
        description="times this host's memory that the limits of all tenants awake may come to; 0: any",
    )
    memory_reserve: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of this host's memory below which, available, no further tenant is started",
    )
    max_tenants: int = Field(1000, gt=0, description="tenants that deployments may make in all")
