"""The register of all deployments: those under way in memory, and the record of each in the store."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import orjson

from gateway.deployments import record as records
from gateway.deployments.progress import Progress, milliseconds
from gateway.deployments.queue import Owner
from gateway.deployments.record import Record
from gateway.deployments.request import Request
from gateway.errors import NotFound
from gateway.ownership.domains import Domains
from gateway.runtime.sites import Recipe
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed

log = logging.getLogger(__name__)

LISTED: Final = 100


@dataclass(slots=True)
class Running:
    """A waiting or running deployment."""

    record: Record
    request: Request
    owner: Owner
    progress: Progress
    uploader: str = ""
    key: str | None = None
    upload: Recipe | None = None  # owner of copies of its upload
    task: asyncio.Task[None] | None = None
    cancelled: bool = False


class Register:
    """The running deployments, by id in `running`, and the records of all."""

    def __init__(self, store: Store, domains: Domains, settings: Settings) -> None:
        self._store, self._domains, self._settings = store, domains, settings
        self.running: dict[str, Running] = {}
        # ended, but not stored yet; bounded, since each was stored when it began
        self._unwritten: dict[str, Record] = {}

    def deploying(self, tenant: str) -> bool:
        """Return whether a deployment of the tenant is under way; one whose end can be seen is not."""
        return any(one.record.tenant == tenant and not one.record.over for one in self.running.values())

    async def open(self, running: Running) -> None:
        """Store a new deployment, and hold its domain. It counts as running from then on."""
        record, digest = running.record, running.request.digest
        self.running[record.id] = running
        try:
            await self._domains.hold(record.domain, record.tenant, record.id)
            kept = self._settings.deployments_kept
            await self._store.write(
                lambda connection: records.begin(connection, record, running.key, digest, kept)
            )
        except BaseException:
            del self.running[record.id]
            await self._domains.over(record.id)
            raise

    async def save(self, record: Record) -> None:
        """Store the current state of a record. Raises `StoreFailed`."""
        text, identity, tenant, ended = orjson.dumps(record), record.id, record.tenant, record.ended
        await self._store.write(lambda connection: records.save(connection, text, identity, tenant, ended))

    async def end(self, record: Record, progress: Progress, began: float) -> None:
        """Store the end of a deployment, and publish it."""
        await self._domains.over(record.id)  # a client that learns of the end may ask for the domain at once
        record.state = "succeeded" if record.error is None else "rolledback"
        record.ended, record.ms = time.time(), milliseconds(began)
        try:
            await self.save(record)
        except StoreFailed as failed:
            log.warning("cannot store the end of deployment %s: %s", record.id, failed.message)
            self._unwritten[record.id] = record
        told = ("ms", "domain", "url", "template", "rollback", "env", "by")
        facts: dict[str, Any] = {name: getattr(record, name) for name in told}
        if record.error is not None:
            facts["error"] = record.error
        self.running.pop(record.id, None)
        progress.tell(record.state, facts)

    async def get(self, identity: str) -> Record:
        """Return a deployment. Raises `NotFound`."""
        if identity in self.running:
            return self.running[identity].record
        if identity in self._unwritten:
            return self._unwritten[identity]
        found = await self._store.read(lambda connection: records.find(connection, identity))
        if found is None:
            raise NotFound(f"no deployment {identity[:40]}")
        return found

    async def recent(self, coverage: Iterable[str] | None) -> list[Record]:
        """Return the newest deployments of these tenants, None for all."""
        found = await self._store.read(lambda connection: records.recent(connection, coverage, LISTED))
        newer = self._unwritten | {identity: running.record for identity, running in self.running.items()}
        return [newer.get(record.id, record) for record in found]

    async def maker(self, tenant: str, instance: str | None) -> str | None:
        """Return the deployment that created a tenant, if it is on record."""
        found = await self._store.read(
            lambda connection: records.recent(connection, [tenant], self._settings.deployments_kept)
        )
        made = (one for one in found if one.kind == "create" and one.state == "succeeded")
        return next((one.id for one in made if one.instance in (None, instance)), None)

    async def keyed(self, by: str, key: str) -> list[tuple[Record, str]]:
        """Return the deployments that a subject began under a key, with their requests' digests."""
        begun = await self._store.read(lambda connection: records.keyed(connection, by, key))
        return begun + [
            (other.record, other.request.digest)
            for other in self.running.values()
            if (other.record.by, other.key) == (by, key)
        ]

    async def unfinished(self) -> set[str]:
        """Return the ids of all that have not ended, neither in the store nor since."""
        found = await self._store.read(records.unfinished)
        return {record.id for record in found} - self._unwritten.keys()

    async def left(self) -> list[Record]:
        """Return the deployments that have not ended but that nobody runs any more."""
        left = []
        for record in await self._store.read(records.unfinished):
            if record.id not in self.running and record.id not in self._unwritten:
                # one may have ended since: it is stored before it stops counting as running
                now = await self._store.read(partial(records.find, identity=record.id))
                if now is not None and not now.over:
                    left.append(now)
        return left

    async def write_down(self) -> None:
        """Store the ends of deployments that the store had no room for at the time."""
        with contextlib.suppress(StoreFailed):
            for identity, record in list(self._unwritten.items()):
                await self.save(record)
                del self._unwritten[identity]
