"""The broker as a separate process: whom it serves, what it does for them, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.errors import NotFound, Unavailable
from gateway.rootfs import FilesystemRoot, process_tree
from gateway.rootfs.broker_client import BrokerClient
from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import FileTools
from tests.unit.incusd import answering, instance
from tests.unit.test_dead_members import incus
from tests.unit.test_rootfs_workers import children_of, gone, make_root, workers_below

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="a broker of its own runs as root")

CONNECT = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    s.connect(sys.argv[1])
    s.send(b'{"do": "same", "worker": 1}')
    print(s.recv(100).decode())
except OSError as error:
    print(type(error).__name__)
"""


class Running:
    """A broker for tenants below `folder`, serving the user `nobody`."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(broker_socket=folder / "run" / "broker.sock")
        self.process: subprocess.Popen[bytes]
        self._folder = folder

    @property
    def socket(self) -> Path:
        assert self.settings.broker_socket is not None
        return self.settings.broker_socket

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "broker"],
            env={
                "PATH": os.defpath,
                "GATEWAY_INCUS_SOCKET": str(self._folder / "unix.socket"),
                "GATEWAY_BROKER_SOCKET": str(self.socket),
                "GATEWAY_BROKER_USER": "nobody",
                "GATEWAY_SECRET": "this-is-no-worker's-business-0123456789",
            },
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            for _ in range(6000):  # a minute, on a busy machine
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                    probe.connect(str(self.socket))
                    return
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.01)
                    break
        raise AssertionError("the broker does not listen")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(10)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path)
    table = {
        "/1.0/instances/one": instance("one"),
        "/1.0/instances/foreign": instance("foreign", expanded_config={}),
    }
    with answering(tmp_path / "unix.socket", table):
        running.start()
        yield running
        running.stop()


@pytest.fixture
def root(tmp_path: Path) -> FilesystemRoot:
    """A tenant and a foreign container, in the places where Incus would have them."""
    for name in ("foreign", "one"):
        laid = make_root(tmp_path / "storage-pools/pool/containers" / name, "rootfs")
    return replace(laid, tenant="one")


async def read(workers: Workers, root: FilesystemRoot) -> str:
    tools = FileTools(workers, workers_settings)
    answer = await tools.call(root, ToolSession(), "Read", {"file_path": "a.txt"})
    return str(answer.data()["content"][0]["text"])


workers_settings = Settings()


@needs_root
async def test_serves(broker: Running, root: FilesystemRoot) -> None:
    """A connecting gateway gets confined workers without the gateway's secret, and starts no broker."""
    async with Workers(broker.settings) as workers:
        assert "alpha" in await read(workers, root)
        assert workers.broker._process is None
        layers = workers.layers(root.tenant)
        assert layers is not None and {"mount", "uid", "seccomp"} <= set(layers)
        # the first connection was the fixture's
        (serving,) = [pid for pid in children_of(broker.process.pid) if children_of(pid)]
        (worker,) = workers_below(serving)
        assert b"GATEWAY_SECRET" not in Path(f"/proc/{broker.process.pid}/environ").read_bytes()
    await gone(worker)


@needs_root
async def test_cuts_off_members_of_the_cluster_alone(broker: Running, tmp_path: Path) -> None:
    """It reads by itself who is one: the gateway's user ends no other connection of this host."""
    client = BrokerClient(at=broker.socket)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        member, stranger = (f"127.0.0.1:{one.getsockname()[1]}" for one in (server, other))
        incus(tmp_path, member)
        with socket.create_connection(server.getsockname()), socket.create_connection(other.getsockname()):
            with pytest.raises(NotFound):
                await client.request({"do": "cut_off", "member": stranger})
            answer, _ = await client.request({"do": "cut_off", "member": member})
            assert answer["ended"] >= 1  # which ends the other end, too
            answer, _ = await client.request({"do": "cut_off", "member": member})
            assert answer == {"ended": 0}
    await client.aclose()


@needs_root
async def test_leaves_disks_to_incus_where_the_pool_has_no_simple_quotas(broker: Running) -> None:
    """`tests/integration/test_quotas.py` has pools that have them."""
    client = BrokerClient(at=broker.socket)
    assert await client.limit_disk("shop") is None
    await client.free_disks()
    await client.aclose()


@needs_root
async def test_comes_back(broker: Running, root: FilesystemRoot) -> None:
    """A restarted broker is found again; its workers ended with it."""
    async with Workers(broker.settings) as workers:
        await read(workers, root)
        assert broker.stop() == 0
        assert not broker.socket.exists()
        with pytest.raises(Unavailable):
            await workers.broker.request({"do": "same", "worker": 1})
        broker.start()
        await asyncio.gather(read(workers, root), return_exceptions=True)
        assert "alpha" in await read(workers, root)


@needs_root
@pytest.mark.parametrize(
    ("mode", "uid", "answer"),
    [
        (0o660, 65534, '{"same":false}'),  # nobody, whom it serves
        (0o660, 12345, "PermissionError"),
        (0o666, 12345, ""),  # the socket lets it in, the kernel's word on who it is does not
    ],
)
def test_whom_it_serves(mode: int, uid: int, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root and the gateway's user are served, by SO_PEERCRED, whatever the socket's mode."""
    folder = Path(f"/run/gateway-test-{os.getpid()}")  # where everybody may look, unlike pytest's
    running = Running(folder)
    folder.mkdir()
    running.start()
    try:
        status = running.socket.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 65534, 0o660)
        running.socket.chmod(mode)
        command = [sys.executable, "-c", CONNECT, str(running.socket), str(uid)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        assert said.strip() in (
            {answer, "ConnectionResetError", "BrokenPipeError"} if not answer else {answer}
        )
    finally:
        running.stop()
        running.socket.parent.rmdir()
        folder.rmdir()


# one broker is asked for all of a table: to start it takes longer than to ask
REFUSED: tuple[dict[str, object], ...] = (
    {"do": "tree", "step": "end", "path": "/"},
    {"do": "tree", "step": "end", "tenant": "shop", "group": "own"},
    {"do": "tree", "step": "shout", "tenant": "one", "group": "own"},
    {"do": "spawn", "tenant": "one", "workspace": "/srv/site", "path": "/etc"},
    {"do": "bind_ports", "tenant": "foreign"},
    {"do": "bind_ports", "port": "eth0"},
    {"do": "shell"},
    {},
)


@needs_root
async def test_refuses(broker: Running) -> None:
    """Unknown requests are refused, and the connection stays open."""
    client = BrokerClient(at=broker.socket)
    for request in REFUSED:
        with pytest.raises((Unavailable, NotFound)):
            print(request, await client.request({"do": "?"} | request))
        assert (await client.request({"do": "same", "worker": 1}))[0] == {"same": False}, request
    await client.aclose()


def test_only_commands_groups() -> None:
    """Only the cgroups of one gateway's commands in a container are touched."""
    container = Path("/cgroup/lxc.payload.shop")
    assert process_tree.of_command(container, "own/exec1") == container / "gateway/own/exec1"
    assert process_tree.of_command(container, "own") == container / "gateway/own"
    for bad in (
        "",
        ".",
        "..",
        "own/..",
        "../init.scope",
        "own/exec/below",
        "/own",
        "own/",
        "own//",
        "a b",
        "a\0",
    ):
        with pytest.raises(ValueError, match="cgroup"):
            process_tree.of_command(container, bad)


@needs_root
async def test_foreign_instances(broker: Running, root: FilesystemRoot) -> None:
    """A compromised gateway gets no worker on foreign instances: they seem not to exist."""
    async with Workers(broker.settings) as workers:
        spawn = workers.spawn(root).wire()
        for name in ("foreign", "absent", "..", "../containers/one", "one/../foreign", ""):
            with pytest.raises(NotFound):
                print(name, await workers.broker.request(spawn | {"tenant": name}))
        for folder in ("/", "/etc", "/srv/site/../..", "/srv"):
            with pytest.raises(Unavailable):
                await workers.broker.request(spawn | {"workspace": folder})
        # What older requests carried is nobody's word any more.
        given = {"path": "/", "uid": 0, "gid": 0, "idmap": [], "shifted": True}
        answer, (descriptor,) = await workers.broker.request(spawn | given)
        with socket.socket(fileno=descriptor) as ready:
            assert b"seccomp" in ready.recv(1000)
            (worker,) = [pid for one in children_of(broker.process.pid) for pid in workers_below(one)]
            status, ids = Path(f"/proc/{worker}/status").read_text(), "\t1001000" * 4
            assert f"Uid:{ids}\nGid:{ids}\n" in status
            assert Path(f"/proc/{worker}/mountinfo").read_text().split()[3].endswith("/one/rootfs/srv/site")
        await workers.broker.request({"do": "kill", "worker": answer["worker"]})
