"""`initialize`, `ping` and `session/…`: the client's token and its renewal."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from gateway import __version__, protocol
from gateway.api.connection.family import Answer, Family, Method
from gateway.api.connection.peer import Peer
from gateway.auth.tokens import Token
from gateway.errors import Forbidden, NotFound


class SessionMethods(Family):
    """`opening` are the families that keep things open and need a scope for that."""

    def __init__(self, peer: Peer, wire: protocol.ServerWire, opening: Sequence[Family]) -> None:
        super().__init__(peer)
        self._wire = wire
        self._opening = opening
        self._using = contextlib.ExitStack()  # keeps the tenant awake
        self._expecting = contextlib.ExitStack()  # keeps warm shells for it

    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "initialize": Method(self._initialize, decisive=True),
            "ping": Method(self._ping),
            "session/end": Method(self._end),
            "session/renew": Method(self._renew),
        }

    def close(self, *, hold: bool) -> None:
        self._expecting.close()
        self._using.close()

    async def _initialize(self, params: protocol.Initialize) -> Answer:
        hub, peer, before = self._hub, self._peer, self._peer.token
        token = hub.verify(params.token) if params.token is not None or before is None else before
        peer.go_by(token)  # it may end during a wait below
        if not token.covers(self._tenant):
            raise NotFound(f"no tenant {self._tenant}")
        peer.become(token)  # before the waits too: no stranger takes its place
        if before is None:  # else the route has looked, before it accepted the socket
            try:
                await hub.runtime.tenants.get(self._tenant)
            except NotFound:
                hub.elsewhere(self._tenant)
                raise
        self._using.enter_context(hub.idle.using(self._tenant))
        await hub.idle.awake(self._tenant)
        peer.session = hub.toolbox.sessions.open(
            self._tenant, params.session, params.read_before_write, lasting=True
        )
        self._expect_execs(token)
        self._wire.initialize()
        settings = hub.settings
        return Answer(
            {
                "server": {"name": "incus-gateway", "version": __version__},
                "protocol": protocol.VERSION,
                "tenant": self._tenant,
                "workspace": settings.workspace,
                "user": settings.workspace_user,
                "scopes": sorted(token.scopes),
                "expires": token.expires,
                **({} if hub.home is None else {"home": hub.home}),
                "limits": {
                    "maxFrame": settings.max_frame,
                    "maxRequests": settings.max_requests,
                    "maxExecs": settings.max_execs,
                    "execTail": settings.exec_tail,
                    "maxArgument": settings.max_argument,
                },
            }
        )

    def _expect_execs(self, token: Token) -> None:
        self._expecting.close()
        if token.allows("exec"):
            self._expecting.enter_context(self._hub.runtime.commands.expect(self._tenant))

    async def _ping(self, params: protocol.NoParams) -> Answer:
        return Answer({})

    async def _end(self, params: protocol.NoParams) -> Answer:
        assert self._peer.session is not None
        await self._hub.toolbox.sessions.end(self._peer.session)
        return Answer({})

    async def _renew(self, params: protocol.SessionRenew) -> Answer:
        """Continue with another token of the same subject; end what that one does not allow."""
        peer, before = self._peer, self._peer.token
        assert before is not None
        token = self._hub.verify(params.token)
        if token.subject != before.subject:
            raise Forbidden("this token belongs to another subject; open a separate websocket with it")
        if not token.covers(self._tenant):
            raise Forbidden(
                "this token does not cover the tenant of this websocket; renew with one that does"
            )
        peer.token = token
        peer.go_by(token)
        if before.allows("exec") != token.allows("exec"):
            self._expect_execs(token)
        # at once; the answer is sent first all the same
        told = [text for family in self._opening for text in family.end_without(token)]
        return Answer(
            {"expires": token.expires, "scopes": sorted(token.scopes)}, lambda: peer.tell_soon(told)
        )
