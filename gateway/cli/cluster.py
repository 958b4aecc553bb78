"""Commands for the members of a cluster, and for moving tenants between them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

import typer

from gateway.admission import Admission
from gateway.cli.invocation import (
    Failed,
    Json,
    TenantName,
    TokenOption,
    Url,
    Yes,
    client_of,
    confirm,
    with_tenant,
)
from gateway.errors import GatewayError, NotFound
from gateway.settings import load
from gateway.terminal import err, out
from gateway_client.client import Client, TenantInfo

Name = Annotated[str, typer.Argument(help="The member's name")]


def enable(
    name: Annotated[str, typer.Argument(help="This server's name in the cluster; default: the host's")] = "",
    address: Annotated[str, typer.Option(help="This host's address for the other members")] = "",
) -> None:
    """Make this server the first member of a cluster. Its tenants keep running."""
    from gateway.host.cluster import enable_cluster as run

    run(load(), name or socket.gethostname().partition(".")[0], address, out.say)
    err.say("restart the gateway: incus-gateway upgrade")


def add(name: Name) -> None:
    """Print a token with which one empty server can join: deploy/quickstart --join TOKEN."""
    from gateway.host.cluster import add_member as run

    out.say(run(load(), name))


def list_members(as_json: Json = False) -> None:
    """List the members."""
    from gateway.host.cluster import member_rows

    found = member_rows(load())
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
    from gateway.host.cluster import check_removable
    from gateway.host.cluster import remove_member as run

    settings = load()
    check_removable(settings, name, force=force)
    if not force:
        run(settings, name, force=False)
        return
    copies = [copy for copy in asyncio.run(_standby_copies(url, token)) if copy["home"] == name]
    tenants = {info.name for info in asyncio.run(_tenants(url, token)) if info.all["location"] == name}
    without = sorted(tenants - {copy["tenant"] for copy in copies})
    _print_copies(copies)
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
    found = {copy["tenant"]: copy for copy in asyncio.run(_standby_copies(url, token))}
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
    _print_copies(lost.values())
    if not yes:
        confirm(f"Bring {len(lost)} tenants back from their copies?", "nothing was changed")
    _recover(sorted(lost), url, token)


def recover_from_quorum_loss(yes: Yes = False) -> None:
    """Make this server work alone after most members were lost for good. Its tenants keep running."""
    from gateway.host.cluster import recover_from_quorum_loss as run

    if not yes:
        confirm(
            "Are the other members lost for good? If one is started again, it is a second cluster with the "
            "same tenants.",
            "nothing was changed",
        )
    run(load(), out.say)


async def _standby_copies(url: str | None, token: str | None) -> list[dict[str, Any]]:
    """Return the standby copies on all members that answer."""
    async with client_of(url, token) as client:
        answer = await client.http("GET", "/v1/standby-copies")
    for member in answer["unanswered"]:
        err.say(f"{member} does not answer; copies that it has are not listed")
    return list(answer["copies"])


async def _tenants(url: str | None, token: str | None) -> list[TenantInfo]:
    async with client_of(url, token) as client:
        return await client.tenants()


def _print_copies(copies: Iterable[Mapping[str, Any]]) -> None:
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

    done = asyncio.run(run())
    for copy in done["recovered"]:
        out.say(f"{copy['tenant']} is back on {copy['member']}")
    for tenant, why in sorted(done["failed"].items()):
        err.say(f"{tenant} is not back: {why}")
    if done["failed"]:
        raise Failed("some tenants are not back; run again: incus-gateway cluster recover")


# --- moves --------------------------------------------------------------------------------------------------


_AT_ONCE: Final = 2  # more would choose the same member as the one with most room
_ROUNDS: Final = 3  # looks for tenants that came while others were moved
_SETTLE: Final = 12.0  # seconds until every gateway knows that a member is drained
_LIFETIME: Final = 24 * 3600  # seconds of the token for a drain

Member = Annotated[str, typer.Argument(metavar="MEMBER", help="A member's name: incus-gateway cluster list")]


def move(
    tenant: TenantName,
    member: Annotated[
        str | None, typer.Argument(metavar="[MEMBER]", help="Where to; default: the one with most room")
    ] = None,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Move a tenant to another member of the cluster. Its calls wait a few seconds; its commands end."""

    done = with_tenant(tenant, url, token, lambda site: site.move(member))
    if as_json:
        out.json(done, indent=True)
    else:
        out.say(_moved(done))


def drain(member: Member, url: Url = None, token: TokenOption = None) -> None:
    """Move all tenants of a member to others that have room for them. New tenants go elsewhere."""
    from gateway.host.cluster import set_drained

    set_drained(load(), member, True)

    async def run() -> Mapping[str, str]:
        async with client_of(url, token, _LIFETIME) as client:
            failed: dict[str, str] = {}
            for number in range(_ROUNDS):
                found = [info.name for info in await client.tenants() if info.all["location"] == member]
                if not (left := [name for name in found if name not in failed]):
                    if number:
                        break
                    await asyncio.sleep(_SETTLE)  # one may just have been placed there
                    continue
                failed |= await _move_all(client, dict.fromkeys(left), drained=True)
            return failed

    _report_failed(asyncio.run(run()), f"{member} is drained: it has no tenants, and gets none")


def restore(member: Member, url: Url = None, token: TokenOption = None) -> None:
    """Let a member take tenants again, and move back those that a drain moved away."""
    from gateway.host.cluster import set_drained

    set_drained(load(), member, False)

    async def run() -> Mapping[str, str]:
        async with client_of(url, token, _LIFETIME) as client:
            back: dict[str, str | None] = {}
            for info in await client.tenants():
                if info.all["location"] == member:
                    continue
                try:
                    last = await client.tenant(info.name).last_move()
                except NotFound:  # it was never moved
                    continue
                except GatewayError as error:
                    err.say(f"{info.name}: {error.message}")
                    continue
                if last["drained"] and last["from"] == member and last["state"] == "moved":
                    back[info.name] = member
            return await _move_all(client, back, drained=False)

    _report_failed(asyncio.run(run()), f"{member} has its tenants again")


async def _move_all(client: Client, wanted: Mapping[str, str | None], *, drained: bool) -> Mapping[str, str]:
    """Move these tenants, a few at a time; return the errors by tenant."""
    failed: dict[str, str] = {}
    moves = Admission[str]("moves", each=1, total=_AT_ONCE)

    async def one(name: str, member: str | None) -> None:
        async with moves.slot(name):
            try:
                out.say(_moved(await client.tenant(name).move(member, drained=drained)))
            except GatewayError as error:
                failed[name] = error.message
                err.say(f"{name} is not moved: {error.message}")

    await asyncio.gather(*(one(name, member) for name, member in wanted.items()))
    return failed


def _moved(done: Mapping[str, Any]) -> str:
    waited = "" if done["gap_ms"] is None else f", after {done['gap_ms'] / 1000:.1f} s"
    return f"{done['tenant']} is on {done['to']}{waited}"


def _report_failed(failed: Mapping[str, str], well: str) -> None:
    if failed:
        raise Failed(
            f"not moved: {_listed(sorted(failed))}; see the reasons above, then run the command again"
        )
    out.say(well)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
