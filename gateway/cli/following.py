"""What commands that begin a deployment share: its progress and its end."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Annotated, Any

import typer

from gateway.cli.asking import run_to_end
from gateway.cli.confirming import Failed
from gateway.cli.progress import Progress, follow
from gateway.terminal import line, out
from gateway_client.deployments import Deployment, DeploymentRecord

Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="The site's domain, or its tenant")]


async def followed(begun: Deployment, domain: str, *, as_json: bool) -> DeploymentRecord:
    """Show a deployment until it ends; return its record."""
    if as_json:
        return await follow(begun, out.json)
    with Progress(out, domain) as progress:
        record = await follow(begun, progress.told)
    if record.error is not None:  # it ends with output that may stand above already
        said = record.error.message.splitlines()
        record.error.message = "\n".join(one for one in said if line(one) not in progress.printed)
    return record


def ended(work: Coroutine[Any, Any, DeploymentRecord]) -> DeploymentRecord:
    """Return the record of a deployment that succeeded. Raises `Failed` for any other."""
    record: DeploymentRecord = run_to_end(work)
    if record.error is not None:
        where = record.error.facts.get("phase", "deploy")
        raise Failed(f"{where}: {record.error.message}\nEverything it did has been undone.")
    return record
