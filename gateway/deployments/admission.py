"""What has to hold before a deployment begins, and who may know of one."""

from __future__ import annotations

from collections.abc import Callable

from gateway.auth.tokens import Token
from gateway.deployments.changes import changed, chosen
from gateway.deployments.queue import uploader
from gateway.deployments.record import Record
from gateway.deployments.register import Register
from gateway.deployments.request import Request, Rollback, Variables, check_env
from gateway.deployments.template import names
from gateway.errors import Conflict, InvalidParams, NotFound
from gateway.hostnames import normalized, tenant_name
from gateway.ownership.domains import Domains
from gateway.runtime import TENANT_NAME, sizes
from gateway.runtime.sites import Sites
from gateway.settings import Settings


class Admission:
    """Checks requests. `ended` returns when a name was last freed, `moving` which tenants are being moved."""

    def __init__(
        self,
        domains: Domains,
        register: Register,
        sites: Sites,
        settings: Settings,
        *,
        ended: Callable[[str], float],
        moving: Callable[[str], bool],
    ) -> None:
        self._domains, self._register, self._settings = domains, register, settings
        self._sites, self._ended, self._moving = sites, ended, moving

    async def check(self, request: Request, token: Token) -> tuple[str, str]:
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
        if self._moving(tenant):
            raise Conflict(
                f"tenant {tenant} is being moved to another server; deploy again once it is there",
                reason="moving",
            )
        holder = self._domains.holder(domain)
        for other in self._register.running.values():
            if other.record.over:  # only not stored yet: whoever has seen its end may begin the next one
                continue
            # of another's deployment, reveal only that it exists
            theirs = other.record.id == holder and token.covers(other.record.tenant)
            if other.record.tenant == tenant or theirs:
                raise Conflict(
                    f"a deployment of {other.record.domain} is running; wait for it, or cancel it",
                    deployment=other.record.id,
                )

    async def template_of_change(self, tenant: str, request: Request) -> str:
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
        return uploader(token, self._ended) if self._settings.upload_copies else ""

    def knows(self, token: Token, record: Record) -> bool:
        """Return whether a deployment belongs to a tenant that the token covers and was made for."""
        if token.coverage is None:
            return True
        ended = self._ended(record.tenant)
        return token.covers(record.tenant) and (record.created >= ended or token.issued <= ended)
