"""Errors: the gateway's own tree, rebuilt from the wire codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.errors import (
    AmbiguousMatch,
    BinaryFile,
    Cancelled,
    Conflict,
    ExecFailed,
    Forbidden,
    GatewayError,
    Gone,
    InvalidParams,
    IsADirectory,
    NoMatch,
    NotAFile,
    NotFound,
    OutsideWorkspace,
    RateLimited,
    StaleRead,
    TenantNotRunning,
    Timeout,
    TooLarge,
    Unauthorized,
    Unavailable,
)

__all__ = [
    "AmbiguousMatch",
    "BinaryFile",
    "Cancelled",
    "Conflict",
    "Disconnected",
    "ExecFailed",
    "Forbidden",
    "GatewayError",
    "Gone",
    "InvalidParams",
    "IsADirectory",
    "NoMatch",
    "NotAFile",
    "NotFound",
    "OutsideWorkspace",
    "RateLimited",
    "StaleRead",
    "TenantNotRunning",
    "Timeout",
    "TokenUnavailable",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "from_close",
    "from_wire",
]

# those of the contract alone: a process that is a gateway too has more
_BY_CODE: Mapping[str, type[GatewayError]] = {
    kind.code: kind for kind in GatewayError.__subclasses__() if kind.__module__ == GatewayError.__module__
}

# close codes of the contract and of RFC 6455 §7.4.1
_BY_CLOSE: Mapping[int, type[GatewayError]] = {
    1009: TooLarge,
    1012: Unavailable,
    4400: InvalidParams,
    4401: Unauthorized,
    4403: Forbidden,
    4404: NotFound,
    4429: RateLimited,
}


class Disconnected(Unavailable):
    """The connection to the gateway broke. It is not known whether a request under way took effect."""


class TokenUnavailable(Unavailable):
    """The function that gives the client's token failed; `__cause__` is what it raised."""


def from_wire(code: str, message: str, facts: Mapping[str, Any] | None = None) -> GatewayError:
    """Return the error that the wire code names; a code of a newer gateway gives a plain `GatewayError`."""
    error = _BY_CODE.get(code, GatewayError)(message)
    error.facts = dict(facts or {})
    return error


def from_close(code: int, reason: str) -> GatewayError:
    """Return the error for a websocket's close code."""
    kind = _BY_CLOSE.get(code, Disconnected)
    return kind(reason or f"the gateway closed the connection ({code})")
