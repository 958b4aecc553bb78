"""Events: their fields, their CloudEvents form, and filters by permission and interest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final
from urllib.parse import quote

import orjson

from gateway.errors import InvalidParams

GAP: Final = "gap"


@dataclass(frozen=True, slots=True)
class Draft:
    """An event without an id. `time` is in seconds since the epoch, `data` is JSON.

    `deployment` is for `Filter`; clients get it as `data.deployment`.
    """

    type: str
    source: str
    time: float
    tenant: str | None = None
    deployment: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """An event with its id in the journal. Ids increase and are never reused.

    `encoded` is the event as CloudEvents 1.0 JSON, as sent by SSE and the websocket. It is encoded once for
    all subscribers.
    """

    id: int
    type: str
    source: str
    time: float
    tenant: str | None
    deployment: str | None
    encoded: bytes

    @property
    def data(self) -> Mapping[str, Any]:
        """The publisher's data, decoded on each access, because the gateway itself rarely needs it."""
        data: Mapping[str, Any] = orjson.loads(self.encoded)["data"]
        return data


def numbered(draft: Draft, number: int) -> Event:
    """Return `draft` as the event with the id `number`. Raises `TypeError` if its data is not JSON."""
    return Event(
        id=number,
        type=draft.type,
        source=draft.source,
        time=draft.time,
        tenant=draft.tenant,
        deployment=draft.deployment,
        # copied, since what orjson returns takes 4 KiB of memory however short it is
        encoded=memoryview(orjson.dumps(_cloudevent(number, draft))).tobytes(),
    )


def source(member: str) -> str:
    """Return what a gateway's events have as their source; `member` is its own, empty without a cluster."""
    return f"/gateway/{quote(member, safe='') or 'gateway'}"


def gap(oldest: int, source: str, time: float) -> Event:
    """Return the event that replaces events no longer kept.

    Its id is `oldest` - 1, so that resuming from the gap misses nothing that is still kept.
    """
    return numbered(Draft(GAP, source, time, data={"oldest": oldest}), oldest - 1)


def _cloudevent(number: int, event: Draft) -> dict[str, Any]:
    # https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md: the id is a string, a missing
    # subject is omitted
    body: dict[str, Any] = {
        "specversion": "1.0",
        "id": str(number),
        "source": event.source,
        "type": event.type,
    }
    if event.tenant is not None:
        body["subject"] = event.tenant
    seconds, ms = divmod(int(event.time * 1000), 1000)
    body["time"] = f"{_second(seconds)}.{ms:03}Z"
    body["data"] = dict(event.data)
    return body


@lru_cache(4)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


# types of events about a tenant that does not exist yet
_BEFORE: Final = ("tenant.", "deployment.")


@dataclass(frozen=True, slots=True)
class Span:
    """Where the events of a name's current tenant begin: with the event of its predecessor's end.

    Events between `ended` and `begun` may still concern the predecessor, except those leading to the current
    tenant. `at` is the time of that end. `arrived` is the first event of a tenant that came from another
    member: what happened there before is not in this journal.
    """

    ended: int
    begun: int
    at: float = 0.0
    arrived: int = 0

    def has(self, event: Event) -> bool:
        return event.id >= self.begun or (event.id >= self.ended and event.type.startswith(_BEFORE))


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects a subscriber's events: those its token covers and it has requested.

    `coverage` has the names the token covers, None for all. Events without a tenant (`gateway.*`) are for
    everybody. `tenants`, `deployments` and `types` are what was requested, None for all; with tenants or
    deployments, events without a tenant are omitted. A type ending in `*` is a prefix. `names` tells where
    events begin for covered names that earlier tenants had. A deployment's id selects all its events, even
    those after the end of the tenant it created. `since` is when the subscriber's token was issued.
    """

    coverage: frozenset[str] | None = None
    tenants: frozenset[str] | None = None
    deployments: frozenset[str] | None = None
    types: tuple[str, ...] | None = None
    names: Mapping[str, Span] = field(default_factory=dict)
    since: float = 0.0

    def matches(self, event: Event) -> bool:
        """Return whether the subscriber may see `event` and has requested it."""
        if event.tenant is not None and self.coverage is not None and event.tenant not in self.coverage:
            return False
        if self.tenants is not None and event.tenant not in self.tenants:
            return False
        if self.deployments is not None:
            if event.deployment not in self.deployments:
                return False
        elif event.tenant is not None and (span := self.names.get(event.tenant)) and not span.has(event):
            return False
        if self.types is None:
            return True
        exact, prefixes = _wishes(self.types)
        return event.type in exact or event.type.startswith(prefixes)

    def hidden(self) -> int:
        """Return the last id of hidden events that the subscriber may have expected to see.

        -1 if there are none: a subscriber with a more recent token has missed nothing.
        """
        if self.deployments is not None:
            return -1
        wanted = [span for name, span in self.names.items() if self.tenants is None or name in self.tenants]
        parted = (span.ended - 1 for span in wanted if span.at > self.since)
        return max(*(span.arrived - 1 for span in wanted), *parted, -1, -1)

    @classmethod
    def parse(
        cls,
        coverage: frozenset[str] | None,
        tenant: str | None = None,
        deployment: str | None = None,
        type: str | None = None,
    ) -> Filter:
        """Parse the query `?tenant=&deployment=&type=`, each comma-separated or absent.

        Raises `InvalidParams` for more than 64 values or one with more than 256 characters.
        """
        tenants, deployments, types = (
            _split(name, value)
            for name, value in (("tenant", tenant), ("deployment", deployment), ("type", type))
        )
        return cls(
            coverage,
            None if tenants is None else frozenset(tenants),
            None if deployments is None else frozenset(deployments),
            types,
        )


EVERYTHING: Final = Filter()


@lru_cache(256)  # of the gateway's own followers; those of clients may push each other out
def _wishes(types: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the types that are wanted, and the beginnings of others."""
    prefixes = tuple(wish[:-1] for wish in types if wish.endswith("*"))
    return frozenset(wish for wish in types if not wish.endswith("*")), prefixes


def _split(name: str, value: str | None) -> tuple[str, ...] | None:
    if not value:
        return None
    parts = tuple(part for part in (part.strip() for part in value.split(",")) if part)
    if len(parts) > 64 or any(len(part) > 256 for part in parts):
        raise InvalidParams(f"{name} accepts at most 64 values of 256 characters", field=name)
    return parts or None
