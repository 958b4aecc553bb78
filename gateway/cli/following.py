"""What commands that begin a deployment share: its tenant, its progress, its end."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Annotated, Any

import typer

from gateway.cli.asking import run_to_end
from gateway.cli.confirming import Failed
from gateway.cli.progress import Progress, follow
from gateway.terminal import out
from gateway_client.client import Client
from gateway_client.deployments import Deployment, DeploymentRecord
from gateway_client.tenant import Tenant

Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="The site's domain, or its tenant")]


async def tenant_of(client: Client, domain: str) -> Tenant:
    """Return the tenant that has a domain or a name. Raises `Failed`."""
    wanted = domain.rstrip(".").lower()
    found = await client.tenants()
    for info in (
        *(one for one in found if one.domain == wanted),
        *(one for one in found if one.name == wanted),
    ):
        return client.tenant(info.name)
    raise Failed(f"no tenant has the domain {domain}; `incus-gateway list` shows all")


async def followed(begun: Deployment, domain: str, *, as_json: bool) -> DeploymentRecord:
    """Show a deployment until it ends; return its record."""
    if as_json:
        return await follow(begun, out.json)
    with Progress(out, domain) as progress:
        return await follow(begun, progress.told)


def ended(work: Coroutine[Any, Any, DeploymentRecord]) -> DeploymentRecord:
    """Return the record of a deployment that succeeded. Raises `Failed` for any other."""
    record: DeploymentRecord = run_to_end(work)
    if record.error is not None:
        where = record.error.facts.get("phase", "deploy")
        raise Failed(f"{where}: {record.error.message}\nEverything it did has been undone.")
    return record
