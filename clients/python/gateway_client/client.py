"""One gateway from outside: its address, the token, its tenants and events."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar
from urllib.parse import urlencode

from gateway_client.connection import Address
from gateway_client.connections import Connections
from gateway_client.credentials import Credentials, Token
from gateway_client.errors import TokenUnavailable
from gateway_client.http_client import HttpClient
from gateway_client.retry import OnChange, Retry
from gateway_client.tenant import Tenant

if TYPE_CHECKING:
    from gateway_client.deployments import Deployment, DeploymentRecord
    from gateway_client.events import EventStream

_T = TypeVar("_T")

# seconds between checks of the clock: it may be set, and the machine may sleep
_LOOK: Final = 5.0


def _given(value: _T | None, variable: str, argument: str) -> _T | str:
    """Return the caller's value, or else the environment's. Raises `ValueError` if there is none."""
    found = value or os.environ.get(variable)
    if not found:
        raise ValueError(f"no {argument} was given: pass {argument}= to Client, or set {variable}")
    return found


def _command(said: str | Sequence[str] | None) -> str | list[str] | None:
    return said if said is None or isinstance(said, str) else list(said)


@dataclass(frozen=True, slots=True)
class TenantInfo:
    """One entry of the list of tenants; `all` holds every member of it."""

    name: str
    status: str
    domain: str | None
    address: str | None
    all: Mapping[str, Any]


class Client:
    """A gateway and one token for it. Use it in an `async with`; nothing is connected before it is needed.

    `url` is `http://HOST:PORT`, `https://HOST` or `unix:/PATH`, by default the variable `GATEWAY_URL`. No
    proxy of the environment is used. Raises `ValueError` without an address or a token.

    `token` is a token, by default the variable `GATEWAY_TOKEN`, or a function, asynchronous or not, that
    returns one. It is called when a token is first needed, shortly before one ends, and once when the gateway
    refuses one; open connections take the new token without a break. If it fails, it is called again until
    the present token ends, and the failure is reported as `TokenUnavailable`, in the log and to `on_change`.

    The client replaces broken connections as `retry` says (None: not at all): it repeats tool calls, which
    run once, continues the output and input of commands, reports that watches missed changes, and replays
    events.
    `on_change` is called with each new state; `Tenant.state` and `EventStream.state` have it too.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: Token | None = None,
        name: str = "gateway_client",
        retry: Retry | None = Retry(),  # noqa: B008 - immutable
        on_change: OnChange | None = None,
    ) -> None:
        self.address = Address.parse(_given(url, "GATEWAY_URL", "url"))
        self.credentials = Credentials(_given(token, "GATEWAY_TOKEN", "token"), self._renewed)
        self._http = HttpClient(self.address, self.credentials, retry, on_change)
        self._keeping: asyncio.Task[None] | None = None
        self._identity = {"name": name, "version": "1"}
        self._connections: list[Connections] = []  # for all tenants
        self._tenants: dict[tuple[str, str | None, bool, float | None], Tenant] = {}

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection. Idempotent. Detached commands linger in the gateway."""
        self._http.shut()
        self.credentials.close()
        if self._keeping is not None:
            self._keeping.cancel()
        try:
            await asyncio.gather(*(connections.close() for connections in self._connections))
        finally:
            await self._http.close()

    def _keep(self) -> None:
        """Give open connections a newer token before theirs ends."""
        if self.credentials.renewable and self._keeping is None:
            self._keeping = asyncio.create_task(self._keep_renewed(), name="tokens")

    async def _keep_renewed(self) -> None:
        try:
            while standing := [one for one in self._connections if one.connected]:
                await asyncio.sleep(min(self.credentials.pause, _LOOK))
                if self.credentials.pause == 0:
                    try:
                        await self.credentials.next()
                    except TokenUnavailable as error:
                        for connections in standing:
                            connections.not_renewed(error)
        finally:
            self._keeping = None

    def _renewed(self) -> None:
        for connections in self._connections:
            connections.renew()

    def tenant(
        self,
        name: str,
        *,
        session: str | None = None,
        read_before_write: bool = False,
        linger: float | None = None,
    ) -> Tenant:
        """Return a tenant by name, without asking whether it exists. The same arguments give the same one.

        `session` names a tool session that outlives this client; `read_before_write` makes Write and Edit
        refuse files that this session has not read in their present state. A tool call whose connection broke
        runs on for `linger` seconds, so that it can be joined again; with 0 or 1, an agent whose process is
        killed leaves nothing running.
        """
        key = name, session, read_before_write, linger
        if key not in self._tenants:
            initialize = {
                "client": self._identity,
                "readBeforeWrite": read_before_write,
                # an unnamed session would end with its connection, and so with a break
                "session": session or f"client-{secrets.token_hex(16)}",
            }
            connections = Connections(
                self._http, name, initialize, ends_session=session is None, keep=self._keep
            )
            self._connections.append(connections)
            self._tenants[key] = Tenant(self._http, connections, name, linger, self.tenant)
        return self._tenants[key]

    async def tenants(self) -> list[TenantInfo]:
        """Return the tenants that the token covers."""
        answer = await self.http("GET", "/v1/tenants")
        return [
            TenantInfo(entry["name"], entry["status"], entry.get("domain"), entry.get("address"), entry)
            for entry in answer["tenants"]
        ]

    async def deploy(
        self,
        domain: str,
        template: str | bytes | os.PathLike[str],
        *,
        size: Literal["small", "medium", "large"] | None = None,
        env: Mapping[str, str] | None = None,
        tenant: str | None = None,
        start: str | Sequence[str] | None = None,
        install: str | Sequence[str] | None = None,
        port: int | None = None,
        mode: Literal["dev", "production"] | None = None,
        clean: bool = False,
        key: str | None = None,
    ) -> Deployment:
        """Begin to deploy a site at a domain, or to update it; needs the scope `deploy`.

        `template` is the name of a template of the gateway, the path of a folder, or a tar of one. What the
        .gitignore files of a folder exclude is not sent: give variables of an `.env` as `env`. The gateway
        detects how a folder is started, unless its `site.toml`, or `start`, `install` and `port`, set that.
        By default the tenant's name is derived from the domain. An update keeps what the site has written
        into its folder, such as a database, unless `clean`. A second call with the same `key` returns the
        same deployment. `Deployment.wait` and `.events` show its progress.
        """
        from gateway_client.deployments import Deployment, template_body

        wishes: dict[str, Any] = {"size": size, "env": None if env is None else dict(env), "tenant": tenant}
        wishes |= {"start": _command(start), "install": _command(install), "port": port, "mode": mode}
        wishes["clean"] = clean or None
        body = {"domain": domain, "template": await asyncio.to_thread(template_body, template)}
        body |= {name: wish for name, wish in wishes.items() if wish is not None}
        headers = {} if key is None else {"Idempotency-Key": key}
        return Deployment(self._http, (await self.http("POST", "/v1/deployments", body, headers))["id"])

    def deployment(self, deployment_id: str) -> Deployment:
        """Return a deployment by its id, without asking whether it exists."""
        from gateway_client.deployments import Deployment

        return Deployment(self._http, deployment_id)

    async def deployments(self) -> list[DeploymentRecord]:
        """Return the newest deployments of the tenants that the token covers."""
        from gateway_client.deployments import DeploymentRecord

        answer = await self.http("GET", "/v1/deployments")
        return [DeploymentRecord.parse(record) for record in answer["deployments"]]

    async def templates(self) -> list[Mapping[str, Any]]:
        """Return name and description of the templates that can be deployed by name."""
        return list((await self.http("GET", "/v1/templates"))["templates"])

    async def revoke(self, token_id: str, expires: float | None = None) -> None:
        """Revoke the token with this `jti`; needs the scope `admin` for every tenant.

        The gateway keeps the revocation until `expires`, the token's `exp`; without it, forever.
        """
        body: dict[str, Any] = {"id": token_id}
        await self.http("POST", "/v1/revocations", body if expires is None else {**body, "expires": expires})

    async def audit(
        self,
        tenant: str | None = None,
        *,
        limit: int = 100,
        before: int | None = None,
        member: str | None = None,
    ) -> list[Mapping[str, Any]]:
        """Return who did what, newest first; needs the scope `admin` for every tenant.

        `before` is the id of an entry, for older ones; in a cluster, also name its `member`.
        """
        wishes = {"tenant": tenant, "limit": limit, "before": before, "member": member}
        query = urlencode({name: wish for name, wish in wishes.items() if wish is not None})
        return list((await self.http("GET", f"/v1/audit?{query}"))["entries"])

    def events(
        self,
        *,
        tenant: str | Iterable[str] | None = None,
        deployment: str | Iterable[str] | None = None,
        types: str | Iterable[str] | None = None,
        last_event_id: str | int | None = None,
    ) -> EventStream:
        """Return the stream of events, filtered; `types` may end in `*`. See `EventStream`."""
        from gateway_client.events import EventStream, event_query

        query = event_query(tenant=tenant, deployment=deployment, types=types)
        return EventStream(self._http, query, last_event_id)

    async def http(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Request a route and return its JSON. Raises the typed error of the answer, or `Disconnected`."""
        return await self._http.json(method, path, body, headers)
