"""Runs deployments: phase after phase, each with its undo, on record at every step.

A new tenant is built and destroyed as a whole. An update builds the next site beside the live one, leads the
domain to it, sees it answer, and only then puts its files in the live one's place. What a killed gateway left
half done the next one undoes, or finishes where it had been seen to work.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Final

import orjson

from gateway.auth.tokens import Token
from gateway.bounds import aside
from gateway.caddy import Caddy, CaddyFailed, asleep
from gateway.deployments import record as records
from gateway.deployments.frameworks import Framework, listening, shortage
from gateway.deployments.queue import DeploymentQueue, Owner, uploader
from gateway.deployments.record import PHASES, Record
from gateway.deployments.template import Template, named, names, uploaded
from gateway.deployments.verify import Subject, Verifier
from gateway.deployments.warming import Warming
from gateway.errors import (
    Conflict,
    GatewayError,
    InvalidParams,
    NotFound,
    RateLimited,
    Timeout,
    Unavailable,
)
from gateway.events import Bus
from gateway.hostnames import normalized, tenant_name
from gateway.ownership.domains import Domains
from gateway.rootfs.root import show
from gateway.rootfs.workers import Workers
from gateway.runtime import TENANT_NAME, TenantEvent, TenantRuntime, sizes
from gateway.runtime.sites import Exposure, Order, Recipe, Side, Site, Sites
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed
from gateway.tasks import apart
from gateway.tools.mirroring import KEPT, LOST

log = logging.getLogger(__name__)

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENV_MAX: Final = 64 << 10
_LISTED: Final = 100
_NAMED: Final = 20  # paths that an update removes and names
_UNDO_TIMEOUT: Final = 120.0
_ARCHIVE: Final = 60.0  # seconds until an uploaded archive is read; the largest takes some
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
# Caddy's own words may name folders of this host; they are in the log
_CADDY: Final = {
    "caddy_down": "Caddy does not answer; whoever runs the gateway starts it (incus-gateway doctor says how)",
    "caddy_foreign": "the Caddy of this host serves something else; incus-gateway doctor says what to do",
    "caddy_refused": "Caddy refuses the gateway's configuration; the gateway's log says why",
}
# what a tenant's end or change may mean for its route
_MOVES: Final = (
    *("tenant.created", "tenant.started", "tenant.destroyed", "tenant.renamed"),
    *("incus.instance-updated", "gateway.resynced"),
)
_ENDS: Final = ("tenant.stopped", "tenant.destroyed", "tenant.renamed", "tenant.restarted")
_ADDRESS_LOOK: Final = 0.5  # seconds between two looks for the address of a site that was just started
_ADDRESS_LOOKS: Final = 20


Promise = Callable[[str, str | None], contextlib.AbstractAsyncContextManager[None]]
"""Has memory for a tenant, by name and limit, that starts to run while the context is open, or refuses it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for. `template` is a name or an archive; `env` is kept nowhere but in the tenant.

    To make one of a large archive, whose digest is taken, takes a moment: do it off the loop.
    """

    domain: str
    template: str | bytes
    size: str = "small"
    env: Mapping[str, str] | None = None
    tenant: str | None = None
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        template = (
            self.template if isinstance(self.template, str) else hashlib.sha256(self.template).hexdigest()
        )
        env = None if self.env is None else sorted(self.env.items())
        facts = [self.domain, template, self.size, env, self.tenant]
        object.__setattr__(self, "digest", hashlib.sha256(orjson.dumps(facts)).hexdigest())


@dataclass(slots=True)
class _Running:
    record: Record
    request: Request
    owner: Owner
    uploader: str = ""
    key: str | None = None
    upload: Recipe | None = None  # of which copies may be kept
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    lines: int = 0
    batch: list[str] = field(default_factory=list)


class Deployments:
    """The deployments of one gateway. Use as an async context manager."""

    def __init__(
        self,
        runtime: TenantRuntime,
        sites: Sites,
        caddy: Caddy,
        domains: Domains,
        store: Store,
        bus: Bus,
        settings: Settings,
        use: Callable[[str], contextlib.AbstractAsyncContextManager[None]] | None = None,
        admit: Callable[[], Awaitable[None]] | None = None,
        spacious: Callable[[], Awaitable[None]] | None = None,
        promise: Promise | None = None,
        ended: Callable[[str], float] | None = None,
        workers: Workers | None = None,
        unwell: Callable[[str, int, str, str], None] | None = None,
    ) -> None:
        """`use` keeps a tenant awake while its context is open; `ended` says when a name's last one ended.

        `unwell` is told tenant, port, path and why where a site does not stay up after its deployment.
        `admit` refuses where there is no room for another tenant, `spacious` where there would be none
        without giving anything up, `promise` where this host has no memory for it. Without `workers` updates
        remove nothing.
        """
        self._admit = admit
        self._promise = promise or (lambda tenant, memory: contextlib.nullcontext())
        self._ended = ended or (lambda tenant: 0.0)
        self._workers = workers
        self._unwell = unwell or (lambda tenant, port, path, why: None)
        self._verifier = Verifier(sites, caddy, settings)
        self._use = use or (lambda tenant: contextlib.nullcontext())
        self._runtime, self._sites, self._caddy, self._domains = runtime, sites, caddy, domains
        self._store, self._bus, self._settings = store, bus, settings
        self._running: dict[str, _Running] = {}
        # over, but the store could not take it; no more than it took when they began
        self._unwritten: dict[str, Record] = {}
        self._unprepared: set[str] = set()  # names of templates
        self._turns = DeploymentQueue(settings)
        self._warming = Warming(sites, self._turns, spacious, settings)
        self._moved = asyncio.Event()
        self._unplaced: frozenset[str] = frozenset()  # tenants whose sites have no address yet
        self._looks = 0  # for these, one after another
        self._recovered = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Deployments:
        await self._domains.retain({record.id for record in await self._store.read(records.unfinished)})
        self._following = asyncio.create_task(self._follow(), name="routes")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self.end()
        await self._warming.aclose()
        await self._verifier.aclose()
        await self._write_down()

    async def end(self) -> None:
        """Cancel what runs and wait until it is undone; what does not fit is left to the next life."""
        tasks = [running.task for running in self._running.values() if running.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self._settings.shutdown_timeout / 2)

    # --- what clients ask ---------------------------------------------------------------------------

    async def begin(self, request: Request, token: Token, *, key: str | None = None) -> tuple[Record, bool]:
        """Begin a deployment; return it, and whether it is new: the same key gives the same one again.

        Raises `InvalidParams`, `NotFound` and `Forbidden` for what can be told at once, `Conflict` where one
        runs for the tenant or the key was used for something else, and `RateLimited`.
        """
        by = token.subject
        domain = normalized(request.domain)
        tenant = request.tenant or tenant_name(domain)
        if not TENANT_NAME.fullmatch(tenant):
            raise InvalidParams(f"{tenant[:63]!r} is no tenant name", field="tenant")
        if not token.covers(tenant):
            raise NotFound(f"no tenant {tenant} for this token; one that covers it can deploy {domain}")
        sizes.known(request.size)
        _check_env(request.env)
        await self._domains.permit(token, domain)
        if isinstance(request.template, str) and request.template not in names(self._settings):
            known = ", ".join(names(self._settings))
            raise NotFound(
                f"no template {request.template[:63]}; there are: {known}", reason="template_missing"
            )
        template = request.template if isinstance(request.template, str) else "upload"
        fresh = Record(tenant, domain, self._caddy.url(domain), template, by)
        if key is not None:
            begun = await self._store.read(lambda connection: records.keyed(connection, by, key))
            begun += [
                (other.record, other.request.digest)
                for other in self._running.values()
                if (other.record.by, other.key) == (by, key)
            ]
            # of another tenant's, or of one that had the name before, nothing may be told
            if told := [one for one in begun if self._knows(token, one[0])]:
                return self._same(told, request), False
        holder = self._domains.holder(domain)
        for other in self._running.values():
            if other.record.over:  # only to be written down: who has seen its end may begin the next one
                continue
            # of another's deployment only that there is one may be told
            theirs = other.record.id == holder and token.covers(other.record.tenant)
            if other.record.tenant == tenant or theirs:
                raise Conflict(
                    f"a deployment of {other.record.domain} runs already; wait for it, or cancel it",
                    deployment=other.record.id,
                )
        owner, size = Owner.of(token), len(request.template) if isinstance(request.template, bytes) else 0
        self._turns.admit(owner, size)
        running = self._running[fresh.id] = _Running(fresh, request, owner, self._uploader(token), key)
        try:
            await self._domains.hold(domain, tenant, fresh.id)
            await self._store.write(
                lambda connection: records.begin(
                    connection, fresh, key, request.digest, self._settings.deployments_kept
                )
            )
        except BaseException:
            del self._running[fresh.id]
            self._turns.leave(owner, size)
            await self._domains.over(fresh.id)
            raise
        running.task = asyncio.create_task(self._run(running), name=f"deploy {tenant}")
        running.task.add_done_callback(lambda _: self._turns.leave(owner, size))
        return fresh, True

    def _uploader(self, token: Token) -> str:
        """Name whose upload it is; empty where no copy of an upload is ever kept."""
        return uploader(token, self._ended) if self._settings.upload_copies else ""

    @staticmethod
    def _same(known: Iterable[tuple[Record, str]], request: Request) -> Record:
        """Return the deployment of a key that was asked for with the same request. Raises `Conflict`."""
        for record, digest in known:
            if digest == request.digest:
                return record
        raise Conflict("this Idempotency-Key was used for another deployment; take a new one")

    def _knows(self, token: Token, record: Record) -> bool:
        """Say whether a deployment is of a tenant that the token covers, and was made for."""
        if token.coverage is None:
            return True
        ended = self._ended(record.tenant)
        return token.covers(record.tenant) and (record.created >= ended or token.issued <= ended)

    async def get(self, identity: str) -> Record:
        """Return a deployment. Raises `NotFound`."""
        if identity in self._running:
            return self._running[identity].record
        if identity in self._unwritten:
            return self._unwritten[identity]
        found = await self._store.read(lambda connection: records.find(connection, identity))
        if found is None:
            raise NotFound(f"no deployment {identity[:40]}")
        return found

    async def recent(self, coverage: frozenset[str] | None) -> list[Record]:
        """Return the newest deployments of the tenants that a token covers, None for all."""
        found = await self._store.read(lambda connection: records.recent(connection, coverage, _LISTED))
        newer = self._unwritten | {identity: running.record for identity, running in self._running.items()}
        return [newer.get(record.id, record) for record in found]

    async def cancel(self, identity: str) -> Record:
        """Cancel a deployment and return it once it is undone; one that has ended is returned as it is."""
        running = self._running.get(identity)
        if running is None or running.task is None:
            return await self.get(identity)
        if running.record.state in ("waiting", "running") and not running.record.settled:
            running.cancelled = True
            running.task.cancel()
        await asyncio.wait([running.task])
        return running.record

    # --- one deployment -----------------------------------------------------------------------------

    async def _run(self, running: _Running) -> None:
        record, began = running.record, time.monotonic()
        try:
            async with self._turns.turn(running.owner):
                await self._recovered.wait()
                record.state = "running"
                self._tell(running, "started", {"domain": record.domain, "template": record.template})
                async with contextlib.AsyncExitStack() as held:
                    await self._attempt(running, held)
            await _whatever_comes(self._end(running, began))
            if record.error is None and isinstance(running.request.template, str):
                with contextlib.suppress(GatewayError):  # it may have been taken away meanwhile
                    template = await self._template(running.request, record.tenant)
                    recipe = await asyncio.to_thread(template.recipe)
                    if self._admit is not None:
                        await self._admit()
                    told, size = partial(self._prepared, template.name), running.request.size
                    self._sites.prepare(recipe, told, size, self._turns.quiet)
            elif record.error is None and record.source == "image" and running.upload is not None:
                self._warming.want(running.upload, running.request.size)
        except asyncio.CancelledError:
            if record.state == "waiting":  # it had not begun
                record.error = {"code": "cancelled", "message": "the deployment was cancelled"}
                self._tell(running, "cancelled", {**_place(PHASES[0]), "error": record.error})
                await _whatever_comes(self._end(running, began))
        except Exception:
            log.exception("deployment %s is broken off; it is looked after again soon", record.id)
        finally:
            self._running.pop(record.id, None)

    def _prepared(self, template: str, error: GatewayError | None) -> None:
        """Say that nothing could be made ready of a template, whose tenants take longer so; or now could."""
        if error is not None:
            log.warning("template %s could not be made ready: %s", template, error.message)
            self._unprepared.add(template)
            # no message: this is told to everybody, and a template's output is for the operator
            facts = {"code": error.code, "reason": error.facts.get("reason")}
            self._bus.publish("gateway.template.failed", None, {"template": template, **facts})
        elif template in self._unprepared:
            self._unprepared.discard(template)
            self._bus.publish("gateway.template.ready", None, {"template": template})

    async def _attempt(self, running: _Running, held: contextlib.AsyncExitStack) -> None:
        """Go through the phases; on failure or cancel unwind what was done, in reverse, and say so.

        The tenant is kept awake until `held` is closed.

        Once the site was seen to work there is no way back: what fails then is finished later.
        """
        undo = contextlib.AsyncExitStack()
        current = PHASES[0]
        work = _Work(self, running, undo, held)
        try:
            await held.enter_async_context(self._use(running.record.tenant))
            for index, current in enumerate(PHASES):
                await self._phase(running, index, current, getattr(work, current))
        except (Exception, asyncio.CancelledError) as error:
            if running.record.settled:
                raise
            await _whatever_comes(self._undo(running, undo, current, error))

    async def _phase(
        self, running: _Running, index: int, name: str, work: Callable[[], Awaitable[Any]]
    ) -> None:
        record = running.record
        phase = record.phases[index]
        phase.state = "running"
        place = _place(name)
        self._tell(running, "phase.started", place)
        began = time.monotonic()
        try:
            await self._save(record)
            facts = await work() or {}
        except BaseException:
            phase.state, phase.ms = "failed", _ms(began)
            raise
        phase.state, phase.ms = "done", _ms(began)
        self._tell(running, "phase.finished", {**place, "ms": phase.ms, **facts})

    async def _undo(
        self, running: _Running, undo: contextlib.AsyncExitStack, phase: str, error: BaseException
    ) -> None:
        record = running.record
        if isinstance(error, asyncio.CancelledError):
            record.error = {"code": "cancelled", "message": "the deployment was cancelled", "phase": phase}
            if not running.cancelled:
                record.error["message"] = "the gateway was stopped"
            kind = "cancelled"
        else:
            known = _known(error)
            record.failed(known, phase)
            kind = "failed"
        record.state = "undoing"
        self._flush(running)
        self._tell(running, kind, {**_place(phase), "error": record.error})
        with contextlib.suppress(StoreFailed):  # of a full disk: all the more is undone
            await self._save(record)
        async with asyncio.timeout(_UNDO_TIMEOUT):
            await undo.aclose()
        for done in record.phases:
            if done.state == "done":
                done.state = "undone"

    async def _end(self, running: _Running, began: float) -> None:
        record = running.record
        await self._domains.over(record.id)  # who hears of the end may ask for the domain at once
        record.state = "succeeded" if record.error is None else "rolledback"
        record.ended, record.ms = time.time(), _ms(began)
        try:
            await self._save(record)
        except StoreFailed as failed:
            log.warning("deployment %s is over, which cannot be written down: %s", record.id, failed.message)
            self._unwritten[record.id] = record
        facts: dict[str, Any] = {"ms": record.ms, "domain": record.domain, "url": record.url}
        if record.error is not None:
            facts["error"] = record.error
        self._running.pop(record.id, None)
        self._tell(running, record.state, facts)

    async def _save(self, record: Record) -> None:
        text, identity, tenant, ended = orjson.dumps(record), record.id, record.tenant, record.ended
        await self._store.write(lambda connection: records.save(connection, text, identity, tenant, ended))

    def _tell(self, running: _Running, kind: str, data: Mapping[str, Any]) -> None:
        record = running.record
        facts = {"deployment": record.id, "tenant": record.tenant, **data}
        self._bus.publish(f"deployment.{kind}", record.tenant, facts, deployment=record.id)

    async def _template(self, request: Request, tenant: str) -> Template:
        template = request.template
        if isinstance(template, str):
            return await asyncio.to_thread(named, template, self._settings)
        return await aside(tenant, _ARCHIVE, uploaded, template, self._settings)

    async def _lost(self, tenant: str, template: Template) -> bytes:
        """Return what the live site has and a folder that takes its place does not, each path with a NUL.

        What is deployed by a template's name is the operator's, and what was made of it since stays.
        """
        if self._workers is None or template.shared:
            return b""
        root = await self._runtime.filesystem(tenant)
        given = await asyncio.to_thread(template.stays)
        return await self._workers.call(root, LOST, given, search=True)

    async def _kept(self, tenant: str, template: Template) -> bytes:
        """Return what the live site has now of what its next one's manifest says to keep."""
        if self._workers is None or not template.manifest.keep:
            return b""
        root = await self._runtime.filesystem(tenant)
        given = await asyncio.to_thread(template.stays)
        return await self._workers.call(root, KEPT, given, search=True)

    # --- the install log ----------------------------------------------------------------------------

    def say(self, running: _Running, phase: str) -> Callable[[str], None]:
        """Return what publishes a phase's lines, a few at once and not more than the setting allows."""

        def one(line: str) -> None:
            running.lines += 1
            if running.lines > self._settings.install_log:
                return
            running.batch.append(line[:500])
            if len(running.batch) == 1:
                asyncio.get_running_loop().call_later(0.1, self._flush, running, phase)
            elif len(running.batch) >= 50:
                self._flush(running, phase)

        return one

    def _flush(self, running: _Running, phase: str = "install") -> None:
        if running.batch:
            lines, running.batch = running.batch, []
            self._tell(running, "phase.log", {**_place(phase), "lines": lines})

    # --- after a restart, and always ----------------------------------------------------------------

    async def recover(self) -> None:
        """Finish or undo what an earlier life left; from then on new ones run. Call it once Incus answers."""
        try:
            await self._sites.adopt(await asyncio.to_thread(self._shared_recipes))
            await self._reconcile()
        finally:
            self._recovered.set()

    def _shared_recipes(self) -> list[Recipe]:
        recipes = []
        for name in names(self._settings):
            with contextlib.suppress(GatewayError, OSError):
                recipes.append(named(name, self._settings).recipe())
        return recipes

    async def _write_down(self) -> None:
        """Keep how deployments ended that the store had no room for then, if it has now."""
        with contextlib.suppress(StoreFailed):
            for identity, record in list(self._unwritten.items()):
                await self._save(record)
                del self._unwritten[identity]

    async def _recover_one(self, record: Record) -> None:
        request, began = Request(record.domain, record.template), time.monotonic()
        running = _Running(record, request, Owner(None, record.by))
        try:
            if record.settled:  # it works: only this was not written down
                order = Order(record.id, record.domain, Recipe(b"", (), record.port, record.health))
                if await self._is_there(record):
                    await self._sites.finish(record.tenant, order)
                    if record.kind == "update":
                        await self._sites.clear(record.tenant)
                record.phases[-1].state = "done"
            else:
                if record.error is None:
                    record.error = {
                        "code": "unavailable",
                        "message": "the gateway ended",
                        "phase": _at(record),
                    }
                    self._tell(running, "failed", {**_place(_at(record)), "error": record.error})
                if record.kind == "create":
                    if self._domains.serves(record.domain, record.tenant):
                        self._caddy.unset(record.domain)
                    await self._sites.remove(record.id)
                elif await self._is_there(record):
                    await self._recover_update(record.tenant)
                for phase in record.phases:
                    if phase.state in ("done", "running"):
                        phase.state = "undone" if phase.state == "done" else "failed"
            await self._end(running, began - (time.time() - record.created))
        except GatewayError as error:
            log.warning("deployment %s cannot be undone yet: %s", record.id, error.message)

    async def _recover_update(self, tenant: str) -> None:
        """Undo an update in its container, which is started for it where somebody stopped it since."""
        async with self._use(tenant):
            stopped = (await self._runtime.get(tenant)).status != "running"
            if stopped:
                await self._runtime.start(tenant)
            try:
                await self._sites.unsettle(tenant)
                await self._sites.clear(tenant)
            finally:
                if stopped:
                    await self._runtime.stop(tenant)

    async def _is_there(self, record: Record) -> bool:
        """Say whether a deployment's tenant is still the one that it was about."""
        try:
            there = await self._runtime.get(record.tenant)
        except NotFound:
            return False
        return record.instance in (None, there.instance)

    async def _unsteady(self, record: Record, site: Subject, why: str) -> None:
        """Tell that a site did not stay up after its deployment, if its tenant is there and awake."""
        try:
            there = await self._runtime.get(site.tenant)
        except GatewayError:
            return
        if there.status == "running" and record.instance in (None, there.instance):
            log.warning("the site of %s did not stay up: %s", site.tenant, why)
            self._unwell(site.tenant, site.exposure.port, site.recipe.health, why)

    async def _follow(self) -> None:
        """Keep the routes as Incus says that they are, whatever happens to Caddy, files or tenants."""
        await self._recovered.wait()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), self._settings.reconcile_interval)
            self._moved.clear()
            try:
                await self._reconcile()
            except GatewayError as error:
                log.warning("routes could not be looked after: %s", error.message)
            except Exception:
                log.exception("routes could not be looked after")

    def noticed(self, event: TenantEvent) -> None:
        """Take notice of what happened to a tenant."""
        if event.type in _MOVES:
            self._moved.set()
        if event.type in _ENDS and event.tenant is not None:
            self._verifier.forget(event.tenant)

    async def _left(self) -> list[Record]:
        """Return the deployments that nobody runs any more and that are not over."""
        left = []
        for record in await self._store.read(records.unfinished):
            if record.id not in self._running and record.id not in self._unwritten:
                # one may have ended since: it is written down before it counts as run no more
                now = await self._store.read(partial(records.find, identity=record.id))
                if now is not None and not now.over:
                    left.append(now)
        return left

    async def _reconcile(self) -> None:
        await self._write_down()
        for record in await self._left():
            with apart(f"the recovery of deployment {record.id}"):
                await self._recover_one(record)
        await self._anchor()
        left = {record.id for record in await self._store.read(records.unfinished)} - self._unwritten.keys()
        async with self._domains.deciding(), self._caddy.changing:
            found = await self._sites.listed()
            deploying = [running.record for running in self._running.values()]
            serving = {
                site.tenant
                for site in found
                if site.exposure is not None and self._leads(site.domain) == site.exposure.target
            }
            await self._domains.look(found, serving, left | self._running.keys())
            busy = self._domains.held()
            sockets = {f"{site.tenant}.sock" for site in found}
            sockets |= {f"{record.tenant}{side}.sock" for record in deploying for side in ("", ".next")}
            wanted = {
                site.domain: asleep(site.exposure.target) if site.asleep else site.exposure.target
                for site in found
                if site.exposure is not None
                and site.deployment is None
                and self._domains.serves(site.domain, site.tenant)
            }
            changed = await asyncio.to_thread(self._caddy.reconcile, wanted, busy, sockets)
        self._look_again(found)
        if changed:
            log.info("routes put right: %s", ", ".join(changed))
        for site in found:
            # made by a request that was still under way when its gateway died
            if site.deployment is not None and site.deployment not in self._running:
                with apart(f"the removal of what deployment {site.deployment} left"):
                    with contextlib.suppress(NotFound):
                        if (await self.get(site.deployment)).over:
                            await self._sites.remove(site.deployment)
        with apart("the removal of copies that nobody needs"):
            await self._sites.tidy()
        if wanted or busy:
            await self._caddy.ensure()

    def _leads(self, domain: str) -> str:
        return (self._caddy.get(domain) or "").removeprefix(asleep(""))

    def _look_again(self, found: Sequence[Site]) -> None:
        """See to it that a site which has just been started is led to once it has its address."""
        unplaced = frozenset(
            site.tenant
            for site in found
            if site.running and site.exposure is None and site.deployment is None and not site.shares_address
        )
        self._looks = self._looks + 1 if unplaced == self._unplaced else 0
        self._unplaced = unplaced
        if unplaced and self._looks < _ADDRESS_LOOKS:
            asyncio.get_running_loop().call_later(_ADDRESS_LOOK, self._moved.set)

    async def _anchor(self) -> None:
        """Give the tenants of sites an address that they keep: one that sleeps has a route by it alone."""
        for site in await self._sites.listed():
            if site.loose and site.deployment is None:
                try:
                    await self._sites.anchor(site.tenant)
                except GatewayError as error:
                    log.warning("tenant %s has no address that it keeps: %s", site.tenant, error.message)


class _Work:
    """The phases of one deployment. Each pushes its undo before it does what is to be undone."""

    def __init__(
        self,
        all_: Deployments,
        running: _Running,
        undo: contextlib.AsyncExitStack,
        held: contextlib.AsyncExitStack,
    ) -> None:
        self._all, self._running, self._undo, self._held = all_, running, undo, held
        self._record, self._request = running.record, running.request
        self._sites, self._caddy, self._settings = all_._sites, all_._caddy, all_._settings
        self._verifier = all_._verifier
        self._answered = 0.0  # when its first answer came
        self._template: Template
        self._recipe: Recipe
        self._framework: tuple[Framework | None, tuple[str, ...]]
        self._exposure: Exposure
        self._side: Side = "live"
        self._prepared = False

    @property
    def _order(self) -> Order:
        record = self._record
        return Order(record.id, record.domain, self._recipe, self._request.size)

    @property
    def _copied(self) -> bool:
        """Whether the tenant is a copy, with nothing of its own, of one whose site was seen to work."""
        return self._prepared and self._request.env is None

    async def validate(self) -> dict[str, Any]:
        record, settings = self._record, self._settings
        template = self._template = await self._all._template(self._request, record.tenant)
        self._framework = await asyncio.to_thread(template.framework)
        self._recipe = await asyncio.to_thread(template.recipe, self._running.uploader)
        self._running.upload = self._recipe if self._recipe.owner else None
        record.port, record.health = self._recipe.port, self._recipe.health
        domains = self._all._domains
        async with domains.deciding():
            found = await self._all._runtime.list()
            await domains.confirm(record.domain, record.tenant, record.id, found)
        tenants = {tenant.name: tenant for tenant in found}
        there = tenants.get(record.tenant)
        if there is None:
            if len(tenants) >= settings.max_tenants:
                raise RateLimited(
                    f"{len(tenants)} tenants are the limit; raise GATEWAY_MAX_TENANTS",
                    reason="quota",
                )
            memory = sizes.SIZES[self._request.size].get("memory", settings.tenant_memory)
            record.warnings = self._short(memory)
            await self._held.enter_async_context(self._all._promise(record.tenant, memory))
            if self._all._admit is not None:
                await self._all._admit()
        else:
            if there.domain not in (None, record.domain):
                raise Conflict(
                    f"tenant {record.tenant} has another domain; deploy that one to update it, or name "
                    "another tenant for this site by `tenant`",
                    reason="domain_owned",
                )
            if there.migration:
                raise Conflict(
                    f"the site of {record.tenant} is being moved in from a folder of the host; whoever runs "
                    "the gateway ends that first (incus-gateway migrate)",
                    reason="migrating",
                )
            record.kind, self._side = "update", "next"
            record.warnings = self._short(there.limits.get("memory") or settings.tenant_memory)
        await self._caddy.ensure()
        return {"kind": record.kind} | ({"warnings": record.warnings} if record.warnings else {})

    def _short(self, memory: str) -> list[str]:
        """Return a warning where a framework is known to need more than the tenant's memory."""
        if self._settings.runtime != "incus":  # others limit none
            return []
        known = sizes.size_of(memory)  # 0 for a share of the host's
        said = shortage(*self._framework, known) if known else ""
        return [said] if said else []

    async def create(self) -> dict[str, Any]:
        record = self._record
        if record.kind == "update":
            record.source = "tenant"
            runtime = self._all._runtime
            there = await runtime.get(record.tenant)
            record.instance = there.instance
            await self._all._save(record)
            if there.status != "running":
                await self._held.enter_async_context(self._all._promise(record.tenant, None))
                self._unless_another(runtime.stop)
                await runtime.start(record.tenant)
            return {"from": "tenant"}
        self._undo.push_async_callback(self._sites.remove, record.id)
        await self._all._save(record)
        record.source = source = await self._sites.create(record.tenant, self._order)
        record.instance = (await self._all._runtime.get(record.tenant)).instance
        self._prepared = source in ("pool", "golden")
        return {"from": source}

    async def push(self) -> dict[str, Any]:
        record = self._record
        if record.kind == "update":
            self._unless_another(self._sites.clear)
        if self._copied:
            return {}
        lost = b""
        if record.kind == "update":
            lost = await self._all._lost(record.tenant, self._template)
        await self._sites.push(record.tenant, self._side, self._recipe, self._request.env, lost)
        if not lost:
            return {}
        names = lost.split(b"\0")[:-1]
        for name in names[:_NAMED]:
            self._all.say(self._running, "push")(f"removed {show(os.fsdecode(name))}")
        self._all._flush(self._running, "push")
        return {"removed": len(names)}

    async def install(self) -> None:
        if not self._prepared:
            say = self._all.say(self._running, "install")
            await self._sites.install(self._record.tenant, self._side, self._recipe, say)
            self._all._flush(self._running)

    async def start(self) -> None:
        record = self._record
        if self._side == "next":
            await self._sites.allow(record.tenant, record.domain)
        if not self._copied:
            await self._sites.start(record.tenant, self._side, self._recipe)

    async def expose(self) -> dict[str, Any]:
        self._exposure = await self._sites.expose(self._record.tenant, self._side, self._recipe)
        return {"address": self._exposure.address, "port": self._recipe.port}

    async def route(self) -> dict[str, Any]:
        self._answered = await self._answering(self._side, self._exposure)
        if self._record.kind == "create":  # an update leads its visitors there once it has settled
            self._lead()
        return {"url": self._record.url}

    def _lead(self) -> None:
        domain = self._record.domain
        before = self._caddy.get(domain)
        self._undo.callback(self._lead_back, before)
        self._caddy.set(domain, self._exposure.target)

    def _lead_back(self, before: str | None) -> None:
        """Have the domain lead where it did before, unless somebody else leads it elsewhere by now."""
        domain = self._record.domain
        if self._caddy.get(domain) != self._exposure.target:
            return
        if before is None:
            self._caddy.unset(domain)
        else:
            self._caddy.set(domain, before)

    def _unless_another(self, undo: Callable[[str], Awaitable[None]]) -> None:
        """Undo something of the tenant later, unless its name is another's by then, or nobody's."""

        async def undone() -> None:
            if await self._all._is_there(self._record):
                await undo(self._record.tenant)

        self._undo.push_async_callback(undone)

    async def verify(self) -> dict[str, Any]:
        record, sites, facts = self._record, self._sites, dict[str, Any]()
        live, site = self._exposure, self._subject(self._side, self._exposure)
        # what was seen to stay up is watched once it is told
        seconds = 0.0 if self._copied else self._settings.settle_time
        if record.kind == "create":
            await self._verifier.settled(site, "caddy", self._answered, seconds, follow=not self._copied)
        else:
            await self._verifier.settled(site, "direct", self._answered, seconds)
            self._lead()
            await self._verifier.seen(site)
            live = await self._settle()
        record.settled = True
        try:
            await self._all._save(record)
        except StoreFailed:  # what is not on record is undone by the next life, so by this one too
            record.settled = False
            raise
        self._undo.pop_all()
        self._caddy.set(record.domain, live.target)
        async with asyncio.TaskGroup() as group:
            group.create_task(sites.finish(record.tenant, self._order))
            if self._settings.caddy_issuer == "internal":
                group.create_task(self._certify(facts))
        if record.kind == "update":
            await sites.clear(record.tenant)
        if self._copied or record.kind == "update":
            site = self._subject("live", live)
            self._verifier.watch(site, self._settings.settle_time, partial(self._all._unsteady, record, site))
        return facts

    async def _certify(self, facts: dict[str, Any]) -> None:
        facts["certificate"] = await self._caddy.certify(self._record.domain, 10.0) or "issued"

    async def _settle(self) -> Exposure:
        """Put the next site in the live one's place; the domain leads to the next one all the while."""
        record, sites = self._record, self._sites
        self._unless_another(sites.unsettle)
        kept = await self._all._kept(record.tenant, self._template)
        await sites.settle(record.tenant, self._recipe, kept)
        live = await sites.expose(record.tenant, "live", self._recipe)
        answered = await self._answering("live", live)
        # as the world will, which is not led there yet
        await self._verifier.settled(self._subject("live", live), "direct", answered, 0.0)
        return live

    async def _answering(self, side: Side, exposure: Exposure) -> float:
        answered = await self._verifier.answering(self._subject(side, exposure), copied=self._copied)
        self._all._tell(self._running, "phase.progress", {**self._place(), "opened": exposure.port})
        return answered

    def _subject(self, side: Side, exposure: Exposure) -> Subject:
        record = self._record
        framework, words = self._framework
        return Subject(
            *(record.tenant, side, record.domain, self._recipe, exposure),
            usual=frozenset() if framework is None else framework.ports,
            advice=listening(framework, words),
        )

    def _place(self) -> dict[str, Any]:
        return _place(next(phase.name for phase in self._record.phases if phase.state == "running"))


async def _whatever_comes(work: Coroutine[Any, Any, None]) -> None:
    """Carry `work` through, also where this task is cancelled meanwhile; it bounds itself."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()


def _known(error: BaseException) -> GatewayError:
    """Return an error as one of ours; what nobody foresaw is in the log."""
    if isinstance(error, CaddyFailed) and error.facts.get("reason") in _CADDY:
        log.warning("a deployment failed: %s", error.message)
        return CaddyFailed(_CADDY[error.facts["reason"]], **error.facts)
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, TimeoutError):
        return Timeout("a step took too long; the gateway's log says more")
    if isinstance(error, OSError) and error.errno in _FULL:
        log.warning("a deployment failed: %s", error)
        return Unavailable("the disk of the state dir is full; free some space there", reason="disk_full")
    log.error("a deployment failed", exc_info=error)
    return Unavailable("the deployment failed; the gateway's log says why")


def _place(phase: str) -> dict[str, Any]:
    """Return what each event of a phase tells of where it stands."""
    return {"phase": phase, "index": PHASES.index(phase), "of": len(PHASES)}


def _at(record: Record) -> str:
    return next((phase.name for phase in record.phases if phase.state in ("running", "failed")), PHASES[0])


def _check_env(env: Mapping[str, str] | None) -> None:
    if env is None:
        return
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise InvalidParams(f"{name[:60]!r} is no environment variable", field="env")
    if sum(len(name) + len(value) for name, value in env.items()) > _ENV_MAX:
        raise InvalidParams(f"env has over {_ENV_MAX} characters", field="env")


def _ms(since: float) -> int:
    return round((time.monotonic() - since) * 1000)
