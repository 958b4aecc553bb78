"""Every error of the gateway, each with its wire code, and those of the connection to it.

One tree for both ends: the server raises these too, through `gateway.errors`. Foreign errors (aiohttp,
OSError, pylxd) are mapped into it once, where they first appear. A client gets `code`, `message` and
`facts`; the log gets the traceback; neither gets a secret or a host path. This module needs nothing but
Python, because the set-up of a machine imports it before any package is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

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

# The order is the contract: the JSON-RPC code of an error is -32001 - its index here.
WIRE_CODES = (
    "unauthorized",
    "forbidden",
    "not_found",
    "conflict",
    "outside_workspace",
    "not_a_file",
    "is_a_directory",
    "too_large",
    "binary_file",
    "ambiguous_match",
    "no_match",
    "stale_read",
    "cancelled",
    "timeout",
    "exec_failed",
    "tenant_not_running",
    "unavailable",
    "rate_limited",
    "gone",
    "invalid_params",
)


class GatewayError(Exception):
    """Base of everything that the gateway raises on purpose.

    `message` is for a person and says what to do next; `facts` are JSON values that go with the
    code. Never put a host path, a token or file content into either.
    """

    code: ClassVar[str] = "unavailable"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    @property
    def rpc_code(self) -> int:
        """The JSON-RPC error number of this error's code."""
        return rpc_code(self.code)


def rpc_code(code: str) -> int:
    """Return the JSON-RPC number of a wire code; `invalid_params` has one of JSON-RPC's own."""
    return -32602 if code == "invalid_params" else -32001 - WIRE_CODES.index(code)


class Unauthorized(GatewayError):
    """No token, or one that is wrong, expired or revoked."""

    code = "unauthorized"
    http_status = 401


class Forbidden(GatewayError):
    """A valid token without the scope, or a foreign browser origin."""

    code = "forbidden"
    http_status = 403


class NotFound(GatewayError):
    """It does not exist, or the token may not see it: both give the same answer."""

    code = "not_found"
    http_status = 404


class Conflict(GatewayError):
    """Something is not in the state that the request assumed."""

    code = "conflict"
    http_status = 409


class OutsideWorkspace(GatewayError):
    """A path leads out of the workspace."""

    code = "outside_workspace"
    http_status = 403


class NotAFile(GatewayError):
    """A FIFO, socket, device or a path through a file."""

    code = "not_a_file"
    http_status = 409


class IsADirectory(GatewayError):
    code = "is_a_directory"
    http_status = 409


class TooLarge(GatewayError):
    """A body, file, frame or argument over its limit."""

    code = "too_large"
    http_status = 413


class BinaryFile(GatewayError):
    code = "binary_file"
    http_status = 415


class AmbiguousMatch(GatewayError):
    code = "ambiguous_match"
    http_status = 409


class NoMatch(GatewayError):
    code = "no_match"
    http_status = 409


class StaleRead(GatewayError):
    """The file changed since this session read it, or was never read."""

    code = "stale_read"
    http_status = 409


class Cancelled(GatewayError):
    code = "cancelled"
    http_status = 499


class Timeout(GatewayError):
    """A deadline of ours passed; what ran under it was ended."""

    code = "timeout"
    http_status = 504


class ExecFailed(GatewayError):
    """The command could not be started: not found, not executable, no such folder or user."""

    code = "exec_failed"
    http_status = 422


class TenantNotRunning(GatewayError):
    code = "tenant_not_running"
    http_status = 409


class Unavailable(GatewayError):
    """Incus, a worker or the gateway itself cannot answer now; the same request may succeed later."""

    code = "unavailable"
    http_status = 503


class RateLimited(GatewayError):
    """A limit on a number is reached; try again in `retry_after` seconds, when some may have ended."""

    code = "rate_limited"
    http_status = 429

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message, **{"retry_after": 5, **facts})


class Gone(GatewayError):
    """It existed, ended, and its record is no longer kept."""

    code = "gone"
    http_status = 410


class InvalidParams(GatewayError):
    """The request is malformed or asks for something impossible."""

    code = "invalid_params"
    http_status = 400


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
    """Return the error for a wire code; a newer gateway's unknown code gives a plain `GatewayError`."""
    error = _BY_CODE.get(code, GatewayError)(message)
    error.facts = dict(facts or {})
    return error


def from_close(code: int, reason: str) -> GatewayError:
    """Return the error for a websocket's close code."""
    kind = _BY_CLOSE.get(code, Disconnected)
    return kind(reason or f"the gateway closed the connection ({code})")
