"""Publishes the progress of one deployment: its phases, the lines of its install log, its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from gateway.deployments.record import PHASES, Record
from gateway.events import Bus


class Progress:
    """The events of one deployment. At most `limit` lines of its install log are published."""

    def __init__(self, record: Record, bus: Bus, limit: int) -> None:
        self._record, self._bus, self._limit = record, bus, limit
        self._lines = 0
        self._batch: list[str] = []

    def tell(self, kind: str, data: Mapping[str, Any]) -> None:
        """Publish the event `deployment.KIND`."""
        record = self._record
        facts = {"deployment": record.id, "tenant": record.tenant, **data}
        self._bus.publish(f"deployment.{kind}", record.tenant, facts, deployment=record.id)

    def say(self, phase: str) -> Callable[[str], None]:
        """Return a function that publishes a phase's lines, several at a time and up to the limit."""

        def one(line: str) -> None:
            self._lines += 1
            if self._lines > self._limit:
                return
            self._batch.append(line[:500])
            if len(self._batch) == 1:
                asyncio.get_running_loop().call_later(0.1, self.flush, phase)
            elif len(self._batch) >= 50:
                self.flush(phase)

        return one

    def flush(self, phase: str = "install") -> None:
        """Publish the waiting lines."""
        if self._batch:
            lines, self._batch = self._batch, []
            self.tell("phase.log", {**place(phase), "lines": lines})


def place(phase: str) -> dict[str, Any]:
    """Return the progress that each event of a phase carries."""
    return {"phase": phase, "index": PHASES.index(phase), "of": len(PHASES)}


def milliseconds(since: float) -> int:
    """Return the milliseconds since a moment of the monotonic clock."""
    return round((time.monotonic() - since) * 1000)
