"""Ask incusd as the broker does: one GET at a time, blocking, without what the gateway's client needs."""

from __future__ import annotations

import http.client
import socket
from typing import Any

import orjson

from gateway.errors import Unavailable

_TIMEOUT = 5.0  # seconds, less than a gateway waits for an answer; usually milliseconds
_ANSWER_MAX = 4 << 20  # bytes of an instance


def get(at: str, path: str, most: int = _ANSWER_MAX, seconds: float = _TIMEOUT) -> Any:
    """Return what the incusd at a socket answers; None if the object does not exist. Raises `Unavailable`.

    An answer of over `most` bytes, or after so many `seconds`, is an error.
    """
    connection = _Connection(at, seconds)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        said = orjson.loads(response.read(most))
        if response.status == 404:
            return None
        if response.status != 200:
            raise Unavailable("Incus refused to locate the tenant's files")
        return said["metadata"]
    except (OSError, http.client.HTTPException, orjson.JSONDecodeError) as error:
        raise Unavailable("cannot ask Incus where the tenant's files are; is it running?") from error
    finally:
        connection.close()


class _Connection(http.client.HTTPConnection):
    """An HTTP connection to a unix socket."""

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("incus", timeout=seconds)
        self._path, self._seconds = path, seconds

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self._seconds)
        self.sock.connect(self._path)
