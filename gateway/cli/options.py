"""Arguments and options that several commands share."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import Annotated, Final

import typer

PROGRAM: Final = "incus-gateway"
VARIABLE: Final = "_INCUS_GATEWAY_COMPLETE"
"""Environment variable that is set when a shell asks for completions."""

# seconds; a person waits for it after Tab
_PATIENCE: Final = 2.0

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Url = Annotated[
    str | None,
    typer.Option("--url", envvar="GATEWAY_URL", help="The gateway to ask; default: this machine's."),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="GATEWAY_TOKEN", help="A token; default: one made from this machine's secret."
    ),
]


def tenants_begun(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the tenants whose names begin with what was typed, for completion; none if that fails."""
    from gateway.cli.asking import client_of, run_to_end

    async def run() -> list[str]:
        async with (
            asyncio.timeout(_PATIENCE),
            client_of(ctx.params.get("url"), ctx.params.get("token")) as client,
        ):
            return [info.name for info in await client.tenants()]

    try:
        return [name for name in run_to_end(run()) if name.startswith(incomplete)]
    except Exception:  # a message would land in the line that is being typed
        return []


TenantName = Annotated[
    str, typer.Argument(metavar="TENANT", help="Its name or its domain", autocompletion=tenants_begun)
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class Size(StrEnum):
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


def assignment(entry: str) -> tuple[str, str]:
    """Return the name and value of a `NAME=VALUE`. Raises `typer.BadParameter`."""
    name, equals, value = entry.partition("=")
    if not equals:
        raise typer.BadParameter(f"--env takes NAME=VALUE, not {entry!r}")
    return name, value
