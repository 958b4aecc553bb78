"""The records of deployments: in memory while they run, in the store, and published as events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final, Literal

import orjson

from gateway.deployments.request import DeploymentOwner, DeploymentRequest
from gateway.errors import GatewayError, NotFound
from gateway.events import Bus
from gateway.ownership.domains import Domains
from gateway.runtime.sites import Recipe
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed

Kind = Literal["create", "update"]
State = Literal["waiting", "running", "succeeded", "undoing", "rolledback"]
PHASES: Final = ("validate", "create", "push", "install", "start", "expose", "route", "verify")
ENDED: Final = ("succeeded", "rolledback")
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    "waiting": frozenset({"running", "undoing", "rolledback"}),
    "running": frozenset({"succeeded", "undoing"}),
    "undoing": frozenset({"undoing", "rolledback"}),
    "succeeded": frozenset(),
    "rolledback": frozenset(),
}


@dataclass(slots=True)
class DeploymentPhase:
    name: str
    state: Literal["waiting", "running", "done", "failed", "undone"] = "waiting"
    ms: int | None = None


@dataclass(slots=True)
class Record:
    """One deployment, without the secrets and files that it was given.

    | state | what happens | next state |
    |---|---|---|
    | waiting | its turn comes | running |
    | waiting | it is cancelled | rolledback |
    | running | the site works, which makes it `settled`, and the rest is cleaned up | succeeded |
    | running | a phase fails, or it is cancelled, before it is settled | undoing |
    | undoing | everything is undone | rolledback |
    | waiting, running or undoing | its gateway was killed before it was settled | undoing |
    | running | its gateway was killed after it was settled | succeeded |
    """

    tenant: str
    domain: str
    url: str
    template: str
    by: str
    kind: Kind = "create"
    port: int = 0
    health: str = "/"
    source: str | None = None  # what the tenant was made from
    instance: str | None = None  # distinguishes the tenant from others with its name
    rollback: str | None = None  # the deployment whose site it brings back
    env: list[str] | None = None  # the variables that it changes
    former: str | None = None  # the deployment whose site it replaces
    settled: bool = False  # of an update: the new files are live, and only clean-up is left
    state: State = "waiting"
    id: str = field(default_factory=lambda: f"d-{secrets.token_hex(8)}")
    created: float = field(default_factory=time.time)
    ended: float | None = None
    ms: int | None = None
    error: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    detected: dict[str, Any] | None = None  # what a folder was detected as
    phases: list[DeploymentPhase] = field(default_factory=lambda: [DeploymentPhase(name) for name in PHASES])

    @property
    def over(self) -> bool:
        return self.state in ENDED

    def to_dict(self) -> dict[str, Any]:
        """Return it as HTTP shows it."""
        hidden = {"by", "settled", "health", "instance", "former"}
        return {name: value for name, value in asdict(self).items() if name not in hidden}

    def enter(self, state: State) -> None:
        """Go to another state. Raises `AssertionError` for one that cannot follow."""
        back = state in ("undoing", "rolledback")
        if state not in TRANSITIONS[self.state] or (self.settled and back):
            raise AssertionError(f"deployment {self.id} cannot go from {self.state} to {state}")
        self.state = state

    def failed(self, error: GatewayError, phase: str) -> None:
        self.error = {"code": error.code, "message": error.message, **error.facts, "phase": phase}


def parsed_record(text: bytes) -> Record:
    said = orjson.loads(text)
    said["phases"] = [DeploymentPhase(**phase) for phase in said["phases"]]
    return Record(**said)


def update_record(
    connection: sqlite3.Connection, record: bytes, identity: str, tenant: str, ended: float | None
) -> None:
    connection.execute(
        "UPDATE deployments SET record = ?, ended = ?, tenant = ? WHERE id = ?",
        (record, ended, tenant, identity),
    )


def keyed_records(connection: sqlite3.Connection, subject: str, key: str) -> list[tuple[Record, str]]:
    """Return the deployments that a subject began under a key, newest first, with their requests' digests."""
    rows = connection.execute(
        "SELECT record, request FROM deployments WHERE subject = ? AND key = ? ORDER BY created DESC",
        (subject, key),
    )
    return [(parsed_record(record), str(request)) for record, request in rows]


def insert_record(
    connection: sqlite3.Connection, record: Record, key: str | None, request: str, kept: int
) -> None:
    """Store a new deployment. Beyond `kept`, remove ended ones: the oldest of the tenant with most."""
    connection.execute(
        "INSERT INTO deployments (id, tenant, created, ended, subject, key, request, record) "
        "VALUES (?, ?, ?, NULL, ?, ?, ?, ?)",
        (record.id, record.tenant, record.created, record.by, key, request, orjson.dumps(record)),
    )
    connection.execute(_TRIM, (kept,))


# numbered by age within each tenant; the highest numbers are removed first
_TRIM: Final = """
    DELETE FROM deployments WHERE id IN (
        SELECT id FROM (
            SELECT id, created, ended, row_number() OVER (PARTITION BY tenant ORDER BY created DESC) AS place
            FROM deployments
        )
        WHERE ended IS NOT NULL ORDER BY place DESC, created
        LIMIT max(0, (SELECT count(*) FROM deployments) - ?)
    )
"""


def find_record(connection: sqlite3.Connection, identity: str) -> Record | None:
    row = connection.execute("SELECT record FROM deployments WHERE id = ?", (identity,)).fetchone()
    return None if row is None else parsed_record(row[0])


def recent_records(connection: sqlite3.Connection, tenants: Iterable[str] | None, limit: int) -> list[Record]:
    """Return the newest deployments, of these tenants or of all."""
    where, names = "", list(tenants or ())
    if tenants is not None:
        where = f"WHERE tenant IN ({','.join('?' * len(names))})"
    rows = connection.execute(
        f"SELECT record FROM deployments {where} ORDER BY created DESC LIMIT ?",  # noqa: S608 - question marks
        (*names, limit),
    ).fetchall()
    return [parsed_record(row[0]) for row in rows]


def unfinished_records(connection: sqlite3.Connection) -> list[Record]:
    rows = connection.execute(
        "SELECT record FROM deployments WHERE ended IS NULL ORDER BY created"
    ).fetchall()
    return [parsed_record(row[0]) for row in rows]


class DeploymentEvents:
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
            self.tell("phase.log", {**phase_position(phase), "lines": lines})


def phase_position(phase: str) -> dict[str, Any]:
    """Return the progress that each event of a phase carries."""
    return {"phase": phase, "index": PHASES.index(phase), "of": len(PHASES)}


def milliseconds(since: float) -> int:
    """Return the milliseconds since a moment of the monotonic clock."""
    return round((time.monotonic() - since) * 1000)


log = logging.getLogger(__name__)

LISTED: Final = 100


@dataclass(slots=True)
class RunningDeployment:
    """A waiting or running deployment."""

    record: Record
    request: DeploymentRequest
    owner: DeploymentOwner
    progress: DeploymentEvents
    uploader: str = ""
    key: str | None = None
    upload: Recipe | None = None  # owner of copies of its upload
    task: asyncio.Task[None] | None = None
    cancelled: bool = False


class Register:
    """The running deployments, by id in `running`, and the records of all."""

    def __init__(self, store: Store, domains: Domains, settings: Settings) -> None:
        self._store, self._domains, self._settings = store, domains, settings
        self.running: dict[str, RunningDeployment] = {}
        # ended, but not stored yet; bounded, since each was stored when it began
        self._unwritten: dict[str, Record] = {}

    def deploying(self, tenant: str) -> bool:
        """Return whether a deployment of the tenant is under way; one whose end can be seen is not."""
        return any(one.record.tenant == tenant and not one.record.over for one in self.running.values())

    async def open(self, running: RunningDeployment) -> None:
        """Store a new deployment, and hold its domain. It counts as running from then on."""
        record, digest = running.record, running.request.digest
        self.running[record.id] = running
        try:
            await self._domains.hold(record.domain, record.tenant, record.id)
            kept = self._settings.deployments_kept
            await self._store.write(
                lambda connection: insert_record(connection, record, running.key, digest, kept)
            )
        except BaseException:
            del self.running[record.id]
            await self._domains.over(record.id)
            raise

    async def save(self, record: Record) -> None:
        """Store the current state of a record. Raises `StoreFailed`."""
        text, identity, tenant, ended = orjson.dumps(record), record.id, record.tenant, record.ended
        await self._store.write(lambda connection: update_record(connection, text, identity, tenant, ended))

    async def end(self, record: Record, progress: DeploymentEvents, began: float) -> None:
        """Store the end of a deployment, and publish it."""
        await self._domains.over(record.id)  # a client that learns of the end may ask for the domain at once
        record.enter("succeeded" if record.error is None else "rolledback")
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
        found = await self._store.read(lambda connection: find_record(connection, identity))
        if found is None:
            raise NotFound(f"no deployment {identity[:40]}")
        return found

    async def recent(self, coverage: Iterable[str] | None) -> list[Record]:
        """Return the newest deployments of these tenants, None for all."""
        found = await self._store.read(lambda connection: recent_records(connection, coverage, LISTED))
        newer = self._unwritten | {identity: running.record for identity, running in self.running.items()}
        return [newer.get(record.id, record) for record in found]

    async def maker(self, tenant: str, instance: str | None) -> str | None:
        """Return the deployment that created a tenant, if it is on record."""
        found = await self._store.read(
            lambda connection: recent_records(connection, [tenant], self._settings.deployments_kept)
        )
        made = (one for one in found if one.kind == "create" and one.state == "succeeded")
        return next((one.id for one in made if one.instance in (None, instance)), None)

    async def keyed(self, by: str, key: str) -> list[tuple[Record, str]]:
        """Return the deployments that a subject began under a key, with their requests' digests."""
        begun = await self._store.read(lambda connection: keyed_records(connection, by, key))
        return begun + [
            (other.record, other.request.digest)
            for other in self.running.values()
            if (other.record.by, other.key) == (by, key)
        ]

    async def unfinished(self) -> set[str]:
        """Return the ids of all that have not ended, neither in the store nor since."""
        found = await self._store.read(unfinished_records)
        return {record.id for record in found} - self._unwritten.keys()

    async def left(self) -> list[Record]:
        """Return the deployments that have not ended although no task of this process runs them."""
        left = []
        for record in await self._store.read(unfinished_records):
            if record.id not in self.running and record.id not in self._unwritten:
                # one may have ended since: it is stored before it stops counting as running
                now = await self._store.read(partial(find_record, identity=record.id))
                if now is not None and not now.over:
                    left.append(now)
        return left

    async def write_down(self) -> None:
        """Store the ends of deployments that the store had no room for at the time."""
        with contextlib.suppress(StoreFailed):
            for identity, record in list(self._unwritten.items()):
                await self.save(record)
                del self._unwritten[identity]
