"""Commands for the members of a cluster."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from gateway.cli.asking import client_of, run_to_end
from gateway.cli.confirming import Failed, confirm
from gateway.cli.options import Json, TokenOption, Url, Yes
from gateway.settings import load
from gateway.terminal import err, out
from gateway_client.client import TenantInfo

Name = Annotated[str, typer.Argument(help="The member's name")]


def enable(
    name: Annotated[str, typer.Argument(help="This server's name in the cluster; default: the host's")] = "",
    address: Annotated[str, typer.Option(help="This host's address for the other members")] = "",
) -> None:
    """Make this server the first member of a cluster. Its tenants keep running."""
    from gateway.host.forming import enable as run

    run(load(), name or socket.gethostname().partition(".")[0], address, out.say)
    err.say("restart the gateway: incus-gateway upgrade")


def add(name: Name) -> None:
    """Print a token with which one empty server can join: deploy/quickstart --join TOKEN."""
    from gateway.host.forming import add as run

    out.say(run(load(), name))


def list_members(as_json: Json = False) -> None:
    """List the members."""
    from gateway.host.forming import rows

    found = rows(load())
    if as_json:
        out.json(found, indent=True)
        return
    if not found:
        err.say("this server is not in a cluster")
    for row in found:
        mark = "*" if row["own"] else " "
        state = "Drained" if row["drained"] and row["status"] == "Online" else row["status"]
        out.say(f"{mark} {row['name']:<16} {row['address']:<24} {state:<10} {row['message']}")


def remove(
    name: Name,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Remove a dead member and bring its tenants back from their standby copies",
        ),
    ] = False,
    yes: Yes = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Remove another member that has no instances left, or with --force one that is dead."""
    from gateway.host.forming import check_removable
    from gateway.host.forming import remove as run

    settings = load()
    check_removable(settings, name, force=force)
    if not force:
        run(settings, name, force=False)
        return
    copies = [copy for copy in run_to_end(_copies(url, token)) if copy["home"] == name]
    tenants = {info.name for info in run_to_end(_tenants(url, token)) if info.all["location"] == name}
    without = sorted(tenants - {copy["tenant"] for copy in copies})
    _show(copies)
    for tenant in without:
        err.say(f"{tenant}: has no standby copy, and is lost for good")
    if not yes:
        confirm(
            f"Remove {name} and bring {len(copies)} tenants back from their copies? {len(without)} are lost "
            "for good.",
            "nothing was removed",
        )
    run(settings, name, force=True)
    if copies:
        _recover([copy["tenant"] for copy in copies], url, token)


def recover(
    tenants: Annotated[
        list[str] | None, typer.Argument(help="Their names; default: all that are lost")
    ] = None,
    yes: Yes = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Bring back tenants of removed members from their standby copies."""
    found = {copy["tenant"]: copy for copy in run_to_end(_copies(url, token))}
    lost = {name: copy for name, copy in found.items() if copy["lost"] and (not tenants or name in tenants)}
    for name in tenants or ():
        if name not in found:
            raise Failed(f"{name} has no standby copy on a member that answers")
        if name not in lost:
            home = found[name]["home"]
            raise Failed(
                f"{home}, the server of {name}, is still a member, and {name} is back when that is; "
                f"if {home} is lost for good: incus-gateway cluster remove {home} --force"
            )
    if not lost:
        out.say("no tenant is lost")
        return
    _show(lost.values())
    if not yes:
        confirm(f"Bring {len(lost)} tenants back from their copies?", "nothing was changed")
    _recover(sorted(lost), url, token)


def recover_from_quorum_loss(yes: Yes = False) -> None:
    """Make this server work alone after most members were lost for good. Its tenants keep running."""
    from gateway.host.forming import recover_from_quorum_loss as run

    if not yes:
        confirm(
            "Are the other members lost for good? If one is started again, it is a second cluster with the "
            "same tenants.",
            "nothing was changed",
        )
    run(load(), out.say)


async def _copies(url: str | None, token: str | None) -> list[dict[str, Any]]:
    """Return the standby copies on all members that answer."""
    async with client_of(url, token) as client:
        answer = await client.http("GET", "/v1/standby-copies")
    for member in answer["unanswered"]:
        err.say(f"{member} does not answer; copies that it has are not listed")
    return list(answer["copies"])


async def _tenants(url: str | None, token: str | None) -> list[TenantInfo]:
    async with client_of(url, token) as client:
        return await client.tenants()


def _show(copies: Iterable[Mapping[str, Any]]) -> None:
    """Print what is lost of each tenant."""
    for copy in copies:
        out.say(
            f"{copy['tenant']:<20} from {copy['home']} to {copy['member']}; its copy was made "
            f"{_age(copy['lost_seconds'])} before {copy['home']} was last heard"
        )


def _age(seconds: int) -> str:
    for unit, size in (("days", 172_800), ("h", 7200), ("min", 120)):
        if seconds >= size:
            return f"{seconds // (size // 2)} {unit}"
    return f"{seconds} s"


def _recover(tenants: list[str], url: str | None, token: str | None) -> None:
    async def run() -> Mapping[str, Any]:
        async with client_of(url, token) as client:
            answer: Mapping[str, Any] = await client.http(
                "POST", "/v1/standby-copies/recover", {"tenants": tenants}
            )
            return answer

    done = run_to_end(run())
    for copy in done["recovered"]:
        out.say(f"{copy['tenant']} is back on {copy['member']}")
    for tenant, why in sorted(done["failed"].items()):
        err.say(f"{tenant} is not back: {why}")
    if done["failed"]:
        raise Failed("some tenants are not back; run again: incus-gateway cluster recover")
