"""Commands for tokens and the audit log."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import typer

from gateway.auth import issuing
from gateway.cli.asking import client_of, run_to_end, tenant_of
from gateway.cli.options import Json, TokenOption, Url
from gateway.settings import load, load_client
from gateway.terminal import err, line, out
from gateway_client.errors import Disconnected


def token(
    tenant: Annotated[
        list[str] | None, typer.Option(help="A tenant it covers, or its domain; repeat for more; * for all.")
    ] = None,
    scope: Annotated[
        list[str], typer.Option(help="Space-separated or repeated: " + " ".join(sorted(issuing.SCOPES)))
    ] = ["files:read files:write exec events"],  # noqa: B006 - typer copies it
    ttl: Annotated[str, typer.Option(help="How long it is valid, such as 15m, 12h, 30d")] = "12h",
    subject: Annotated[
        str | None,
        typer.Option(help="Who it is for, such as a person or an agent; shows in events. Default: your user"),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(help="A domain that its tenants may use, or *.suffix; repeat for more."),
    ] = None,
    revoke: Annotated[
        str | None, typer.Option(metavar="ID", help="Revoke a token instead: its jti, or the token itself")
    ] = None,
    url: Url = None,
    own: TokenOption = None,
) -> None:
    """Print a token. A tenant that is named need not exist yet."""
    if (tenant is None) == (revoke is None):
        raise typer.BadParameter("give --tenant, or --revoke")
    if revoke is not None:
        from gateway.auth.tokens import identified

        identity, expires = identified(revoke)
        run_to_end(_revoke(identity, expires, url, own))
        out.say(f"tokens with the id {line(identity)} are refused from now on")
        if expires is None and not re.fullmatch("[0-9a-f]{32}", identity):
            err.say("this is not an id that `incus-gateway token` gives: check that it is the token's jti")
        return
    settings = load_client()
    secret = issuing.load_secret(settings.secret, settings.state_dir)
    scopes = " ".join(scope).replace(",", " ").split()
    subject = subject or issuing.caller()
    names = run_to_end(_names(tenant or (), url, own)) if "." in "".join(tenant or ()) else tenant or ()
    out.say(issuing.issue(secret, subject, names, scopes, issuing.parse_ttl(ttl), domain or None))


async def _names(tenants: Sequence[str], url: str | None, own: str | None) -> Sequence[str]:
    async with client_of(url, own) as client:
        return [(await tenant_of(client, one)).name for one in tenants]


async def _revoke(id_: str, expires: float | None, url: str | None, own: str | None) -> None:
    try:
        async with client_of(url, own) as client:
            await client.revoke(id_, expires)
    except Disconnected:
        if url is not None:
            raise
        # no gateway runs here; the next one reads it from the store
        from gateway.auth.grants import Revocations
        from gateway.storage.store import Store

        async with Store(load().state_dir) as store:
            until = math.inf if expires is None else expires
            await (await Revocations.opened(store)).add(id_, f"{issuing.caller()} (cli)", until)


def audit(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant, by its name or domain")] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, max=1000, help="How many")] = 50,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Show who did what, latest last."""

    async def run() -> None:
        async with client_of(url, token) as client:
            about = tenant and (await tenant_of(client, tenant)).name
            entries = (await client.audit(about, limit=lines))[::-1]
        if as_json:
            out.json(entries, indent=True)
            return
        rows = []
        for entry in entries:
            at = datetime.fromtimestamp(entry["time"]).isoformat(" ", "seconds")
            facts = " ".join(f"{key}={value}" for key, value in entry["facts"].items())
            rows.append((at, entry["who"], entry["action"], entry["tenant"] or "-", facts))
        out.table(("time", "who", "did", "tenant", ""), rows)

    run_to_end(run())
