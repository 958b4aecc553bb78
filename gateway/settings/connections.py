"""Limits of websockets, HTTP connections and requests."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gateway.settings.units import MiB


class ConnectionSettings(BaseModel):
    initialize_timeout: float = Field(
        10.0, gt=0, description="seconds within which a websocket must send `initialize`"
    )
    max_frame: int = Field(16 * MiB, gt=0, description="maximum size of a websocket frame in bytes")
    max_body: int = Field(16 * MiB, gt=0, description="maximum size of a JSON request body in bytes")
    max_requests: int = Field(256, gt=0, description="maximum number of requests in flight on one websocket")
    max_connections: int = Field(
        2000, gt=0, description="maximum number of websockets and event streams that have shown a token"
    )
    max_tenant_connections: int = Field(
        256,
        gt=0,
        description="maximum number of websockets and event streams of one tenant",
    )
    max_anonymous: int = Field(
        64,
        gt=0,
        description="maximum number of websockets that have not shown a token yet; they are counted "
        "separately",
    )
    max_anonymous_per_address: int = Field(
        16,
        gt=0,
        description="maximum number of websockets without a token from one address",
    )
    head_timeout: float = Field(10.0, gt=0, description="seconds within which a request's head must arrive")
    body_timeout: float = Field(
        30.0, gt=0, description="seconds without progress after which a request's body times out"
    )
    bytes_in_flight: int = Field(
        512 * MiB, gt=0, description="maximum size of all requests and answers in flight in bytes"
    )
    tenant_bytes: int = Field(
        128 * MiB,
        gt=0,
        description="maximum size of one tenant's requests and answers in flight in bytes",
    )
    socket_bytes: int = Field(
        32 * MiB,
        gt=0,
        description="maximum size of one websocket's requests and answers in flight in bytes; "
        "beyond it the gateway stops reading that websocket",
    )
    max_subscriptions: int = Field(
        16, gt=0, description="maximum number of event subscriptions of one websocket"
    )
    max_tenant_subscriptions: int = Field(
        256, gt=0, description="maximum number of event subscriptions of all websockets of one tenant"
    )
