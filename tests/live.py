"""A gateway process as the tests meet it, and a client that speaks the bare wire.

Both are the real thing: `incus-gateway serve` in a process of its own, and a plain websocket without our
client library, so that what a test sends and sees is exactly what crosses the wire. The process is a fork of
one that has imported the gateway, see `forks`, but for tests of what it is from its start.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import itertools
import os
import random
import signal
import socket
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from websockets.asyncio.client import ClientConnection, connect

from gateway import protocol
from gateway.auth import tokens
from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from tests import constants, forks, shapes
from tests.waits import until

SECRET = "a secret of the tests, long enough to sign with"
EVERY_SCOPE = tuple(sorted(tokens.SCOPES - {"admin"}))
DEADLINE = 60.0


class RpcFailure(Exception):
    """The error answer of a call."""

    def __init__(self, number: int, message: str, data: Mapping[str, Any]) -> None:
        super().__init__(f"{number} {message} {data}")
        self.number = number
        self.message = message
        self.data = data
        self.code = str(data.get("code"))


class Wire:
    """One websocket. Sorts what arrives: answers to calls, notifications, output by channel."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.notifications: list[protocol.Notification] = []
        self.output: dict[tuple[int, int], bytearray] = defaultdict(bytearray)
        self._replies: dict[protocol.RequestId | None, asyncio.Future[Any]] = {}
        self._asked: dict[protocol.RequestId | None, str] = {}
        self._grown = asyncio.Condition()
        self._next = 0
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for message in self.socket:
                if isinstance(message, bytes):
                    frame = protocol.unpack_frame(message)
                    self.output[frame.channel, frame.stream] += frame.data
                else:
                    self._text(message)
                async with self._grown:
                    self._grown.notify_all()
        except Exception as error:
            for reply in self._replies.values():
                if not reply.done():
                    reply.set_exception(error)
                    reply.exception()  # not all are awaited, and asyncio would print it for each
            raise
        finally:
            for reply in self._replies.values():
                if not reply.done():
                    reply.set_exception(ConnectionError("closed"))
                    reply.exception()
            async with self._grown:
                self._grown.notify_all()

    def _text(self, text: str) -> None:
        said = protocol.decode_server_text(text)
        if isinstance(said, protocol.Notification):
            shapes.check_notification(said)
            self.notifications.append(said)
            return
        reply = self._replies.pop(said.id, None)
        if reply is None or reply.done():
            return
        if said.error is None:
            try:
                shapes.check_result(self._asked[said.id], said.result, len(text))
            except AssertionError as wrong:
                reply.set_exception(wrong)
            else:
                reply.set_result(said.result)
        else:
            data = {**said.error.facts, "code": said.error.code}
            reply.set_exception(RpcFailure(said.error.number, said.error.message, data))

    async def send(self, value: Any) -> None:
        await self.socket.send(value if isinstance(value, str | bytes) else orjson.dumps(value).decode())

    def begin(self, method: str, params: Mapping[str, Any] | None = None) -> tuple[int, asyncio.Future[Any]]:
        """Return the id of a new call and the future of its answer; send it by `send_call`."""
        self._next += 1
        self._replies[self._next] = asyncio.get_running_loop().create_future()
        self._asked[self._next] = method
        return self._next, self._replies[self._next]

    async def call(self, method: str, **params: Any) -> Any:
        """Call and return the result; raises `RpcFailure`."""
        number, reply = self.begin(method, params)
        await self.socket.send(protocol.request(number, method, params))
        return await asyncio.wait_for(reply, DEADLINE)

    async def start_call(self, method: str, **params: Any) -> tuple[int, asyncio.Future[Any]]:
        number, reply = self.begin(method, params)
        await self.socket.send(protocol.request(number, method, params))
        return number, reply

    async def notify(self, method: str, **params: Any) -> None:
        await self.socket.send(protocol.notification(method, params))

    async def stdin(self, channel: int, data: bytes) -> None:
        await self.socket.send(protocol.pack_frame(0, channel, data))

    async def until(self, condition: Any, deadline: float = DEADLINE) -> Any:
        """Wait until `condition()` is true and return its value."""
        async with asyncio.timeout(deadline), self._grown:
            while not (value := condition()):
                if self._reader.done():
                    raise ConnectionError("the gateway closed the socket")
                await self._grown.wait()
            return value

    def notified(self, method: str, **facts: Any) -> Mapping[str, Any] | None:
        for notification in self.notifications:
            if notification.method == method and facts.items() <= notification.params.items():
                return notification.params
        return None

    async def exited(self, exec_id: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self.until(lambda: self.notified("exec/exited", exec=exec_id))
        return found

    async def run(self, **params: Any) -> tuple[Mapping[str, Any], bytes, bytes]:
        """Start a command and return its exit and outputs."""
        started = await self.call("exec/start", **params)
        exit_ = await self.exited(started["exec"])
        channel = started["channel"]
        return exit_, bytes(self.output[channel, 1]), bytes(self.output[channel, 2])

    async def closed(self, deadline: float = DEADLINE) -> int | None:
        """Wait until the gateway closes the socket and return the code."""
        async with asyncio.timeout(deadline):
            await self.socket.wait_closed()
        return self.socket.close_code

    async def close(self) -> None:
        await self.socket.close()
        await asyncio.gather(self._reader, return_exceptions=True)


# below those from which the kernel takes one for any connection
_PORTS = range(10_240, 32_768)
_OF_A_PROCESS = 256


@functools.cache
def _own_ports() -> Iterator[int]:
    """Return ports that no other test process takes while this one runs, again and again."""
    folder = Path(tempfile.gettempdir()) / "gateway-test-ports"
    folder.mkdir(mode=0o777, exist_ok=True)
    firsts = _PORTS[::_OF_A_PROCESS]
    for first in random.sample(firsts, len(firsts)):
        with contextlib.suppress(OSError):
            lock = os.open(folder / str(first), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
            return itertools.cycle(range(first, first + _OF_A_PROCESS))
    raise AssertionError(f"all ports of {_PORTS} are taken by other tests")


def free_ports(count: int) -> list[int]:
    """Return ports that nobody uses. No other process of tests gets them, nor does this one soon again."""
    found: list[int] = []
    while len(found) < count:
        port = next(_own_ports())
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
    return found


class LiveGateway:
    """`incus-gateway serve` as a process."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.at(*free_ports(1))
        self.environment = {
            "PATH": os.environ["PATH"],
            "GATEWAY_CONFIG": "/nonexistent",
            "GATEWAY_SECRET": SECRET,
            "GATEWAY_LISTEN": f"127.0.0.1:{self.port}",
            # what tests call their sites
            "GATEWAY_DOMAIN_SUFFIXES": "localhost,test,example.com",
            "GATEWAY_SETTLE_TIME": "0.2",
            **environment,
        }
        self.log = log
        self.program: tuple[str, ...] = forks.PROGRAM  # or another one
        self.serve: tuple[str, ...] = ("serve",)
        self.signatures: set[str] = set()  # of the tokens that were made for it
        self.process: asyncio.subprocess.Process | forks.Forked | None = None

    def at(self, port: int) -> None:
        """Ask it at a port of this host from now on."""
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    async def start(self, *before: str) -> None:
        """Start it, by the command `before` if there is one, and return once it is ready."""
        with self.log.open("ab") as log:
            if before or self.program != forks.PROGRAM or not forks.can_start(self.environment):
                command = (*before, *constants.program(self.program, self.environment), *self.serve)
                self.process = await asyncio.create_subprocess_exec(
                    *command, env=self.environment, stdout=log, stderr=log
                )
            else:
                self.process = await forks.start(
                    *self.serve, environment=self.environment, stdout=log.fileno(), stderr=log.fileno()
                )
        process = self.process
        async with aiohttp.ClientSession() as session:

            async def up() -> bool:  # nothing to wait on but the port itself
                assert process.returncode is None, self.log.read_text()
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(self.url + "/readyz") as response:
                        return response.status == 200
                return False

            await until(up, DEADLINE)

    async def stop(self, number: signal.Signals = signal.SIGTERM, deadline: float = DEADLINE) -> int:
        """Send a signal and return the exit code."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), deadline)

    def memory(self, key: str) -> int:
        """Return bytes of the gateway's own process: `VmRSS` now, or `VmHWM` since `reset_peak`."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"{key}:")[2].split()[0]) << 10

    def starved(self) -> float:
        """Return the seconds for which the gateway's main thread could run and had no CPU."""
        assert self.process is not None
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[1]) / 1e9

    def reset_peak(self) -> None:
        assert self.process is not None
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def token(
        self,
        *tenants: str,
        scopes: tuple[str, ...] = EVERY_SCOPE,
        ttl: int = 600,
        domains: tuple[str, ...] | None = None,
        subject: str = "test",
    ) -> str:
        token = tokens.issue(SECRET, subject, tenants, scopes, ttl, domains)
        self.signatures.add(token.rpartition(".")[2])
        return token

    @contextlib.asynccontextmanager
    async def raw(self, tenant: str, kind: type[Wire] = Wire, **headers: str) -> AsyncIterator[Wire]:
        """Connect without saying anything; `kind` is who reads."""
        address = f"{self.url.replace('http', 'ws', 1)}/v1/tenants/{tenant}/ws"
        subprotocols: Any = [protocol.SUBPROTOCOL]
        async with connect(
            address,
            subprotocols=subprotocols,
            additional_headers={name.replace("_", "-"): value for name, value in headers.items()},
            max_size=None,
            compression=None,
            proxy=None,
            open_timeout=DEADLINE,
            ping_interval=None,  # a test that reads nothing for a while is not dead
        ) as websocket:
            wire = kind(websocket)
            try:
                yield wire
            finally:
                await wire.close()

    @contextlib.asynccontextmanager
    async def wire(self, tenant: str, **initialize: Any) -> AsyncIterator[Wire]:
        """Connect and initialize with a token for everything of this tenant."""
        async with self.raw(tenant) as wire:
            client = {"name": "test", "version": "1"}
            params = {"client": client, "token": self.token(tenant), **initialize}
            await wire.call("initialize", **params)
            yield wire

    @contextlib.asynccontextmanager
    async def http(self, *tenants: str, **options: Any) -> AsyncIterator[aiohttp.ClientSession]:
        headers = {"Authorization": f"Bearer {self.token(*tenants, **options)}"}
        opened: list[aiohttp.ClientResponse] = []

        class Response(aiohttp.ClientResponse):
            async def start(self, connection: Any) -> aiohttp.ClientResponse:
                opened.append(self)
                return await super().start(connection)

            async def read(self) -> bytes:
                body = await super().read()
                shapes.check_answer(self.method, self.url.path, self.status, self.content_type, body)
                return body

        async with aiohttp.ClientSession(self.url, headers=headers, response_class=Response) as session:
            yield session
            # an answer that a test did not read would be warned of whenever it is collected
            for response in opened:
                response.close()


async def local_gateway(folder: Path, *tenants: str, **environment: str) -> LiveGateway:
    """Return a gateway of the `local` runtime with a state dir of its own and these tenants."""
    async with LocalRuntime(Settings(runtime="local", state_dir=folder)) as runtime:
        for tenant in tenants:
            await runtime.tenants.create(tenant)
    given = {"GATEWAY_RUNTIME": "local", "GATEWAY_STATE_DIR": str(folder), **environment}
    return LiveGateway(given, folder / "gateway.log")
