"""Commands for this machine: serve, upgrade, setup, doctor, the base image, tokens, the audit log."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import typer

from gateway.auth import issuing
from gateway.cli.invocation import Json, TokenOption, Url, client_of, tenant_of
from gateway.settings import load, load_client
from gateway.terminal import err, line, out
from gateway_client.errors import Disconnected


def settings_help() -> str:
    """Return every setting with its default, by groups, as the help of `serve` prints it."""
    from gateway.settings.settings import GROUPS

    parts = ["Settings, as environment variables or in the TOML file that GATEWAY_CONFIG names:"]
    for group in GROUPS:
        parts.append(f"{group.__name__.removesuffix('Settings').upper()}: {group.__doc__}")
        for name, field in group.model_fields.items():
            default = "" if field.default is None else f" [{field.default}]"
            parts.append(f"GATEWAY_{name.upper()}{default}: {field.description}")
    return "\n\n".join(parts)


def serve(
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Replace the running gateway, as `upgrade` does."),
    ] = False,
) -> None:
    """Run the gateway until SIGTERM."""
    from gateway.server import serve as run  # only this command needs uvicorn and uvloop

    run(load(), log_level=log_level, take_over=take_over)


def upgrade(
    back: Annotated[bool, typer.Option("--back", help="Go back to the version before this one.")] = False,
    reload: Annotated[bool, typer.Option("--reload", hidden=True, help="As the unit's ExecReload=.")] = False,
) -> None:
    """Replace the running gateway with this version and the current settings, without a gap.

    Clients get answers all the time, connections resume, and commands keep running. If the new gateway
    cannot serve, the old one keeps running, and this says why.
    """
    from gateway.host.gateway_process import reload_gateway, upgrade_gateway

    if reload:
        reload_gateway(load(), err.say)
    else:
        upgrade_gateway(load(), out.say, back=back)


def broker() -> None:
    """Start file workers, end command trees and bind ports for a gateway without root, until SIGTERM.

    It listens at GATEWAY_BROKER_SOCKET, for root and the user GATEWAY_BROKER_USER.
    """
    from gateway.host.services import become_broker

    become_broker(load(), err.say)


def hold() -> None:
    """Keep a gateway's commands running while it restarts, until SIGTERM. Run it as the gateway's user."""
    from gateway.host.services import become_holder

    become_holder(load())


def setup(
    as_json: Json = False,
) -> None:
    """Prepare this host: network, firewall, storage, tenant profile. Idempotent."""
    from gateway.host.requirements import setup as run

    changes = run(load(), _silent if as_json else out.say)
    if as_json:
        out.json([{"step": c.step, "changed": c.changed, "detail": c.detail} for c in changes], indent=True)


def doctor(as_json: Json = False) -> None:
    """Check that the gateway runs and has all it needs; change nothing. Exit code 1 if not."""
    from gateway.host.requirements import doctor as run

    found = run(load())
    if as_json:
        out.json(
            [{"what": f.what, "ok": f.ok, "detail": f.detail, "hint": f.hint} for f in found], indent=True
        )
    else:
        for finding in found:
            out.say(str(finding))
    if not all(finding.ok for finding in found):
        raise typer.Exit(1)


def capacity(as_json: Json = False) -> None:
    """Show how many more tenants of each size fit on this host, and what runs out first."""
    from gateway.limits.capacity import host_memory, lines, look
    from gateway.runtime.incus import IncusRuntime

    async def run() -> None:
        settings = load()
        async with IncusRuntime(settings) as runtime:
            report = await look(runtime, settings, host_memory())
        if as_json:
            out.json(report.to_dict(), indent=True)
        else:
            for line in lines(report):
                out.say(line)

    asyncio.run(run())


def image_build(
    rebuild: Annotated[bool, typer.Option(help="Build it even if this definition was built before.")] = False,
) -> None:
    """Build the base image and import it into Incus."""
    from gateway.host.image import build_image

    build_image(load(), out.say, rebuild=rebuild)


def _silent(line: str) -> None:
    pass


# --- tokens and the audit log -------------------------------------------------------------------------------


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
        asyncio.run(_revoke(identity, expires, url, own))
        out.say(f"tokens with the id {line(identity)} are refused from now on")
        if expires is None and not re.fullmatch("[0-9a-f]{32}", identity):
            err.say("this is not an id that `incus-gateway token` gives: check that it is the token's jti")
        return
    settings = load_client()
    secret = issuing.load_secret(settings.secret, settings.state_dir)
    scopes = " ".join(scope).replace(",", " ").split()
    subject = subject or issuing.caller()
    names = asyncio.run(_names(tenant or (), url, own)) if "." in "".join(tenant or ()) else tenant or ()
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

    asyncio.run(run())
