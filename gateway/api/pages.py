"""Lets pages of the origins in `GATEWAY_ORIGINS` read the gateway's answers, as CORS has it (Fetch §3.2).

They send a token: no answer allows credentials, so that a browser lets none of them use its session's cookie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from gateway.auth import tokens

_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_SENT: Final = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "Last-Event-ID",
    "Mcp-Protocol-Version",
    "Mcp-Session-Id",
    "Range",
    "X-Call-Linger",
    "X-Request-Id",
    "X-Session-Slot",
    "X-Tool-Session",
)
_READ: Final = ("Content-Range", "ETag", "Location", "Retry-After", "X-Request-Id")
_KEPT: Final = 600  # seconds for which a browser does not ask again


class _Listed(CORSMiddleware):
    """Allows an origin in any spelling, as the check of requests does."""

    def is_allowed_origin(self, origin: str) -> bool:
        return tokens.origin_allowed(origin, None, "", self.allow_origins)


def for_listed_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Answer browsers' preflight requests, and let pages of the listed origins read the answers."""
    listed = [origin for origin in origins if origin != "*"]  # that would be every origin, and is none here
    if not listed:
        return app
    return _Listed(
        app,
        allow_origins=listed,
        allow_methods=_METHODS,
        allow_headers=_SENT,
        expose_headers=_READ,
        max_age=_KEPT,
    )
