"""A command whose warm shell hangs because its tenant was paused, or whose cgroup stays for a reason.

And one whose start is given up half-way.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import GatewayError, TenantNotRunning, Timeout, Unavailable
from gateway.incus import ExecSockets, Incus, IncusError, NotAwaited, Operation, client
from gateway.incus.exec_sockets import OperationWait
from gateway.incus.stream_socket import StreamSocket
from gateway.rootfs.command_cgroup import CommandCgroup
from gateway.runtime import ExecSpec
from gateway.runtime.incus import commands as starting
from gateway.runtime.incus.commands import Assignment, IncusCommands, IncusShell
from gateway.runtime.incus.process import ContainerScripts, IncusProcess
from gateway.settings import Settings


class Incusd(Incus):
    """An Incus with one tenant in a given status."""

    def __init__(self, status: str) -> None:
        super().__init__(Path("/nowhere"), "default", 1.0)
        self.status = status

    async def instance(self, name: str, **_: Any) -> dict[str, Any]:
        return {"status": self.status}


class Still(IncusShell):
    """A warm shell that reads no line."""

    def __init__(self) -> None:
        self.tenant = "shop"
        self.abandoned = False

    async def begin(self, order: Assignment) -> IncusProcess:
        await asyncio.Event().wait()
        raise AssertionError

    async def abandon(self) -> None:
        self.abandoned = True


@pytest.mark.parametrize(
    ("status", "raised"), [("Frozen", TenantNotRunning), ("Stopped", TenantNotRunning), ("Running", Timeout)]
)
async def test_a_command_for_a_tenant_that_was_just_paused_says_so(
    monkeypatch: pytest.MonkeyPatch, status: str, raised: type[GatewayError]
) -> None:
    """Even if the gateway did not know when it took a warm shell; that shell is discarded."""

    async def given(tenant: str) -> int:
        raise AssertionError("no other shell is started")

    shell = Still()

    async def take(tenant: str, terminal: bool) -> IncusShell:
        return shell

    commands = IncusCommands(Settings(exec_start_timeout=0.01), Incusd(status), given)
    monkeypatch.setattr(commands._warm_shells, "take", take)
    with pytest.raises(raised) as caught:
        await commands.exec("shop", ExecSpec(("true",)))
    assert caught.value.facts.get("status") == (None if raised is Timeout else status.lower())
    assert shell.abandoned


class Late(Incusd):
    """One that did not wait for the sockets of the first commands, so that their shells never ran."""

    def __init__(self, late: int) -> None:
        super().__init__("Running")
        self.late, self.asked = late, 0

    async def exec(self, instance: str, command: list[str], **given: Any) -> ExecSockets:
        self.asked += 1
        if self.asked <= self.late:
            raise NotAwaited
        return object.__new__(ExecSockets)


@pytest.mark.parametrize(("late", "asked"), [(0, 1), (2, 3), (9, 3)])
async def test_a_shell_whose_sockets_came_too_late_is_started_again(late: int, asked: int) -> None:
    async def pid(tenant: str) -> int:
        return 0

    incusd = Late(late)
    commands = IncusCommands(Settings(), incusd, pid)
    if late < asked:
        assert await commands._begin("shop", ["sh"], None)
    else:
        with pytest.raises(NotAwaited):
            await commands._begin("shop", ["sh"], None)
    assert incusd.asked == asked


async def test_a_refused_handshake_is_told_apart_from_an_incusd_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Incusd answers 404 once it has waited for five seconds."""
    created = {"metadata": {"id": "o", "metadata": {"fds": {"control": "c", "0": "s", "1": "s", "2": "s"}}}}

    async def request(*_: Any, **__: Any) -> Any:
        return created

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        if b"/wait" in asked:
            await reader.read()
        else:
            writer.write(b"HTTP/1.1 404 Not Found\r\n\r\n")
        writer.close()

    incusd = Incus(tmp_path / "s", "default", 1.0)
    monkeypatch.setattr(incusd, "_request", request)
    async with await asyncio.start_unix_server(serve, str(tmp_path / "s")):
        with pytest.raises(NotAwaited):
            await incusd.exec("shop", ["sh"])
    (tmp_path / "s").unlink(missing_ok=True)
    with pytest.raises(IncusError) as away:
        await incusd.exec("shop", ["sh"])
    assert away.value.status == 0


class Ended(ExecSockets):
    """The sockets of a command that exited with 3."""

    def __init__(self) -> None:
        self.terminal = False

    async def result(self) -> Operation:
        return Operation(ok=True, error="", metadata={"return": 3})


class Staying(CommandCgroup):
    """A cgroup that cannot be removed now."""

    def __init__(self, why: GatewayError) -> None:
        super().__init__(Path("/none"))
        self.why = why

    async def remove(self) -> bool:
        raise self.why


@pytest.mark.parametrize("why", [Timeout("too slow"), Unavailable("the broker is away")])
async def test_an_exit_is_known_even_if_the_cgroup_is_not_removed_in_time(why: GatewayError) -> None:
    """It was told as lost on a host under load."""
    settings = Settings()
    inside = ContainerScripts(settings, Incusd("Running"))
    own = {"tenant": "shop", "exec": "own/abc", "pid": 7, "started": 1.0, "terminal": False, "path": ""}
    process = IncusProcess(inside, 1.0, {**own, "method": "cgroup"}, Ended(), Staying(why), None)
    assert (await process.wait()).code == 3


class Opened(ExecSockets):
    """The sockets of a command that has just been started."""

    def __init__(self) -> None:
        self.closed = False

    async def aclose(self) -> None:
        self.closed = True


async def test_a_start_that_is_given_up_leaves_no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a warm shell whose tenant is paused meanwhile, say: only the garbage collector closed them."""
    opened = list[Opened]()
    looking = asyncio.Event()

    class Starting(Incusd):
        async def exec(self, *given: Any, **more: Any) -> ExecSockets:
            opened.append(Opened())
            return opened[-1]

    async def slow(pid: int) -> Path:
        looking.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def given(tenant: str) -> int:
        return 7

    monkeypatch.setattr(starting, "of_init", slow)
    start = asyncio.create_task(
        IncusCommands(Settings(), Starting("Running"), given).exec("shop", ExecSpec(("true",)))
    )
    await looking.wait()
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    assert all(one.closed for one in opened)


async def test_a_command_that_cannot_be_followed_leaves_no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connected ones are closed, too, where one of the files that hold a command cannot be made."""
    closed = list[str]()

    class Stream(StreamSocket):
        def __init__(self) -> None:
            pass

        def close(self) -> None:
            closed.append("stream")

    class Asked(OperationWait):
        def __init__(self) -> None:
            pass

        def close(self) -> None:
            closed.append("operation")

    class Answering(Incusd):
        async def _request(self, *given: Any, **more: Any) -> dict[str, Any]:
            return {"metadata": {"id": "op", "metadata": {"fds": {}}}}

    async def ask(*given: Any) -> OperationWait:
        return Asked()

    async def connected(*given: Any, **more: Any) -> dict[str, StreamSocket]:
        return {"control": Stream(), "0": Stream()}

    def full(*given: Any, **more: Any) -> ExecSockets:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(OperationWait, "ask", ask)
    monkeypatch.setattr(client, "connect", connected)
    monkeypatch.setattr(client, "ExecSockets", full)
    with pytest.raises(IncusError):
        await Answering("Running").exec("shop", ["true"])
    assert sorted(closed) == ["operation", "stream", "stream"]
