"""What the gateways of an Incus cluster's members share."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ClusterSettings(BaseModel):
    cluster_project: str = Field(
        "gateway-state",
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
