"""Commands that show one tenant, the templates, or a site's address."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from gateway.cli.asking import client_of, run_to_end, tenant_of
from gateway.cli.confirming import Failed
from gateway.cli.options import Json, TenantName, TokenOption, Url
from gateway.terminal import line, out


def info(tenant: TenantName, as_json: Json = False, url: Url = None, token: TokenOption = None) -> None:
    """Show one tenant: state, address, limits, usage, and whether its site answers."""

    async def run() -> tuple[Mapping[str, Any], Mapping[str, Any], int]:
        async with client_of(url, token) as client:
            target = await tenant_of(client, tenant)
            return await target.info(), await target.site(), len(await target.snapshots())

    found, site, kept = run_to_end(run())
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
        yield "memory", _of(usage, "memory")
        yield "disk", _of(usage, "disk")
        yield "processes", str(usage["processes"])


def _of(usage: Mapping[str, Any], what: str) -> str:
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

    found = run_to_end(run())
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

    address = run_to_end(run())
    if address is None:
        raise Failed(f"{tenant} has no domain; `incus-gateway rename {tenant} DOMAIN` gives it one")
    out.say(address)
    desktop = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if out.is_terminal and desktop and address.startswith(("http://", "https://")):
        import webbrowser

        webbrowser.open(address)
