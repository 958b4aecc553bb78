"""Commands for the members of a cluster."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from gateway.cli.confirming import confirm
from gateway.cli.options import Json, Yes
from gateway.settings import load
from gateway.terminal import err, out

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
            help="Remove a member that is lost for good; tenants without a standby copy are lost with it",
        ),
    ] = False,
    yes: Yes = False,
) -> None:
    """Remove another member that has no instances left."""
    from gateway.host.forming import remove as run

    if force and not yes:
        confirm(
            f"Remove {name} for good? Its tenants come back from their standby copies; those without one are "
            "forgotten. Never start it again as it is.",
            "nothing was removed",
        )
    run(load(), name, force=force)


def recover(yes: Yes = False) -> None:
    """Make this server work alone after most members were lost for good. Its tenants keep running."""
    from gateway.host.forming import recover as run

    if not yes:
        confirm(
            "Are the other members lost for good? If one is started again, it is a second cluster with the "
            "same tenants.",
            "nothing was changed",
        )
    run(load(), out.say)
