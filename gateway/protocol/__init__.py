"""The wire of `gateway.v1`, both ends of it, without IO.

Text frames are JSON-RPC 2.0 objects without batches (`messages`); binary frames carry the bytes of commands
(`frames`). The server feeds what comes to a `ServerWire` and gets events, with their parameters checked
(`params`). Nothing here waits, so every case is a test by values. Import from this package, not from its
modules.
"""

from typing import TYPE_CHECKING

from gateway.protocol.frames import (
    HEADER_SIZE,
    Frame,
    StreamId,
    frame_header,
    pack_frame,
    unpack_frame,
)
from gateway.protocol.messages import (
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

if TYPE_CHECKING:
    from gateway.protocol.params import (
        MAX_EXEC_ID,
        METHODS,
        NUMBER,
        CallId,
        CancelRequest,
        ClientInfo,
        Encoding,
        EventsSubscribe,
        EventsUnsubscribe,
        ExecAck,
        ExecAttach,
        ExecCancel,
        ExecRef,
        ExecResize,
        ExecSignal,
        ExecStart,
        FilesList,
        FilesMkdir,
        FilesMove,
        FilesPath,
        FilesRemove,
        FilesUnwatch,
        FilesWatch,
        FilesWrite,
        HistoryList,
        HistoryRestore,
        HistoryTurn,
        Initialize,
        NoParams,
        Offsets,
        Params,
        PtySize,
        Reader,
        SessionRenew,
        ToolsCall,
        ToolsCancel,
        TurnBegin,
        switch,
        validate,
    )
    from gateway.protocol.server_wire import (
        CancelPending,
        Close,
        Ignored,
        Input,
        Refused,
        Request,
        ServerEvent,
        ServerWire,
    )
    from gateway.protocol.weight import LIGHT, VALUES_MAX, weigh
else:

    def __getattr__(name: str) -> object:
        # the server's half brings pydantic, which a client does without
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from gateway.protocol import params, server_wire, weight

        for module in (params, server_wire, weight):
            globals().update({each: vars(module)[each] for each in __all__ if each in vars(module)})
        return globals()[name]


__all__ = [
    "CANCEL_REQUEST",
    "HEADER_SIZE",
    "LIGHT",
    "MAX_EXEC_ID",
    "METHODS",
    "NUMBER",
    "SUBPROTOCOL",
    "VALUES_MAX",
    "VERSION",
    "CallId",
    "CancelPending",
    "CancelRequest",
    "ClientInfo",
    "Close",
    "CloseCode",
    "Encoding",
    "EventsSubscribe",
    "EventsUnsubscribe",
    "ExecAck",
    "ExecAttach",
    "ExecCancel",
    "ExecRef",
    "ExecResize",
    "ExecSignal",
    "ExecStart",
    "FilesList",
    "FilesMkdir",
    "FilesMove",
    "FilesPath",
    "FilesRemove",
    "FilesUnwatch",
    "FilesWatch",
    "FilesWrite",
    "Frame",
    "HistoryList",
    "HistoryRestore",
    "HistoryTurn",
    "Ignored",
    "Initialize",
    "Input",
    "Message",
    "NoParams",
    "Notification",
    "Offsets",
    "Params",
    "PtySize",
    "Reader",
    "Refused",
    "Reply",
    "Request",
    "RequestId",
    "RpcError",
    "ServerEvent",
    "ServerWire",
    "SessionRenew",
    "StreamId",
    "ToolsCall",
    "ToolsCancel",
    "TurnBegin",
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
    "switch",
    "unpack_frame",
    "validate",
    "weigh",
]
