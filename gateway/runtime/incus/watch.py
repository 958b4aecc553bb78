"""Watch an Incus project and report changes of its tenants.

One log covers all containers with either cgroup version. Counters of cgroups would have to be polled, and
vanish with a command's cgroup.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from gateway.errors import GatewayError, NotFound
from gateway.incus import Incus, IncusError
from gateway.rootfs.paths import show
from gateway.runtime import TENANT_NAME, OnAnotherServer, Status, TenantEvent, TenantInstances
from gateway.runtime.incus.commands import is_ours
from gateway.runtime.incus.disks import OURS
from gateway.runtime.incus.moves import is_aside
from gateway.settings import Settings

log = logging.getLogger(__name__)

_LOG: Final = "/dev/kmsg"
_PAUSE: Final = 1.0  # seconds between two reports about the same container
_RECORDS: Final = 1000  # records per pass, at 2 us each; the rest follows in the next
_RECORD: Final = 8192  # bytes of the longest record, see the kernel's Documentation/ABI/testing/dev-kmsg
_CONTAINER: Final = re.compile(r"/lxc\.payload\.([^/,\s]+)")
_PROCESS: Final = re.compile(r",task=(.*),pid=\d+,uid=\d+$")


def victim(record: str) -> tuple[str, str] | None:
    """Return the container, as named by its cgroup, and the process that a record reports as killed.

    A tenant chooses the names of cgroups in its container, and could use another container's name: a record
    with more than one container is ignored.
    """
    message = record.partition("\n")[0].partition(";")[2]
    if not message.startswith("oom-kill:"):
        return None
    containers = set(_CONTAINER.findall(message))
    process = _PROCESS.search(message)
    if len(containers) != 1 or process is None:
        return None
    return containers.pop(), process[1]


async def ooms() -> AsyncGenerator[tuple[str, str, int]]:
    """Yield container, name of a killed process and number of them, from now on; ends if unreadable."""
    try:
        descriptor = os.open(_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        log.info("cannot read the kernel log, so tenant.oom is not reported: %s", error.strerror)
        return
    try:
        os.lseek(descriptor, 0, os.SEEK_END)
        while True:
            await _readable(descriptor)
            found: dict[str, tuple[str, int]] = {}
            for record in _records(descriptor):
                if (one := victim(record)) is not None:
                    found[one[0]] = (one[1], found.get(one[0], ("", 0))[1] + 1)
            for container, (process, count) in found.items():
                yield container, process, count
            # a tenant that keeps running out of memory gets one event per second
            await asyncio.sleep(_PAUSE)
    finally:
        os.close(descriptor)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _records(descriptor: int) -> Iterator[str]:
    for _ in range(_RECORDS):
        try:
            record = os.read(descriptor, _RECORD)
        except BlockingIOError:
            return
        except BrokenPipeError:
            continue  # some records were overwritten; the next read continues after them
        if not record:
            return
        yield record.decode("utf-8", "replace")


# Incus's lifecycle actions and their names in our events
_LIFECYCLE: Final[Mapping[str, str]] = {
    "instance-created": "tenant.created",
    "instance-started": "tenant.started",
    "instance-stopped": "tenant.stopped",
    "instance-shutdown": "tenant.stopped",
    "instance-restarted": "tenant.restarted",
    "instance-deleted": "tenant.destroyed",
    "instance-renamed": "tenant.renamed",
    "instance-snapshot-created": "tenant.snapshot.created",
    "instance-snapshot-deleted": "tenant.snapshot.deleted",
}
# a snapshot's events name it only in their source
_SNAPSHOT: Final = re.compile(r"/1\.0/instances/([^/?]+)/snapshots/([^/?]+)")
_PAUSES: Final = (0.1, 1.0)
"""Seconds before connecting again, the first and the longest: meanwhile the gateway is not ready."""

# remembered destroyed tenants, whose late events must not count for a new tenant of the same name
_ENDS: Final = 1000

# number of events whose marks a successor is told, far more than arrive during a handover
_TOLD: Final = 500

# the status after an action, if it is known
_AFTER: Final[Mapping[str, Status]] = {
    "instance-started": "running",
    "instance-restarted": "running",
    "instance-stopped": "stopped",
    "instance-shutdown": "stopped",
}

# actions that do not change where a tenant's files and processes are
_LOOKS: Final = ("instance-file-", "instance-log-", "instance-metadata-", "instance-console")


class LifecycleWatch:
    """The changes of one Incus project's tenants; see `gateway.runtime.TenantChanges`.

    `changed` is called with the name of each tenant that may have changed, and with None if any may have.
    `leaving` are tenants on their way to another member: that they are gone is no destruction. `standing`
    tells whether the event stream is connected, so that changes will be reported.
    """

    def __init__(
        self,
        settings: Settings,
        incus: Incus,
        tenants: TenantInstances,
        changed: Callable[[str | None], None],
        leaving: Collection[str],
    ) -> None:
        self._settings, self._incus = settings, incus
        self._tenants, self._changed, self._leaving = tenants, changed, leaving
        self.standing = False
        self._stream: AsyncGenerator[dict[str, Any], None] | None = None  # connected ahead of `watch`
        self._told: deque[str] = deque(maxlen=_TOLD)
        self._skip = frozenset[str]()
        self._ends: dict[str, datetime] = {}  # time of destruction by name, latest last

    async def prepare(self) -> None:
        """Connect the event stream ahead of `watch`, which begins with what comes from now on.

        Raises `IncusError`.
        """
        self._stream = stream = self._incus.events("lifecycle")
        connected = await anext(stream)
        assert connected["type"] == "connected"

    @property
    def told(self) -> Sequence[str]:
        """The marks of the latest events of which `watch` has yielded all changes."""
        return tuple(self._told)

    def skip(self, told: Sequence[str]) -> None:
        """Yield nothing for the events with these marks, which an earlier process has reported."""
        self._skip = frozenset(told)

    def _next(self) -> AsyncGenerator[dict[str, Any], None]:
        """Return the stream that is connected already, else a new one."""
        if self._stream is None:
            return self._incus.events("lifecycle")
        prepared, self._stream = self._stream, None
        return _connected(prepared)

    async def watch(self) -> AsyncIterator[TenantEvent]:
        """Yield the tenants' events forever.

        Incus replays nothing: after each gap the instances are listed and the differences yielded, followed
        by `gateway.resynced`. The same is done every `reconcile_interval`, because Incus drops events for a
        slow reader and sends none for a deleted profile key.
        """
        known: dict[str, Status] | None = None
        pause, longest = _PAUSES
        while True:
            try:
                stream = self._next()
                ticks = _with_ticks(stream, self._settings.reconcile_interval)
                # close both: a generator being awaited by the other cannot be closed, and a cancel would be
                # lost
                async with contextlib.aclosing(stream), contextlib.aclosing(ticks):
                    async for event in ticks:
                        if event is None or event["type"] == "connected":
                            changes, known = await self._differences(known)
                            for change in changes:
                                yield change
                            if event is not None:
                                pause, self.standing = _PAUSES[0], True
                                yield TenantEvent("gateway.resynced", None, {"tenants": len(known)})
                            continue
                        if known is None:  # cannot happen: "connected" comes first
                            continue
                        mark = _mark(event)
                        async for change in self._lifecycle(event, known):
                            if mark not in self._skip:
                                yield change
                        self._told.append(mark)
                raise IncusError("the event stream ended", 0)
            except (GatewayError, IncusError) as error:
                if self.standing:
                    log.warning("Incus event stream lost: %s", error)
            except Exception:
                # one strange answer must not end the watch: start over
                log.exception("cannot process an Incus event")
            self.standing = False
            self._changed(None)
            await asyncio.sleep(pause)  # back-off before reconnecting
            pause = min(pause * 2, longest)

    async def starved(self) -> AsyncGenerator[TenantEvent]:
        """Yield `tenant.oom` whenever the kernel has killed processes of a tenant for lack of memory.

        Ends at once if the kernel log, which only root can read, is not readable.
        """
        project = self._settings.incus_project
        prefix = "" if project == "default" else f"{project}_"
        async with contextlib.aclosing(ooms()) as told:
            async for container, process, count in told:
                name = container.removeprefix(prefix)
                # instances of other projects have an underscore in their names
                if container.startswith(prefix) and TENANT_NAME.fullmatch(name):
                    with contextlib.suppress(GatewayError):  # not a tenant, or Incus is away
                        await self._tenants.get(name)
                        yield TenantEvent("tenant.oom", name, {"process": show(process), "killed": count})

    async def _differences(
        self, known: dict[str, Status] | None
    ) -> tuple[Sequence[TenantEvent], dict[str, Status]]:
        now = {tenant.name: tenant.status for tenant in await self._tenants.list(addresses=False)}
        changes = [] if known is None else differences(known, now)
        for change in changes:
            self._changed(change.tenant or "")
        changes = [
            one for one in changes if one.type != "tenant.destroyed" or one.tenant not in self._leaving
        ]
        gone = [change for change in changes if change.type == "tenant.destroyed"]
        if gone and await self._incus.member():
            # one that left this server of a cluster is not destroyed while there is one of its name
            left = await self._incus.names()
            changes = [change for change in changes if change not in gone or change.tenant not in left]
        return changes, now

    async def _lifecycle(
        self, event: Mapping[str, Any], known: dict[str, Status]
    ) -> AsyncIterator[TenantEvent]:
        metadata = event.get("metadata") or {}
        action, name = str(metadata.get("action", "")), str(metadata.get("name", ""))
        context, facts = metadata.get("context") or {}, dict[str, str]()
        if action.startswith("instance-snapshot-"):
            if (source := _SNAPSHOT.match(str(metadata.get("source", "")))) is None:
                return
            name, facts["snapshot"] = source[1], source[2]
            if source[2].startswith(OURS):
                return
        if not action.startswith("instance-") or not name or "/" in name:
            return
        at = _moment(event)
        if at < self._ends.get(name, at):
            return  # of a destroyed tenant: Incus sends events in any order
        if action == "instance-exec":
            if is_ours(context.get("command") or []):
                return  # our own command, reported as exec.started
        elif not action.startswith(_LOOKS):
            self._changed(name)
        old = str(context.get("old_name", "")) if action == "instance-renamed" else ""
        self._changed(old)
        if is_aside(name) or is_aside(old):
            known.pop(old, None)
            return  # who moves it tells
        if name not in known and old not in known:
            try:
                await self._tenants.get(name)  # is it a tenant?
            except (NotFound, OnAnotherServer):
                return
        requestor = metadata.get("requestor") or {}
        by = requestor.get("username") or requestor.get("protocol") or "guest"
        data = {"action": action, **facts, "by": by}
        if old:
            known.pop(old, None)
            data["from"] = old
        if action == "instance-deleted":
            self._ends.pop(name, None)
            self._ends[name] = at
            while len(self._ends) > _ENDS:
                del self._ends[next(iter(self._ends))]
            if known.pop(name, "stopped") != "stopped":  # its stop event is late or lost
                yield TenantEvent("tenant.stopped", name, {"action": "instance-stopped", "by": by})
        else:
            before: Status = "stopped" if action == "instance-created" else "running"
            known[name] = _AFTER.get(action, known.get(name, before))
        # an exec's command line is private to the tenant: report only that there was one
        yield TenantEvent(_LIFECYCLE.get(action, f"incus.{action}"), name, data)
        if action == "instance-restored" and (snapshot := str(context.get("snapshot", ""))):
            data = {"action": action, "snapshot": snapshot.rpartition("/")[2], "by": by}
            yield TenantEvent("tenant.snapshot.restored", name, data)


def differences(known: Mapping[str, Status], now: Mapping[str, Status]) -> list[TenantEvent]:
    """Return the events that must have been missed between two listings, marked `resync`."""
    data = {"resync": True}
    changes: list[TenantEvent] = []
    for name, status in now.items():
        if name not in known:
            changes.append(TenantEvent("tenant.created", name, data))
        if known.get(name) != status and status in ("running", "stopped"):
            kind = "tenant.started" if status == "running" else "tenant.stopped"
            if name in known or status == "running":
                changes.append(TenantEvent(kind, name, data))
    changes += [TenantEvent("tenant.destroyed", name, data) for name in known if name not in now]
    return changes


def _mark(event: Mapping[str, Any]) -> str:
    """Return what tells an event from all others: Incus gives them no ids."""
    facts = orjson.dumps([event.get("timestamp"), event.get("metadata")], option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(facts, digest_size=8).hexdigest()


async def _connected(stream: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
    """Yield all of a stream of which the beginning was taken."""
    async with contextlib.aclosing(stream):
        yield {"type": "connected"}
        async for event in stream:
            yield event


def _moment(event: Mapping[str, Any]) -> datetime:
    """Return an event's timestamp, or the current time if it has none."""
    try:
        return datetime.fromisoformat(str(event.get("timestamp"))).astimezone(UTC)
    except ValueError:
        return datetime.now(UTC)


async def _with_ticks(
    stream: AsyncIterator[dict[str, Any]], interval: float
) -> AsyncGenerator[dict[str, Any] | None]:
    """Yield the stream's items, and None every `interval` seconds."""
    pending: asyncio.Task[dict[str, Any]] | None = None
    due = time.monotonic() + interval
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(stream))
            await asyncio.wait([pending], timeout=max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:
                due = time.monotonic() + interval
                yield None
            if pending.done():
                task, pending = pending, None
                try:
                    item = task.result()
                except StopAsyncIteration:
                    return
                yield item
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
