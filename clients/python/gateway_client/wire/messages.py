"""Text messages of `gateway.v1`, JSON-RPC 2.0: what each end writes, and how a client reads what comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, TypeAlias

import orjson

from gateway_client.errors import GatewayError, InvalidParams

SUBPROTOCOL: Final = "gateway.v1"
VERSION: Final = 1
CANCEL_REQUEST: Final = "$/cancelRequest"

RequestId: TypeAlias = str | int
Message: TypeAlias = str | tuple[bytes, ...]
"""A text message, whole or as the parts of its UTF-8."""


class CloseCode(IntEnum):
    FRAME_TOO_LARGE = 1009
    DRAINING = 1012
    TRY_LATER = 1013
    PROTOCOL_ERROR = 4400
    UNAUTHORIZED = 4401
    FORBIDDEN = 4403
    UNKNOWN_TENANT = 4404
    TOO_MANY = 4429


# --- what a server sends ------------------------------------------------------------------------------


def result(request_id: RequestId, value: Mapping[str, Any]) -> str:
    """Return the answer to a request."""
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "result": value}).decode()


def encoded_result(request_id: RequestId, value: bytes) -> Message:
    """Return the answer to a request with a result that is JSON already, which is not copied.

    Raises `UnicodeDecodeError` if it is no UTF-8, which would end the client's connection.
    """
    if not value.isascii():
        value.decode()
    return b'{"jsonrpc":"2.0","id":' + orjson.dumps(request_id) + b',"result":', value, b"}"


def size(message: Message) -> int:
    """Return how long a message is: the characters of a whole one, the bytes of parts."""
    return len(message) if isinstance(message, str) else sum(map(len, message))


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
    """Return what a server said. Raises `InvalidParams` if it does not speak this protocol."""
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
