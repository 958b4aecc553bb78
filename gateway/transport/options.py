"""How uvicorn serves our sockets, clients' and peers' alike."""

from __future__ import annotations

from typing import Any

import uvicorn
from starlette.types import ASGIApp

from gateway.settings import Settings
from gateway.transport.http1 import HttpProtocol
from gateway.transport.websocket import WebSocketProtocol


def config(app: ASGIApp, settings: Settings, http: type[HttpProtocol], **more: Any) -> uvicorn.Config:
    """Return the configuration of a server for `app`; `more` are uvicorn's own options."""
    return uvicorn.Config(
        app,
        http=http,
        ws=WebSocketProtocol,
        ws_max_size=settings.max_frame,
        ws_ping_interval=None,
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        **more,
    )
