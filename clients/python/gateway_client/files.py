"""A tenant's files for an editor: bytes, etags, and changes."""

from __future__ import annotations

import asyncio
import base64
import io
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote

from gateway_client import wire
from gateway_client.connection import Connection, refusal
from gateway_client.connections import Connections
from gateway_client.errors import Disconnected, GatewayError, Unavailable
from gateway_client.retry import Patience

if TYPE_CHECKING:
    from yarl import URL

CHUNK: Final = 1 << 18
# notifications that wait for a slow reader; beyond that they are dropped, which is an overflow
WAITING: Final = 100


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, folder or link. `mtime` is in seconds since the epoch, `mode` its permission bits.

    `target` is where a link points to, None if that is outside. `escaped`: the name is not UTF-8, and
    `path` only shows it.
    """

    path: str
    type: Literal["file", "directory", "symlink", "other"]
    size: int
    mode: int
    mtime: float
    etag: str
    target: str | None = None
    escaped: bool = False

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Entry:
        return cls(**{name: value[name] for name in cls.__slots__ if name in value})


@dataclass(frozen=True, slots=True)
class Content:
    """A complete file, and its etag for writing it back."""

    data: bytes
    etag: str

    @property
    def text(self) -> str:
        """The file as UTF-8; raises `UnicodeDecodeError`."""
        return self.data.decode()


@dataclass(frozen=True, slots=True)
class Changed:
    """What changed, as (path, "created" or "changed" or "removed"). After an `overflow` read the files again.

    `ended` says why nothing more comes.
    """

    changes: Sequence[tuple[str, str]]
    overflow: bool
    ended: str | None = None


class Files:
    """The files of one tenant. Paths are absolute in the container or relative to the workspace.

    Every method raises the typed error of the gateway's answer; a stale `if_match` is `Conflict`, whose facts
    hold the present etag.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def stat(self, path: str) -> Entry:
        return Entry.parse(await self._connections.request("files/stat", {"path": path}))

    async def list(self, path: str = ".", *, depth: int = 1) -> tuple[Sequence[Entry], bool]:
        """Return the entries of a folder, and whether the gateway's limit cut them off."""
        answer = await self._connections.request("files/list", {"path": path, "depth": depth})
        return [Entry.parse(entry) for entry in answer["entries"]], bool(answer["truncated"])

    async def read(self, path: str) -> Content:
        """Return a whole file, up to 8 MiB; `download` has no limit."""
        answer = await self._connections.request("files/read", {"path": path})
        data = answer["text"].encode() if "text" in answer else base64.b64decode(answer["data"])
        return Content(data, answer["etag"])

    async def write(
        self,
        path: str,
        content: str | bytes,
        *,
        if_match: str | None = None,
        new: bool = False,
        create_dirs: bool = False,
    ) -> str:
        """Write a whole file, up to 8 MiB, and return its etag. With `new` it must not exist yet."""
        params: dict[str, Any] = {"path": path, "createDirs": create_dirs}
        if isinstance(content, str):
            params["text"] = content
        else:
            params["data"] = base64.b64encode(content).decode()
        if if_match is not None:
            params["ifMatch"] = if_match
        if new:
            params["ifNoneMatch"] = "*"
        return str((await self._connections.request("files/write", params))["etag"])

    async def move(self, source: str, target: str, *, overwrite: bool = False) -> Entry:
        params = {"from": source, "to": target, "overwrite": overwrite}
        return Entry.parse(await self._connections.request("files/move", params))

    async def remove(self, path: str, *, recursive: bool = False, if_match: str | None = None) -> None:
        params: dict[str, Any] = {"path": path, "recursive": recursive}
        if if_match is not None:
            params["ifMatch"] = if_match
        await self._connections.request("files/remove", params)

    async def mkdir(self, path: str) -> Entry:
        """Create a folder, and those above it."""
        return Entry.parse(await self._connections.request("files/mkdir", {"path": path}))

    async def upload(
        self, path: str, body: bytes | IO[bytes] | AsyncIterable[bytes], *, if_match: str | None = None
    ) -> str:
        """Upload a file of any size, atomically; return its etag."""
        import aiohttp

        headers = {} if if_match is None else {"If-Match": f'"{if_match}"'}
        again = isinstance(body, bytes)  # other sources can be read only once
        data = lambda: io.BytesIO(body) if isinstance(body, bytes) else body  # noqa: E731
        try:
            async with await self._connections.http.ask(
                "PUT", self._url(path), data=data, headers=headers, repeatable=again
            ) as response:
                answer = await response.read()
                if response.status >= 400:
                    raise refusal(response.status, answer)
                return response.headers["ETag"].strip('"')
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Disconnected(f"the upload was cut off: {error}") from error

    async def download(self, path: str, *, start: int = 0) -> AsyncIterator[bytes]:
        """Yield a file's bytes from `start` at the reader's pace. Raises `Disconnected` if they break off."""
        import aiohttp

        headers = {"Range": f"bytes={start}-"} if start else {}
        try:
            async with await self._connections.http.ask("GET", self._url(path), headers=headers) as response:
                if response.status >= 400:
                    raise refusal(response.status, await response.read())
                async for chunk in response.content.iter_chunked(CHUNK):
                    yield chunk
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Disconnected(f"the download was cut off: {error}") from error

    @asynccontextmanager
    async def watch(self, *paths: str, ignore: Iterable[str] | None = None) -> AsyncIterator[Watch]:
        """Watch files and folders, these with all below them, while the block runs; the workspace by default.

        Changes after the block is entered are reported: enter it first, then read the state.
        """
        params: dict[str, Any] = {"paths": list(paths) or ["."]}
        if ignore is not None:
            params["ignore"] = list(ignore)
        watch = Watch(self._connections, params)
        try:
            async with self._connections.patience() as patience:
                await watch._begin(patience)
            yield watch
        finally:
            await watch._end()

    def _url(self, path: str) -> URL:
        from yarl import URL

        # encoded here: a library would keep what looks like an escape
        base = self._connections.http.address.url
        return URL(f"{base}/v1/tenants/{self._connections.tenant}/files/{quote(path)}", encoded=True)


class Watch:
    """Changes, for `async for`. Ends after the notification with `ended`; may raise `Disconnected`.

    A broken connection is replaced as the client's `Retry` says, and reported as an `overflow`, since changes
    in between were missed. `unwatched` counts folders that could not be watched.
    """

    def __init__(self, connections: Connections, params: Mapping[str, Any]) -> None:
        self.unwatched = 0
        self._connections, self._params = connections, params
        self._connection: Connection | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._number: int | None = None
        self._told: deque[Changed] = deque()
        self._failure: GatewayError | None = None
        self._over = False
        self._grown = asyncio.Event()

    async def _begin(self, patience: Patience) -> None:
        connection = await self._connections.connect(patience, patient=False)
        connection.receiver = self
        try:
            await connection.request("files/watch", self._params, self._begun)
        except BaseException:
            connection.receiver = None
            await self._connections.release(connection, good=False)
            raise
        self._connection = connection
        if connection.failure is not None:  # it broke again before we took it over
            self.broken(connection.failure)

    def _begun(self, answer: Mapping[str, Any]) -> None:
        self._number, self.unwatched = answer["watch"], answer["unwatched"]

    async def _resume(self, broken: Connection, error: GatewayError) -> None:
        self._connection = None
        try:
            async with self._connections.patience() as patience:
                await self._connections.release(broken, good=False)
                while self._connection is None:
                    await self._connections.pause(patience, error)
                    try:
                        await self._begin(patience)
                    except Unavailable as again:
                        error = again
            self._tell(Changed([], True))
        except GatewayError as final:
            self._failure = final
            self._grown.set()

    async def _end(self) -> None:
        if self._resuming is not None:
            self._resuming.cancel()
            await asyncio.wait([self._resuming])
        if self._connection is not None:
            self._connection.receiver = None
            await self._connections.release(self._connection, good=False)

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Changed:
        while not self._told:
            if self._over:
                raise StopAsyncIteration
            if self._failure is not None:
                raise self._failure
            self._grown.clear()
            await self._grown.wait()
        told = self._told.popleft()
        self._over = told.ended is not None
        return told

    # as the connection's receiver

    def frame(self, frame: wire.Frame) -> None:
        """No command runs on this connection."""

    def notified(self, notification: wire.Notification) -> None:
        told = notification.params
        if notification.method == "files/changed" and told.get("watch") == self._number:
            changes = [(change["path"], change["change"]) for change in told["changes"]]
            self._tell(Changed(changes, bool(told["overflow"]), told.get("ended")))

    def _tell(self, changed: Changed) -> None:
        if len(self._told) < WAITING:
            self._told.append(changed)
        else:
            self._told[-1] = replace(self._told[-1], overflow=True, ended=changed.ended)
        self._grown.set()

    def broken(self, error: GatewayError) -> None:
        if self._connection is None:
            return  # the start notices it itself
        if isinstance(error, Unavailable) and self._connections.http.retry is not None:
            self._resuming = asyncio.create_task(self._resume(self._connection, error))
        else:
            self._failure = error
            self._grown.set()

    async def room(self) -> None:
        """Never block: the queue is bounded."""
