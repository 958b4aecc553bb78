"""Commands for a deployed site: its deployments, going back to one, its environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer

from gateway.cli.asking import client_of, run_to_end, tenant_of
from gateway.cli.confirming import somebody_is_there
from gateway.cli.following import Domain, ended, followed
from gateway.cli.options import Json, TokenOption, Url
from gateway.terminal import err, line, out
from gateway_client.deployments import DeploymentRecord


class Action(StrEnum):
    LIST = "list"
    SET = "set"
    UNSET = "unset"


def deployments(domain: Domain, as_json: Json = False, url: Url = None, token: TokenOption = None) -> None:
    """List a site's deployments: which one is live, and which can be rolled back to."""

    async def run() -> None:
        async with client_of(url, token) as client:
            history = await (await tenant_of(client, domain)).deployments()
        if as_json:
            out.json(history.all, indent=True)
            return
        known = {record.id for record in history.deployments}
        rows: list[Sequence[str]] = [
            (
                *(record.id, _when(record.all["created"]), _what(record), _state(record)),
                "live" if record.id == history.live else "kept" if record.id in history.kept else "",
            )
            for record in history.deployments
        ]
        # those whose record is gone, or which were made under another name
        rows += [(identity, "", "", "", "kept") for identity in history.kept if identity not in known]
        out.table(("id", "created", "what", "state", ""), rows)

    run_to_end(run())


def rollback(
    domain: Domain,
    identity: Annotated[
        str | None,
        typer.Argument(
            metavar="ID", help="As listed by `deployments`; default: the one that was live before"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Go back to an earlier deployment; the one that is live now is kept. Ctrl-C undoes it."""

    async def run() -> DeploymentRecord:
        async with client_of(url, token) as client:
            begun = await (await tenant_of(client, domain)).rollback(identity)
            return await followed(begun, domain, as_json=as_json)

    record = ended(run())
    if not as_json:
        out.say(f"{record.url} is {record.all['rollback']} again, after {(record.ms or 0) / 1000:.2f} s")


def env(
    domain: Domain,
    action: Annotated[Action, typer.Argument(help="What to do")] = Action.LIST,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE … | NAME …]",
            help="Variables to set or unset; without any, `set` reads .env lines from standard input",
        ),
    ] = None,
    values: Annotated[bool, typer.Option("--values", help="List the values too.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """List, set or unset a site's variables. A change restarts the site without failing a request."""
    given = words or []
    if action is Action.LIST:
        if given:
            raise typer.BadParameter("list takes no names")
        run_to_end(_list(domain, values=values, as_json=as_json, url=url, token=token))
        return
    changes: Mapping[str, str | None]
    if action is Action.SET:
        changes = dict(_assignment(entry) for entry in given or _lines())
    else:
        changes = dict.fromkeys(given)
    if not changes:
        raise typer.BadParameter(f"{action} takes at least one variable")

    async def run() -> DeploymentRecord:
        async with client_of(url, token) as client:
            begun = await (await tenant_of(client, domain)).change_environment(changes)
            return await followed(begun, domain, as_json=as_json)

    record = ended(run())
    if not as_json:
        done = "has" if action is Action.SET else "has no more"
        names = ", ".join(sorted(changes))
        out.say(f"{record.url} {done} {line(names)}, after {(record.ms or 0) / 1000:.2f} s")


async def _list(domain: str, *, values: bool, as_json: bool, url: str | None, token: str | None) -> None:
    async with client_of(url, token) as client:
        tenant = await tenant_of(client, domain)
        found: Mapping[str, str | None]
        if values:
            found = await tenant.environment()
        else:
            found = dict.fromkeys(await tenant.variables())
    if as_json:
        out.json(found if values else list(found), indent=True)
        return
    if not found:
        err.say(f"{domain} has no variables; `incus-gateway env {domain} set NAME=VALUE` gives it one")
    for name, value in sorted(found.items()):
        out.say(name if value is None else f"{name}={line(value)}")


def _lines() -> list[str]:
    """Return the assignments on standard input, since a command line shows in the list of processes."""
    if somebody_is_there():
        raise typer.BadParameter(
            "set takes NAME=VALUE arguments, or such lines on standard input: env … set <.env"
        )
    found = (entry.strip() for entry in sys.stdin.read().splitlines())
    return [entry.removeprefix("export ") for entry in found if entry and not entry.startswith("#")]


def _assignment(entry: str) -> tuple[str, str]:
    name, equals, value = entry.partition("=")
    if not equals:
        raise typer.BadParameter(f"set takes NAME=VALUE, not {entry!r}")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return name.strip(), value[1:-1] if quoted else value


def _what(record: DeploymentRecord) -> str:
    said = record.all
    if said["rollback"]:
        return f"rollback to {said['rollback']}"
    if said["env"]:
        return line(f"env {', '.join(said['env'])}")
    return str(said["template"])


def _state(record: DeploymentRecord) -> str:
    """Return a deployment's state in a word; one that was undone says why."""
    if record.error is None:
        return record.state
    return "cancelled" if record.error.code == "cancelled" else "failed"


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
