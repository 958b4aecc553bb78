"""Measures what clients and commands cost, and how soon a command answers, beside the other ways.

Idle websockets and commands that stream at the same time: the gateway's memory for each. A command's first
byte by a standby, by a fresh exec of the Incus API and by `incus exec`; a cancel until nothing of the tree
is left; the echo of a keystroke beside `incus exec -t`, and terminado in front of it where that is
installed. The ways take turns, so that ratios are what to look at. Exit code 1 only where an answer or a
byte is wrong; nothing passes or fails by time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, cast

import aiohttp
import uvloop

from gateway import protocol
from gateway_client import Client
from gateway_client.errors import GatewayError
from tests.bench.bench import (
    PROJECT,
    SOCKET,
    USER,
    WORKSPACE,
    Bare,
    Wrong,
    check,
    container,
    gateway,
    percentile,
    plain,
)
from tests.contracts.processes import alive, mark

STANDBY, API, CLI, TERMINADO = "standby", "Incus API", "incus exec", "terminado"
TREE: Final = 5
_QUIET: Final = 0.3
_ECHO: Final = ("sh", "-c", "stty raw -echo; printf ready; exec cat")
_EXEC: Final = ("--user", USER, "--group", USER, "--cwd", WORKSPACE)

Key = Callable[[bytes], Awaitable[None]]


# --- processes ----------------------------------------------------------------------------------------


def processes() -> dict[int, tuple[int, str]]:
    """Return parent and command line of each process of the host, those in containers included."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(entry.name)] = (parent, line)
    return found


def serving() -> int:
    """Return the process id of the gateway that this process has started."""
    for pid, (parent, line) in processes().items():
        if parent == os.getpid() and line.rstrip().endswith("-m gateway serve"):
            return pid
    raise RuntimeError("the gateway does not run")


def memory(pid: int, key: str = "Pss") -> int:
    """Return KiB of a process."""
    return int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition(f"\n{key}:")[2].split()[0])


async def standbys(name: str) -> dict[str, float]:
    """Return the mean KiB of the shells that wait in `name`, and of their helpers on the host."""
    async with asyncio.timeout(30):
        while True:
            there = processes()
            helpers = [pid for pid, (_, line) in there.items() if " forkexec " in line and name in line]
            waiting = [
                pid
                for pid, (parent, line) in there.items()
                if parent in helpers and line.partition(" ")[0].endswith("sh")
            ]
            if len(waiting) == 3:  # two for pipes, one for a terminal
                break
            await asyncio.sleep(0.05)  # nobody tells when a standby is ready
    return {
        "shell_kib": sum(memory(pid) for pid in waiting) / len(waiting),
        "helper_kib": sum(memory(pid) for pid in helpers) / len(helpers),
    }


# --- memory under load --------------------------------------------------------------------------------


async def crowd(client: Client, name: str, pid: int, clients: int, execs: int, lines: int) -> dict[str, Any]:
    """Return the gateway's memory with idle clients, with commands that wait, and as all of these stream."""
    whole = "".join(f"{number}\n" for number in range(1, lines + 1)).encode()
    wanted, started = hashlib.sha256(whole).digest(), 0
    all_started, go = asyncio.Event(), asyncio.Event()
    before = memory(pid), memory(pid, "Rss")
    async with contextlib.AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(plain(client, name)) for _ in range(clients)]
        idle = memory(pid), memory(pid, "Rss")

        async def one(socket: aiohttp.ClientWebSocketResponse) -> None:
            nonlocal started
            script = f"read x; exec seq 1 {lines}"
            params = {"argv": ["sh", "-c", script], "stdin": True}
            await socket.send_str(protocol.request(1, "exec/start", params))
            said = protocol.decode_server_text(await socket.receive_str())
            check(isinstance(said, protocol.Reply) and said.error is None, f"exec/start: {said}")
            assert isinstance(said, protocol.Reply) and said.result is not None
            started += 1
            if started == execs:
                all_started.set()
            await go.wait()
            await socket.send_bytes(protocol.pack_frame(0, said.result["channel"], b"\n"))
            digest = hashlib.sha256()
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    digest.update(memoryview(message.data)[protocol.HEADER_SIZE :])
                    continue
                told = protocol.decode_server_text(message.data)
                if isinstance(told, protocol.Notification) and told.method == "exec/exited":
                    check(told.params["exitCode"] == 0, f"seq: {told.params}")
                    break
            check(digest.digest() == wanted, "a command's output differs")

        streaming: asyncio.Future[Any] = asyncio.gather(*(one(socket) for socket in sockets[:execs]))
        starting: asyncio.Future[Any] = asyncio.ensure_future(all_started.wait())
        try:
            await asyncio.wait([streaming, starting], return_when=asyncio.FIRST_COMPLETED)
            waiting, peak = memory(pid), 0
            began = time.perf_counter()
            go.set()
            while not streaming.done():
                peak = max(peak, memory(pid))
                await asyncio.wait([streaming], timeout=0.05)  # a sample each time
            await streaming
            took = time.perf_counter() - began
        finally:
            streaming.cancel()
            starting.cancel()
    return {
        "clients": clients,
        "execs": execs,
        "before_mib": before[0] / 1024,
        "client_kib": (idle[0] - before[0]) / clients,
        "client_rss_kib": (idle[1] - before[1]) / clients,
        "waiting_kib": (waiting - idle[0]) / execs,
        "streaming_kib": (peak - idle[0]) / execs,
        "mb_per_s": len(whole) * execs / 1e6 / took,
    }


# --- first bytes and cancels --------------------------------------------------------------------------


async def by_standby(socket: aiohttp.ClientWebSocketResponse) -> float:
    began = time.perf_counter()
    await socket.send_str(protocol.request(1, "exec/start", {"argv": ["echo", "first"]}))
    first = 0.0
    async for message in socket:
        if message.type is aiohttp.WSMsgType.BINARY:
            first = first or time.perf_counter() - began
            check(message.data[protocol.HEADER_SIZE :] == b"first\n", "echo's output")
        elif isinstance(protocol.decode_server_text(message.data), protocol.Notification):
            break
    check(first, "echo printed nothing")
    return first


async def by_api(bare: Bare) -> float:
    began, first = time.perf_counter(), 0.0

    async def taken(data: bytes) -> None:
        nonlocal first
        first = first or time.perf_counter() - began

    await bare.exec(["echo", "first"], taken)
    return first or time.perf_counter() - began


def _cli(*words: str) -> tuple[tuple[str, ...], dict[str, str]]:
    environment = {"INCUS_DIR": str(Path(SOCKET).parent), **os.environ, "INCUS_PROJECT": PROJECT}
    return ("incus", "exec", *words), environment


async def by_cli(name: str) -> float:
    words, environment = _cli(name, *_EXEC, "--", "echo", "first")

    def first_byte() -> float:  # in a thread for the reason of `bench.spawned`
        began, quiet = time.perf_counter(), subprocess.DEVNULL
        with subprocess.Popen(words, env=environment, stdin=quiet, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)  # nothing where it loses its output, as it does now and then
            return time.perf_counter() - began

    return await asyncio.to_thread(first_byte)


async def first_bytes(client: Client, bare: Bare, rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {STANDBY: [], API: [], CLI: []}
    async with plain(client, bare.name) as socket:
        for _ in range(rounds):
            samples[CLI].append(await by_cli(bare.name))
            samples[API].append(await by_api(bare))
            samples[STANDBY].append(await by_standby(socket))
            # the shell that was taken is replaced meanwhile: that disturbs no way's next turn
            await asyncio.sleep(_QUIET)
    return samples


async def cancels(client: Client, name: str, rounds: int) -> list[float]:
    shop, samples = client.tenant(name), []
    for _ in range(rounds):
        number = mark()
        script = " ".join(f"sleep {number} &" for _ in range(TREE)) + " echo ready; wait"
        async with shop.exec(["sh", "-c", script]) as run:
            check(await anext(run.stdout) == b"ready\n", "the tree did not grow")
            began = time.perf_counter()
            killed = await run.cancel()
            samples.append(time.perf_counter() - began)
            check(killed.survivors == 0 and alive(number) == 0, f"a cancel left something: {killed}")
    return samples


# --- keystrokes ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def keys_by_gateway(client: Client, name: str) -> AsyncIterator[Key]:
    async with client.tenant(name).exec(_ECHO, pty=(80, 24)) as run:
        said = b""
        while b"ready" not in said:
            said += await anext(run.stdout)

        async def key(typed: bytes) -> None:
            await run.write(typed)
            check(await anext(run.stdout) == typed, "the echo")

        yield key
        await run.cancel(0)


@contextlib.asynccontextmanager
async def keys_by_cli(name: str) -> AsyncIterator[Key]:
    words, environment = _cli(name, *_EXEC, "-t", "--", *_ECHO)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x18\x00\x50\x00\0\0\0\0")
    os.set_blocking(ours, False)
    process = await asyncio.create_subprocess_exec(
        *words, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    loop, came = asyncio.get_running_loop(), asyncio.Event()

    async def read() -> bytes:
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(BlockingIOError):
                    return os.read(ours, 4096)
                came.clear()
                await came.wait()

    loop.add_reader(ours, came.set)
    try:
        said = b""
        while b"ready" not in said:
            said += await read()

        async def key(typed: bytes) -> None:
            os.write(ours, typed)
            check(await read() == typed, "the echo of incus exec -t")

        yield key
    finally:
        loop.remove_reader(ours)
        os.close(ours)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def keys_by_terminado(name: str) -> AsyncIterator[Key]:
    """Type into terminado in front of `incus exec -t`, which is how it reaches a container."""
    # not of the project: what is there is measured
    terminado: Any = importlib.import_module("terminado")
    httpserver, netutil, web = (
        cast(Any, importlib.import_module(f"tornado.{part}")) for part in ("httpserver", "netutil", "web")
    )
    words, environment = _cli(name, *_EXEC, "-t", "--", *_ECHO)
    terminals = terminado.UniqueTermManager(shell_command=list(words), extra_env=environment)
    routes = [(r"/ws", terminado.TermSocket, {"term_manager": terminals})]
    server = httpserver.HTTPServer(web.Application(routes))
    sockets = netutil.bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    try:
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/ws"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:

            async def read() -> str:
                while True:
                    kind, *said = await socket.receive_json(timeout=20)
                    if kind == "stdout":
                        return str(said[0])

            said = ""
            while "ready" not in said:
                said += await read()

            async def key(typed: bytes) -> None:
                await socket.send_json(["stdin", typed.decode()])
                check(await read() == typed.decode(), "the echo of terminado")

            yield key
    finally:
        server.stop()
        await terminals.shutdown()


async def keystrokes(client: Client, name: str, count: int) -> dict[str, list[float]]:
    async with contextlib.AsyncExitStack() as stack:
        ways = {
            STANDBY: await stack.enter_async_context(keys_by_gateway(client, name)),
            CLI: await stack.enter_async_context(keys_by_cli(name)),
        }
        with contextlib.suppress(ImportError):
            ways[TERMINADO] = await stack.enter_async_context(keys_by_terminado(name))
        samples: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(count):
            for way, key in ways.items():
                began = time.perf_counter()
                await key(b"%c" % (97 + number % 26))
                samples[way].append(time.perf_counter() - began)
    return samples


# --- the run ------------------------------------------------------------------------------------------


def summary(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return milliseconds by way, and how many times longer each p50 is than the gateway's."""
    base = percentile(samples[STANDBY], 50)
    return {
        way: {
            **{f"p{p}_ms": percentile(values, p) * 1000 for p in (50, 95, 99)},
            "ratio": percentile(values, 50) / base,
        }
        for way, values in samples.items()
    }


async def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    async with asyncio.timeout(300), container(say) as bare, gateway(say, bare.name) as client:
        pid = serving()
        say("first bytes")
        first = await first_bytes(client, bare, options.rounds)
        say("memory of a standby")
        async with plain(client, bare.name):
            standby = await standbys(bare.name)
        say("cancels")
        cancelled = await cancels(client, bare.name, options.rounds)
        say("keystrokes")
        typed = await keystrokes(client, bare.name, options.keys)
        say(f"{options.clients} clients, {options.execs} commands")
        crowded = await crowd(client, bare.name, pid, options.clients, options.execs, options.lines)
    return {
        "first_byte": summary(first),
        "standby": standby,
        "cancel": summary({STANDBY: cancelled})[STANDBY],
        "keystroke": summary(typed),
        "load": crowded,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result for a person."""
    lines = [f"{'':14}{'':12}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'ratio':>9}"]
    for name, key in (("first byte", "first_byte"), ("keystroke", "keystroke")):
        for way, row in result[key].items():
            numbers = "".join(f"{row[f'p{p}_ms']:10.2f}" for p in (50, 95, 99))
            lines.append(f"{name:14}{way:12}{numbers}{row['ratio']:8.1f}x")
            name = ""
    lines.append(
        "cancel of {tree} processes to an empty tree: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms".format(
            tree=TREE + 1, **result["cancel"]
        )
    )
    lines.append(
        "a standby: {shell_kib:.0f} KiB in the container, {helper_kib:.0f} KiB on the host (PSS)".format(
            **result["standby"]
        )
    )
    lines.append(
        "the gateway: {before_mib:.0f} MiB, and {client_kib:.1f} KiB (RSS {client_rss_kib:.1f}) for each of "
        "{clients} idle websockets,\n{waiting_kib:.0f} KiB for each of {execs} commands that wait, "
        "{streaming_kib:.0f} KiB at the peak as all of them stream at {mb_per_s:.0f} MB/s".format(
            **result["load"]
        )
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/bench/load", description=__doc__)
    parser.add_argument("--clients", type=int, default=500, help="idle websockets")
    parser.add_argument("--execs", type=int, default=100, help="commands that stream at once")
    parser.add_argument("--lines", type=int, default=100_000, help="lines of each command's output")
    parser.add_argument("--rounds", type=int, default=40, help="first bytes of each way, and cancels")
    parser.add_argument("--keys", type=int, default=500, help="keystrokes of each way")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.execs > options.clients:
        parser.error("each command has a websocket of its own: --execs is at most --clients")

    def say(text: str) -> None:
        print(f"· {text}", file=sys.stderr, flush=True)

    try:
        result = uvloop.run(measure(options, say))
    except Wrong as wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
        return 1
    except (GatewayError, RuntimeError, TimeoutError, OSError, aiohttp.ClientError) as error:
        print(f"could not be measured: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
