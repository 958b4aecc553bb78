"""The turns that record the changes of tool sessions, and a tenant's history of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal


class TenantTurns(ABC):
    """The part of `Tenant` that records turns and goes back to earlier ones."""

    @abstractmethod
    async def request(self, method: str, params: Mapping[str, Any] | None = None) -> Any:
        """Call a method of `gateway.v1`; see `ToolSession.request`."""

    async def begin_turn(self, title: str = "", agent: str | None = None) -> Mapping[str, Any] | None:
        """Begin a turn of this tool session; `title` is the request to the agent, `agent` its name.

        This ends the previous turn, which is returned if it changed anything.
        """
        asked = {"title": title} if agent is None else {"title": title, "agent": agent}
        found: Mapping[str, Any] | None = (await self.request("turn/begin", asked))["before"]
        return found

    async def end_turn(self) -> Mapping[str, Any] | None:
        """End this tool session's turn; return it as recorded, None if nothing changed."""
        found: Mapping[str, Any] | None = (await self.request("turn/end"))["turn"]
        return found

    async def history(self, limit: int = 50, *, before: str | None = None) -> list[Mapping[str, Any]]:
        """Return the turns of the tenant, latest first; with `before`, a turn's id, those before it."""
        asked: dict[str, Any] = {"limit": limit}
        if before is not None:
            asked["before"] = before
        return list((await self.request("history/list", asked))["turns"])

    async def turn(self, turn: str) -> Mapping[str, Any]:
        """Return a turn with the files that it `changed` and its `diff`."""
        found: Mapping[str, Any] = await self.request("history/diff", {"turn": turn})
        return found

    async def restore_turn(
        self, turn: str, to: Literal["after", "before"] = "after"
    ) -> Mapping[str, Any] | None:
        """Restore the files as they were right after a turn, or before it; return that as a new turn.

        This reverts later changes too; `undo` keeps them. None if nothing changes. Raises `Conflict` if
        something unrecorded is in the way.
        """
        asked = {"turn": turn, "to": to}
        found: Mapping[str, Any] | None = (await self.request("history/restore", asked))["turn"]
        return found

    async def undo(self, turn: str | None = None, *, force: Sequence[str] = ()) -> Mapping[str, Any]:
        """Revert exactly what a turn changed, by default the last one; later changes stay.

        Returns `turn`, the undo as a new turn, None if nothing changes, and `conflicts`, the paths where
        later changes are of the same lines. If there are any, nothing was changed; those named in `force`
        become what they were before the turn.
        """
        if turn is None:
            last = await self.history(1)
            if not last:
                return {"turn": None, "conflicts": []}
            turn = last[0]["turn"]
        asked = {"turn": turn, "force": list(force)} if force else {"turn": turn}
        found: Mapping[str, Any] = await self.request("history/undo", asked)
        return found
