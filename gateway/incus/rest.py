"""Incus's REST conventions: requests over the unix socket, answers and errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import orjson

from gateway.bounds import Flood, first
from gateway.errors import GatewayError


@dataclass(frozen=True, slots=True)
class Operation:
    """A finished operation: whether it succeeded, incusd's error text if not, and its metadata."""

    ok: bool
    error: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


BASE = "http://incus"  # a URL needs a host, even over a unix socket
_ANSWER_MAX = 256 << 20  # bytes; a thousand instances take 10 MB
# As cluster members name themselves when they ask one another (internal/server/cluster/request in Incus): one
# that is asked by another answers for itself. On the unix socket root may say so too.
NOTIFIER = "incus-cluster-notifier"
_OWN = "/1.0/operations"  # what a member answers without its cluster's database, besides `/1.0`


class IncusError(GatewayError):
    """incusd refused a request or failed. The message is incusd's own and may name host paths.

    `status` is incusd's HTTP-like code, 0 if it could not be reached.
    """

    code = "unavailable"
    http_status = 503

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NoQuorum(IncusError):
    """The cluster's database has no majority of its members, and answers nothing."""

    def __init__(self) -> None:
        super().__init__("most members of the cluster are away", 0)


class NotAwaited(IncusError):
    """A command did not start, as incusd does not wait for its sockets for longer than five seconds."""

    def __init__(self) -> None:
        super().__init__("incusd did not wait for the sockets of a command; this host is busy", 503)


class Elsewhere(IncusError):
    """The instance exists, but on another member of the cluster, `location`."""

    def __init__(self, name: str, location: str) -> None:
        super().__init__(f"instance {name} is on {location}", 421)
        self.location = location


class Rest:
    """The API of one incusd, within one project. An async context manager."""

    def __init__(self, socket: Path, project: str, timeout: float) -> None:
        self.socket = socket
        self.project = project
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session: aiohttp.ClientSession | None = None
        self._quorum = True
        self._waiting: set[asyncio.Timeout] = set()  # of requests that only the database answers

    def has_quorum(self, has: bool) -> None:
        """Record whether the cluster's database answers; if not, all requests that need it fail."""
        self._quorum = has
        if not has:
            now = asyncio.get_running_loop().time()
            for waiting in self._waiting:
                if not waiting.expired():
                    waiting.reschedule(now)

    async def __aenter__(self) -> Self:
        # limit=0: 25 commands with 4 sockets each would exhaust the default pool of 100 connections
        connector = aiohttp.UnixConnector(str(self.socket), limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("Incus must be used inside its `async with`")
        return self._session

    async def get(self, path: str, **query: str) -> Any:
        """Return the metadata of a GET. Raises `IncusError`."""
        return (await self._request("GET", path, query=query))["metadata"]

    async def get_tagged(self, path: str) -> tuple[Any, str]:
        """Return the metadata of a GET and its ETag, for `operate`."""
        answer = await self._request("GET", path)
        return answer["metadata"], answer["etag"]

    async def get_file(self, instance: str, path: str, most: int) -> bytes | None:
        """Return a file of an instance, running or not; None if there is no regular file at `path`.

        Raises `IncusError`, also if the file exceeds `most` bytes.
        """
        at = instance_path(instance, "files")
        params = {"project": self.project, "path": path}
        try:
            async with (
                self._in_quorum(at),
                self.session.get(BASE + at, params=params, timeout=self._timeout) as response,
            ):
                if response.status == 404:
                    return None
                kind = response.headers.get("X-Incus-type", "")
                text = await first(response.content.readany, most, most=most)
        except Flood:
            raise IncusError(f"{path} exceeds {most} bytes", 413) from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise unreachable(error) from error
        if response.status != 200:
            raise IncusError(f"{path} cannot be read", response.status)
        return text if kind == "file" else None

    async def put_file(self, instance: str, path: str, data: bytes, *, mode: int) -> None:
        """Write a file owned by root into an instance, running or not. Raises `IncusError`."""
        headers = {
            "Content-Type": "application/octet-stream",
            "X-Incus-type": "file",
            "X-Incus-mode": f"{mode:04o}",
            "X-Incus-uid": "0",
            "X-Incus-gid": "0",
        }
        at = instance_path(instance, "files")
        params = {"project": self.project, "path": path}
        try:
            async with (
                self._in_quorum(at),
                self.session.post(BASE + at, params=params, data=data, headers=headers) as response,
            ):
                answer: dict[str, Any] = orjson.loads(await response.read())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise unreachable(error) from error
        if answer.get("type") == "error":
            raise IncusError(str(answer.get("error", "")), int(answer.get("error_code", 500)))

    @contextlib.asynccontextmanager
    async def _in_quorum(self, path: str) -> AsyncIterator[None]:
        """Raise `NoQuorum` once the database that this path needs does not answer any more."""
        if path == "/1.0" or path.startswith(_OWN):
            yield
            return
        if not self._quorum:
            raise NoQuorum
        try:
            async with asyncio.timeout(None) as waiting:
                self._waiting.add(waiting)
                try:
                    yield
                finally:
                    self._waiting.discard(waiting)
        except TimeoutError:
            if self._quorum:
                raise
            raise NoQuorum from None

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        limit: float | None = -1,
        most: int = _ANSWER_MAX,
        if_match: str | None = None,
        alone: bool = False,
    ) -> dict[str, Any]:
        params = {"project": self.project, **(query or {})}
        data = None if body is None else orjson.dumps(body)
        # with aiohttp's default content type incusd would take a new instance's description for a backup
        headers = {"Content-Type": "application/json"}
        if if_match is not None:
            headers["If-Match"] = if_match
        if alone:
            headers["User-Agent"] = NOTIFIER
        timeout = self._timeout if limit == -1 else aiohttp.ClientTimeout(total=limit)
        try:
            async with (
                self._in_quorum(path),
                self.session.request(
                    method, BASE + path, params=params, data=data, headers=headers, timeout=timeout
                ) as response,
            ):
                answer: dict[str, Any] = orjson.loads(await first(response.content.readany, most, most=most))
                answer["etag"] = response.headers.get("ETag", "")
        except Flood:
            raise IncusError(f"incusd's answer exceeds {most} bytes", 413) from None
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise unreachable(error) from error
        if answer.get("type") == "error":
            raise IncusError(str(answer.get("error", "")), int(answer.get("error_code", 500)))
        return answer


def instance_path(name: str, *rest: str) -> str:
    """Return the API path of an instance."""
    return "/".join(("/1.0/instances", quote(name, safe=""), *rest))


def unreachable(error: BaseException) -> IncusError:
    """Return the error to raise for a request that incusd did not answer."""
    if isinstance(error, TimeoutError):
        return IncusError("incusd did not answer in time", 0)
    return IncusError(f"incusd cannot be reached: {type(error).__name__}", 0)
