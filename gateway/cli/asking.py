"""Asks a gateway: the client of the one that is named, or of this machine's with a token of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from typing import Any

from gateway.auth import issuing
from gateway.cli.confirming import Failed
from gateway.settings import load_client
from gateway_client.client import Client
from gateway_client.credentials import Token


@contextlib.asynccontextmanager
async def client_of(url: str | None, token: str | None, life: int = 3600) -> AsyncIterator[Client]:
    """Open a client of the named gateway, or of this machine's with tokens of our own of so many seconds."""
    settings = load_client()
    source: Token = token or partial(
        _own_token, issuing.load_secret(settings.secret, settings.state_dir), life
    )
    try:
        client = Client(url or own_url(settings.listen), token=source)
    except ValueError as error:
        raise Failed(f"{error}; mend --url or GATEWAY_URL") from None
    async with client:
        yield client


def _own_token(secret: str, life: int) -> str:
    return issuing.issue(secret, os.environ.get("USER", "operator"), ["*"], issuing.SCOPES, life)


def own_url(listen: str) -> str:
    """Return the URL of a gateway of this machine that listens there."""
    return f"unix:{listen}" if "/" in listen else f"http://{listen}"


def run_to_end(work: Coroutine[Any, Any, Any]) -> Any:
    """Run what a command does."""
    return asyncio.run(work)
