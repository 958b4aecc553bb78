"""`exec/…`: commands of the tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gateway import protocol
from gateway.api.connection.exec_channels import ExecChannels
from gateway.api.connection.family import Answer, Family, Method
from gateway.api.connection.peer import Peer
from gateway.api.exec_spec import exec_spec
from gateway.auth.tokens import Token
from gateway.errors import Conflict, Forbidden, NotFound
from gateway.execs import Attachment, Exec, started_at
from gateway.protocol import ServerWire


class ExecMethods(Family):
    """Each command is attached once, as a channel of `wire`; see `ExecChannels`."""

    def __init__(self, peer: Peer, wire: ServerWire) -> None:
        super().__init__(peer)
        self._channels = ExecChannels(peer, wire)

    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "exec/start": Method(self._start, fence=self._fence),
            "exec/attach": Method(self._attach),
            "exec/ack": Method(self._ack),
            "exec/detach": Method(self._detach),
            "exec/closeStdin": Method(self._close_stdin),
            "exec/resize": Method(self._resize),
            "exec/signal": Method(self._signal),
            "exec/cancel": Method(self._cancel),
            "exec/list": Method(self._list),
            "exec/wait": Method(self._wait),
        }

    async def write(self, channel: int, data: bytes) -> None:
        """Write input to the command of an open channel."""
        await self._channels.write(channel, data)

    def end_without(self, token: Token) -> list[str]:
        if token.allows("exec"):
            return []
        told = []
        for channel, attachment in self._channels:
            self._channels.close(channel)
            facts = {"exec": attachment.exec.id, "channel": channel, "reason": Forbidden.code}
            told.append(protocol.notification("exec/detached", facts))
        return told

    def close(self, *, hold: bool) -> None:
        for _, attachment in self._channels:
            if hold and attachment.acking:
                attachment.hold(self._hub.settings.exec_hold)
            else:
                attachment.close()

    # --- methods ------------------------------------------------------------------------------------

    async def _start(self, params: protocol.ExecStart) -> Answer:
        token = self._peer.require("exec")
        exec_ = await self._hub.execs.start(
            self._tenant,
            exec_spec(
                *(params.argv, params.command, params.cwd, params.env, params.user, params.pty),
                *(params.stdin, params.helper),
            ),
            exec_id=params.exec_id,
            once=params.exec_id is not None,
            timeout=None if params.timeout_ms is None else params.timeout_ms / 1000,
            linger=None if params.linger_ms is None else max(-1.0, params.linger_ms / 1000),
            by=token.subject,
            outlive=True,
        )
        channel, attachment = self._channels.open(exec_, {}, params)
        answer = {
            "exec": exec_.id,
            "channel": channel,
            "pid": exec_.process.pid,
            "startedAt": started_at(exec_.process),
            "attachment": attachment.id,
            "stdinWindow": exec_.stdin_window,
        }
        return Answer(answer, lambda: self._follow(channel, attachment))

    async def _fence(self, params: protocol.ExecStart) -> None:
        if params.exec_id is not None:
            await self._hub.execs.fence(self._tenant, params.exec_id)

    async def _attach(self, params: protocol.ExecAttach) -> Answer:
        exec_ = self._exec(params.exec)
        offsets = {"stdout": params.from_.stdout, "stderr": params.from_.stderr}
        channel, attachment = self._channels.open(exec_, offsets, params, params.resume)
        if attachment.lost["stdout"]:
            exec_.terminal.redraw()
        begin = {name: cursor.offset for name, cursor in attachment.cursors.items()}
        answer = {
            "channel": channel,
            "from": {"stdout": 0, "stderr": 0, **begin},
            "lost": attachment.lost,
            "state": exec_.state,
            "attachment": attachment.id,
            "stdin": attachment.taken,
            "stdinWindow": exec_.stdin_window,
        }
        return Answer(answer, lambda: self._follow(channel, attachment))

    async def _ack(self, params: protocol.ExecAck) -> Answer:
        attachment = self._channels.attachment(self._exec(params.exec).id)
        if attachment is not None:
            for name, cursor in attachment.cursors.items():
                cursor.ack(getattr(params, name))
        return Answer({})

    async def _detach(self, params: protocol.ExecRef) -> Answer:
        channel = self._channels.of(self._exec(params.exec).id)
        if channel is not None:
            self._channels.close(channel)
        return Answer({})

    async def _close_stdin(self, params: protocol.ExecRef) -> Answer:
        self._exec(params.exec).close_stdin()
        return Answer({})

    async def _resize(self, params: protocol.ExecResize) -> Answer:
        exec_ = self._exec(params.exec)
        if exec_.spec.pty is None:
            raise Conflict(f"exec {exec_.id} has no terminal", exec=exec_.id)
        await exec_.terminal.resize(params.cols, params.rows)
        return Answer({})

    async def _signal(self, params: protocol.ExecSignal) -> Answer:
        await self._exec(params.exec).process.signal(params.signal, tree=params.tree)
        return Answer({})

    async def _cancel(self, params: protocol.ExecCancel) -> Answer:
        grace = None if params.grace_ms is None else params.grace_ms / 1000
        try:
            exec_ = self._exec(params.exec)
        except NotFound:
            starting = await self._hub.execs.fence(self._tenant, params.exec)  # not started yet
            if starting is None:
                raise
            exec_ = starting
        killed = await self._hub.execs.cancel(exec_, grace)
        answer = {"killed": killed.killed, "escalated": killed.escalated, "survivors": killed.survivors}
        return Answer({**answer, "method": killed.method})

    async def _list(self, params: protocol.NoParams) -> Answer:
        self._peer.require("exec")
        return Answer({"execs": [await exec_.describe() for exec_ in self._hub.execs.list(self._tenant)]})

    async def _wait(self, params: protocol.ExecRef) -> Answer:
        exec_ = self._exec(params.exec)
        ended = await asyncio.shield(exec_.ended)
        return Answer(ended.on_wire(exec_.id))

    def _exec(self, exec_id: str) -> Exec:
        self._peer.require("exec")
        return self._hub.execs.get(self._tenant, exec_id)

    def _follow(self, channel: int, attachment: Attachment) -> None:
        self._end_late()
        self._channels.follow(channel, attachment)
