"""The server's end of one connection, without IO: frames in, events out.

It decides which channels and requests are open, and what a frame means. Any bytes from a client result in an
event, never in an exception.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from typing import Final, TypeAlias

import orjson

from gateway.errors import GatewayError, InvalidParams, RateLimited
from gateway.protocol.maxima import LIGHT
from gateway.protocol.params import METHODS, CancelRequest, Params, validate
from gateway_client.wire.frames import StreamId, unpack_frame
from gateway_client.wire.messages import CANCEL_REQUEST, CloseCode, RequestId, error_reply, failure


@dataclass(frozen=True, slots=True)
class Request:
    """A call with its parameters checked. `id` is None if the client wants no answer."""

    id: RequestId | None
    method: str
    params: Params


@dataclass(frozen=True, slots=True)
class CancelPending:
    """The client cancels the pending request `id`. Returned once for each request."""

    id: RequestId


@dataclass(frozen=True, slots=True)
class Input:
    """Bytes for the standard input of the command attached as `channel`."""

    channel: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """A message to answer at once with this text."""

    reply: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """Nothing to do: a frame for an ended channel, an unknown notification, a cancel that is too late."""


@dataclass(frozen=True, slots=True)
class Close:
    """The connection must be closed, after sending `reply` if there is one."""

    code: CloseCode
    reason: str
    reply: str | None = None


_RETRY_AFTER: Final = 1  # seconds; a single answer makes room

ServerEvent: TypeAlias = Request | CancelPending | Input | Refused | Ignored | Close


class ServerWire:
    """The server's end of one connection: what was agreed, and which channels and requests are open.

    `initialize` must come first, and only once. Channel numbers only grow, so that a frame for an ended
    channel can be told from one for a channel that never existed. A request is in flight from its event until
    its answer has been sent; at most `max_requests` are at a time.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._initialized = False
        self._last_channel = 0
        self._open: set[int] = set()
        self._in_flight = 0
        self._pending: set[RequestId] = set()  # not answered yet; their ids are in use
        self._cancelled: set[RequestId] = set()  # of these

    @property
    def initialized(self) -> bool:
        return self._initialized

    def initialize(self) -> None:
        """Serve every method from now on, since `initialize` has succeeded."""
        self._initialized = True

    def open_channel(self) -> int:
        self._last_channel += 1
        self._open.add(self._last_channel)
        return self._last_channel

    def close_channel(self, channel: int) -> None:
        self._open.discard(channel)

    def cancelled(self, request_id: RequestId | None) -> bool:
        """Whether the client has cancelled this unanswered request."""
        return request_id in self._cancelled

    def settle(self, request_id: RequestId | None) -> None:
        """Note that a request's answer is about to be sent: it cannot be cancelled, and its id is free."""
        if request_id is None:
            self._in_flight -= 1  # nothing is sent
        else:
            self._pending.discard(request_id)
            self._cancelled.discard(request_id)

    def sent(self, request_id: RequestId | None) -> None:
        """Note that a settled request's answer has been sent."""
        if request_id is not None:
            self._in_flight -= 1

    def receive_binary(self, data: bytes) -> ServerEvent:
        if not self._initialized:
            return Close(CloseCode.PROTOCOL_ERROR, "initialize must come first")
        try:
            frame = unpack_frame(data)
        except InvalidParams as error:
            return Close(CloseCode.PROTOCOL_ERROR, error.message)
        if frame.stream is not StreamId.STDIN:
            return Close(CloseCode.PROTOCOL_ERROR, "a client may only send stream 0")
        if frame.channel in self._open:
            return Input(frame.channel, frame.data)
        if 0 < frame.channel <= self._last_channel:
            return Ignored()
        return Close(CloseCode.PROTOCOL_ERROR, f"unknown channel {frame.channel}")

    def receive_text(self, text: str | bytes) -> ServerEvent:
        try:
            message = orjson.loads(text)
        except ValueError:
            return self._refuse(*_unreadable(text))
        if not isinstance(message, dict):
            what = (
                "batches are not supported"
                if isinstance(message, list)
                else "a message must be a JSON object"
            )
            return self._refuse(None, -32600, what)
        request_id = message.get("id")
        if "id" in message and (isinstance(request_id, bool) or not isinstance(request_id, str | int)):
            return self._refuse(None, -32600, "id must be a string or an integer")
        if isinstance(request_id, str) and len(request_id) > 256:
            return self._refuse(None, -32600, "id is longer than 256 characters")
        if message.get("jsonrpc") != "2.0":
            return self._refuse(request_id, -32600, 'jsonrpc must be "2.0"')
        method = message.get("method")
        if not isinstance(method, str):
            return self._refuse(request_id, -32600, "method must be a string")
        params = message.get("params")
        return self._receive(request_id, method, {} if params is None else params)

    def _receive(self, request_id: RequestId | None, method: str, params: object) -> ServerEvent:
        if not self._initialized and method != "initialize":
            return self._refuse(request_id, -32600, "initialize must come first")
        try:
            if method == CANCEL_REQUEST:
                return self._cancel(validate(CancelRequest, params).id)
            model = METHODS.get(method)
            if model is None:
                if request_id is None:
                    return Ignored()  # JSON-RPC: a notification is never answered
                return Refused(error_reply(request_id, -32601, f"no method {method[:100]!r}", "not_found"))
            if method == "initialize" and self._initialized:
                return self._refuse(request_id, -32600, "initialize was already sent")
            return self._take(Request(request_id, method, validate(model, params)))
        except GatewayError as error:
            if request_id is None:
                return Ignored()
            return Refused(failure(request_id, error))

    def _take(self, request: Request) -> Request:
        if request.id in self._pending:
            raise InvalidParams(f"request {request.id} is still pending")
        if self._in_flight >= self._max_requests:
            raise RateLimited(
                "too many requests in flight", limit=self._max_requests, retry_after=_RETRY_AFTER
            )
        self._in_flight += 1
        if request.id is not None:
            self._pending.add(request.id)
        return request

    def _cancel(self, request_id: RequestId) -> CancelPending | Ignored:
        if request_id not in self._pending or request_id in self._cancelled:
            return Ignored()
        self._cancelled.add(request_id)
        return CancelPending(request_id)

    def refuse_heavy(self, text: str | bytes, error: GatewayError) -> ServerEvent:
        """Return the event for a message that `weigh` has refused; its id may be found at its beginning."""
        if not self._initialized:
            return Close(CloseCode.PROTOCOL_ERROR, error.message, failure(None, error))
        return Refused(failure(_first_id(text), error))

    def _refuse(self, request_id: RequestId | None, code: int, message: str) -> ServerEvent:
        reply = error_reply(request_id, code, message, "invalid_params")
        if not self._initialized:  # the client does not speak this protocol, so do not stay open
            return Close(CloseCode.PROTOCOL_ERROR, message, reply)
        return Refused(reply)


_ID: Final = re.compile(
    r'\s*\{(?:\s*"jsonrpc"\s*:\s*"2\.0"\s*,)?\s*"id"\s*:\s*("[^"\\\x00-\x1f]{0,256}"|\d{1,15})\s*,'
)
_ID_WITHIN: Final = 512  # characters of a message in which its id is looked for


def _first_id(text: str | bytes) -> RequestId | None:
    """Return the id at the beginning of a message, if there is one, without reading the rest."""
    begun = text[:_ID_WITHIN]
    found = _ID.match(begun if isinstance(begun, str) else begun.decode("utf-8", "replace"))
    return None if found is None else orjson.loads(found[1])


def _unreadable(text: str | bytes) -> tuple[RequestId | None, int, str]:
    """Return id, code and text of the error for a message that orjson does not accept.

    One cause is a lone surrogate, which JSON can express and UTF-8 cannot: JavaScript makes it of half an
    emoji, Python of a file name that is not UTF-8. Without the id the caller would wait forever.
    """
    if len(text) > LIGHT:
        return _first_id(text), -32700, "the message is not JSON"
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if "\\u" in text:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            message = json.loads(text)
            request_id = message.get("id") if isinstance(message, dict) else None
            whole = orjson.loads(orjson.dumps(request_id))  # refuses an id that no answer could contain
            if isinstance(whole, str | int) and not isinstance(whole, bool) and len(str(whole)) <= 256:
                return whole, -32700, "the message is not valid JSON: half of a surrogate pair, or NaN"
    return None, -32700, "the message is not JSON"
