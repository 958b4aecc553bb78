"""`turn/…` and `history/…`: the turns of this connection's session, and the tenant's history."""

from __future__ import annotations

from collections.abc import Mapping

from gateway import protocol
from gateway.api.connection.family import Answer, Family, Method


class HistoryMethods(Family):
    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "turn/begin": Method(self._begin),
            "turn/end": Method(self._end),
            "history/list": Method(self._list),
            "history/diff": Method(self._diff, most=self._most),
            "history/restore": Method(self._restore),
            "history/undo": Method(self._undo),
        }

    async def _begin(self, params: protocol.TurnBegin) -> Answer:
        token, session = self._peer.require("files:write"), self._peer.session
        assert session is not None
        before = await self._hub.history.begin(
            self._tenant, session, params.title, params.agent, token.subject
        )
        return Answer({"before": None if before is None else before.on_wire()})

    async def _end(self, params: protocol.NoParams) -> Answer:
        token, session = self._peer.require("files:write"), self._peer.session
        assert session is not None
        turn = await self._hub.history.end(self._tenant, session, token.subject)
        return Answer({"turn": None if turn is None else turn.on_wire()})

    async def _list(self, params: protocol.HistoryList) -> Answer:
        self._peer.require("files:read")
        return Answer(await self._hub.history.turns(self._tenant, params.limit, params.before))

    async def _diff(self, params: protocol.HistoryTurn) -> Answer:
        self._peer.require("files:read")
        return Answer(await self._hub.history.changes(self._tenant, params.turn))

    def _most(self, params: protocol.HistoryTurn) -> int:
        return self._hub.settings.result_max

    async def _restore(self, params: protocol.HistoryRestore) -> Answer:
        token = self._peer.require("files:write")
        turn = await self._hub.history.restore(self._tenant, params.turn, params.to, token.subject)
        return Answer({"turn": None if turn is None else turn.on_wire()})

    async def _undo(self, params: protocol.HistoryUndo) -> Answer:
        token = self._peer.require("files:write")
        return Answer(await self._hub.history.undo(self._tenant, params.turn, params.force, token.subject))
