"""Commands that show what goes on: a site's log, what a tenant uses, events."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from gateway.cli.asking import client_of, run_to_end
from gateway.cli.options import Json, TenantName, TokenOption, Url
from gateway.terminal import Lines, copy, encoded, out


def logs(
    tenant: TenantName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last lines")] = 100,
    raw: Annotated[
        bool, typer.Option("--raw", help="Every byte as the site wrote it; not to a terminal")
    ] = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Print the log of a tenant's site, without what would steer a terminal."""
    if raw and sys.stdout.isatty():
        raise typer.BadParameter("--raw is for a pipe or a file: a log's bytes can steer a terminal")

    async def run() -> None:
        shown = Lines()
        # a stream that is followed goes by the token that it began with
        async with client_of(url, token, 30 * 86400 if follow else 3600) as client:
            async for piece in client.tenant(tenant).logs(lines, follow):
                await asyncio.to_thread(copy, piece if raw else shown.cleaned(piece))
        copy(shown.cleaned(b"", last=True))

    run_to_end(run())


def metrics(tenant: TenantName, as_json: Json = False, url: Url = None, token: TokenOption = None) -> None:
    """Show what a tenant uses."""

    async def run() -> None:
        async with client_of(url, token) as client:
            answer = await client.tenant(tenant).metrics()
        if as_json:
            out.json(answer, indent=True)
            return
        for name, value in answer.items():
            out.say(f"{name:22} {value}")

    run_to_end(run())


def events(
    tenant: Annotated[list[str] | None, typer.Option(help="Only of these tenants")] = None,
    type: Annotated[
        list[str] | None, typer.Option(help="Only of these types; * at the end is a prefix")
    ] = None,
    last_event_id: Annotated[int | None, typer.Option(help="Begin after this id")] = None,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Follow what happens, until interrupted."""

    async def run() -> None:
        async with (
            client_of(url, token) as client,
            client.events(tenant=tenant or None, types=type or None, last_event_id=last_event_id) as stream,
        ):
            async for event in stream:
                if as_json:
                    about = {"id": event.id, "type": event.type, "tenant": event.tenant}
                    out.json(about | {"time": event.time, "data": event.data})
                else:
                    who = event.tenant or "-"
                    out.say(f"{event.time}  {event.type:24} {who:20} {encoded(event.data)}")

    run_to_end(run())
