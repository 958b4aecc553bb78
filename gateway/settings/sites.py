"""Sites while they run: their health, their memory, their sleep."""

from __future__ import annotations

from pydantic import BaseModel, Field


class SiteSettings(BaseModel):
    # idle tenants
    idle_stop: float = Field(
        0.0,
        ge=0,
        description="seconds without use after which a tenant is put to sleep, until it is needed again; "
        "0: never",
    )
