"""Sites while they run: their health, their memory, their sleep."""

from __future__ import annotations

from pydantic import BaseModel, Field


class SiteSettings(BaseModel):
    health_interval: float = Field(5.0, gt=0, description="seconds between two checks of a site's port")
    health_timeout: float = Field(
        5.0, gt=0, description="seconds without an answer after which a site is unhealthy at once"
    )
    health_failures: int = Field(
        3, gt=0, description="number of failed checks after which a site is unhealthy"
    )
    hang_timeout: float = Field(
        4.0,
        ge=0,
        description="seconds after which visitors of a site that reads no requests get an error page; 0: "
        "never",
    )
    # idle tenants
    idle_stop: float = Field(
        0.0,
        ge=0,
        description="seconds without use after which a tenant is put to sleep, until it is needed again; "
        "0: never",
    )
