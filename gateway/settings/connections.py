"""Limits of websockets, HTTP connections and requests."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gateway.settings.units import MiB


class ConnectionSettings(BaseModel):
    initialize_timeout: float = Field(
        10.0, gt=0, description="seconds until a websocket must have said initialize"
    )
    max_frame: int = Field(16 * MiB, gt=0, description="bytes of one websocket frame")
    max_body: int = Field(16 * MiB, gt=0, description="bytes of one JSON request body")
    max_requests: int = Field(256, gt=0, description="requests in flight on one websocket")
    max_connections: int = Field(
        2000, gt=0, description="websockets and event streams of this gateway, all with a token"
    )
    max_tenant_connections: int = Field(256, gt=0, description="those of one tenant")
    max_anonymous: int = Field(64, gt=0, description="websockets that have shown no token yet, beside those")
    max_anonymous_per_address: int = Field(16, gt=0, description="those of one address")
    max_silent: int = Field(
        1024,
        gt=0,
        description="HTTP connections that wait for a request's head; beyond them the longest silent is cut",
    )
    head_timeout: float = Field(10.0, gt=0, description="seconds in which a request's head must have come")
    body_timeout: float = Field(
        30.0, gt=0, description="seconds without progress after which a request's body is given up"
    )
    bytes_in_flight: int = Field(
        512 * MiB, gt=0, description="bytes of requests and answers in flight, all tenants"
    )
    tenant_bytes: int = Field(128 * MiB, gt=0, description="those of one tenant")
    socket_bytes: int = Field(
        32 * MiB, gt=0, description="those of one websocket; beyond them it is read no further"
    )
    max_subscriptions: int = Field(16, gt=0, description="event subscriptions of one websocket")
    max_tenant_subscriptions: int = Field(
        256, gt=0, description="event subscriptions of all websockets of one tenant"
    )
