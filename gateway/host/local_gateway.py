"""HTTP requests to the gateway of this machine, bypassing any proxy."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from typing import Any


class _Local(http.client.HTTPConnection):
    """A connection to the gateway's own address, ignoring proxies in the environment."""

    def __init__(self, listen: str, timeout: float) -> None:
        host, _, port = listen.rpartition(":")
        self._path = listen if "/" in listen else None
        host = {"0.0.0.0": "127.0.0.1", "[::]": "::1", "": "127.0.0.1"}.get(host, host.strip("[]"))  # noqa: S104 - compared, not bound
        super().__init__("localhost" if self._path else host, 80 if self._path else int(port), timeout)

    def connect(self) -> None:
        if self._path is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(
    listen: str,
    method: str,
    path: str,
    token: str = "",
    body: Any = None,
    timeout: float = 30.0,
    host: str = "",
) -> tuple[int, Any]:
    """Send a request to the gateway; return the status and the answer's JSON, or its text if it is not JSON.

    Raises `OSError` if nothing answers, or the answer is not HTTP.
    """
    connection = _Local(listen, timeout)
    try:
        headers = {"Content-Type": "application/json"}
        if host:
            headers["Host"] = host
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text.decode(errors="replace")
    except http.client.HTTPException as error:
        raise OSError(f"not HTTP: {error!r}") from error
    finally:
        connection.close()


def base_url(listen: str) -> str:
    """Return the gateway's URL for a browser on this machine."""
    if "/" in listen:
        return f"unix:{listen}"
    host, _, port = listen.rpartition(":")
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '[::]', '') else host}:{port}"  # noqa: S104 - compared, not bound


def expires(token: str) -> float:
    """Return a JWT's expiry in seconds since the epoch, 0 if it is not a JWT. Does not verify it."""
    try:
        payload = token.split(".")[1]
        return float(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"])
    except (ValueError, IndexError, KeyError, TypeError):
        return 0.0
