"""The phases of one deployment. Each registers its undo before it changes anything.

| phase | a new site | an update |
|---|---|---|
| `validate` | read the template, claim the domain, check limits | the same for its tenant |
| `create` | make the container, from a copy or the image | start the container if it is stopped |
| `push` | unpack the files | unpack them as the next site, beside the live one |
| `install` | run the install command | run it in the next site's folder |
| `start` | start the service | start the next site's service |
| `expose` | find the address | find the next site's address |
| `route` | wait for the first answer, route the domain there | wait for the next site's first answer |
| `verify` | load the page, watch it, record the success | also put it in the live one's place |

A new tenant is built and destroyed as a whole. An update rehearses the next site unseen by visitors. Then
visitors wait in Caddy while the live site is stopped and the next one is started in its place, so that two
servers of one project never serve the same files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

from gateway.bounds import run_in_thread
from gateway.caddy import Caddy, asleep
from gateway.deployments.archive import LEFT_OUT
from gateway.deployments.context import Context
from gateway.deployments.record import DeploymentEvents, Record, RunningDeployment, phase_position
from gateway.deployments.request import DeploymentRequest, Rollback, Variables, check_env
from gateway.deployments.template import SiteTemplate, named, uploaded
from gateway.deployments.verify import LAST_OUTPUT, SiteUnderTest, in_the_way, install_failed, more_memory
from gateway.detection.frameworks import Framework, listening, shortage
from gateway.errors import Conflict, ExecFailed, GatewayError, InvalidParams, NotFound, RateLimited, Timeout
from gateway.limits.pressure import Pressure
from gateway.rootfs.paths import show
from gateway.runtime import TenantInstance, sizes
from gateway.runtime.listening import drained
from gateway.runtime.probe import HostRefused, answer
from gateway.runtime.sites import Exchange, Exposure, FormerSites, Order, Recipe, Side
from gateway.settings import Settings
from gateway.storage.store import StoreFailed
from gateway.tools.mirroring import KEPT, LOST, OWN_LISTS

log = logging.getLogger(__name__)

_NAMED: Final = 20  # removed paths that an update names
_RETURNS: Final = 60.0  # seconds that an undo, and with it the held visitors, wait for the old site
_ARCHIVE: Final = 60.0  # seconds until an uploaded archive is read; the largest takes some

Step = Callable[[], Awaitable[Mapping[str, Any] | None]]
"""Does a phase; returns the data of its event."""


class Phases:
    """The work of one deployment, from `validate` to `verify`.

    Undos for a failure are pushed to `undo`. `held` keeps contexts open until the deployment has ended.
    """

    how: Exchange = "update"
    known = False
    """Whether the site has proven before that it stays up, as a former one has."""

    def __init__(
        self,
        context: Context,
        running: RunningDeployment,
        undo: contextlib.AsyncExitStack,
        held: contextlib.AsyncExitStack,
    ) -> None:
        self._context, self._running, self._undo, self._held = context, running, undo, held
        self._record, self._request, self._progress = running.record, running.request, running.progress
        self._tenants, self._sites, self._caddy = context.runtime.tenants, context.sites, context.caddy
        self._verifier, self._register, self._settings = context.verifier, context.register, context.settings
        self._answered = 0.0  # time of its first answer
        self._template: SiteTemplate
        self._recipe: Recipe
        self._framework: tuple[Framework | None, tuple[str, ...], tuple[str, ...]]
        self._exposure: Exposure
        self._side: Side = "live"
        self._prepared = False
        self._rehearsed = False
        self._target = ""  # where this update found the domain to lead, or led it
        self._memory = 0  # bytes of the tenant's memory; 0 if unknown

    @property
    def steps(self) -> tuple[Step, ...]:
        """Each phase's work, in the order of `record.PHASES`."""
        return (
            self.validate,
            self.create,
            self.push,
            self.install,
            self.start,
            self.expose,
            self.await_answer,
            self.put_live,
        )

    @property
    def _order(self) -> Order:
        record = self._record
        return Order(record.id, record.domain, self._recipe, self._request.size)

    @property
    def _copied(self) -> bool:
        """Whether the tenant is an unchanged copy of one whose site was seen to work."""
        return self._prepared and self._request.env is None

    async def validate(self) -> dict[str, Any]:
        record, settings = self._record, self._settings
        await self._read()
        record.port, record.health = self._recipe.port, self._recipe.health
        domains = self._context.domains
        async with domains.deciding():
            found = await self._tenants.list()
            await domains.confirm(record.domain, record.tenant, record.id, found)
        tenants = {tenant.name: tenant for tenant in found}
        there = tenants.get(record.tenant)
        if there is None:
            if len(tenants) >= settings.max_tenants:
                raise RateLimited(
                    f"the limit of {settings.max_tenants} tenants is reached; raise GATEWAY_MAX_TENANTS",
                    reason="quota",
                )
            memory = sizes.SIZES[self._request.size].get("memory", settings.tenant_memory)
            record.warnings = self._short(memory)
            await self._held.enter_async_context(self._context.promise(record.tenant, memory))
            await self._context.admit()
        else:
            if there.domain not in (None, record.domain):
                raise Conflict(
                    f"tenant {record.tenant} has another domain; deploy that one to update it, or name "
                    "another tenant for this site with `tenant`",
                    reason="domain_owned",
                )
            if there.migration:
                raise Conflict(
                    f"the site of {record.tenant} is being migrated from a folder of the host; its "
                    "operator must finish that first (incus-gateway migrate)",
                    reason="migrating",
                )
            record.kind, self._side = "update", "next"
            record.warnings = self._short(there.limits.get("memory") or settings.tenant_memory)
        await self._caddy.ensure()
        told = {"warnings": record.warnings, "detected": record.detected}
        return {"kind": record.kind} | {name: value for name, value in told.items() if value}

    async def _read(self) -> None:
        """Read the template, and check that it can be deployed."""
        template = self._template = await template_of(self._request, self._record.tenant, self._settings)
        self._framework = await asyncio.to_thread(template.framework)
        self._recipe = await asyncio.to_thread(template.recipe, self._running.uploader)
        self._running.upload = self._recipe if self._recipe.owner else None
        if template.detected is not None:
            self._record.detected = template.detected.to_dict(self._recipe.port)

    def _short(self, memory: str) -> list[str]:
        """Return a warning if the framework is known to need more memory than the tenant has."""
        if self._settings.runtime != "incus":  # other runtimes limit none
            return []
        self._memory = known = sizes.size_of(memory)  # 0 for a share of the host's
        framework, start, install = self._framework
        said = shortage(framework, start, known, install) if known else ""
        return [said] if said else []

    async def create(self) -> dict[str, Any]:
        record = self._record
        if record.kind == "update":
            record.source = "tenant"
            there = await self._tenants.get(record.tenant)
            record.instance = there.instance
            record.former = await live_deployment(self._context, there)
            await self._register.save(record)
            if there.status != "running":
                await self._held.enter_async_context(self._context.promise(record.tenant, None))
                self._unless_another(self._tenants.stop)
                await self._tenants.start(record.tenant)
            return {"from": "tenant"}
        self._undo.push_async_callback(self._sites.remove, record.id)
        await self._register.save(record)
        record.source = source = await self._sites.create(record.tenant, self._order)
        record.instance = (await self._tenants.get(record.tenant)).instance
        self._prepared = source in ("pool", "golden")
        return {"from": source}

    async def push(self) -> dict[str, Any]:
        record = self._record
        if record.kind == "update":
            self._unless_another(self._sites.clear)
        if self._copied:
            return {}
        lost, written = list[bytes](), list[bytes]()
        if record.kind == "update" and (update := self._template.update()) is not self._template:
            self._template = update
            self._recipe = replace(self._recipe, archive=await asyncio.to_thread(update.archive))
        if record.kind == "update" and not self._template.shared:
            # a template deployed by name is the operator's, and what a tenant added to it stays
            lost, written = await removed_files(self._context, record.tenant, await self._kept_paths())
        given = b"".join(name + b"\0" for name in lost)
        await self._sites.push(record.tenant, self._side, self._recipe, self._request.env, given)
        names = [show(os.fsdecode(name)) for name in lost if not name.startswith(OWN_LISTS)]
        say = self._progress.say("push")
        for name in names[:_NAMED]:
            say(f"removed {name}")
        if written:
            more = f" and {len(written) - _NAMED} more" if len(written) > _NAMED else ""
            kept = ", ".join(show(os.fsdecode(name)) for name in written[:_NAMED])
            say(f"kept {kept}{more}: never part of a deployed folder; clean (--clean) removes such files")
        self._progress.flush("push")
        facts = {"removed": len(names), "kept": len(written)}
        return {key: count for key, count in facts.items() if count}

    async def _kept_paths(self) -> dict[str, Any]:
        """Return the request to a worker for the files of the live site that go and that stay."""
        return await asyncio.to_thread(self._template.stays, clean=self._request.clean)

    async def install(self) -> None:
        if not self._prepared:
            where = self._record.tenant, self._side, self._recipe
            await install(self._context, *where, self._memory, self._progress)

    async def start(self) -> None:
        record = self._record
        if self._side == "next":
            await self._sites.allow(record.tenant, record.domain)
        if not self._copied:
            await self._sites.start(record.tenant, self._side, self._recipe)

    async def expose(self) -> dict[str, Any]:
        self._exposure = await self._sites.expose(self._record.tenant, self._side, self._recipe)
        return {"address": self._exposure.address, "port": self._recipe.port}

    async def await_answer(self) -> dict[str, Any]:
        if self._record.kind == "create":
            self._answered = await self._answering(self._side, self._exposure)
            self._lead(self._exposure.target)
        else:
            self._rehearsed = await self._rehearsal(self._rehearse())
        return {"url": self._record.url}

    async def _rehearse(self) -> None:
        """Wait until the next site answers while the live one runs."""
        self._answered = await self._answering(self._side, self._exposure)

    async def _rehearsal(self, work: Awaitable[object]) -> bool:
        """Do a part of the rehearsal; return False if the live site is in the way of it.

        Then only the exchange can tell whether the update works. Raises why it does not.
        """
        try:
            await work
        except (ExecFailed, Timeout) as error:
            last = error.message.rpartition(LAST_OUTPUT)[2]
            silent = last == "nothing" and not self._answered
            if error.facts.get("reason") != "wrong_address" and not silent and not in_the_way(last):
                raise
            self._progress.say("route")(
                "It cannot run beside the live site, which has its port or a lock. So it is tried in the "
                "live site's place, while visitors wait."
            )
            self._progress.flush("route")
            return False
        return True

    def _routed(self) -> str:
        """Return where the domain leads, held or not; "" for nowhere."""
        return (self._caddy.get(self._record.domain) or "").removeprefix(asleep(""))

    def _lead(self, target: str) -> None:
        """Route the domain to a new site. The undo leaves a route that somebody else has changed since."""
        caddy, domain = self._caddy, self._record.domain

        def back() -> None:
            if caddy.get(domain) == target:
                caddy.unset(domain)

        self._undo.callback(back)
        caddy.set(domain, target)

    def _unless_another(self, undo: Callable[[str], Awaitable[None]]) -> None:
        """Register an undo that does nothing if the tenant is gone by then, or its name is another's."""

        async def undone() -> None:
            if await self._context.is_there(self._record):
                await undo(self._record.tenant)

        self._undo.push_async_callback(undone)

    async def put_live(self) -> dict[str, Any]:
        record, sites, facts = self._record, self._sites, dict[str, Any]()
        live, site = self._exposure, self._subject(self._side, self._exposure)
        # one that has stayed up before is only watched afterwards
        seconds = 0.0 if self._copied or self.known else self._settings.settle_time
        if record.kind == "create":
            await self._verifier.settled(site, "caddy", self._answered, seconds, follow=not self._copied)
        else:
            live = await self._exchange(await self._remaining(site, seconds))
            self._target = live.target
            self._caddy.set(record.domain, live.target)
            self._caddy.release(record.domain)
            await self._verifier.seen(self._subject("live", live))
        record.settled = True
        try:
            await self._register.save(record)
        except StoreFailed:  # after a restart an unrecorded change would be undone, so undo it here too
            record.settled = False
            raise
        self._undo.pop_all()
        async with asyncio.TaskGroup() as group:
            group.create_task(sites.finish(record.tenant, self._order))
            if self._settings.caddy_issuer == "internal":
                group.create_task(_certify(self._caddy, record.domain, facts))
        if record.kind == "update":
            await keep_replaced_site(self._context, record)
            await sites.clear(record.tenant)
        if self._copied or record.kind == "update":
            site = self._subject("live", live)
            told = partial(report_unsteady, self._context, record, site)
            self._verifier.watch(site, self._settings.settle_time, told)
        return facts

    async def _remaining(self, site: SiteUnderTest, seconds: float) -> float:
        """Finish the rehearsal; return for how long the site must stay up once it is live."""
        if self._rehearsed:
            worked = False

            async def settled() -> None:
                nonlocal worked
                worked = await self._verifier.settled(site, "direct", self._answered, seconds)

            self._rehearsed = await self._rehearsal(settled())
            if self._rehearsed and not worked:
                return 0.0
        return seconds  # it has not been seen to stay up, or will be at work for as long

    async def _exchange(self, seconds: float) -> Exposure:
        """Put the next site in the live one's place, where it must stay up for `seconds`.

        Visitors wait until it is known to work.
        """
        record, sites, domain = self._record, self._sites, self._record.domain
        self._undo.callback(self._caddy.release, domain)
        self._unless_another(self._unsettle)
        self._caddy.hold(domain)
        self._target = self._routed()
        address, _, port = self._target.rpartition(":")
        if address:
            await drained(address, int(port))
        await sites.halt(record.tenant)
        # the last that it wrote, too
        kept = await kept_files(self._context, record.tenant, await self._kept_paths())
        with self._context.exchanging(record.tenant):
            await sites.settle(record.tenant, self._recipe, kept, self.how)
        live = await sites.expose(record.tenant, "live", self._recipe)
        answered = await self._answering("live", live)
        site = self._subject("live", live)
        await self._verifier.settled(site, "direct", answered, seconds, follow=not self._rehearsed)
        return live

    async def _unsettle(self, tenant: str) -> None:
        """Undo the exchange; visitors wait until the old site answers, if it does soon."""
        sites, domain = self._sites, self._record.domain
        self._caddy.hold(domain)
        with self._context.exchanging(tenant):
            await sites.unsettle(tenant)
        with contextlib.suppress(GatewayError, OSError, HostRefused):
            _, recipe = await sites.former.live(tenant)
            if recipe is not None:
                live = await sites.expose(tenant, "live", recipe)
                await answer(live.address, live.port, recipe.health, _RETURNS, host=domain)
                if self._routed() == self._target:  # otherwise somebody else has changed it
                    self._caddy.set(domain, live.target)

    async def _answering(self, side: Side, exposure: Exposure) -> float:
        answered = await self._verifier.answering(
            self._subject(side, exposure),
            None if side == "next" else self._progress.say("route"),
            copied=self._copied,
        )
        phase = next(phase.name for phase in self._record.phases if phase.state == "running")
        self._progress.tell("phase.progress", {**phase_position(phase), "opened": exposure.port})
        return answered

    def _subject(self, side: Side, exposure: Exposure) -> SiteUnderTest:
        record = self._record
        framework, start, _ = self._framework
        return SiteUnderTest(
            *(record.tenant, side, record.domain, self._recipe, exposure),
            usual=frozenset() if framework is None else framework.ports,
            advice=listening(framework, start),
            memory=self._memory,
        )


async def template_of(request: DeploymentRequest, tenant: str, settings: Settings) -> SiteTemplate:
    """Read the template that a request names or contains. Raises `GatewayError` for a broken one."""
    template = request.template
    if isinstance(template, str):
        return await asyncio.to_thread(named, template, settings)
    assert isinstance(template, bytes)  # a change has other phases
    return await run_in_thread(tenant, _ARCHIVE, uploaded, template, request.overrides)


async def _certify(caddy: Caddy, domain: str, facts: dict[str, Any]) -> None:
    facts["certificate"] = await caddy.certify(domain, 10.0) or "issued"


async def report_unsteady(context: Context, record: Record, site: SiteUnderTest, why: str) -> None:
    """Report that a site did not stay up after its deployment, if its tenant exists and is awake."""
    try:
        there = await context.runtime.tenants.get(site.tenant)
    except GatewayError:
        return
    if there.status == "running" and record.instance in (None, there.instance):
        log.warning("the site of %s did not stay up: %s", site.tenant, why)
        if context.health is not None:
            context.health.unwell(site.tenant, site.exposure.port, site.recipe.health, why)


_SHORT: Final = 10.0  # seconds of uninterrupted pressure after which the install log says so
_LOOK: Final = 2.0


async def install(
    context: Context, tenant: str, side: Side, recipe: Recipe, memory: int, progress: DeploymentEvents
) -> None:
    """Install a site in a tenant with this many bytes of `memory`; 0 if unknown.

    Raises `ExecFailed`, with the cause and the next step where they are known.
    """
    say, pressure, began = progress.say("install"), context.pressure, time.monotonic()
    watching = asyncio.create_task(_tell_shortage(pressure, tenant, memory, say))
    try:
        await context.sites.install(tenant, side, recipe, say)
    except ExecFailed as error:
        # at its limit a tenant reads its programs back from the disk again and again: nothing is killed
        if pressure is not None:
            slow = watching.done() and "exit_code" not in error.facts
            if slow or (error.facts.get("cause") == "killed" and await pressure.has_killed(tenant, began)):
                error.facts["cause"] = "memory"
        raise install_failed(error, recipe.install, memory) from error
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    progress.flush()


async def _tell_shortage(
    pressure: Pressure | None, tenant: str, memory: int, say: Callable[[str], None]
) -> None:
    """Report in the install log that the tenant is short of memory, once, and return."""
    if pressure is None:
        return
    while pressure.seconds(tenant) < _SHORT:  # noqa: ASYNC110 - memory is looked at every few seconds too
        await asyncio.sleep(_LOOK)
    say(f"the tenant is short of memory, so this may take very long: {more_memory(memory)}")


async def removed_files(
    context: Context, tenant: str, stays: dict[str, Any]
) -> tuple[list[bytes], list[bytes]]:
    """Return the paths of the live site that an update removes, and those that no deployed folder had.

    `stays` is `Template.stays()` of the new folder.
    """
    if context.workers is None:
        return [], []
    root = await context.runtime.filesystem(tenant)
    found = (await context.workers.call(root, LOST, stays, search=True)).split(b"\0")[:-1]
    removed, written = ([name[1:] for name in found if name.startswith(sign)] for sign in (b"-", b"+"))
    return removed, written


async def kept_files(context: Context, tenant: str, stays: dict[str, Any]) -> bytes:
    """Return the existing files of the live site that an update keeps, each followed by a NUL.

    Those that the manifest does not name begin with "./".
    """
    if context.workers is None or (stays.get("clean", True) and not stays["keep"]):
        return b""
    root = await context.runtime.filesystem(tenant)
    return await context.workers.call(root, KEPT, stays, search=True)


async def live_deployment(context: Context, tenant: TenantInstance) -> str:
    """Return the deployment of a tenant's live site; if it is unknown, an id that no client has seen."""
    noted, _ = await context.sites.former.live(tenant.name)
    return noted or await context.register.maker(tenant.name, tenant.instance) or f"d-{secrets.token_hex(8)}"


async def keep_replaced_site(context: Context, record: Record) -> None:
    """Keep the site that was replaced. If that fails, the deployment has succeeded all the same."""
    if record.former is None:
        return
    try:
        most = context.settings.rollbacks_kept
        await context.sites.former.put(record.tenant, record.former, record.id, most)
    except (GatewayError, TimeoutError, OSError) as error:
        log.warning("cannot keep the former site of %s: %s", record.tenant, error)


class _Changed(Phases):
    _lives: Recipe | None  # how the live site is started

    async def _begin(self, recipe: Recipe) -> None:
        self._recipe, self._framework = recipe, (None, recipe.start, ())
        self._record.template = recipe.template

    async def create(self) -> dict[str, Any]:
        if self._record.kind != "update":
            raise NotFound(f"tenant {self._record.tenant} is gone")
        return await super().create()

    async def install(self) -> None:
        return

    async def _kept_paths(self) -> dict[str, Any]:
        return {"keep": self._lives.keep if self._lives else (), "left_out": [*LEFT_OUT]}


class RollbackPhases(_Changed):
    """Replace the live site with a former one. The live site is kept as a former one."""

    how: Exchange = "rollback"
    known = True

    async def _read(self) -> None:
        assert isinstance(self._request.template, Rollback)
        former, tenant = self._sites.former, self._record.tenant
        self._record.rollback = await chosen(former, tenant, self._request.template)
        _, self._lives = await former.live(tenant)
        await self._begin(await former.recipe(tenant, self._record.rollback))

    async def _kept_paths(self) -> dict[str, Any]:
        # what one of both names is not in the other's copy (see put_former.sh)
        lasting = await super()._kept_paths()
        return lasting | {"keep": [*lasting["keep"], *self._recipe.keep]}

    async def push(self) -> dict[str, Any]:
        assert self._record.rollback is not None
        self._unless_another(self._sites.clear)
        await self._sites.former.take(self._record.tenant, self._record.rollback)
        return {"rollback": self._record.rollback}


class EnvironmentPhases(_Changed):
    """Change the environment of the live site, after a rehearsal with a copy of its files."""

    how: Exchange = "environment"
    _env: Mapping[str, str]
    _copying: asyncio.Task[None]

    async def _read(self) -> None:
        assert isinstance(self._request.template, Variables)
        tenant = self._record.tenant
        self._env = await changed(self._sites.former, tenant, self._request.template)
        _, self._lives = await self._sites.former.live(tenant)
        if self._lives is None:
            raise Conflict(
                f"the gateway does not know how the site of {tenant} is started; deploy it once more, then "
                "change its environment"
            )
        await self._begin(self._lives)

    async def push(self) -> dict[str, Any]:
        self._unless_another(self._sites.clear)
        await self._sites.push(self._record.tenant, "next", self._recipe, self._env, how=self.how)
        return {"env": self._record.env}

    async def await_answer(self) -> dict[str, Any]:
        told = await super().await_answer()
        # while the next site is watched, which takes longer than most copies
        self._copying = asyncio.create_task(self._copy())
        self._undo.push_async_callback(self._stop_copying)
        return told

    async def _exchange(self, seconds: float) -> Exposure:
        live = await super()._exchange(seconds)
        await self._copying
        return live

    async def _copy(self) -> None:
        tenant = self._record.tenant
        if self._context.settings.rollbacks_kept:
            try:
                await self._sites.former.copy(tenant)
            except (GatewayError, TimeoutError, OSError) as error:
                log.info("cannot copy the site of %s yet: %s", tenant, error)

    async def _stop_copying(self) -> None:
        self._copying.cancel()
        await asyncio.wait([self._copying])


KINDS: Final[Mapping[type, type[Phases]]] = {Rollback: RollbackPhases, Variables: EnvironmentPhases}


def phases_of(request: DeploymentRequest) -> type[Phases]:
    """Return the phases for a request."""
    return KINDS.get(type(request.template), Phases)


async def chosen(former: FormerSites, tenant: str, wanted: Rollback) -> str:
    """Return the deployment to go back to. Raises `Conflict` and `NotFound`."""
    kept = [one.id for one in await former.listed(tenant)]
    if wanted.to is None:
        if kept:
            return kept[0]
        raise NotFound(
            f"tenant {tenant} has no earlier site to go back to; each deployment after the first keeps one",
            reason="not_kept",
        )
    if wanted.to in kept:
        return wanted.to
    live, _ = await former.live(tenant)
    if wanted.to == live:
        raise Conflict(f"{wanted.to} is already live")
    raise NotFound(
        f"tenant {tenant} does not keep the site of {wanted.to}; it keeps {', '.join(kept) or 'none'}",
        reason="not_kept",
    )


async def changed(former: FormerSites, tenant: str, wanted: Variables) -> dict[str, str]:
    """Return a site's environment with the changes made. Raises `Conflict` and `InvalidParams`."""
    env = dict(await former.environment(tenant))
    for name, value in wanted.changes.items():
        if value is not None:
            env[name] = value
        elif env.pop(name, None) is None:
            raise InvalidParams(f"{name} is not set", field="env")
    check_env(env)
    return env
