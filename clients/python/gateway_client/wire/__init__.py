"""The wire of `gateway.v1` as clients need it, without IO.

Text frames are JSON-RPC 2.0 objects without batches (`messages`); binary frames carry the bytes of commands
(`frames`). The server uses the same modules, through `gateway.protocol`; they are here so that a client can
be installed without a gateway.
"""

from gateway_client.wire.frames import (
    HEADER_SIZE,
    Frame,
    StreamId,
    frame_header,
    pack_frame,
    unpack_frame,
)
from gateway_client.wire.messages import (
    CANCEL_REQUEST,
    SUBPROTOCOL,
    VERSION,
    CloseCode,
    Message,
    Notification,
    Reply,
    RequestId,
    RpcError,
    cancel_request,
    decode_server_text,
    encoded_result,
    error_reply,
    failure,
    notification,
    request,
    result,
    size,
)

__all__ = [
    "CANCEL_REQUEST",
    "HEADER_SIZE",
    "SUBPROTOCOL",
    "VERSION",
    "CloseCode",
    "Frame",
    "Message",
    "Notification",
    "Reply",
    "RequestId",
    "RpcError",
    "StreamId",
    "cancel_request",
    "decode_server_text",
    "encoded_result",
    "error_reply",
    "failure",
    "frame_header",
    "notification",
    "pack_frame",
    "request",
    "result",
    "size",
    "unpack_frame",
]
