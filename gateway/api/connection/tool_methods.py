"""`tools/…`: Claude's tools, in the session of this connection."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gateway import protocol
from gateway.api.connection.family import Answer, Family, Method
from gateway.tools.running import Left


class ToolMethods(Family):
    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "tools/list": Method(self._list),
            "tools/call": Method(self._call, most=self._most, fence=self._fence),
            "tools/cancel": Method(self._cancel),
        }

    async def _list(self, params: protocol.NoParams) -> Answer:
        return Answer({"tools": self._hub.toolbox.descriptions()})

    async def _call(self, params: protocol.ToolsCall) -> Answer:
        session = self._peer.session
        assert session is not None
        token = self._peer.require(self._hub.toolbox.scope(params.name))
        try:
            result = await self._hub.toolbox.call(
                self._tenant,
                session,
                params.name,
                params.arguments,
                by=token.subject,
                call_id=params.call_id,
                linger=None if params.linger_ms is None else params.linger_ms / 1000,
            )
        except Left:  # send no answer: the socket is about to close, and clients then ask again
            await asyncio.get_running_loop().create_future()
            raise
        return Answer(result.encoded)

    def _most(self, params: protocol.ToolsCall) -> int:
        return self._hub.settings.result_max if params.name in ("Read", "Grep", "Glob") else 0

    async def _fence(self, params: protocol.ToolsCall) -> None:
        if params.call_id is not None:
            await self._hub.toolbox.fence(self._tenant, params.call_id)

    async def _cancel(self, params: protocol.ToolsCancel) -> Answer:
        token = self._peer.token
        assert token is not None
        if not any(map(token.allows, self._hub.toolbox.SCOPES)):
            self._peer.require("files:read")
        await self._hub.toolbox.fence(self._tenant, params.call_id)
        return Answer({})
