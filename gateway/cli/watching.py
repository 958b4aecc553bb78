"""Commands that watch: a site's log, a tenant's usage, events."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from gateway.cli.asking import client_of, run_to_end, tenant_of
from gateway.cli.options import Json, TenantName, TokenOption, Url
from gateway.cli.showing import size
from gateway.terminal import Lines, copy, encoded, line, out


def logs(
    tenant: TenantName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Print new lines as they come")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Number of lines, from the end")] = 100,
    raw: Annotated[
        bool, typer.Option("--raw", help="The bytes exactly as the site wrote them; not to a terminal")
    ] = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Print the log of a tenant's site, without terminal control sequences."""
    if raw and sys.stdout.isatty():
        raise typer.BadParameter(
            "--raw is for a pipe or a file: a log can hold control sequences for the terminal"
        )

    async def run() -> None:
        shown = Lines()
        # a stream cannot renew its token, so it needs one that lasts
        async with client_of(url, token, 30 * 86400 if follow else 3600) as client:
            site = await tenant_of(client, tenant)
            async for piece in site.logs(lines, follow):
                await asyncio.to_thread(copy, piece if raw else shown.cleaned(piece))
        copy(shown.cleaned(b"", last=True))

    run_to_end(run())


def metrics(tenant: TenantName, as_json: Json = False, url: Url = None, token: TokenOption = None) -> None:
    """Show a tenant's usage of memory, CPU, disk and network."""

    async def run() -> None:
        async with client_of(url, token) as client:
            answer = await (await tenant_of(client, tenant)).metrics()
        if as_json:
            out.json(answer, indent=True)
            return
        for name, value in _rows(answer):
            out.say(f"{name:30} {line(value)}")

    run_to_end(run())


def _rows(measured: Mapping[str, Any], of: str = "") -> Iterator[tuple[str, str]]:
    for name, value in measured.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{of}{name} ")
        else:
            shown = "-" if value is None else size(value) if name.endswith("_bytes") else str(value)
            yield f"{of}{name.removesuffix('_bytes')}", shown


def events(
    tenant: Annotated[list[str] | None, typer.Option(help="Only events of these tenants")] = None,
    type: Annotated[
        list[str] | None, typer.Option(help="Only these types; a * at the end matches the rest")
    ] = None,
    last_event_id: Annotated[
        str | None, typer.Option(help="Start after the event with this `lastEventId`, as --json prints it")
    ] = None,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Print events as they happen, until interrupted."""

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(client_of(url, token))
            named = [(await tenant_of(client, one)).name for one in tenant or ()]
            events = client.events(tenant=named or None, types=type or None, last_event_id=last_event_id)
            stream = await stack.enter_async_context(events)
            async for event in stream:
                if as_json:
                    about = {"id": event.id, "type": event.type, "tenant": event.tenant}
                    about |= {"time": event.time, "source": event.source, "data": event.data}
                    out.json(about | {"lastEventId": stream.last_event_id})
                else:
                    who = event.tenant or "-"
                    out.say(f"{event.time}  {event.type:24} {who:20} {encoded(event.data)}")

    run_to_end(run())
