"""Commands that move tenants to other members of a cluster: one, all of a member, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import typer

from gateway.cli.asking import client_of, run_to_end, tenant_of
from gateway.cli.confirming import Failed
from gateway.cli.options import Json, TenantName, TokenOption, Url
from gateway.errors import GatewayError, NotFound
from gateway.settings import load
from gateway.terminal import err, out
from gateway_client.client import Client

_AT_ONCE: Final = 2
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

    async def run() -> Mapping[str, Any]:
        async with client_of(url, token) as client:
            return await (await tenant_of(client, tenant)).move(member)

    done = run_to_end(run())
    if as_json:
        out.json(done, indent=True)
    else:
        out.say(_moved(done))


def drain(member: Member, url: Url = None, token: TokenOption = None) -> None:
    """Move all tenants of a member to others that have room for them. New tenants go elsewhere."""
    from gateway.host.forming import set_drained

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
                failed |= await _all(client, dict.fromkeys(left), drained=True)
            return failed

    _report(run_to_end(run()), f"{member} is drained: it has no tenants, and gets none")


def restore(member: Member, url: Url = None, token: TokenOption = None) -> None:
    """Let a member take tenants again, and move back those that a drain moved away."""
    from gateway.host.forming import set_drained

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
            return await _all(client, back, drained=False)

    _report(run_to_end(run()), f"{member} has its tenants again")


async def _all(client: Client, wanted: Mapping[str, str | None], *, drained: bool) -> Mapping[str, str]:
    """Move these tenants, a few at a time; return the errors by tenant."""
    failed: dict[str, str] = {}
    few = asyncio.Semaphore(_AT_ONCE)

    async def one(name: str, member: str | None) -> None:
        async with few:
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


def _report(failed: Mapping[str, str], well: str) -> None:
    if failed:
        raise Failed(
            f"not moved: {_listed(sorted(failed))}; see the reasons above, then run the command again"
        )
    out.say(well)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
