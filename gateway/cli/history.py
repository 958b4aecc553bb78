"""Commands for what agents changed: list a tenant's turns, and undo them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from gateway.cli.asking import client_of, run_to_end
from gateway.cli.confirming import Failed, confirm, somebody_is_there
from gateway.cli.options import Json, TenantName, TokenOption, Url, Yes
from gateway.errors import NotFound
from gateway.terminal import out
from gateway_client.tenant import Tenant

_SHORT = 8  # digits of a turn's id that are shown, and suffice to name it
_LOOKED = 200  # turns searched for a shortened id


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
            asked = client.tenant(tenant)
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
    to: Annotated[
        bool, typer.Option("--to", help="Go back to the state right after TURN, not before it")
    ] = False,
    yes: Yes = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Restore the files to what they were before a turn. The undo is a turn too, and can be undone."""
    if to and turn is None:
        raise typer.BadParameter("--to needs a TURN")

    async def run() -> None:
        async with client_of(url, token) as client:
            asked = client.tenant(tenant)
            turns = await asked.history(_LOOKED)
            if not turns:
                raise Failed(f"{tenant} has no turns yet: there is nothing to undo")
            wanted = _latest(tenant, turns) if turn is None else await _whole(asked, turn, turns)
            ids = [one["turn"] for one in turns]
            later = ids.index(wanted) if wanted in ids else 0
            if later and not yes and somebody_is_there():
                word = "turn" if later == 1 else "turns"
                question = f"That undoes {later} later {word} too. Continue?"
                confirm(question, "nothing was changed")
            done = await asked.restore_turn(wanted, "after" if to else "before")
        if done is None:
            out.say("Nothing to do: the files are already in that state.")
            return
        files = f"{done['files']} file{'' if done['files'] == 1 else 's'}"
        out.say(f"{_first(done['title'])}: {files}. To take it back: incus-gateway undo {tenant}")

    run_to_end(run())


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
