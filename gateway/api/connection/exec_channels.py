"""The outputs of commands on channels of one connection, each command on one channel at most."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Final

from gateway import protocol
from gateway.api.connection.peer import Peer
from gateway.execs import Attachment, Cursor, Exec, Reading
from gateway.protocol import ServerWire, StreamId
from gateway.runtime import StreamName

_AHEAD: Final = 1 << 20  # bytes after which our clients acknowledge at the latest
_STREAMS: Final[Mapping[StreamName, StreamId]] = {"stdout": StreamId.STDOUT, "stderr": StreamId.STDERR}


class ExecChannels:
    """The open channels of `wire`. A task of the peer copies the output of each."""

    def __init__(self, peer: Peer, wire: ServerWire) -> None:
        self._peer, self._wire = peer, wire
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
        unacked = self._peer.hub.settings.exec_unacked
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
            self._peer.spawn(self._forward(channel, attachment))
            if attachment.exec.spec.stdin:
                self._peer.spawn(self._tell_consumed(channel, attachment))

    async def _tell_consumed(self, channel: int, attachment: Attachment) -> None:
        """Allow the client to send more input as the command takes it."""
        while (consumed := await attachment.more_consumed()) is not None:
            told = {"exec": attachment.exec.id, "channel": channel, "consumed": consumed}
            await self._peer.tell("exec/stdin", told)

    async def _forward(self, channel: int, attachment: Attachment) -> None:
        """Copy a command's output to the socket, then send its exit after the last byte."""
        exec_ = attachment.exec
        async with asyncio.TaskGroup() as group:
            for name, cursor in attachment.cursors.items():
                group.create_task(self._copy(channel, name, attachment, cursor))
        ended = await asyncio.shield(exec_.ended)
        if channel in self._attachments:
            self.close(channel)
            await self._peer.tell("exec/exited", ended.on_wire(exec_.id))

    async def _copy(self, channel: int, name: StreamName, attachment: Attachment, cursor: Cursor) -> None:
        header, socket = protocol.frame_header(_STREAMS[name], channel), self._peer.socket
        while (parts := await cursor.next()) and channel in self._attachments:
            if cursor.lost:
                told = {"exec": attachment.exec.id, "channel": channel, "stream": name, "bytes": cursor.lost}
                cursor.lost = 0
                await self._peer.tell("exec/lost", told)
            await socket.send_output(channel, header, *parts)
            if socket.closing.done():
                return  # it may not have been sent
            cursor.taken(parts)
