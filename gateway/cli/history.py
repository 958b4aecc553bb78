"""Commands for what agents changed: list a tenant's turns, and undo them."""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from gateway.cli.asking import client_of, run_to_end, tenant_of
from gateway.cli.confirming import Failed, confirm, somebody_is_there
from gateway.cli.options import Json, TenantName, TokenOption, Url, Yes
from gateway.errors import NotFound
from gateway.terminal import out
from gateway_client.tenant import Tenant

_SHORT = 8  # digits of a turn's id that are shown, and suffice to name it
_LOOKED = 200  # turns searched for a shortened id


class Side(StrEnum):
    BEFORE = "before"
    AFTER = "after"


def history(
    tenant: TenantName,
    turn: Annotated[str | None, typer.Argument(metavar="TURN", help="Show what this turn changed")] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, max=200, help="How many turns")] = 20,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """List what agents changed, turn by turn, latest first; or show one turn as a patch."""

    async def run() -> None:
        async with client_of(url, token) as client:
            asked = await tenant_of(client, tenant)
            if turn is None:
                turns = await asked.history(lines)
                if as_json:
                    out.json(turns, indent=True)
                else:
                    _show_list(tenant, turns)
                return
            shown = await asked.turn(await _whole(asked, turn))
        if as_json:
            out.json(shown, indent=True)
            return
        out.say(f"{shown['turn']}  {shown['agent']}  {_when(shown['at'])}")
        out.say(shown["title"])
        for path in shown["leftOut"]:
            out.say(f"left out: {path}")
        out.say("")
        out.say(shown["diff"].removesuffix("\n"))
        if shown["truncated"]:
            out.say("… the rest of the patch is too long to show")

    run_to_end(run())


def undo(
    tenant: TenantName,
    turn: Annotated[
        str | None, typer.Argument(metavar="TURN", help="The turn; default: an agent's latest")
    ] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            "--force", metavar="PATH", help="A path in conflict that becomes what it was before TURN"
        ),
    ] = None,
    to: Annotated[
        Side | None,
        typer.Option("--to", help="Instead, make all files what they were before TURN, or right after it"),
    ] = None,
    yes: Yes = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Take back exactly what a turn changed; later changes stay. The undo is a turn too, and can be undone.

    Where later changes are of the same lines, nothing is changed, and the paths are listed.
    """
    if to is not None and (turn is None or force):
        raise typer.BadParameter("--to needs a TURN, and has no --force")

    async def run() -> None:
        async with client_of(url, token) as client:
            asked = await tenant_of(client, tenant)
            turns = await asked.history(_LOOKED)
            if not turns:
                raise Failed(f"{tenant} has no turns yet: there is nothing to undo")
            wanted = _latest(tenant, turns) if turn is None else await _whole(asked, turn, turns)
            if to is None:
                found = await asked.undo(wanted, force=force or ())
                done, conflicts = found["turn"], found["conflicts"]
            else:
                _confirm_later(wanted, turns, yes=yes)
                done, conflicts = await asked.restore_turn(wanted, to.value), ()
        if conflicts:
            for path in conflicts:
                out.say(path)
            again = " ".join(f"--force {shlex.quote(path)}" for path in [*(force or ()), *conflicts][:4])
            raise Failed(
                "nothing was changed: what this turn changed there was changed again since. To have a file "
                "as it was before the turn (the undo can be undone): "
                f"incus-gateway undo {tenant} {wanted[:_SHORT]} {again}"
            )
        if done is None:
            out.say("Nothing to do: the files are already in that state.")
            return
        files = f"{done['files']} file{'' if done['files'] == 1 else 's'}"
        out.say(f"{_first(done['title'])}: {files}. To take it back: incus-gateway undo {tenant}")

    run_to_end(run())


def _confirm_later(turn: str, turns: Sequence[Mapping[str, Any]], *, yes: bool) -> None:
    """Have whoever goes back past later turns confirm it. Raises `Failed`."""
    ids = [one["turn"] for one in turns]
    later = ids.index(turn) if turn in ids else 0
    if later and not yes and somebody_is_there():
        word = "turn" if later == 1 else "turns"
        confirm(f"That takes back {later} later {word} too. Continue?", "nothing was changed")


def _latest(tenant: str, turns: Sequence[Mapping[str, Any]]) -> str:
    """Return the turn that is undone by default: since the last deployment, an agent's latest if any.

    Raises `Failed` if there is none: files are not taken back to before their site was deployed.
    """
    since = [*itertools.takewhile(lambda one: one["kind"] not in ("deployed", "first"), turns)]
    if not since:
        began = "it was deployed" if turns[0]["kind"] == "deployed" else "its history began"
        raise Failed(
            f"nothing has changed in {tenant} since {began}; to undo an earlier turn, name it "
            f"(incus-gateway history {tenant} lists them)"
        )
    return str(next((one for one in since if one["kind"] != "outside"), since[0])["turn"])


async def _whole(tenant: Tenant, turn: str, turns: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Return the id of the turn that begins with these digits. Raises `NotFound`."""
    if len(turn) == 40:
        return turn
    known = turns if turns is not None else await tenant.history(_LOOKED)
    found = [str(one["turn"]) for one in known if str(one["turn"]).startswith(turn)]
    if len(turn) < 4 or len(found) != 1:
        raise NotFound(f"no turn {turn!r}; `incus-gateway history {tenant.name}` lists them")
    return found[0]


def _show_list(tenant: str, turns: Sequence[Mapping[str, Any]]) -> None:
    if not turns:
        out.say(f"{tenant} has no turns yet.")
        return
    rows = [
        (
            *(one["turn"][:_SHORT], _when(one["at"]), one["agent"], str(one["files"])),
            *(f"+{one['added']} -{one['removed']}", _first(one["title"])),
        )
        for one in turns
    ]
    out.table(("turn", "when", "agent", "files", "lines", "what"), rows)


def _when(at: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _first(title: str) -> str:
    line = title.partition("\n")[0]
    return line if len(line) <= 60 else line[:59] + "…"
