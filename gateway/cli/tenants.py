"""Commands for tenants: create to destroy, snapshots and clones, state, usage, log, events, history."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from gateway.cli.invocation import (
    Failed,
    Json,
    Size,
    TenantName,
    TokenOption,
    Url,
    Yes,
    at_terminal,
    client_of,
    confirm,
    tenant_of,
    with_tenant,
)
from gateway.errors import InvalidParams, NotFound
from gateway.settings import load
from gateway.terminal import LogCleaner, copy, encoded, err, line, out
from gateway_client.tenant import Tenant


def create(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Its name")],
    domain: Annotated[str | None, typer.Option(help="The domain of its site")] = None,
) -> None:
    """Create a tenant from the base image and start it."""
    from gateway.hostnames import DomainReserved, gateway_names, normalized, reserved
    from gateway.runtime import TENANT_NAME
    from gateway.runtime.incus import IncusRuntime
    from gateway.runtime.local import LocalRuntime

    if not TENANT_NAME.fullmatch(tenant):
        raise InvalidParams(
            f"{tenant!r} is not a tenant name: use lower-case letters, digits and dashes, at most 63"
        )
    settings = load()
    given = None if domain is None else normalized(domain)
    if given is not None and reserved(given, gateway_names(settings)):
        raise DomainReserved(given)

    async def run() -> None:
        runtime_type = IncusRuntime if settings.runtime == "incus" else LocalRuntime
        async with runtime_type(settings) as runtime:
            made = await runtime.tenants.create(tenant, domain=given)
        out.say(f"{made.name} is {made.status}")

    asyncio.run(run())


def list_tenants(as_json: Json = False, url: Url = None, token: TokenOption = None) -> None:
    """List the tenants."""

    async def run() -> None:
        async with client_of(url, token) as client:
            found = await client.tenants()
        if as_json:
            out.json([info.all for info in found], indent=True)
            return
        out.table(
            ("tenant", "status", "address", "domain", "memory", "created"),
            [
                (
                    *(info.name, "asleep" if info.all["asleep"] else info.status),
                    *(info.address or "-", info.domain or "-", info.all["limits"].get("memory") or "-"),
                    (info.all["created"] or "")[:19],
                )
                for info in found
            ],
        )

    asyncio.run(run())


def start(tenant: TenantName, url: Url = None, token: TokenOption = None) -> None:
    """Start a tenant."""

    with_tenant(tenant, url, token, lambda site: site.start())
    out.say(f"{tenant} is running")


def stop(tenant: TenantName, yes: Yes = False, url: Url = None, token: TokenOption = None) -> None:
    """Stop a tenant. At a terminal it asks first."""
    if not yes and at_terminal():
        confirm(f"Stop {tenant}? Its site is down until it is started again.", "nothing was stopped")

    with_tenant(tenant, url, token, lambda site: site.stop())
    out.say(f"{tenant} is stopped")


def sleep(tenant: TenantName, url: Url = None, token: TokenOption = None) -> None:
    """Put a tenant to sleep until the next visitor or command, as if it were idle. Refused while in use."""

    with_tenant(tenant, url, token, lambda site: site.sleep())
    out.say(f"{tenant} sleeps; the next visitor or command wakes it")


def restart(tenant: TenantName, url: Url = None, token: TokenOption = None) -> None:
    """Restart a tenant."""

    with_tenant(tenant, url, token, lambda site: site.restart())
    out.say(f"{tenant} was restarted")


def destroy(tenant: TenantName, yes: Yes = False, url: Url = None, token: TokenOption = None) -> None:
    """Destroy a tenant with all its files and snapshots. Asks first; without a terminal, give --yes."""
    if not yes and not at_terminal():
        err.say(
            "incus-gateway: nothing was destroyed: without a terminal this cannot ask first. To destroy "
            f"{tenant} "
            f"with all its files and snapshots: incus-gateway destroy {tenant} --yes"
        )
        raise typer.Exit(2)

    async def look() -> tuple[str | None, int]:
        async with client_of(url, token) as client:
            target = await tenant_of(client, tenant)
            return (await target.info())["domain"], len(await target.snapshots())

    if not yes:
        domain, kept = asyncio.run(look())
        what = [*([domain] if domain else []), f"{kept} snapshot{'' if kept == 1 else 's'}"]
        question = f"Destroy {tenant} ({', '.join(what)})? Its files are gone for good."
        confirm(question, "nothing was destroyed")
    with_tenant(tenant, url, token, lambda site: site.delete())
    out.say(f"{tenant} is destroyed")


SnapshotName = Annotated[str, typer.Argument(metavar="SNAPSHOT")]


def snapshot(
    tenant: TenantName,
    name: Annotated[str | None, typer.Argument(help="Its name; default: the current time")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the snapshots instead")] = False,
    delete: Annotated[str | None, typer.Option(metavar="SNAPSHOT", help="Delete one instead")] = None,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Take a snapshot of a tenant's disk, list its snapshots, or delete one."""
    if (name is not None) + list_ + (delete is not None) > 1:
        raise typer.BadParameter("give only one of NAME, --list and --delete")

    async def run() -> None:
        async with client_of(url, token) as client:
            target = await tenant_of(client, tenant)
            if delete is not None:
                await target.delete_snapshot(delete)
                out.say(f"{tenant} no longer has the snapshot {delete}")
                return
            kept = await target.snapshots() if list_ else [await target.snapshot(name)]
        if as_json:
            out.json(kept if list_ else kept[0], indent=True)
        elif list_:
            out.table(
                ("snapshot", "created"), [(entry["name"], (entry["created"] or "")[:19]) for entry in kept]
            )
        else:
            out.say(kept[0]["name"])

    asyncio.run(run())


def restore(
    tenant: TenantName,
    snapshot: SnapshotName,
    yes: Yes = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Restore a tenant's disk to a snapshot. A running tenant is stopped, then started again.

    Asks first at a terminal.
    """

    if not yes and at_terminal():
        question = f"Restore the disk of {tenant} to {snapshot}? All later changes are lost."
        confirm(question, "nothing was changed")
    with_tenant(tenant, url, token, lambda site: site.restore(snapshot))
    out.say(f"{tenant} is restored to {snapshot}")


def clone(
    tenant: TenantName,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new tenant's name")],
    snapshot: Annotated[str | None, typer.Option(help="Copy this snapshot, not the current disk")] = None,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Create a tenant from a copy of another's disk. It has no domain until you give it one."""

    with_tenant(tenant, url, token, lambda site: site.clone(new, snapshot))
    out.say(f"{new} is a copy of {tenant}{f' at {snapshot}' if snapshot else ''}; it has no domain")


def rename(
    tenant: TenantName,
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="The new domain; - for none")],
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Change a tenant's domain; its name stays."""

    with_tenant(tenant, url, token, lambda site: site.rename(None if domain == "-" else domain))
    out.say(f"{tenant} has {'no domain' if domain == '-' else f'the domain {domain}'}")


def resize(
    tenant: TenantName,
    size: Annotated[Size, typer.Argument(metavar="SIZE", help="small, medium or large")],
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Change a tenant's limits to those of another size, up or down, while it runs."""

    async def run() -> None:
        async with client_of(url, token) as client:
            now = await (await tenant_of(client, tenant)).resize(size.value)
        limits = " ".join(f"{name} {value}" for name, value in now["limits"].items() if value)
        out.say(f"{tenant} is {size.value}: {limits}")

    asyncio.run(run())


# --- state --------------------------------------------------------------------------------------------------


def info(tenant: TenantName, as_json: Json = False, url: Url = None, token: TokenOption = None) -> None:
    """Show one tenant: state, address, limits, usage, and whether its site answers."""

    async def run() -> tuple[Mapping[str, Any], Mapping[str, Any], int]:
        async with client_of(url, token) as client:
            target = await tenant_of(client, tenant)
            return await target.info(), await target.site(), len(await target.snapshots())

    found, site, kept = asyncio.run(run())
    if as_json:
        out.json({**found, "site": site, "snapshots": kept}, indent=True)
        return
    for name, value in _facts(found, site):
        out.say(f"{name:10} {line(value)}")
    out.say(f"{'snapshots':10} {kept}")


def _facts(found: Mapping[str, Any], site: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "tenant", str(found["name"])
    yield "status", "asleep" if found["asleep"] else str(found["status"])
    answers = {True: "answers", False: "does not answer", None: "-"}[site["answers"]]
    if site.get("reason") == "host_refused":
        answers = f"refuses its domain: {site.get('said', '')}"
    yield "url", str(found["url"] or "-")
    yield "site", answers
    where = f"{found['address']}:{found['port']}" if found["port"] else found["address"]
    yield "address", str(where or "-")
    yield "created", str(found["created"] or "-")[:19]
    limits = [f"{name} {value}" for name, value in found["limits"].items() if value]
    yield "limits", ", ".join(limits) or "-"
    if usage := found.get("usage"):
        yield "memory", _used_of(usage, "memory")
        yield "disk", _used_of(usage, "disk")
        yield "processes", str(usage["processes"])


def _used_of(usage: Mapping[str, Any], what: str) -> str:
    used, limit = usage.get(f"{what}_bytes"), usage.get(f"{what}_limit_bytes")
    return "-" if used is None else size(used) + (f" of {size(limit)}" if limit else "")


def size(count: int) -> str:
    """Format a number of bytes for people."""
    for unit, above in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= above:
            return f"{count / above:.1f} {unit}"
    return f"{count} B"


def templates(as_json: Json = False, url: Url = None, token: TokenOption = None) -> None:
    """List the templates for `deploy --template`."""

    async def run() -> list[Mapping[str, Any]]:
        async with client_of(url, token) as client:
            return await client.templates()

    found = asyncio.run(run())
    if as_json:
        out.json(found, indent=True)
        return
    rows = [(str(one["name"]), str(one.get("error") or one.get("description") or "-")) for one in found]
    out.table(("template", "what it is"), rows)


def open_site(
    tenant: TenantName,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Print the address of a tenant's site; on a desktop, also open it in the browser."""

    async def run() -> str | None:
        async with client_of(url, token) as client:
            found: str | None = (await (await tenant_of(client, tenant)).info())["url"]
            return found

    address = asyncio.run(run())
    if address is None:
        raise Failed(f"{tenant} has no domain; `incus-gateway rename {tenant} DOMAIN` gives it one")
    out.say(address)
    desktop = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if out.is_terminal and desktop and address.startswith(("http://", "https://")):
        import webbrowser

        webbrowser.open(address)


# --- log, usage and events ----------------------------------------------------------------------------------


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
        shown = LogCleaner()
        # a stream cannot renew its token, so it needs one that lasts
        async with client_of(url, token, 30 * 86400 if follow else 3600) as client:
            site = await tenant_of(client, tenant)
            async for piece in site.logs(lines, follow):
                await asyncio.to_thread(copy, piece if raw else shown.cleaned(piece))
        copy(shown.cleaned(b"", last=True))

    asyncio.run(run())


def metrics(tenant: TenantName, as_json: Json = False, url: Url = None, token: TokenOption = None) -> None:
    """Show a tenant's usage of memory, CPU, disk and network."""

    async def run() -> None:
        async with client_of(url, token) as client:
            answer = await (await tenant_of(client, tenant)).metrics()
        if as_json:
            out.json(answer, indent=True)
            return
        for name, value in _metric_rows(answer):
            out.say(f"{name:30} {line(value)}")

    asyncio.run(run())


def _metric_rows(measured: Mapping[str, Any], of: str = "") -> Iterator[tuple[str, str]]:
    for name, value in measured.items():
        if isinstance(value, Mapping):
            yield from _metric_rows(value, f"{of}{name} ")
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

    asyncio.run(run())


# --- history ------------------------------------------------------------------------------------------------


_TURN_DIGITS = 8  # digits of a turn's id that are shown, and suffice to name it
_TURNS_SEARCHED = 200  # turns searched for a shortened id


class Side(StrEnum):
    BEFORE = "before"
    AFTER = "after"


def history(
    tenant: TenantName,
    turn: Annotated[str | None, typer.Argument(metavar="TURN", help="Show what this turn changed")] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, max=200, help="How many turns")] = 20,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """List what agents changed, turn by turn, latest first; or show one turn as a patch."""

    async def run() -> None:
        async with client_of(url, token) as client:
            asked = await tenant_of(client, tenant)
            if turn is None:
                turns = await asked.history(lines)
                if as_json:
                    out.json(turns, indent=True)
                else:
                    _print_turns(tenant, turns)
                return
            shown = await asked.turn(await _full_turn(asked, turn))
        if as_json:
            out.json(shown, indent=True)
            return
        out.say(f"{shown['turn']}  {shown['agent']}  {_turn_time(shown['at'])}")
        out.say(shown["title"])
        for path in shown["leftOut"]:
            out.say(f"left out: {path}")
        out.say("")
        out.say(shown["diff"].removesuffix("\n"))
        if shown["truncated"]:
            out.say("… the rest of the patch is too long to show")

    asyncio.run(run())


def undo(
    tenant: TenantName,
    turn: Annotated[
        str | None, typer.Argument(metavar="TURN", help="The turn; default: an agent's latest")
    ] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            "--force", metavar="PATH", help="A path in conflict that becomes what it was before TURN"
        ),
    ] = None,
    to: Annotated[
        Side | None,
        typer.Option("--to", help="Instead, make all files what they were before TURN, or right after it"),
    ] = None,
    yes: Yes = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Take back exactly what a turn changed; later changes stay. The undo is a turn too, and can be undone.

    Where later changes are of the same lines, nothing is changed, and the paths are listed.
    """
    if to is not None and (turn is None or force):
        raise typer.BadParameter("--to needs a TURN, and has no --force")

    async def run() -> None:
        async with client_of(url, token) as client:
            asked = await tenant_of(client, tenant)
            turns = await asked.history(_TURNS_SEARCHED)
            if not turns:
                raise Failed(f"{tenant} has no turns yet: there is nothing to undo")
            wanted = _latest_turn(tenant, turns) if turn is None else await _full_turn(asked, turn, turns)
            if to is None:
                found = await asked.undo(wanted, force=force or ())
                done, conflicts = found["turn"], found["conflicts"]
            else:
                _confirm_later(wanted, turns, yes=yes)
                done, conflicts = await asked.restore_turn(wanted, to.value), ()
        if conflicts:
            for path in conflicts:
                out.say(path)
            again = " ".join(f"--force {shlex.quote(path)}" for path in [*(force or ()), *conflicts][:4])
            raise Failed(
                "nothing was changed: what this turn changed there was changed again since. To have a file "
                "as it was before the turn (the undo can be undone): "
                f"incus-gateway undo {tenant} {wanted[:_TURN_DIGITS]} {again}"
            )
        if done is None:
            out.say("Nothing to do: the files are already in that state.")
            return
        files = f"{done['files']} file{'' if done['files'] == 1 else 's'}"
        out.say(f"{_title(done['title'])}: {files}. To take it back: incus-gateway undo {tenant}")

    asyncio.run(run())


def _confirm_later(turn: str, turns: Sequence[Mapping[str, Any]], *, yes: bool) -> None:
    """Have whoever goes back past later turns confirm it. Raises `Failed`."""
    ids = [one["turn"] for one in turns]
    later = ids.index(turn) if turn in ids else 0
    if later and not yes and at_terminal():
        word = "turn" if later == 1 else "turns"
        confirm(f"That takes back {later} later {word} too. Continue?", "nothing was changed")


def _latest_turn(tenant: str, turns: Sequence[Mapping[str, Any]]) -> str:
    """Return the turn that is undone by default: since the last deployment, an agent's latest if any.

    Raises `Failed` if there is none: files are not taken back to before their site was deployed.
    """
    since = [*itertools.takewhile(lambda one: one["kind"] not in ("deployed", "first"), turns)]
    if not since:
        began = "it was deployed" if turns[0]["kind"] == "deployed" else "its history began"
        raise Failed(
            f"nothing has changed in {tenant} since {began}; to undo an earlier turn, name it "
            f"(incus-gateway history {tenant} lists them)"
        )
    return str(next((one for one in since if one["kind"] != "outside"), since[0])["turn"])


async def _full_turn(tenant: Tenant, turn: str, turns: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Return the id of the turn that begins with these digits. Raises `NotFound`."""
    if len(turn) == 40:
        return turn
    known = turns if turns is not None else await tenant.history(_TURNS_SEARCHED)
    found = [str(one["turn"]) for one in known if str(one["turn"]).startswith(turn)]
    if len(turn) < 4 or len(found) != 1:
        raise NotFound(f"no turn {turn!r}; `incus-gateway history {tenant.name}` lists them")
    return found[0]


def _print_turns(tenant: str, turns: Sequence[Mapping[str, Any]]) -> None:
    if not turns:
        out.say(f"{tenant} has no turns yet.")
        return
    rows = [
        (
            *(one["turn"][:_TURN_DIGITS], _turn_time(one["at"]), one["agent"], str(one["files"])),
            *(f"+{one['added']} -{one['removed']}", _title(one["title"])),
        )
        for one in turns
    ]
    out.table(("turn", "when", "agent", "files", "lines", "what"), rows)


def _turn_time(at: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _title(title: str) -> str:
    line = title.partition("\n")[0]
    return line if len(line) <= 60 else line[:59] + "…"
