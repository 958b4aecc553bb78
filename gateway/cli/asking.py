"""Asks a gateway: the client of the one that is named, or of this machine's with a token of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from typing import Any

from gateway.auth import tokens
from gateway.settings import load
from gateway_client import Client, Token


@contextlib.asynccontextmanager
async def client_of(url: str | None, token: str | None, life: int = 3600) -> AsyncIterator[Client]:
    """Open a client of the named gateway, or of this machine's with tokens of our own of so many seconds."""
    settings = load()
    source: Token = partial(_own_token, tokens.load_secret(settings), life) if token is None else token
    async with Client(url or own_url(settings.listen), token=source) as client:
        yield client


def _own_token(secret: str, life: int) -> str:
    return tokens.issue(secret, os.environ.get("USER", "operator"), ["*"], sorted(tokens.SCOPES), life)


def own_url(listen: str) -> str:
    """Return the URL of a gateway of this machine that listens there."""
    return f"unix:{listen}" if "/" in listen else f"http://{listen}"


def run_to_end(work: Coroutine[Any, Any, Any]) -> Any:
    """Run what a command does; a reader of its output that has enough ends it without a word."""
    with contextlib.suppress(BrokenPipeError):
        return asyncio.run(work)
