"""Watch which tenants are short of memory, report it, and kill a site that thrashes for too long.

At its limit, a tenant drops pages that it needs again immediately: it reads them back from the disk for
minutes, the kernel kills nothing, and hardly anything in the tenant makes progress. `Course` decides from the
measurements of one tenant; `Pressure` measures all tenants, in a thread, and acts on the decisions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal

from gateway.bounds import run_in_thread
from gateway.errors import GatewayError
from gateway.events import Bus
from gateway.rootfs import memory, site_cgroup
from gateway.rootfs.broker_client import BrokerClient
from gateway.rootfs.memory import KernelFile, Place, Sample
from gateway.rootfs.paths import show
from gateway.rootfs.site_cgroup import SITE, SiteProcess
from gateway.runtime import TenantEvent, scripts
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.sizes import SIZES, size_of

log = logging.getLogger(__name__)


INTERVAL: Final = 2.0  # seconds between two measurements
# seconds that a site may thrash before its biggest process is killed, 0 for any: a start thrashes for a while
PATIENCE: Final = 60.0
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_SHARE: Final = 0.2  # of the time that some process waits for memory, from which on it is pressure
# bytes read back per second, also required for pressure: a process that reads or writes a lot once waits for
# memory too, but reads nothing again
_AGAIN: Final = 4 << 20
_AGAIN_ALONE: Final = 32 << 20  # bytes per second, if the kernel does not measure waiting
_BEGINS: Final = 2  # consecutive measurements with pressure before it is reported
_ENDS: Final = 3  # consecutive measurements without it before it counts as over
_STILL: Final = 0.02  # seconds waited between two measurements below which nothing more is read
_TELL: Final = 60.0  # seconds between two reports about a tenant
_LOOK: Final = 10.0  # seconds to measure all tenants, which takes milliseconds
_LOGGING: Final = 20.0  # seconds to write a line into a site's log
_REPORT: Final = 2.0  # seconds until a kill is known: the kernel log is read at least each second
_STARTS: Final = ("tenant.started", "tenant.restarted", "tenant.created", "gateway.resynced")
_MOVES: Final = (*_STARTS, "tenant.stopped", "tenant.destroyed", "tenant.renamed")

_PRINTED: Final = 4096  # bytes of output allowed for that
# a message by root with this field shows up in the unit's log: journalctl(1) --unit
_NOTE: Final = """\
MESSAGE={line}
PRIORITY=3
SYSLOG_IDENTIFIER=incus-gateway
OBJECT_SYSTEMD_UNIT=site.service
"""


@dataclass(frozen=True, slots=True)
class Window:
    """What happened in a cgroup between two samples. `share` of time waited is None if not measured."""

    seconds: float
    share: float | None
    refaults: float  # pages per second

    @property
    def reads(self) -> int:
        """Bytes read back per second, at least."""
        return int(self.refaults * _PAGE)

    @property
    def pressed(self) -> bool:
        if self.share is None:
            return self.reads >= _AGAIN_ALONE
        return self.share >= _SHARE and self.reads >= _AGAIN


def window(before: Sample | None, now: Sample | None) -> Window | None:
    """Return the difference of two samples, None if one is missing or the counters were reset."""
    if before is None or now is None or now.at <= before.at or now.refaults < before.refaults:
        return None
    seconds = now.at - before.at
    share = None
    if now.stalled is not None and before.stalled is not None:
        share = min(1.0, max(0.0, now.stalled - before.stalled) / seconds)
    return Window(seconds, share, (now.refaults - before.refaults) / seconds)


Step = Literal["tell", "relieve", "over", "reserve"]


@dataclass(slots=True)
class Course:
    """The history of one tenant's pressure. `patience` is in seconds, 0 for unlimited."""

    patience: float
    looks: int = 0  # consecutive measurements with pressure
    calm: int = 0  # consecutive measurements without
    site_calm: int = 0
    since: float | None = None  # start of the current pressure
    site_since: float | None = None  # start of the current pressure of the site
    told: float | None = None
    telling: bool = False  # whether the current pressure was reported

    def step(self, at: float, tenant: Window | None, site: Window | None) -> tuple[Step, ...]:
        """Process the measurements up to `at`, and return the actions due now."""
        pressed = tenant is not None and tenant.pressed
        if not pressed:
            return self._calm()
        assert tenant is not None
        self.looks, self.calm = self.looks + 1, 0
        if self.since is None:
            self.since = at - tenant.seconds
        if site is not None and site.pressed:
            self.site_calm = 0
            if self.site_since is None:
                self.site_since = at - site.seconds
        else:
            self.site_calm += 1
            if self.site_calm >= _ENDS:
                self.site_since = None
        if self.looks < _BEGINS:
            return ()
        steps: list[Step] = []
        if self.told is None or at - self.told >= _TELL:
            self.told, self.telling = at, True
            steps.append("tell")
        if self.patience and self.site_since is not None and at - self.site_since >= self.patience:
            self.site_since = None  # restart the patience
            steps.append("relieve")
        return tuple(steps)

    def _calm(self) -> tuple[Step, ...]:
        self.looks, self.calm = 0, self.calm + 1
        if self.calm < _ENDS:
            return ()
        self.since = self.site_since = None
        over, self.telling = self.telling, False
        return ("over",) if over else ()


@dataclass(slots=True)
class _Watched:
    place: Place
    course: Course
    stalls: KernelFile
    processes: KernelFile  # of the site
    stalled: float | None = None  # seconds, at the last measurement
    tenant: Sample | None = None
    site: Sample | None = None
    first: int = 0  # first process of the site when CPU was reserved for commands
    unreserved: bool = False  # CPU cannot be reserved for commands, for lack of root


@dataclass(frozen=True, slots=True)
class _ThrashingSite:
    """The measurements of a tenant that needs action."""

    steps: tuple[Step, ...]
    sample: Sample | None = None
    window: Window | None = None
    biggest: SiteProcess | None = None


class Pressure:
    """Watches all running tenants. An async context manager.

    An idle tenant costs two small reads per `INTERVAL`, and two descriptors.
    """

    def __init__(self, runtime: IncusRuntime, root: BrokerClient, bus: Bus) -> None:
        self._runtime, self._root, self._bus = runtime, root, bus
        self._watched: dict[str, _Watched] = {}
        self._stale = asyncio.Event()
        self._acting: dict[tuple[str, Step], asyncio.Task[None]] = {}
        self._killed: dict[str, float] = {}  # when a process was last killed for lack of memory
        self._reported = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self.pressed = 0  # tenants that are short of memory now

    async def __aenter__(self) -> Pressure:
        self._stale.set()
        self._watching = asyncio.create_task(self._watch(), name="pressure")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._watching, *self._acting.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def seconds(self, tenant: str) -> float:
        """Return for how many seconds a tenant has been continuously short of memory."""
        watched = self._watched.get(tenant)
        since = None if watched is None else watched.course.since
        return 0.0 if since is None else max(0.0, time.monotonic() - since)

    async def has_killed(self, tenant: str, since: float) -> bool:
        """Return whether a process of a tenant was killed for lack of memory `since` a monotonic time.

        Waits a little for the report, which comes after the process has ended.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REPORT):
                while self._killed.get(tenant, -1.0) < since:
                    self._reported.clear()
                    await self._reported.wait()
        return self._killed.get(tenant, -1.0) >= since

    def _note_kill(self, tenant: str) -> None:
        self._killed[tenant] = time.monotonic()
        self._reported.set()

    def noticed(self, event: TenantEvent) -> None:
        """Handle a tenant's event."""
        if event.type == "tenant.oom" and event.tenant is not None:
            self._note_kill(event.tenant)
        if event.type == "tenant.destroyed" and event.tenant is not None:
            self._killed.pop(event.tenant, None)
        if event.type in _MOVES:
            if event.tenant is not None:
                self._watched.pop(event.tenant, None)
            self._stale.set()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                if self._stale.is_set():
                    self._stale.clear()
                    await self._renew()
                found = await run_in_thread("pressure", _LOOK, _look, dict(self._watched))
                self._act(found)
            except GatewayError as error:
                self._stale.set()
                log.info("cannot measure the tenants' memory: %s", error.message)
            except TimeoutError:
                self._watched.clear()  # a thread may still be using these
                self._stale.set()
                log.warning("cannot measure the tenants' memory within %g s", _LOOK)
            except Exception:
                self._stale.set()
                log.exception("cannot measure the tenants' memory")

    async def _renew(self) -> None:
        """Find out which tenants are running, and the kernel's counters of new ones."""
        tenants = await self._runtime.tenants.list(addresses=False)
        running = {one.name for one in tenants if one.status == "running"}
        for gone in self._watched.keys() - running:
            del self._watched[gone]
        for name in running - self._watched.keys():
            try:
                pid = await self._runtime.containers.init_pid(name)
            except GatewayError:
                self._stale.set()  # it has just stopped, or Incus is away
                continue
            place = await run_in_thread("pressure", _LOOK, memory.place, pid) if pid else None
            if place is None:
                self._stale.set()  # it is just starting
            else:
                course = Course(PATIENCE)
                self._watched[name] = _Watched(
                    place, course, memory.stalls(place), memory.site_processes(place)
                )

    def _act(self, found: Mapping[str, _ThrashingSite]) -> None:
        self.pressed = sum(one.course.since is not None for one in self._watched.values())
        for name, one in found.items():
            if self._watched.get(name) is None:
                continue  # its state changed meanwhile
            since = self._watched[name].course.since
            if "tell" in one.steps:
                self._bus.publish("tenant.pressure", name, self._facts(name, one, since))
            if "over" in one.steps:
                self._bus.publish("tenant.pressure.ended", name, {})
            work = {"relieve": self._end, "reserve": self._reserve}
            for step in one.steps:
                if step in work and (name, step) not in self._acting:
                    task = asyncio.create_task(work[step](name), name=f"{step} in {name}")
                    self._acting[name, step] = task
                    task.add_done_callback(partial(self._acted, (name, step)))

    def _acted(self, what: tuple[str, Step], task: asyncio.Task[None]) -> None:
        del self._acting[what]

    async def _reserve(self, name: str) -> None:
        """Reserve some of a tenant's CPU for commands."""
        try:
            await self._root.reserve(name)
        except GatewayError as error:
            if (one := self._watched.get(name)) is not None:
                one.unreserved = True
            log.info("cannot reserve CPU for commands in %s: %s", name, error.message)

    def _facts(self, name: str, one: _ThrashingSite, since: float | None) -> dict[str, Any]:
        sample, went = one.sample, one.window
        assert sample is not None and went is not None
        size = larger(sample.limit)
        return {
            "usage": sample.usage,
            "limit": sample.limit,
            "refaults": round(went.refaults),
            "stalled": None if went.share is None else round(went.share, 3),
            "reads": went.reads,
            "seconds": 0 if since is None else round(sample.at - since, 1),
            "process": None if one.biggest is None else show(one.biggest.name),
            "size": size,
            "advice": advice(name, sample.limit, size),
        }

    async def _end(self, name: str) -> None:
        """Kill the biggest process of a site, so that systemd restarts it, and write why into its log."""
        try:
            ended = await self._root.relieve(name)
            if ended is None:
                return
            self._note_kill(name)
            process, size = show(ended[0]), ended[1]
            facts = {"process": process, "bytes": size, "seconds": PATIENCE}
            self._bus.publish("tenant.pressure.killed", name, facts)
            line = (
                f"short of memory for {PATIENCE:g} s: the gateway killed {process} ({size >> 20} MiB), the "
                "biggest process of the site, so that it restarts; it needs a larger size, or less memory use"
            )
            log.warning("%s: %s", name, line)
            await self._note(name, line)
        except (GatewayError, TimeoutError) as error:
            log.warning("cannot kill what thrashes in %s, or write to its log: %s", name, error)
        except Exception:
            log.exception("cannot kill what thrashes in %s, or write to its log", name)

    async def _note(self, name: str, line: str) -> None:
        """Write a line into the log of a tenant's site."""
        await scripts.run(
            self._runtime.commands.exec,
            name,
            ("logger", "--journald"),
            given=_NOTE.format(line=line).encode(),
            seconds=_LOGGING,
            printed=_PRINTED,
        )


def _look(watched: Mapping[str, _Watched]) -> dict[str, _ThrashingSite]:
    """Measure all tenants, and return those that need action."""
    found = {}
    for name, one in watched.items():
        alone: tuple[Step, ...] = ()
        # a restarted site has a different first process
        if not one.unreserved and (first := memory.first_process(one.processes)) != one.first:
            if first and site_cgroup.lacks(one.place.unified, first):
                alone = ("reserve",)
            else:
                one.first = first
        before, one.stalled = one.stalled, memory.waited(one.stalls.read())
        quiet = before is not None and one.stalled is not None and one.stalled - before < _STILL
        if quiet and one.tenant is None and one.course.since is None:
            if alone:
                found[name] = _ThrashingSite(alone)
            continue
        now, site = memory.sample(one.place), memory.sample(one.place.below(SITE))
        went = window(one.tenant, now)
        steps: tuple[Step, ...] = ()
        if now is not None:
            steps = one.course.step(now.at, went, window(one.site, site))
        # forget a quiet tenant's samples, so that its next measurement is short again
        rests = quiet and one.course.since is None and not one.course.telling
        one.tenant, one.site = (None, None) if rests else (now, site)
        if steps or alone:
            who = site_cgroup.biggest(one.place.unified) if "tell" in steps else None
            found[name] = _ThrashingSite((*steps, *alone), now, went, who)
    return found


def larger(limit: int | None) -> str | None:
    """Return the smallest size with more memory than `limit` bytes, None if there is none."""
    sizes = [(size_of(size["memory"]), name) for name, size in SIZES.items() if "memory" in size]
    more = [(has, name) for has, name in sizes if limit is not None and has > limit]
    return min(more)[1] if more else None


def advice(name: str, limit: int | None, size: str | None) -> str:
    """Return advice for a tenant that is short of memory."""
    has = "its memory" if limit is None else f"its {limit >> 20} MiB of memory"
    if size is None:
        return f"{name} needs more than {has}, and there is no larger size: make it use less"
    return (
        f"{name} needs more than {has}: give it the size {size} (incus-gateway resize {name} {size}, or "
        f'PATCH /v1/tenants/{name} {{"size": "{size}"}}), or make it use less'
    )
