"""The holder process, with real descriptors, and the gateway's client of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import signal
import socket
import stat
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.holder import holder as holder_client
from gateway.holder import holding
from gateway.holder.holder import HolderClient, held_at
from gateway.holder.holding import close, receive, send
from gateway.host import HostError, checks
from gateway.host.checks import Hint
from gateway.host.services import ensure_holder, holder_command, running_holder, stop_holder
from gateway.settings import Settings
from tests.waits import settled, until

IDLE = 4  # descriptors of one that holds nothing: the standard three, and where it listens

TURNS = 20  # of a holder and a gateway

Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start a holder in `tmp_path` and return it once it listens."""
    started: list[asyncio.subprocess.Process] = []

    async def start(seconds: float = 60, before: Sequence[str] = ()) -> asyncio.subprocess.Process:
        settings = Settings(runtime="local", state_dir=tmp_path, hold=seconds)
        process = await asyncio.create_subprocess_exec(*before, *holder_command(settings))
        started.append(process)
        await until(lambda: answers(tmp_path / "holder.sock"))
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.wait()


def answers(path: Path) -> bool:
    try:
        return held_at(path) >= 0
    except OSError:
        return False


def descriptors(process: asyncio.subprocess.Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


async def hung_up(connection: socket.socket) -> None:
    """Wait until the other end of a socket is closed everywhere."""
    connection.setblocking(False)
    assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connection, 1), 30) == b""


async def accepted(listener: socket.socket) -> socket.socket:
    async with asyncio.timeout(10):
        return (await asyncio.get_running_loop().sock_accept(listener))[0]


async def test_what_can_wait_is_told_a_moment_later(start: Start, tmp_path: Path) -> None:
    """Though nothing else is told; and what was put and taken back by then is not held."""
    await start()
    path = tmp_path / "holder.sock"
    read, write = os.pipe()
    async with HolderClient(path) as holder:
        await holder.taken_over()
        holder.put("one", [read], soon=True)
        assert held_at(path) == 0
        await until(lambda: held_at(path) == 1)
        holder.put("two", [write], soon=True)
        holder.drop("one", soon=True)
        holder.drop("two")
        await until(lambda: held_at(path) == 0)
    for descriptor in (read, write):
        os.close(descriptor)


async def test_what_is_put_outlives_who_put_it(start: Start, tmp_path: Path) -> None:
    """The next client gets it by name and in order, and it is the same socket."""
    process = await start()
    path = tmp_path / "holder.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    async with HolderClient(path) as holder:
        assert await holder.taken_over() == {}
        holder.put("one", [theirs.fileno(), write])
        holder.put("gone", [read])
        holder.drop("gone")
        await until(lambda: held_at(path) == 1)
    theirs.close()
    os.close(write)
    async with HolderClient(path) as holder:
        found = await holder.taken_over()
        assert list(found) == ["one"]
        again = socket.socket(fileno=found["one"][0])
        assert not again.get_inheritable()
        again.sendall(b"still there")
        assert ours.recv(100) == b"still there"
        os.write(found["one"][1], b"x")
        assert os.read(read, 10) == b"x"
        again.close()
        os.close(found["one"][1])
        holder.drop("one")
        await hung_up(ours)
    await until(lambda: descriptors(process) == IDLE)
    ours.close()
    os.close(read)


async def test_without_descriptors_a_name_is_refused_and_the_others_stay(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection stays too, and there is room again for what is put once others are dropped."""
    await start(before=("prlimit", "--nofile=100:100"))
    path, room = tmp_path / "holder.sock", 100 - holding._SPARE
    ours, theirs = socket.socketpair()
    async with HolderClient(path) as holder:
        await holder.taken_over()
        for number in range(3 * room):
            holder.put(str(number), [theirs.fileno()])
        await until(lambda: "no room for " + str(3 * room - 1) in caplog.text)
        assert held_at(path) == room and "no room for " + str(room - 1) not in caplog.text
        holder.drop("0")
        holder.put("last", [theirs.fileno()])
        await until(lambda: held_at(path) == room)
        assert "no room for last" not in caplog.text and "is gone" not in caplog.text
    theirs.close()
    async with HolderClient(path) as holder:
        found = await holder.taken_over()
        assert found.keys() == {*map(str, range(1, room)), "last"}
        for descriptors in found.values():
            close(descriptors)
    ours.close()


async def test_all_is_closed_where_no_gateway_comes(start: Start, tmp_path: Path) -> None:
    """But not while one is connected; a client that only asks for information does not count."""
    await start(0.3)
    path = tmp_path / "holder.sock"
    ours, theirs = socket.socketpair()
    async with HolderClient(path) as holder:
        await holder.taken_over()
        with theirs:
            holder.put("one", [theirs.fileno()])
            await asyncio.sleep(0.6)
            assert held_at(path) == 1
    await hung_up(ours)
    assert held_at(path) == 0
    ours.close()


async def test_a_holder_that_was_killed_gets_everything_anew(start: Start, tmp_path: Path) -> None:
    process = await start()
    path = tmp_path / "holder.sock"
    ours, theirs = socket.socketpair()
    async with HolderClient(path) as holder:
        await holder.taken_over()
        holder.put("one", [theirs.fileno()])
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await until(lambda: not holder.there)
        holder.put("two", [theirs.fileno()])
        await start()
        await until(lambda: holder.there and held_at(path) == 2)
    theirs.close()
    async with HolderClient(path) as holder:
        found = await holder.taken_over()
        assert found.keys() == {"one", "two"}
        for held in found.values():
            os.close(held[0])
    ours.close()


async def test_holder_and_gateway_die_in_turn_at_any_moment(start: Start, tmp_path: Path) -> None:
    """Each next gateway finds all of the one before, which had given it to the next holder anew."""
    path, seed = tmp_path / "holder.sock", random.randrange(1 << 32)
    print(f"seed {seed}")
    chance, process = random.Random(seed), await start()
    pairs, kept = list[tuple[socket.socket, socket.socket]](), dict[str, list[int]]()
    for number in range(TURNS):
        async with HolderClient(path) as holder:
            found = await holder.taken_over()
            assert found.keys() == kept.keys()
            for name, descriptors in found.items():
                assert os.path.sameopenfile(descriptors[0], kept[name][0])
                close(descriptors)
                holder.keep(name, kept[name])
            if kept and chance.random() < 0.3:
                kept.pop(gone := chance.choice(list(kept)))
                holder.drop(gone)
            pairs.append(socket.socketpair())
            kept[f"n{number}"] = [pairs[-1][1].fileno()]
            holder.put(f"n{number}", kept[f"n{number}"], soon=chance.random() < 0.5)
            await asyncio.sleep(chance.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            await process.wait()
            await asyncio.sleep(chance.uniform(0, 0.02))
            process = await start()
            await until(lambda: held_at(path) == len(kept))
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


async def test_a_holder_that_lives_on_drops_what_it_was_not_told_to_drop(
    start: Start, tmp_path: Path
) -> None:
    """A word that a broken connection took with it is said again: a command's sockets would stay open."""
    await start()
    path = tmp_path / "holder.sock"
    async with HolderClient(path) as holder:
        await holder.taken_over()
        holder.put("one", [0])
        holder.put("two", [0])
        await until(lambda: held_at(path) == 2)
        assert holder._socket is not None
        holder._socket.shutdown(socket.SHUT_RDWR)
        holder.drop("one")
        await until(lambda: held_at(path) == 1)


async def test_without_a_holder_nothing_is_held_and_nothing_fails(tmp_path: Path) -> None:
    async with HolderClient(tmp_path / "holder.sock") as holder:
        assert await holder.taken_over() == {}
        assert not holder.there
        holder.put("one", [0])
        holder.drop("one")


async def test_no_thread_is_used_to_look_for_a_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway without one looks all the time: by threads it took more CPU than all else of it at rest."""
    looks, threads = Counter[str](), list[object]()
    connected, loop = holder_client._connected, asyncio.get_running_loop()
    in_thread = loop.run_in_executor

    def look(*given: Any, **more: Any) -> socket.socket:
        looks["all"] += 1
        return connected(*given, **more)

    def aside(*given: Any) -> Any:
        threads.append(given)
        return in_thread(*given)

    monkeypatch.setattr(holder_client, "_connected", look)
    monkeypatch.setattr(holder_client, "_AGAIN", 0.001)
    monkeypatch.setattr(loop, "run_in_executor", aside)
    async with HolderClient(tmp_path / "holder.sock") as holder:
        await holder.taken_over()
        await until(lambda: looks["all"] > 5)
    assert not threads


@pytest.mark.parametrize(
    "said", [b"no JSON", b"[]", b"{}", b'{"v": 2, "list": true}', b'{"v": 1, "put": 7}', b"\xff" * 2000]
)
async def test_what_is_no_packet_ends_its_connection_and_leaves_nothing(
    start: Start, tmp_path: Path, said: bytes
) -> None:
    process = await start()
    path = tmp_path / "holder.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(path))
        socket.send_fds(connection, [said], [0, 1, 2])
        connection.settimeout(30)
        assert connection.recv(100) == b""
    await until(lambda: descriptors(process) == IDLE)


async def test_many_names_arrive_whole(start: Start, tmp_path: Path) -> None:
    """Also more than fit into the holder's queue at once."""
    await start()
    path = tmp_path / "holder.sock"
    ours, theirs = socket.socketpair()
    async with HolderClient(path) as holder:
        await holder.taken_over()
        for number in range(600):
            holder.put(f"n{number}", [theirs.fileno()] * 8)
        for number in range(0, 600, 2):
            holder.drop(f"n{number}")
        await until(lambda: held_at(path) == 300)
    theirs.close()
    ours.close()


async def test_what_was_sent_before_a_list_is_in_it(start: Start, tmp_path: Path) -> None:
    """However slow the holder is: a gateway that is killed has just put its latest commands."""
    process = await start()
    path = tmp_path / "holder.sock"
    process.send_signal(signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as killed:
        killed.connect(str(path))
        for number in range(20):
            send(killed, {"v": 1, "put": f"n{number}"}, [0] * 8)
        send(killed, {"v": 1, "drop": "n0"})
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as following:
        following.connect(str(path))
        send(following, {"v": 1, "list": True})
        process.send_signal(signal.SIGCONT)
        following.settimeout(30)
        found = set[str]()
        while (received := await asyncio.to_thread(receive, following)) and "end" not in received[0]:
            found.add(received[0]["name"])
            close(received[1])
    assert found == {f"n{number}" for number in range(1, 20)}


async def test_a_holder_that_is_slow_is_waited_for(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a gateway does not get to know of at its start would end."""
    process = await start()
    path = tmp_path / "holder.sock"
    async with HolderClient(path) as holder:
        await holder.taken_over()
        holder.put("one", [0])
        await until(lambda: held_at(path) == 1)
    monkeypatch.setattr(holder_client, "_PATIENCE", 0.05)
    process.send_signal(signal.SIGSTOP)
    async with HolderClient(path) as holder:
        listing = asyncio.create_task(holder.taken_over())
        await until(lambda: "cannot list" in caplog.text)
        monkeypatch.setattr(holder_client, "_PATIENCE", 30.0)
        process.send_signal(signal.SIGCONT)
        found = await listing
        assert found.keys() == {"one"} and holder.there
    close(found["one"])


async def test_a_list_that_breaks_off_leaves_no_descriptor(tmp_path: Path) -> None:
    """A duplicate of a command's sockets would keep it running for ever."""
    path = tmp_path / "holder.sock"
    ours, theirs = socket.socketpair()

    def break_off(listener: socket.socket) -> None:
        for _ in range(holder_client._ATTEMPTS):
            with listener.accept()[0] as client:
                client.recv(1000)
                send(client, {"name": "one"}, [theirs.fileno()])

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        breaking = asyncio.create_task(asyncio.to_thread(break_off, listener))
        async with HolderClient(path) as holder:
            assert await holder.taken_over() == {}
            await breaking
            theirs.close()
            await hung_up(ours)
    ours.close()


@pytest.mark.parametrize("busy", [False, True])
async def test_leaving_amid_a_reconnect_closes_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    """At once, whether a thread waits for the holder's answer, or none is free to ask."""
    monkeypatch.setattr(holder_client, "_PATIENCE", 60)
    path, free = tmp_path / "holder.sock", threading.Event()
    loop = asyncio.get_running_loop()
    waiting = [loop.run_in_executor(None, free.wait) for _ in range(100 if busy else 0)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.ExitStack() as last:
        last.callback(free.set)
        async with HolderClient(path) as holder:
            await holder.taken_over()  # nobody is there
            listener.bind(str(path))
            listener.listen()
            listener.setblocking(False)
            client = last.enter_context(await accepted(listener))
            if not busy:
                await until(lambda: select.select([client], [], [], 0)[0])
                client.recv(1000)
        await hung_up(client)
    await asyncio.gather(*waiting)


async def test_what_waits_for_room_is_sent_before_the_holder_is_left(start: Start, tmp_path: Path) -> None:
    """To a holder that is slow, and whose queue is full."""
    process = await start()
    path = tmp_path / "holder.sock"
    async with HolderClient(path) as holder:
        await holder.taken_over()
        process.send_signal(signal.SIGSTOP)
        for number in range(1000):
            holder.put(f"n{number}", [0])
        leaving = asyncio.create_task(holder.leave())
        await settled()
        assert not leaving.done()
        process.send_signal(signal.SIGCONT)
        await leaving
    await until(lambda: held_at(path) == 1000)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_gets_nothing_even_if_the_socket_is_open_to_it(
    start: Start, tmp_path: Path
) -> None:
    """Its mode is one barrier; who asks is another."""
    await start()
    tmp_path.chmod(0o711)
    (tmp_path / "holder.sock").chmod(0o666)
    read, write = os.pipe()
    async with HolderClient(tmp_path / "holder.sock") as holder:
        holder.put("one", [read])
        with contextlib.chdir(tmp_path), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(30)
            os.seteuid(65534)
            try:
                stranger.connect("holder.sock")
            finally:
                os.seteuid(0)
            with contextlib.suppress(ConnectionError):
                send(stranger, {"v": 1, "list": True})
                assert receive(stranger) is None
        assert held_at(tmp_path / "holder.sock") == 1
    for descriptor in (read, write):
        os.close(descriptor)


async def test_another_holder_at_the_same_place_is_refused(start: Start, tmp_path: Path) -> None:
    await start()
    settings = Settings(runtime="local", state_dir=tmp_path)
    second = await asyncio.create_subprocess_exec(*holder_command(settings), stderr=asyncio.subprocess.PIPE)
    said = (await asyncio.wait_for(second.communicate(), 30))[1]
    assert second.returncode == 1 and b"another holder is listening" in said
    assert held_at(tmp_path / "holder.sock") == 0


def test_a_packet_with_too_many_descriptors_is_refused_and_closed() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = len(os.listdir("/proc/self/fd"))
    send(one, {"v": 1, "put": "x"}, [0] * 20)
    with pytest.raises(ValueError, match="not a packet"):
        receive(other)
    assert len(os.listdir("/proc/self/fd")) == before
    one.close()
    other.close()


def test_a_holder_is_started_once_found_by_its_socket_and_stopped(tmp_path: Path) -> None:
    """As quickstart does without systemd."""
    settings = Settings(runtime="local", state_dir=tmp_path)
    assert running_holder(settings) is None
    assert not stop_holder(settings)
    lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(lock, True)  # as quickstart's shell hands it on
    said = ensure_holder(settings, tmp_path / "log")
    os.close(lock)
    try:
        pid = running_holder(settings)
        assert pid is not None and said == f"started, pid {pid}"
        assert ensure_holder(settings, tmp_path / "log") == f"already running, pid {pid}"
        of = (tmp_path / "lock").stat()
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # of a client that has just gone
                assert not os.path.samestat(entry.stat(), of), "who waits for that lock would wait for this"
        status = Path(f"/proc/{pid}/status").read_text()
        assert int(status.partition("VmRSS:")[2].split()[0]) < 32 << 10
    finally:
        assert stop_holder(settings)
    assert running_holder(settings) is None
    assert not (tmp_path / "holder.sock").exists()


def test_a_holder_that_cannot_start_says_where_to_look(tmp_path: Path) -> None:
    settings = Settings(runtime="local", state_dir=tmp_path / ("x" * 100) / ("y" * 50))
    settings.state_dir.mkdir(parents=True)
    with pytest.raises(HostError, match="see the end of"):
        ensure_holder(settings, tmp_path / "log")


def test_doctor_says_what_is_held_or_what_a_restart_would_end(tmp_path: Path) -> None:
    settings = Settings(runtime="local", state_dir=tmp_path)
    with pytest.raises(Hint, match="a restart of the gateway ends all commands"):
        checks.holder(settings)
    ensure_holder(settings, tmp_path / "log")
    try:
        assert checks.holder(settings).startswith("holds 0 commands")
    finally:
        stop_holder(settings)

    def hang_up() -> None:
        with listener.accept()[0] as client:
            client.recv(1000)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(settings.holder_socket))
        listener.listen()
        other = threading.Thread(target=hang_up)
        other.start()
        with pytest.raises(HostError, match="not a holder of this version"):
            checks.holder(settings)
        other.join()
