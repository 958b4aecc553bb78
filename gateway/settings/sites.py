"""Sites while they run: their health, their memory, their sleep."""

from __future__ import annotations

from pydantic import BaseModel, Field


class SiteSettings(BaseModel):
    health_interval: float = Field(5.0, gt=0, description="seconds between two looks at a site's port")
    health_timeout: float = Field(
        5.0, gt=0, description="seconds without an answer after which a site is unhealthy at once"
    )
    health_failures: int = Field(3, gt=0, description="failed looks after which a site is unhealthy")
    hang_timeout: float = Field(
        4.0,
        ge=0,
        description="seconds after which who visits a site that reads no request is shown a page; 0: never",
    )
    pressure_interval: float = Field(
        2.0, gt=0, description="seconds between two looks at how short of memory the tenants are"
    )
    pressure_patience: float = Field(
        60.0,
        ge=0,
        description="seconds that a site may read its own pages back from the disk for want of memory until "
        "its biggest process is ended; 0: for ever",
    )
    # idle tenants
    idle_stop: float = Field(
        0.0,
        ge=0,
        description="seconds without use after which a tenant sleeps until it is asked for; 0: none",
    )
    idle_look: float = Field(
        15.0, gt=0, le=50, description="seconds between two looks at who uses which tenant"
    )
    wake_timeout: float = Field(
        30.0, gt=0, description="seconds that a request to a sleeping tenant waits for it at most"
    )
    wakes_at_once: int = Field(8, gt=0, description="tenants that are woken or put to sleep at once")
    wakes_waiting: int = Field(
        1000, gt=0, description="visitors that wait for sleeping sites, a quarter for one; more are refused"
    )
