"""A tenant's site over HTTP: whether it answers, its log, its deployments, its environment."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gateway_client.tenant_lifecycle import TenantLifecycle

if TYPE_CHECKING:
    from gateway_client.deployments import Deployment, History


class TenantSite(TenantLifecycle):
    """The part of `Tenant` that manages the tenant's site."""

    async def site(self) -> Mapping[str, Any]:
        """Return whether the tenant's site answers now: `answers`, None if it has none or sleeps."""
        answer: Mapping[str, Any] = await self._http.json("GET", f"{self._path}/site")
        return answer

    async def ports(self) -> list[Mapping[str, Any]]:
        """Return where processes of the tenant listen, by port: `port` and `address` of each."""
        return list((await self._http.json("GET", f"{self._path}/ports"))["ports"])

    async def agent_token(self) -> Mapping[str, Any]:
        """Return a `token` for an agent's server: for this tenant alone, and no longer than the client's."""
        answer: Mapping[str, Any] = await self._http.json("POST", f"{self._path}/agent-token")
        return answer

    async def logs(self, lines: int = 100, follow: bool = False) -> AsyncIterator[bytes]:
        """Yield the last lines of the site's log in pieces, and with `follow` new ones until you leave."""
        path = f"{self._path}/logs?lines={lines}&follow={int(follow)}"
        async with contextlib.aclosing(self._http.stream(path)) as pieces:
            async for piece in pieces:
                yield piece

    async def deployments(self) -> History:
        """Return its deployments, which one is live, and those it can go back to."""
        from gateway_client.deployments import History

        return History.parse(await self._http.json("GET", f"{self._path}/deployments"))

    async def publish(
        self,
        domain: str,
        *,
        size: str = "small",
        env: Mapping[str, str] | None = None,
        tenant: str | None = None,
        start: str | Sequence[str] | None = None,
        install: str | Sequence[str] | None = None,
        key: str | None = None,
    ) -> Deployment:
        """Begin to build the site for production and serve it at another domain, in a separate tenant.

        What serves it (`start`) and what installs and builds it (`install`) are detected unless given.
        """
        given = {"env": env, "tenant": tenant, "start": start, "install": install}
        body: dict[str, Any] = {"domain": domain, "size": size}
        body |= {name: value for name, value in given.items() if value is not None}
        return await self._begun("POST", "publish", body, key)

    async def rollback(self, to: str | None = None, *, key: str | None = None) -> Deployment:
        """Begin to go back to a kept site: the one live before, or that of the deployment `to`."""
        body = {} if to is None else {"to": to}
        return await self._begun("POST", "rollback", body, key)

    async def variables(self) -> list[str]:
        """Return the names of the site's environment variables."""
        return list((await self._http.json("GET", f"{self._path}/env"))["names"])

    async def environment(self) -> dict[str, str]:
        """Return the site's environment with its values; needs the scope `exec` too."""
        return dict((await self._http.json("GET", f"{self._path}/env?values=1"))["env"])

    async def change_environment(
        self, changes: Mapping[str, str | None], *, key: str | None = None
    ) -> Deployment:
        """Begin to restart the site with changed variables; None removes one."""
        return await self._begun("PATCH", "env", {"env": dict(changes)}, key)

    async def _begun(self, method: str, what: str, body: Mapping[str, Any], key: str | None) -> Deployment:
        from gateway_client.deployments import Deployment

        headers = {} if key is None else {"Idempotency-Key": key}
        answer = await self._http.json(method, f"{self._path}/{what}", body, headers)
        return Deployment(self._http, answer["id"])
