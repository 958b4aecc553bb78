"""Limits of websockets, HTTP connections and requests."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gateway.settings.units import MiB


class ConnectionSettings(BaseModel):
    max_connections: int = Field(
        2000, gt=0, description="maximum number of websockets and event streams that have shown a token"
    )
    max_tenant_connections: int = Field(
        256,
        gt=0,
        description="maximum number of websockets and event streams of one tenant",
    )
    bytes_in_flight: int = Field(
        512 * MiB, gt=0, description="maximum size of all requests and answers in flight in bytes"
    )
    tenant_bytes: int = Field(
        128 * MiB,
        gt=0,
        description="maximum size of one tenant's requests and answers in flight in bytes",
    )
