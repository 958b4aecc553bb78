"""Commands for tenants: create to destroy, snapshots, clones, domain and size."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from gateway.cli.asking import client_of, run_to_end, tenant_of
from gateway.cli.confirming import confirm, somebody_is_there
from gateway.cli.options import Json, Size, TenantName, TokenOption, Url, Yes
from gateway.errors import InvalidParams
from gateway.settings import load
from gateway.terminal import err, out


def create(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Its name")],
    domain: Annotated[str | None, typer.Option(help="The domain of its site")] = None,
) -> None:
    """Create a tenant from the base image and start it."""
    from gateway.hostnames import DomainReserved, normalized, own_names, reserved
    from gateway.runtime import TENANT_NAME
    from gateway.runtime.incus import IncusRuntime
    from gateway.runtime.local import LocalRuntime

    if not TENANT_NAME.fullmatch(tenant):
        raise InvalidParams(
            f"{tenant!r} is not a tenant name: use lower-case letters, digits and dashes, at most 63"
        )
    settings = load()
    given = None if domain is None else normalized(domain)
    if given is not None and reserved(given, own_names(settings)):
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

    run_to_end(run())


def start(tenant: TenantName, url: Url = None, token: TokenOption = None) -> None:
    """Start a tenant."""

    async def run() -> None:
        async with client_of(url, token) as client:
            await (await tenant_of(client, tenant)).start()

    run_to_end(run())
    out.say(f"{tenant} is running")


def stop(tenant: TenantName, yes: Yes = False, url: Url = None, token: TokenOption = None) -> None:
    """Stop a tenant. At a terminal it asks first."""
    if not yes and somebody_is_there():
        confirm(f"Stop {tenant}? Its site is down until it is started again.", "nothing was stopped")

    async def run() -> None:
        async with client_of(url, token) as client:
            await (await tenant_of(client, tenant)).stop()

    run_to_end(run())
    out.say(f"{tenant} is stopped")


def sleep(tenant: TenantName, url: Url = None, token: TokenOption = None) -> None:
    """Put a tenant to sleep until the next visitor or command, as if it were idle. Refused while in use."""

    async def run() -> None:
        async with client_of(url, token) as client:
            await (await tenant_of(client, tenant)).sleep()

    run_to_end(run())
    out.say(f"{tenant} sleeps; the next visitor or command wakes it")


def restart(tenant: TenantName, url: Url = None, token: TokenOption = None) -> None:
    """Restart a tenant."""

    async def run() -> None:
        async with client_of(url, token) as client:
            await (await tenant_of(client, tenant)).restart()

    run_to_end(run())
    out.say(f"{tenant} was restarted")


def destroy(tenant: TenantName, yes: Yes = False, url: Url = None, token: TokenOption = None) -> None:
    """Destroy a tenant with all its files and snapshots. Asks first; without a terminal, give --yes."""
    if not yes and not somebody_is_there():
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

    async def run() -> None:
        async with client_of(url, token) as client:
            await (await tenant_of(client, tenant)).delete()

    if not yes:
        domain, kept = run_to_end(look())
        what = [*([domain] if domain else []), f"{kept} snapshot{'' if kept == 1 else 's'}"]
        question = f"Destroy {tenant} ({', '.join(what)})? Its files are gone for good."
        confirm(question, "nothing was destroyed")
    run_to_end(run())
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

    run_to_end(run())


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

    async def run() -> None:
        async with client_of(url, token) as client:
            await (await tenant_of(client, tenant)).restore(snapshot)

    if not yes and somebody_is_there():
        question = f"Restore the disk of {tenant} to {snapshot}? All later changes are lost."
        confirm(question, "nothing was changed")
    run_to_end(run())
    out.say(f"{tenant} is restored to {snapshot}")


def clone(
    tenant: TenantName,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new tenant's name")],
    snapshot: Annotated[str | None, typer.Option(help="Copy this snapshot, not the current disk")] = None,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Create a tenant from a copy of another's disk. It has no domain until you give it one."""

    async def run() -> None:
        async with client_of(url, token) as client:
            await (await tenant_of(client, tenant)).clone(new, snapshot)

    run_to_end(run())
    out.say(f"{new} is a copy of {tenant}{f' at {snapshot}' if snapshot else ''}; it has no domain")


def rename(
    tenant: TenantName,
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="The new domain; - for none")],
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Change a tenant's domain; its name stays."""

    async def run() -> None:
        async with client_of(url, token) as client:
            await (await tenant_of(client, tenant)).rename(None if domain == "-" else domain)

    run_to_end(run())
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

    run_to_end(run())
