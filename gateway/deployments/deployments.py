"""Deployments as the API sees them: requests are checked and queued, and records are looked up.

`runner` and `phases` do the work of one; `recovery` finishes or undoes what a killed gateway left half done.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Final

from gateway.auth.tokens import Token
from gateway.deployments.context import Context
from gateway.deployments.phases import changed, chosen
from gateway.deployments.queue import DeploymentQueue, Warming
from gateway.deployments.reconciler import Reconciler, Recovery
from gateway.deployments.record import DeploymentEvents, Record, RunningDeployment
from gateway.deployments.request import (
    Change,
    DeploymentOwner,
    DeploymentRequest,
    Rollback,
    Variables,
    check_env,
    uploader,
)
from gateway.deployments.runner import DeploymentRunner
from gateway.deployments.template import named, names
from gateway.errors import Conflict, GatewayError, InvalidParams, NotFound, Unavailable
from gateway.hostnames import normalized, tenant_name
from gateway.runtime import TENANT_NAME, TenantEvent, sizes
from gateway.runtime.sites import Former, Recipe

# events of a tenant after which its route may be wrong
_MOVES: Final = (
    *("tenant.created", "tenant.started", "tenant.destroyed", "tenant.renamed"),
    *("incus.instance-updated", "gateway.resynced"),
)
_ENDS: Final = ("tenant.stopped", "tenant.destroyed", "tenant.renamed", "tenant.restarted")


class Deployer:
    """The deployments of one gateway. Use as an async context manager."""

    def __init__(self, context: Context) -> None:
        self._caddy, self._domains, self._sites = context.caddy, context.domains, context.sites
        self._tenants, self._bus, self._settings = context.runtime.tenants, context.bus, context.settings
        self._register, self._verifier = context.register, context.verifier
        self._checks = RequestChecks(context)
        self._turns = DeploymentQueue(self._settings)
        self._warming = Warming(self._sites.copies, self._turns, context.room)
        self._recovered = asyncio.Event()
        self._resting = False
        self._runner = DeploymentRunner(context, self._turns, self._warming, self._recovered)
        self._recovery = Recovery(context)
        self._reconciler = Reconciler(context, self._recovery)
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Deployer:
        await self._domains.retain(await self._register.unfinished())
        for record in await self._register.left():
            if record.kind == "update" and self._caddy.sleeps(record.domain):
                self._caddy.hold(record.domain)  # until it is recovered
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
        await self._register.write_down()

    async def quiet(self) -> None:
        """Wait until no deployment waits and half of the places are free."""
        await self._turns.quiet()

    async def end(self) -> None:
        """Cancel what runs and wait until it is undone. What takes too long is left to the next start."""
        tasks = [running.task for running in self._register.running.values() if running.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self._settings.shutdown_timeout / 2)

    async def rest(self, seconds: float, waiting: Callable[[int], None]) -> None:
        """Return once no deployment is under way, from when on none begins until `go_on`.

        `waiting` is called with their number as they end. Raises `Unavailable` if some run after `seconds`.
        """
        running = self._register.running
        try:
            async with asyncio.timeout(seconds):
                while running:
                    waiting(len(running))
                    tasks = [one.task for one in running.values() if one.task is not None]
                    if tasks:
                        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    else:  # it was just asked for
                        await asyncio.sleep(0)
        except TimeoutError:
            raise Unavailable(
                f"{len(running)} deployments are still running after {seconds:.0f} s; try again later, or "
                "restart the gateway, which undoes them"
            ) from None
        self._resting = True

    def go_on(self) -> None:
        """Let deployments begin again."""
        self._resting = False

    async def begin(
        self, request: DeploymentRequest, token: Token, *, key: str | None = None
    ) -> tuple[Record, bool]:
        """Begin a deployment; return it, and whether it is new. The same key returns the same deployment.

        Raises `InvalidParams`, `NotFound` and `Forbidden` for what can be checked at once, `Conflict` if one
        runs for the tenant or the key was used for another request, and `RateLimited`.
        """
        if self._resting:
            raise Unavailable("the gateway is being replaced; try again", retry_after=1)
        tenant, domain = await self._checks.check(request, token)
        by = token.subject
        fresh = Record(tenant, domain, self._caddy.url(domain), _template_name(request), by)
        if isinstance(request.template, Variables):
            fresh.env = sorted(request.template.changes)
        if key is not None:
            begun = await self._register.keyed(by, key)
            # nothing may be revealed of another tenant's, or of one that had the name before
            if told := [one for one in begun if self._checks.knows(token, one[0])]:
                return _same(told, request), False
        self._checks.check_alone(tenant, domain, token)
        fresh.template = await self._checks.template_of_change(tenant, request) or fresh.template
        self._checks.check_alone(tenant, domain, token)  # another may have begun during the last await
        owner, size = (
            DeploymentOwner.of(token),
            len(request.template) if isinstance(request.template, bytes) else 0,
        )
        place = self._turns.admit(owner, size)
        progress = DeploymentEvents(fresh, self._bus, self._settings.install_log)
        running = RunningDeployment(fresh, request, owner, progress, self._checks.uploader(token), key)
        try:
            await self._register.open(running)
        except BaseException:
            place.close()
            raise
        running.task = asyncio.create_task(self._runner.run(running), name=f"deploy {tenant}")
        running.task.add_done_callback(lambda _: place.close())
        return fresh, True

    def deploying(self, tenant: str) -> bool:
        """Return whether a deployment of the tenant is under way; one whose end can be seen is not."""
        return self._register.deploying(tenant)

    async def change(
        self, tenant: str, change: Change, token: Token, *, key: str | None = None
    ) -> tuple[Record, bool]:
        """Begin a deployment without new files for an existing tenant; see `begin`."""
        domain = (await self._tenants.get(tenant)).domain
        if domain is None:
            raise Conflict(f"tenant {tenant} has no domain, and so no site; give it one first")
        return await self.begin(DeploymentRequest(domain, change, tenant=tenant), token, key=key)

    async def kept(self, tenant: str) -> tuple[str | None, Sequence[Former]]:
        """Return the deployment of a tenant's live site, if known, and those it keeps, newest first."""
        there, former = await self._tenants.get(tenant), self._sites.former
        live, _ = await former.live(tenant)
        return live or await self._register.maker(tenant, there.instance), await former.listed(tenant)

    async def environment(self, tenant: str) -> Mapping[str, str]:
        """Return the environment of a tenant's site. Raises `NotFound` and `Conflict`."""
        await self._tenants.get(tenant)
        return await self._sites.former.environment(tenant)

    async def get(self, identity: str) -> Record:
        """Return a deployment. Raises `NotFound`."""
        return await self._register.get(identity)

    async def recent(self, coverage: frozenset[str] | None) -> list[Record]:
        """Return the newest deployments of the tenants that a token covers, None for all."""
        return await self._register.recent(coverage)

    async def cancel(self, identity: str) -> Record:
        """Cancel a deployment and return it once it is undone; one that has ended is returned as it is."""
        running = self._register.running.get(identity)
        if running is None or running.task is None:
            return await self.get(identity)
        if running.record.state in ("waiting", "running") and not running.record.settled:
            running.cancelled = True
            running.task.cancel()
        await asyncio.wait([running.task])
        return running.record

    async def recover(self) -> None:
        """Finish or undo what an earlier run left, then let new ones run. Call it once Incus answers."""
        try:
            await self._sites.copies.adopt(await asyncio.to_thread(self._shared_recipes))
            await self._reconciler.reconcile()
        finally:
            self._recovered.set()

    def _shared_recipes(self) -> list[Recipe]:
        recipes = []
        for name in names(self._settings):
            with contextlib.suppress(GatewayError, OSError):
                recipes.append(named(name, self._settings).recipe())
        return recipes

    async def _follow(self) -> None:
        await self._recovered.wait()
        await self._reconciler.follow()

    def look_soon(self) -> None:
        """Check the routes soon: something happened to the sites of other members."""
        self._reconciler.look_soon()

    def noticed(self, event: TenantEvent) -> None:
        """Handle an event of a tenant."""
        if event.type in _MOVES:
            self._reconciler.look_soon()
        if event.type in _ENDS and event.tenant is not None:
            self._verifier.forget(event.tenant)


def _template_name(request: DeploymentRequest) -> str:
    """Return the template's name for the record; that of a change is known only when it runs."""
    match request.template:
        case str():
            return request.template
        case bytes():
            return "upload"
    return ""


def _same(known: Iterable[tuple[Record, str]], request: DeploymentRequest) -> Record:
    """Return the deployment begun with this key and the same request. Raises `Conflict` for another."""
    for record, digest in known:
        if digest == request.digest:
            return record
    raise Conflict("this Idempotency-Key was used for another deployment; use a new one")


class RequestChecks:
    """What has to hold before a deployment begins, and who may know of one."""

    def __init__(self, context: Context) -> None:
        self._context, self._domains, self._register = context, context.domains, context.register
        self._sites, self._settings = context.sites, context.settings

    async def check(self, request: DeploymentRequest, token: Token) -> tuple[str, str]:
        """Return the tenant and the domain of a request whose parts are valid and permitted.

        Raises `InvalidParams`, `NotFound`, and what `Domains.permit` raises.
        """
        domain = normalized(request.domain)
        tenant = request.tenant or tenant_name(domain)
        if not TENANT_NAME.fullmatch(tenant):
            raise InvalidParams(f"{tenant[:63]!r} is not a tenant name", field="tenant")
        if not token.covers(tenant):
            raise NotFound(f"no tenant {tenant} for this token; one that covers it can deploy {domain}")
        sizes.known(request.size)
        check_env(request.env)
        await self._domains.permit(token, domain)
        if isinstance(request.template, str) and request.template not in names(self._settings):
            known = ", ".join(names(self._settings))
            raise NotFound(
                f"no template {request.template[:63]}; there are: {known}", reason="template_missing"
            )
        return tenant, domain

    def check_alone(self, tenant: str, domain: str, token: Token) -> None:
        """Raise `Conflict` if another deployment of the tenant or the domain is under way, or a move."""
        if self._context.moving(tenant):
            raise Conflict(
                f"tenant {tenant} is being moved to another server; deploy again once it is there",
                reason="moving",
            )
        holder = self._domains.holder(domain)
        for other in self._register.running.values():
            if other.record.over:  # a client that has seen its end may begin the next one
                continue
            # of another's deployment, reveal only that it exists
            theirs = other.record.id == holder and token.covers(other.record.tenant)
            if other.record.tenant == tenant or theirs:
                raise Conflict(
                    f"a deployment of {other.record.domain} is running; wait for it, or cancel it",
                    deployment=other.record.id,
                )

    async def template_of_change(self, tenant: str, request: DeploymentRequest) -> str:
        """Return the template of the site that a change leads to; raise if the change cannot be made."""
        match request.template:
            case Rollback():
                former = self._sites.former
                return (await former.recipe(tenant, await chosen(former, tenant, request.template))).template
            case Variables():
                await changed(self._sites.former, tenant, request.template)
                _, recipe = await self._sites.former.live(tenant)
                return recipe.template if recipe else ""
        return ""

    def uploader(self, token: Token) -> str:
        """Return the owner of an upload; empty if copies of uploads are never kept."""
        return uploader(token, self._context.ended) if self._settings.upload_copies_bytes else ""

    def knows(self, token: Token, record: Record) -> bool:
        """Return whether a deployment belongs to a tenant that the token covers and was made for."""
        if token.coverage is None:
            return True
        ended = self._context.ended(record.tenant)
        return token.covers(record.tenant) and (record.created >= ended or token.issued <= ended)
