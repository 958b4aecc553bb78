"""`exec/…`: commands of the tenant, and their outputs on channels of one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Final

from gateway import protocol
from gateway.api.connection.client_session import ClientSession
from gateway.api.connection.methods import Family, Method, MethodAnswer
from gateway.api.oneshot import exec_spec
from gateway.auth.tokens import Token
from gateway.errors import Conflict, Forbidden, NotFound
from gateway.execs import Attachment, Cursor, Exec, Reading, started_at
from gateway.protocol import ServerWire, StreamId
from gateway.runtime import StreamName

_AHEAD: Final = 1 << 20  # bytes after which our clients acknowledge at the latest
_STREAMS: Final[Mapping[StreamName, StreamId]] = {"stdout": StreamId.STDOUT, "stderr": StreamId.STDERR}


class ExecChannels:
    """The open channels of `wire`. A task of the client copies the output of each."""

    def __init__(self, client: ClientSession, wire: ServerWire) -> None:
        self._client, self._wire = client, wire
        self._attachments: dict[int, Attachment] = {}
        self._channels: dict[str, int] = {}  # by exec id

    def __iter__(self) -> Iterator[tuple[int, Attachment]]:
        """Iterate over the channels and their attachments as they are now."""
        return iter(list(self._attachments.items()))

    def of(self, exec_id: str) -> int | None:
        """Return the channel of a command, None if it has none here."""
        return self._channels.get(exec_id)

    def attachment(self, exec_id: str) -> Attachment | None:
        """Return the attachment to a command, None if it has no channel here."""
        return self._attachments.get(self._channels.get(exec_id, 0))

    async def write(self, channel: int, data: bytes) -> None:
        """Write input to the command of an open channel."""
        await self._attachments[channel].write(data)

    def open(
        self,
        exec_: Exec,
        offsets: Mapping[str, int],
        wanted: protocol.Reader,
        resume: str | None = None,
    ) -> tuple[int, Attachment]:
        """Attach to a command; the connection's earlier attachment to it ends."""
        # more than can be had again after a break is not sent ahead
        unacked = self._client.hub.settings.exec_unacked
        window = None if wanted.window is None else min(wanted.window, max(unacked, _AHEAD))
        acks = unacked > 0 and (wanted.acks or window is not None)
        reading = Reading(viewer=True, acks=acks, window=window, text=wanted.encoding == "utf-8")
        # before the old one ends, so that nothing falls between
        attachment = exec_.attach(offsets, resume=resume, reading=reading)
        old = self._channels.get(exec_.id)
        if old is not None:
            self.close(old)
        channel = self._wire.open_channel()
        self._attachments[channel] = attachment
        self._channels[exec_.id] = channel
        return channel, attachment

    def close(self, channel: int) -> None:
        """Close a channel, if it is open."""
        attachment = self._attachments.pop(channel, None)
        if attachment is not None:
            attachment.close()
            self._wire.close_channel(channel)
            if self._channels.get(attachment.exec.id) == channel:
                del self._channels[attachment.exec.id]

    def follow(self, channel: int, attachment: Attachment) -> None:
        """Begin to copy the output of a channel's command."""
        if channel in self._attachments:  # unless it was detached meanwhile
            self._client.spawn(self._forward(channel, attachment))
            if attachment.exec.spec.stdin:
                self._client.spawn(self._tell_consumed(channel, attachment))

    async def _tell_consumed(self, channel: int, attachment: Attachment) -> None:
        """Allow the client to send more input as the command takes it."""
        while (consumed := await attachment.more_consumed()) is not None:
            told = {"exec": attachment.exec.id, "channel": channel, "consumed": consumed}
            await self._client.tell("exec/stdin", told)

    async def _forward(self, channel: int, attachment: Attachment) -> None:
        """Copy a command's output to the socket, then send its exit after the last byte."""
        exec_ = attachment.exec
        async with asyncio.TaskGroup() as group:
            for name, cursor in attachment.cursors.items():
                group.create_task(self._copy(channel, name, attachment, cursor))
        ended = await asyncio.shield(exec_.ended)
        if channel in self._attachments:
            self.close(channel)
            await self._client.tell("exec/exited", ended.on_wire(exec_.id))

    async def _copy(self, channel: int, name: StreamName, attachment: Attachment, cursor: Cursor) -> None:
        header, socket = protocol.frame_header(_STREAMS[name], channel), self._client.socket
        while (parts := await cursor.next()) and channel in self._attachments:
            if cursor.lost:
                told = {"exec": attachment.exec.id, "channel": channel, "stream": name, "bytes": cursor.lost}
                cursor.lost = 0
                await self._client.tell("exec/lost", told)
            await socket.send_output(channel, header, *parts)
            if socket.closing.done():
                return  # it may not have been sent
            cursor.taken(parts)


class ExecMethods(Family):
    """Each command is attached once, as a channel of `wire`; see `ExecChannels`."""

    def __init__(self, client: ClientSession, wire: ServerWire) -> None:
        super().__init__(client)
        self._channels = ExecChannels(client, wire)

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
                attachment.hold()
            else:
                attachment.close()

    # --- methods ------------------------------------------------------------------------------------

    async def _start(self, params: protocol.ExecStart) -> MethodAnswer:
        token = self._client.require("exec")
        exec_ = await self._hub.execs.start(
            self._tenant,
            exec_spec(params),
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
        return MethodAnswer(answer, lambda: self._follow(channel, attachment))

    async def _fence(self, params: protocol.ExecStart) -> None:
        if params.exec_id is not None:
            await self._hub.execs.fence(self._tenant, params.exec_id)

    async def _attach(self, params: protocol.ExecAttach) -> MethodAnswer:
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
        return MethodAnswer(answer, lambda: self._follow(channel, attachment))

    async def _ack(self, params: protocol.ExecAck) -> MethodAnswer:
        attachment = self._channels.attachment(self._exec(params.exec).id)
        if attachment is not None:
            for name, cursor in attachment.cursors.items():
                cursor.ack(getattr(params, name))
        return MethodAnswer({})

    async def _detach(self, params: protocol.ExecRef) -> MethodAnswer:
        channel = self._channels.of(self._exec(params.exec).id)
        if channel is not None:
            self._channels.close(channel)
        return MethodAnswer({})

    async def _close_stdin(self, params: protocol.ExecRef) -> MethodAnswer:
        self._exec(params.exec).close_stdin()
        return MethodAnswer({})

    async def _resize(self, params: protocol.ExecResize) -> MethodAnswer:
        exec_ = self._exec(params.exec)
        if exec_.spec.pty is None:
            raise Conflict(f"exec {exec_.id} has no terminal", exec=exec_.id)
        await exec_.terminal.resize(params.cols, params.rows)
        return MethodAnswer({})

    async def _signal(self, params: protocol.ExecSignal) -> MethodAnswer:
        await self._exec(params.exec).process.signal(params.signal, tree=params.tree)
        return MethodAnswer({})

    async def _cancel(self, params: protocol.ExecCancel) -> MethodAnswer:
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
        return MethodAnswer({**answer, "method": killed.method})

    async def _list(self, params: protocol.NoParams) -> MethodAnswer:
        self._client.require("exec")
        return MethodAnswer(
            {"execs": [await exec_.describe() for exec_ in self._hub.execs.list(self._tenant)]}
        )

    async def _wait(self, params: protocol.ExecRef) -> MethodAnswer:
        exec_ = self._exec(params.exec)
        ended = await asyncio.shield(exec_.ended)
        return MethodAnswer(ended.on_wire(exec_.id))

    def _exec(self, exec_id: str) -> Exec:
        self._client.require("exec")
        return self._hub.execs.get(self._tenant, exec_id)

    def _follow(self, channel: int, attachment: Attachment) -> None:
        self._end_late()
        self._channels.follow(channel, attachment)
