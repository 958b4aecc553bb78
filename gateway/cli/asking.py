"""The client that commands use: of the gateway named by --url, or of the one on this machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from typing import Any

from gateway.auth import issuing
from gateway.cli.confirming import Failed
from gateway.hostnames import plain
from gateway.settings import load_client
from gateway_client.client import Client
from gateway_client.credentials import Token
from gateway_client.tenant import Tenant


@contextlib.asynccontextmanager
async def client_of(url: str | None, token: str | None, lifetime: int = 3600) -> AsyncIterator[Client]:
    """Open a client of the gateway at `url`, or of this machine's with tokens for `lifetime` seconds."""
    settings = load_client()
    source: Token = token or partial(
        _own_token, issuing.load_secret(settings.secret, settings.state_dir), lifetime
    )
    try:
        client = Client(url or own_url(settings.listen), token=source)
    except ValueError as error:
        raise Failed(f"{error}; correct --url or GATEWAY_URL") from None
    async with client:
        yield client


async def tenant_of(client: Client, named: str) -> Tenant:
    """Return the tenant with a name or a domain, of which only a domain has a dot. Raises `Failed`."""
    if "." not in named:
        return client.tenant(named)
    domain = plain(named) or named
    for info in await client.tenants():
        if info.domain == domain:
            return client.tenant(info.name)
    raise Failed(f"no tenant has the domain {named}; `incus-gateway list` shows all")


def _own_token(secret: str, lifetime: int) -> str:
    return issuing.issue(secret, f"{issuing.caller()} (cli)", ["*"], issuing.SCOPES, lifetime)


def own_url(listen: str) -> str:
    """Return the URL of this machine's gateway, from its setting `listen`."""
    return f"unix:{listen}" if "/" in listen else f"http://{listen}"


def run_to_end(work: Coroutine[Any, Any, Any]) -> Any:
    """Run the asynchronous part of a command and return its result."""
    return asyncio.run(work)
