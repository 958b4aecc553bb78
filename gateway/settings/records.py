"""What is kept: the audit, idempotency records, events."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gateway.settings.units import MiB


class RecordSettings(BaseModel):
    audit_kept: int = Field(
        100_000, gt=0, description="entries kept of who did what, and as many of operators"
    )
    store_waiting: int = Field(10_000, gt=0, description="reads and writes of records that may wait at once")
    call_linger: float = Field(
        30.0,
        ge=0,
        description="seconds that a call with a callId outlives its connection, to be asked again",
    )
    receipts_kept: int = Field(
        1000, gt=0, description="calls and commands kept under the caller's id, of one tenant"
    )
    receipts_bytes: int = Field(16 * MiB, gt=0, description="bytes of those of one tenant, in the store")
    receipts_age: float = Field(86_400.0, gt=0, description="seconds that they are kept")
    receipts_memory: int = Field(
        32 * MiB, gt=0, description="bytes of results kept in memory, of calls that only read, all tenants"
    )
    # events
    events_kept: int = Field(10_000, gt=0, description="events kept for replay")
    events_bytes: int = Field(64 * MiB, gt=0, description="bytes of events kept for replay")
    events_age: float = Field(604_800.0, gt=0, description="seconds that events are kept for replay")
    events_waiting: int = Field(
        50_000, gt=0, description="events that wait in memory while they cannot be written"
    )
    events_keepalive: float = Field(15.0, gt=0, description="seconds between SSE comment lines")
