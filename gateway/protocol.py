"""Knows the wire of `gateway.v1`, both ends of it, and never waits.

Text frames are JSON-RPC 2.0 objects without batches; binary frames carry the bytes of commands. The
server's connection feeds frames to a `ServerWire` and gets events; replies are plain functions that
return the text to send. Nothing here does IO, so every case is a test by values, and whatever bytes a
client sends end in an event, never in an exception.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from signal import Signals
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from gateway.errors import GatewayError, InvalidParams, TooLarge

SUBPROTOCOL: Final = "gateway.v1"
VERSION: Final = 1

RequestId: TypeAlias = str | int


class StreamId(IntEnum):
    """First byte of a binary frame. A terminal's output is STDOUT."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2


class CloseCode(IntEnum):
    FRAME_TOO_LARGE = 1009
    DRAINING = 1012
    TRY_LATER = 1013
    PROTOCOL_ERROR = 4400
    UNAUTHORIZED = 4401
    FORBIDDEN = 4403
    UNKNOWN_TENANT = 4404
    TOO_MANY = 4429


# --- binary frames -----------------------------------------------------------------------------------

_HEADER = struct.Struct("!BI")
HEADER_SIZE: Final = _HEADER.size


@dataclass(frozen=True, slots=True)
class Frame:
    """One binary frame: `data` of `stream` on `channel`."""

    stream: StreamId
    channel: int
    data: bytes


def frame_header(stream: int, channel: int) -> bytes:
    """Return what comes before a frame's bytes: u8 stream, u32 channel big-endian."""
    return _HEADER.pack(stream, channel)


def pack_frame(stream: int, channel: int, data: bytes) -> bytes:
    """Return a whole frame."""
    return frame_header(stream, channel) + data


def unpack_frame(frame: bytes) -> Frame:
    """Return the parts of a frame. Raises `InvalidParams` where it is none."""
    if len(frame) < HEADER_SIZE:
        raise InvalidParams(f"a binary frame has at least {HEADER_SIZE} bytes")
    stream, channel = _HEADER.unpack_from(frame)
    try:
        return Frame(StreamId(stream), channel, frame[HEADER_SIZE:])
    except ValueError:
        raise InvalidParams(f"unknown stream {stream}") from None


# --- parameters of the methods ------------------------------------------------------------------------


class Params(BaseModel):
    """Base of all parameters: camelCase on the wire, no coercion, unknown names refused."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", strict=True, frozen=True)


P = TypeVar("P", bound=BaseModel)


class NoParams(Params):
    pass


class ClientInfo(Params):
    # other facts that a client tells of itself are its own business
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    name: Annotated[str, Field(max_length=200)] = "unknown"
    version: Annotated[str, Field(max_length=200)] = ""


_Token = Annotated[str, Field(max_length=16384)]


class Initialize(Params):
    client: ClientInfo = ClientInfo()
    token: _Token | None = None
    session: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    read_before_write: bool = False


class SessionRenew(Params):
    token: _Token


MAX_EXEC_ID: Final = 128
NUMBER: Final = re.compile(r"[0-9]{1,18}")  # in a header or query: one that SQLite and JSON can hold
CallId: TypeAlias = Annotated[str, Field(min_length=1, max_length=200)]


class ToolsCall(Params):
    name: Annotated[str, Field(max_length=200)]
    arguments: dict[str, Any] = Field(default_factory=dict)
    call_id: CallId | None = None
    linger_ms: Annotated[int, Field(ge=0)] | None = None


class ToolsCancel(Params):
    call_id: CallId


class PtySize(Params):
    cols: Annotated[int, Field(ge=1, le=65535)] = 80
    rows: Annotated[int, Field(ge=1, le=65535)] = 24


_ExecId = Annotated[str, Field(min_length=1, max_length=MAX_EXEC_ID, pattern=r"^[A-Za-z0-9._:-]+$")]


Encoding = Literal["binary", "utf-8"]


class Reader(Params):
    """How who attaches wants the output. `window` says that it acknowledges, and how far it may be behind."""

    acks: bool = False
    window: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    encoding: Encoding = "binary"


class ExecStart(Reader):
    """`argv` runs a program, `command` a line by bash: one of the two."""

    argv: Annotated[list[str], Field(min_length=1, max_length=65536)] | None = None
    command: Annotated[str, Field(min_length=1)] | None = None
    cwd: str | None = None
    env: dict[str, str] = Field(default_factory=dict)
    user: str | int | None = None
    pty: PtySize | None = None
    stdin: bool = False
    timeout_ms: Annotated[int, Field(gt=0, le=7 * 86_400_000)] | None = None
    linger_ms: Annotated[int, Field(ge=-1, le=7 * 86_400_000)] | None = None
    exec_id: _ExecId | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> ExecStart:
        if (self.argv is None) == (self.command is None):
            raise ValueError("give either argv or command")
        return self


class Offsets(Params):
    stdout: Annotated[int, Field(ge=0)] = 0
    stderr: Annotated[int, Field(ge=0)] = 0


class ExecAttach(Reader):
    exec: str
    from_: Offsets = Field(default_factory=Offsets, alias="from")
    resume: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class ExecAck(Offsets):
    exec: str


class ExecRef(Params):
    exec: str


class ExecResize(ExecRef):
    cols: Annotated[int, Field(ge=1, le=65535)]
    rows: Annotated[int, Field(ge=1, le=65535)]


def _signal_number(named: object) -> int:
    """Return the number of `INT`, `SIGINT` or 2."""
    if isinstance(named, str) and (name := "SIG" + named.upper().removeprefix("SIG")) in Signals.__members__:
        return Signals[name].value
    if isinstance(named, int) and not isinstance(named, bool) and 1 <= named <= 64:
        return named
    raise ValueError("there is no such signal; name one, such as INT, or give its number")


class ExecSignal(ExecRef):
    signal: Annotated[int, PlainValidator(_signal_number)]


class ExecCancel(ExecRef):
    grace_ms: Annotated[int, Field(ge=0, le=60_000)] | None = None


class EventsSubscribe(Params):
    types: Annotated[list[str], Field(max_length=64)] | None = None
    last_event_id: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None


class EventsUnsubscribe(Params):
    subscription: int


_Path = Annotated[str, Field(min_length=1, max_length=4096)]
_Name = Annotated[str, Field(min_length=1, max_length=255)]
_Etag = Annotated[str, Field(min_length=1, max_length=200)]


class FilesPath(Params):
    path: _Path


class FilesList(Params):
    path: _Path = "."
    depth: Annotated[int, Field(ge=1, le=64)] = 1


class FilesWrite(Params):
    """`text` is written as UTF-8, `data` is base64: one of the two."""

    path: _Path
    text: str | None = None
    data: str | None = None
    if_match: _Etag | None = None
    if_none_match: _Etag | None = None
    create_dirs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> FilesWrite:
        if (self.text is None) == (self.data is None):
            raise ValueError("give either text or data")
        return self


class FilesMove(Params):
    from_: _Path = Field(alias="from")
    to: _Path
    overwrite: bool = False
    create_dirs: bool = False


class FilesRemove(Params):
    path: _Path
    recursive: bool = False
    if_match: _Etag | None = None


class FilesWatch(Params):
    """`ignore` are names, at any depth; None stands for the gateway's own list."""

    paths: Annotated[list[_Path], Field(min_length=1, max_length=64)]
    ignore: Annotated[list[_Name], Field(max_length=64)] | None = None


class FilesUnwatch(Params):
    watch: int


class FilesMkdir(Params):
    path: _Path
    create_dirs: bool = True


class CancelRequest(Params):
    id: str | int


METHODS: Final[Mapping[str, type[Params]]] = {
    "initialize": Initialize,
    "ping": NoParams,
    "tools/list": NoParams,
    "tools/call": ToolsCall,
    "tools/cancel": ToolsCancel,
    "session/end": NoParams,
    "session/renew": SessionRenew,
    "exec/start": ExecStart,
    "exec/attach": ExecAttach,
    "exec/ack": ExecAck,
    "exec/detach": ExecRef,
    "exec/closeStdin": ExecRef,
    "exec/resize": ExecResize,
    "exec/signal": ExecSignal,
    "exec/cancel": ExecCancel,
    "exec/list": NoParams,
    "exec/wait": ExecRef,
    "files/stat": FilesPath,
    "files/list": FilesList,
    "files/read": FilesPath,
    "files/write": FilesWrite,
    "files/move": FilesMove,
    "files/remove": FilesRemove,
    "files/mkdir": FilesMkdir,
    "files/watch": FilesWatch,
    "files/unwatch": FilesUnwatch,
    "events/subscribe": EventsSubscribe,
    "events/unsubscribe": EventsUnsubscribe,
}
CANCEL_REQUEST: Final = "$/cancelRequest"


def validate(model: type[P], params: object) -> P:
    """Return `params` as `model`. Raises `InvalidParams` that names the first wrong field."""
    try:
        return model.model_validate(params)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # in a union pydantic names the type that it tried last
        where = ".".join(str(part) for part in first["loc"] if part not in ("str", "int"))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "model_type":
            message = "this is an object, with names and values" if where else "params is an object"
        raise InvalidParams(f"{where}: {message}" if where else message, field=where) from None


# --- what a server receives ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """A call with its parameters checked. `id` is None where the client wants no answer."""

    id: RequestId | None
    method: str
    params: Params


@dataclass(frozen=True, slots=True)
class CancelPending:
    """The client wants its pending request `id` ended."""

    id: RequestId


@dataclass(frozen=True, slots=True)
class Input:
    """Bytes for the standard input of the command attached as `channel`."""

    channel: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """A message that is answered at once with this text."""

    reply: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """Nothing to do: a frame for an ended channel, an unknown notification."""


@dataclass(frozen=True, slots=True)
class Close:
    """The connection cannot go on; `reply`, if any, is sent before."""

    code: CloseCode
    reason: str
    reply: str | None = None


ServerEvent: TypeAlias = Request | CancelPending | Input | Refused | Ignored | Close


class ServerWire:
    """The server's end of one connection: what was agreed, which channels are open.

    `initialize` comes first and once. Channels are numbers that only grow, so that a frame for one that
    ended can be told from one that never was.
    """

    def __init__(self) -> None:
        self.initialized = False
        self._last_channel = 0
        self._open: set[int] = set()

    def open_channel(self) -> int:
        self._last_channel += 1
        self._open.add(self._last_channel)
        return self._last_channel

    def close_channel(self, channel: int) -> None:
        self._open.discard(channel)

    def receive_binary(self, data: bytes) -> ServerEvent:
        if not self.initialized:
            return Close(CloseCode.PROTOCOL_ERROR, "initialize comes first")
        try:
            frame = unpack_frame(data)
        except InvalidParams as error:
            return Close(CloseCode.PROTOCOL_ERROR, error.message)
        if frame.stream is not StreamId.STDIN:
            return Close(CloseCode.PROTOCOL_ERROR, "a client sends stream 0 only")
        if frame.channel in self._open:
            return Input(frame.channel, frame.data)
        if 0 < frame.channel <= self._last_channel:
            return Ignored()
        return Close(CloseCode.PROTOCOL_ERROR, f"unknown channel {frame.channel}")

    def receive_text(self, text: str) -> ServerEvent:
        try:
            message = orjson.loads(text)
        except ValueError:
            return self._refuse(*_unreadable(text))
        if not isinstance(message, dict):
            what = "batches are not served" if isinstance(message, list) else "a message is a JSON object"
            return self._refuse(None, -32600, what)
        request_id = message.get("id")
        if "id" in message and (isinstance(request_id, bool) or not isinstance(request_id, str | int)):
            return self._refuse(None, -32600, "id is a string or an integer")
        if isinstance(request_id, str) and len(request_id) > 256:
            return self._refuse(None, -32600, "id is longer than 256 characters")
        if message.get("jsonrpc") != "2.0":
            return self._refuse(request_id, -32600, 'jsonrpc is "2.0"')
        method = message.get("method")
        if not isinstance(method, str):
            return self._refuse(request_id, -32600, "method is a string")
        params = message.get("params")
        return self._receive(request_id, method, {} if params is None else params)

    def _receive(self, request_id: RequestId | None, method: str, params: object) -> ServerEvent:
        if not self.initialized and method != "initialize":
            return self._refuse(request_id, -32600, "initialize comes first")
        try:
            if method == CANCEL_REQUEST:
                return CancelPending(validate(CancelRequest, params).id)
            model = METHODS.get(method)
            if model is None:
                if request_id is None:
                    return Ignored()  # JSON-RPC: a notification is never answered
                return Refused(error_reply(request_id, -32601, f"no method {method[:100]!r}", "not_found"))
            if method == "initialize" and self.initialized:
                return self._refuse(request_id, -32600, "initialize was said before")
            return Request(request_id, method, validate(model, params))
        except InvalidParams as error:
            if request_id is None:
                return Ignored()
            return Refused(failure(request_id, error))

    def refuse_heavy(self, text: str, error: GatewayError) -> ServerEvent:
        """Return what becomes of a message that `weigh` does not let pass; its beginning may tell its id."""
        if not self.initialized:
            return Close(CloseCode.PROTOCOL_ERROR, error.message, failure(None, error))
        return Refused(failure(_first_id(text), error))

    def _refuse(self, request_id: RequestId | None, code: int, message: str) -> ServerEvent:
        reply = error_reply(request_id, code, message, "invalid_params")
        if not self.initialized:  # nobody speaks our language at the other end: do not stay open for it
            return Close(CloseCode.PROTOCOL_ERROR, message, reply)
        return Refused(reply)


_ID: Final = re.compile(
    r'\s*\{(?:\s*"jsonrpc"\s*:\s*"2\.0"\s*,)?\s*"id"\s*:\s*("[^"\\\x00-\x1f]{0,256}"|\d{1,15})\s*,'
)
_ID_WITHIN: Final = 512  # characters of a message


def _first_id(text: str) -> RequestId | None:
    """Return the id that a message begins with, where it does, without looking at the rest."""
    found = _ID.match(text, 0, _ID_WITHIN)
    return None if found is None else orjson.loads(found[1])


def _unreadable(text: str) -> tuple[RequestId | None, int, str]:
    """Return the id, code and words for a message that orjson does not take.

    Half a surrogate pair, which JSON can write and no UTF-8 can hold, is what JavaScript makes of half an
    emoji, and Python of a file's name that is not UTF-8. Without its id the caller would wait for ever.
    """
    if len(text) > LIGHT:
        return _first_id(text), -32700, "the message is not JSON"
    if "\\u" in text:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            message = json.loads(text)
            request_id = message.get("id") if isinstance(message, dict) else None
            whole = orjson.loads(orjson.dumps(request_id))  # not an id that no answer could have
            if isinstance(whole, str | int) and not isinstance(whole, bool) and len(str(whole)) <= 256:
                return whole, -32700, "the message is not JSON that is text: half of a surrogate pair, or NaN"
    return None, -32700, "the message is not JSON"


VALUES_MAX: Final = 200_000  # values and names in one message; the largest argv has 65 536
LIGHT: Final = 256 << 10  # characters of a message that cannot have so many that it matters
_SLICE: Final = 128 << 10
_STRUCTURE: Final = (",", ":", "[", "{")


def weigh(text: str | bytes) -> None:
    """Raise `TooLarge` for JSON of more values than a message needs, before they are made.

    16 MiB of `{},` take a second and half a gigabyte to parse, and nothing else runs meanwhile. This takes as
    long as it reads, but a millisecond at a time: it is for a thread. What is no JSON passes.
    """
    values, inside, escaped = 0, False, False
    for start in range(0, len(text), _SLICE):
        part = text[start + escaped : start + _SLICE]
        piece = part if isinstance(part, str) else part.decode("latin-1")
        escaped = (len(piece) - len(piece.rstrip("\\"))) % 2 == 1
        if escaped:
            piece = piece[:-1]
        if "\\" in piece:
            piece = piece.replace("\\\\", "").replace('\\"', "")
        parts = piece.split('"')
        outside = " ".join(parts[inside::2])
        inside ^= len(parts) % 2 == 0
        values += sum(map(outside.count, _STRUCTURE))
        if values > VALUES_MAX:
            raise TooLarge(f"the message has over {VALUES_MAX} values; send fewer", limit=VALUES_MAX)


def switch(given: Mapping[str, str], name: str) -> bool:
    """Tell whether a header, or a member of the query, turns something on; off where it is not there.

    Raises `InvalidParams` for a word that is neither: who asks for a rule must not go without it unawares.
    """
    match given.get(name, "").strip().lower():
        case "1" | "true":
            return True
        case "" | "0" | "false":
            return False
        case _:
            raise InvalidParams(f"{name} is 1 or 0", field=name)


# --- what a server sends ------------------------------------------------------------------------------


def result(request_id: RequestId, value: Mapping[str, Any] | bytes) -> str:
    """Return the answer to a request. `value` as bytes is JSON already and goes in as it is."""
    body = orjson.Fragment(value) if isinstance(value, bytes) else value
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "result": body}).decode()


def failure(request_id: RequestId | None, error: GatewayError) -> str:
    """Return the error answer for `error`, with its code and facts under `data`."""
    return error_reply(request_id, error.rpc_code, error.message, error.code, error.facts)


def error_reply(
    request_id: RequestId | None,
    number: int,
    message: str,
    code: str,
    facts: Mapping[str, Any] | None = None,
) -> str:
    body = {"code": number, "message": message, "data": {**(facts or {}), "code": code}}
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "error": body}).decode()


def notification(method: str, params: Mapping[str, Any] | bytes) -> str:
    """Return a message that wants no answer. `params` as bytes is JSON already."""
    body = orjson.Fragment(params) if isinstance(params, bytes) else params
    return orjson.dumps({"jsonrpc": "2.0", "method": method, "params": body}).decode()


# --- the client's end ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to request `id`: a result, or an error with its JSON-RPC number and data."""

    id: RequestId | None
    result: Any = None
    error: RpcError | None = None


@dataclass(frozen=True, slots=True)
class RpcError:
    number: int
    message: str
    code: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Notification:
    method: str
    params: Mapping[str, Any]


def request(request_id: RequestId, method: str, params: Mapping[str, Any] | None = None) -> str:
    """Return the text of a call."""
    return orjson.dumps(
        {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params or {}}
    ).decode()


def cancel_request(request_id: RequestId) -> str:
    """Return the notification that ends a pending call."""
    return notification(CANCEL_REQUEST, {"id": request_id})


def decode_server_text(text: str) -> Reply | Notification:
    """Return what a server said. Raises `InvalidParams` where it does not speak this protocol."""
    try:
        message = orjson.loads(text)
        if "method" in message:
            return Notification(str(message["method"]), message.get("params") or {})
        if "error" in message:
            error = message["error"]
            data = error.get("data") or {}
            facts = {key: value for key, value in data.items() if key != "code"}
            code = str(data.get("code", "unavailable"))
            return Reply(
                message["id"], error=RpcError(int(error["code"]), str(error["message"]), code, facts)
            )
        return Reply(message["id"], result=message["result"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidParams("the server's message is not gateway.v1") from None
