"""What is kept: the audit, idempotency records, events."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gateway.settings.units import MiB


class RecordSettings(BaseModel):
    audit_kept: int = Field(
        100_000, gt=0, description="number of audit entries that are kept, and as many of operators"
    )
    idempotency_age: float = Field(
        86_400.0,
        gt=0,
        description="seconds that records of calls and commands are kept",
    )
    # events
    events_kept: int = Field(10_000, gt=0, description="number of events kept for replay")
    events_bytes: int = Field(
        64 * MiB, gt=0, description="maximum size of the events kept for replay in bytes"
    )
    events_age: float = Field(604_800.0, gt=0, description="seconds that events are kept for replay")
