"""The client without asyncio: the same names, blocking methods and plain iterators.

    with Client("http://127.0.0.1:8080", token=…) as client:
        shop = client.tenant("shop")
        print(shop.read("src/App.tsx").text)
        with shop.exec("bun install") as install:
            for name, chunk in install.output():
                sys.stdout.buffer.write(chunk)
            exit = install.wait()

All of it runs on one event loop in a separate thread, for the duration of the client's `with`. It may be
used from several threads. Ctrl-C while a method waits cancels what it waits for, in the gateway too.
`on_change` is called in the loop's thread.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, contextmanager
from types import TracebackType
from typing import Any, Concatenate, Final, Generic, ParamSpec, TypeVar

from gateway_client import client, deployments, events, execution, files, output, tenant
from gateway_client.credentials import Token
from gateway_client.errors import Disconnected
from gateway_client.retry import OnChange, Retry, State

__all__ = ["Client", "Deployment", "EventStream", "Exec", "Files", "Output", "Tenant", "Watch"]

Given = ParamSpec("Given")
Inner = TypeVar("Inner", covariant=True)
Opened = TypeVar("Opened")
Result = TypeVar("Result")
_END: Final = object()


class _Loop:
    """An event loop in a separate thread, from `start` to `close`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway_client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run it on the loop and wait for the result."""
        if self._loop is None:
            work.close()
            raise Disconnected("use this client inside its `with`")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # above all Ctrl-C in this thread
            future.cancel()
            raise

    def close(self) -> None:
        assert self._loop is not None and self._thread is not None
        self.run(self._loop.shutdown_asyncgens())
        loop, self._loop = self._loop, None
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()


class _Facade(Generic[Inner]):
    """Wraps an object of the asynchronous client, with the loop it lives on."""

    def __init__(self, loop: _Loop, inner: Inner) -> None:
        self._loop, self._inner = loop, inner


def _waits(
    method: Callable[Concatenate[Inner, Given], Awaitable[Result]],
) -> Callable[Concatenate[_Facade[Inner], Given], Result]:
    """Return a blocking version of a method."""

    @functools.wraps(method)
    def call(facade: _Facade[Inner], /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        async def work() -> Result:
            return await method(facade._inner, *args, **kwargs)

        return facade._loop.run(work())

    return call


def _makes(
    method: Callable[Concatenate[Inner, Given], Awaitable[Opened]], show: Callable[[_Loop, Opened], Result]
) -> Callable[Concatenate[_Facade[Inner], Given], Result]:
    """Return a blocking version of a method, whose result is wrapped too."""
    waits = _waits(method)

    @functools.wraps(method)
    def call(facade: _Facade[Inner], /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        return show(facade._loop, waits(facade, *args, **kwargs))

    return call


def _iterates(
    method: Callable[Concatenate[Inner, Given], AsyncIterator[Result]],
) -> Callable[Concatenate[_Facade[Inner], Given], Iterator[Result]]:
    """Return a version of a method with a plain iterator."""

    @functools.wraps(method)
    def call(facade: _Facade[Inner], /, *args: Given.args, **kwargs: Given.kwargs) -> Iterator[Result]:
        return _each(facade._loop, method(facade._inner, *args, **kwargs))

    return call


def _each(loop: _Loop, found: AsyncIterator[Result]) -> Iterator[Result]:
    async def following() -> Any:
        return await anext(found, _END)

    try:
        while (item := loop.run(following())) is not _END:
            yield item
    finally:
        # for a generator that is left early; a stream ends by itself
        if (close := getattr(found, "aclose", None)) is not None:
            loop.run(close())


def _opens(
    method: Callable[Concatenate[Inner, Given], AbstractAsyncContextManager[Opened]],
    show: Callable[[_Loop, Opened], Result],
) -> Callable[Concatenate[_Facade[Inner], Given], AbstractContextManager[Result]]:
    """Return a version of a method for a plain `with`."""

    @functools.wraps(method)
    @contextmanager
    def call(facade: _Facade[Inner], /, *args: Given.args, **kwargs: Given.kwargs) -> Iterator[Result]:
        loop, stack = facade._loop, AsyncExitStack()

        async def enter() -> Opened:
            # constructed on the loop, since some classes look for it
            return await stack.enter_async_context(method(facade._inner, *args, **kwargs))

        opened = loop.run(enter())
        try:
            yield show(loop, opened)
        except BaseException as error:
            loop.run(stack.__aexit__(type(error), error, error.__traceback__))
            raise
        loop.run(stack.aclose())

    return call


class Output(_Facade[output.Output]):
    """One output stream of a command; see `gateway_client.Output`."""

    read = _waits(output.Output.read)

    def __iter__(self) -> Iterator[bytes]:
        return _each(self._loop, self._inner)

    @property
    def offset(self) -> int:
        return self._inner.offset

    @property
    def lost(self) -> int:
        return self._inner.lost


class Exec(_Facade[execution.Exec]):
    """A running command; see `gateway_client.Exec`."""

    write = _waits(execution.Exec.write)
    close_stdin = _waits(execution.Exec.close_stdin)
    resize = _waits(execution.Exec.resize)
    signal = _waits(execution.Exec.signal)
    cancel = _waits(execution.Exec.cancel)
    wait = _waits(execution.Exec.wait)
    detach = _waits(execution.Exec.detach)
    output = _iterates(execution.Exec.output)

    @property
    def id(self) -> str:
        return self._inner.id

    @property
    def pid(self) -> int | None:
        return self._inner.pid

    @property
    def started_at(self) -> Any:
        return self._inner.started_at

    @property
    def stdout(self) -> Output:
        return Output(self._loop, self._inner.stdout)

    @property
    def stderr(self) -> Output:
        return Output(self._loop, self._inner.stderr)


class Watch(_Facade[files.Watch]):
    """Changes in a tenant's files; see `gateway_client.Watch`."""

    def __iter__(self) -> Iterator[files.Changed]:
        return _each(self._loop, self._inner)


class Files(_Facade[files.Files]):
    """The files of one tenant; see `gateway_client.Files`."""

    stat = _waits(files.Files.stat)
    list = _waits(files.Files.list)
    read = _waits(files.Files.read)
    write = _waits(files.Files.write)
    move = _waits(files.Files.move)
    remove = _waits(files.Files.remove)
    mkdir = _waits(files.Files.mkdir)
    upload = _waits(files.Files.upload)
    download = _iterates(files.Files.download)

    watch = _opens(files.Files.watch, Watch)


class EventStream(_Facade[events.EventStream]):
    """Events as they happen; see `gateway_client.EventStream`."""

    def __iter__(self) -> Iterator[events.Event]:
        return _each(self._loop, self._inner)

    @property
    def last_event_id(self) -> str | None:
        return self._inner.last_event_id

    @property
    def state(self) -> State:
        return self._inner.state


class Deployment(_Facade[deployments.Deployment]):
    """One deployment; see `gateway_client.Deployment`."""

    record = _waits(deployments.Deployment.record)
    wait = _waits(deployments.Deployment.wait)
    cancel = _waits(deployments.Deployment.cancel)
    events = _iterates(deployments.Deployment.events)

    @property
    def id(self) -> str:
        return self._inner.id


class Tenant(_Facade[tenant.Tenant]):
    """One tenant; see `gateway_client.Tenant`."""

    ping = _waits(tenant.Tenant.ping)
    tools = _waits(tenant.Tenant.tools)
    tool = _waits(tenant.Tenant.tool)
    read = _waits(tenant.Tenant.read)
    write = _waits(tenant.Tenant.write)
    edit = _waits(tenant.Tenant.edit)
    glob = _waits(tenant.Tenant.glob)
    grep = _waits(tenant.Tenant.grep)
    bash = _waits(tenant.Tenant.bash)
    bash_output = _waits(tenant.Tenant.bash_output)
    kill_shell = _waits(tenant.Tenant.kill_shell)
    execs = _waits(tenant.Tenant.execs)
    run = _waits(tenant.Tenant.run)
    info = _waits(tenant.Tenant.info)
    metrics = _waits(tenant.Tenant.metrics)
    ports = _waits(tenant.Tenant.ports)
    agent_token = _waits(tenant.Tenant.agent_token)
    site = _waits(tenant.Tenant.site)
    start = _waits(tenant.Tenant.start)
    stop = _waits(tenant.Tenant.stop)
    sleep = _waits(tenant.Tenant.sleep)
    restart = _waits(tenant.Tenant.restart)
    rename = _waits(tenant.Tenant.rename)
    resize = _waits(tenant.Tenant.resize)
    move = _waits(tenant.Tenant.move)
    last_move = _waits(tenant.Tenant.last_move)
    snapshots = _waits(tenant.Tenant.snapshots)
    snapshot = _waits(tenant.Tenant.snapshot)
    restore = _waits(tenant.Tenant.restore)
    delete_snapshot = _waits(tenant.Tenant.delete_snapshot)
    begin_turn = _waits(tenant.Tenant.begin_turn)
    end_turn = _waits(tenant.Tenant.end_turn)
    history = _waits(tenant.Tenant.history)
    turn = _waits(tenant.Tenant.turn)
    restore_turn = _waits(tenant.Tenant.restore_turn)
    undo = _waits(tenant.Tenant.undo)
    delete = _waits(tenant.Tenant.delete)
    logs = _iterates(tenant.Tenant.logs)
    deployments = _waits(tenant.Tenant.deployments)
    variables = _waits(tenant.Tenant.variables)
    environment = _waits(tenant.Tenant.environment)
    publish = _makes(tenant.Tenant.publish, Deployment)
    rollback = _makes(tenant.Tenant.rollback, Deployment)
    change_environment = _makes(tenant.Tenant.change_environment, Deployment)
    clone = _makes(tenant.Tenant.clone, lambda loop, made: Tenant(loop, made))
    exec = _opens(tenant.Tenant.exec, Exec)
    attach = _opens(tenant.Tenant.attach, Exec)
    events = _opens(tenant.Tenant.events, EventStream)

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def state(self) -> State:
        return self._inner.state

    @property
    def files(self) -> Files:
        return Files(self._loop, self._inner.files)


class Client(_Facade[client.Client]):
    """A gateway and one token for it, for a plain `with`; see `gateway_client.Client`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        token: Token | None = None,
        name: str = "gateway_client",
        retry: Retry | None = Retry(),  # noqa: B008 - immutable
        on_change: OnChange | None = None,
    ) -> None:
        inner = client.Client(url, token=token, name=name, retry=retry, on_change=on_change)
        super().__init__(_Loop(), inner)

    tenants = _waits(client.Client.tenants)
    deployments = _waits(client.Client.deployments)
    templates = _waits(client.Client.templates)
    revoke = _waits(client.Client.revoke)
    audit = _waits(client.Client.audit)
    deploy = _makes(client.Client.deploy, Deployment)
    events = _opens(client.Client.events, EventStream)

    def __enter__(self) -> Client:
        self._loop.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._loop.run(self._inner.close())
        finally:
            self._loop.close()

    def tenant(self, name: str, *, session: str | None = None, read_before_write: bool = False) -> Tenant:
        found = self._inner.tenant(name, session=session, read_before_write=read_before_write)
        return Tenant(self._loop, found)

    def deployment(self, deployment_id: str) -> Deployment:
        return Deployment(self._loop, self._inner.deployment(deployment_id))
