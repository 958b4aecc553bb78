"""The gateway's metrics, in Prometheus' text format."""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections.abc import Sized
from functools import cache
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.process_collector import ProcessCollector

from gateway.events import Bus, Filter
from gateway.execs import Execs
from gateway.limits.budget import ClientLimits
from gateway.limits.pressure import Pressure
from gateway.ownership.domains import Domains

_LAG_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LAG_EVERY: Final = 0.5  # seconds; a sample takes some 150 us, most of it for waking up
_TOOL_BUCKETS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


class Metrics:
    """Counts the bus's events and shows the gateway's current state.

    Each number is read from the object that has it when the metrics are rendered.
    """

    CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

    def __init__(
        self,
        connections: Sized,
        execs: Execs,
        domains: Domains,
        limits: ClientLimits,
        pressure: Pressure | None,
    ) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Gauge("gateway_connections", "Open websockets.", registry=registry).set_function(
            lambda: len(connections)
        )
        Gauge("gateway_execs", "Running commands.", registry=registry).set_function(lambda: execs.running)
        Gauge(
            "gateway_domains_contested",
            "Domains that several tenants carry, or one though they are the gateway's own.",
            registry=registry,
        ).set_function(lambda: domains.contested)
        Gauge(
            "gateway_addresses_shared",
            "Tenants with a domain whose address another instance has too.",
            registry=registry,
        ).set_function(lambda: domains.shared)
        for name, told, now in (
            ("bytes_in_flight", "Bytes of requests and answers in flight.", lambda: limits.bytes.held),
            ("bytes_in_flight_most", "Bytes of the tenant with the most.", lambda: limits.bytes.most),
            ("messages_waiting", "Large messages that wait for room.", lambda: limits.bytes.waiting),
            ("connections_anonymous", "Websockets without a token yet.", lambda: limits.strangers.held),
        ):
            Gauge(f"gateway_{name}", told, registry=registry).set_function(now)
        if pressure is not None:
            pressed = "Tenants that are short of memory now."
            Gauge("gateway_tenants_pressed", pressed, registry=registry).set_function(
                lambda: pressure.pressed
            )
        self._events = Counter("gateway_events", "Events published, by type.", ["type"], registry=registry)
        self._tools = Histogram(
            "gateway_tool_seconds",
            "Duration of tool calls, by tool and outcome.",
            ["tool", "error"],
            buckets=_TOOL_BUCKETS,
            registry=registry,
        )

        self._lag = Histogram(
            "gateway_loop_lag_seconds",
            "How late the event loop is, sampled twice a second: what a client waits beside its own work.",
            buckets=_LAG_BUCKETS,
            registry=registry,
        )
        self._unprepared = Gauge(
            "gateway_template_unprepared",
            "1 for a template whose golden copy or pool could not be made, until it can.",
            ["template"],
            registry=registry,
        )

    async def follow(self, bus: Bus) -> None:
        """Count events until the bus closes."""
        # `labels` takes a lock and makes strings, which each tool call would pay for
        events, tools = cache(self._events.labels), cache(self._tools.labels)
        subscription = bus.subscribe(Filter(), patient=True)
        while batch := await subscription.batch():
            for type_, count in Tally(event.type for event in batch).items():
                events(type_).inc(count)
            for event in batch:
                if event.type == "tool.finished":
                    data = event.data
                    error = str(data.get("isError", False)).lower()
                    tools(data["name"], error).observe(data["ms"] / 1000)
                elif event.type in ("gateway.template.failed", "gateway.template.ready"):
                    failed = event.type.endswith(".failed")
                    self._unprepared.labels(event.data["template"]).set(int(failed))

    async def sample_lag(self) -> None:
        """Measure forever how late the event loop is."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_EVERY
            await asyncio.sleep(_LAG_EVERY)
            self._lag.observe(max(0.0, loop.time() - due))

    def render(self) -> bytes:
        return generate_latest(self.registry)
