"""What a tenant is made of, its limits, and how many this host takes."""

from __future__ import annotations

from pydantic import BaseModel, Field


class TenantSettings(BaseModel):
    workspace: str = Field("/srv/site", description="project folder of a tenant inside its container")
    workspace_user: str = Field(
        "site", description="user inside the container that owns the workspace and runs commands"
    )
    workspace_uid: int = Field(
        1000, ge=0, description="uid of that user inside the container; its gid is the same"
    )
    profile: str = Field("gateway-tenant", description="Incus profile of every tenant")
    image: str = Field("gateway-base", description="alias of the base image")
    image_compiler: bool = Field(
        False, description="whether the base image has a C++ compiler, with the headers of Node and Python"
    )
    network: str = Field("gatewaybr0", description="bridge of the tenants")
    network_ipv4: str = Field("10.82.0.1/20", description="IPv4 address and network of that bridge")
    pool: str = Field("gateway", description="storage pool of the tenants")
    pool_source: str = Field(
        "", description="block device for a new pool; empty: a sparse file sized to the free disk"
    )
    tenant_cpu: str = Field("1", description="CPU limit of a tenant, as Incus's limits.cpu takes it")
    tenant_memory: str = Field(
        "1GiB", description="memory limit of a tenant, as Incus's limits.memory takes it; hard"
    )
    tenant_processes: int = Field(400, gt=0, description="maximum number of processes of a tenant")
    tenant_disk: str = Field("4GiB", description="size of a tenant's root disk, if the pool has quotas")
    simple_quotas: bool = Field(
        True,
        description="whether setup gives a new btrfs pool simple quotas (Linux 6.8, btrfs-progs 6.7)",
    )
    tenant_read: str = Field(
        "250MB",
        description="limit of reads from a tenant's root disk in bytes a second, as Incus's limits.read "
        "takes it; empty: none",
    )
    overcommit: float = Field(
        8.0,
        ge=0,
        description="maximum of the memory limits of all awake tenants, in multiples of this host's "
        "memory; 0: none",
    )
    memory_reserve: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of this host's memory that must be available for another tenant to start",
    )
    max_tenants: int = Field(1000, gt=0, description="maximum number of tenants that deployments create")
