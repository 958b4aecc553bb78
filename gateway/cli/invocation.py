"""What all commands share: options, the gateway's client, and questions to the person at the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from gateway.terminal import err

if TYPE_CHECKING:  # imported by the functions below: `--version` and `--help` ask no gateway
    from gateway_client.client import Client
    from gateway_client.credentials import Token
    from gateway_client.tenant import Tenant

Result = TypeVar("Result")


class Failed(Exception):
    """Ends the command with exit code 1; its text is printed as one line."""


def at_terminal() -> bool:
    """Return whether a person can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str, otherwise: str) -> None:
    """Ask the person at the terminal, and raise `Failed(otherwise)` unless the answer is yes.

    Blocks, so call it outside an event loop: inside one Ctrl-C would have no effect until Enter is pressed.
    """
    err.say(f"{question} [y/N]", end=" ")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        answer = sys.stdin.readline()
    finally:
        signal.signal(signal.SIGINT, before)
    if answer.strip().lower() not in ("y", "yes"):
        raise Failed(otherwise)


@contextlib.asynccontextmanager
async def client_of(url: str | None, token: str | None, lifetime: int = 3600) -> AsyncIterator[Client]:
    """Open a client of the gateway at `url`, or of this machine's with tokens for `lifetime` seconds."""
    from gateway.auth import issuing
    from gateway.settings import load_client
    from gateway_client.client import Client

    settings = load_client()
    source: Token = token or partial(
        _local_token, issuing.load_secret(settings.secret, settings.state_dir), lifetime
    )
    try:
        client = Client(url or local_url(settings.listen), token=source)
    except ValueError as error:
        raise Failed(f"{error}; correct --url or GATEWAY_URL") from None
    async with client:
        yield client


async def tenant_of(client: Client, named: str) -> Tenant:
    """Return the tenant with a name or a domain, of which only a domain has a dot. Raises `Failed`."""
    if "." not in named:
        return client.tenant(named)
    from gateway.hostnames import plain

    domain = plain(named) or named
    for info in await client.tenants():
        if info.domain == domain:
            return client.tenant(info.name)
    raise Failed(f"no tenant has the domain {named}; `incus-gateway list` shows all")


def _local_token(secret: str, lifetime: int) -> str:
    from gateway.auth import issuing

    return issuing.issue(secret, f"{issuing.caller()} (cli)", ["*"], issuing.SCOPES, lifetime)


def local_url(listen: str) -> str:
    """Return the URL of this machine's gateway, from its setting `listen`."""
    return f"unix:{listen}" if "/" in listen else f"http://{listen}"


def with_tenant(
    named: str, url: str | None, token: str | None, work: Callable[[Tenant], Awaitable[Result]]
) -> Result:
    """Return what `work` returns for the tenant with a name or a domain. Raises what `tenant_of` raises."""

    async def run() -> Result:
        async with client_of(url, token) as client:
            return await work(await tenant_of(client, named))

    return asyncio.run(run())


PROGRAM: Final = "incus-gateway"
VARIABLE: Final = "_INCUS_GATEWAY_COMPLETE"
"""Environment variable that is set when a shell asks for completions."""

# seconds; a person waits for it after Tab
_PATIENCE: Final = 2.0

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Url = Annotated[
    str | None,
    typer.Option("--url", envvar="GATEWAY_URL", help="The gateway to ask; default: this machine's."),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="GATEWAY_TOKEN", help="A token; default: one made from this machine's secret."
    ),
]


def tenants_begun(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the tenants whose names begin with what was typed, for completion; none if that fails."""

    async def run() -> list[str]:
        async with (
            asyncio.timeout(_PATIENCE),
            client_of(ctx.params.get("url"), ctx.params.get("token")) as client,
        ):
            return [info.name for info in await client.tenants()]

    try:
        return [name for name in asyncio.run(run()) if name.startswith(incomplete)]
    except Exception:  # a message would land in the line that is being typed
        return []


TenantName = Annotated[
    str, typer.Argument(metavar="TENANT", help="Its name or its domain", autocompletion=tenants_begun)
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class Size(StrEnum):
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


def assignment(entry: str) -> tuple[str, str]:
    """Return the name and value of a `NAME=VALUE`. Raises `typer.BadParameter`."""
    name, equals, value = entry.partition("=")
    if not equals:
        raise typer.BadParameter(f"--env takes NAME=VALUE, not {entry!r}")
    return name, value
