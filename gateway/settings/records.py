"""What is kept: the audit, idempotency records, events."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gateway.settings.units import MiB


class RecordSettings(BaseModel):
    audit_kept: int = Field(
        100_000, gt=0, description="number of audit entries that are kept, and as many of operators"
    )
    store_waiting: int = Field(
        10_000, gt=0, description="maximum number of reads and writes of records that wait at once"
    )
    receipts_kept: int = Field(
        1000, gt=0, description="number of calls and commands kept under their callers' ids, for one tenant"
    )
    receipts_bytes: int = Field(
        16 * MiB,
        gt=0,
        description="maximum size of one tenant's records of calls and commands in the store in bytes",
    )
    receipts_age: float = Field(
        86_400.0,
        gt=0,
        description="seconds that records of calls and commands are kept",
    )
    receipts_memory: int = Field(
        32 * MiB,
        gt=0,
        description="maximum size in memory of the kept results of calls that only read, for all tenants, "
        "in bytes",
    )
    records_most: int = Field(
        64 * MiB,
        gt=0,
        description="maximum size in bytes of one tenant's records when they are sent to another member of a "
        "cluster; the same on all members",
    )
    # events
    events_kept: int = Field(10_000, gt=0, description="number of events kept for replay")
    events_bytes: int = Field(
        64 * MiB, gt=0, description="maximum size of the events kept for replay in bytes"
    )
    events_age: float = Field(604_800.0, gt=0, description="seconds that events are kept for replay")
    events_waiting: int = Field(
        50_000, gt=0, description="maximum number of events that wait in memory while they cannot be written"
    )
    events_keepalive: float = Field(
        15.0, gt=0, description="seconds between the comment lines that keep an event stream open"
    )
