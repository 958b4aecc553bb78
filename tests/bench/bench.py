"""Measures what a client waits for, three ways side by side: this gateway, the bare Incus API, `incus exec`.

It makes its own container from the base image and starts its own gateway against the daemon that
GATEWAY_INCUS_SOCKET names; both are gone afterwards. The ways take turns within each round, so that a
noisy machine disturbs all alike: ratios are what to look at. In its turn a way makes a few calls in
series, as an agent does; `first` is the first of each series alone, when caches are cold and the CPU
sleeps because another way had its turn. Nothing here passes or fails by time; the
exit code is 1 only where an answer of the gateway, or a streamed byte, is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from gateway import protocol
from gateway_client import Client, Tenant
from gateway_client.errors import GatewayError

SOCKET: Final = os.environ.get("GATEWAY_INCUS_SOCKET", "/var/lib/incus/unix.socket")
PROJECT: Final = os.environ.get("GATEWAY_INCUS_PROJECT", "default")
IMAGE: Final = os.environ.get("GATEWAY_IMAGE", "gateway-base")
PROFILE: Final = os.environ.get("GATEWAY_PROFILE", "gateway-tenant")
WORKSPACE: Final = os.environ.get("GATEWAY_WORKSPACE", "/srv/site")
USER: Final = os.environ.get("GATEWAY_WORKSPACE_UID", "1000")

SCOPES: Final = "files:read files:write exec"
PREFIX: Final = "t-cl-bench-"
GATEWAY, API, CLI, FILES = "websocket", "Incus API", "incus exec", "Incus file GET"
CLIENT: Final = "Python client"
MiB = 1 << 20

Way = Callable[[], Awaitable[None]]


class Wrong(Exception):
    """An answer that is not what it must be: the measurement means nothing."""


def check(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)


# --- numbers ------------------------------------------------------------------------------------------


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: always a value that was measured."""
    ordered = sorted(samples)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


@dataclass
class Case:
    """One thing done in several ways; seconds of each call by way, in series of `series` calls."""

    name: str
    ways: Mapping[str, Way]
    series: int = 10
    samples: dict[str, list[float]] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """Return milliseconds by way, and how many times longer each p50 is than the gateway's."""
        base = percentile(self.samples[GATEWAY], 50)
        return {
            way: {
                "n": len(samples),
                **{f"p{p}_ms": round(percentile(samples, p) * 1000, 3) for p in (50, 95, 99)},
                "first_ms": round(percentile(samples[:: self.series], 50) * 1000, 3),
                "ratio": round(percentile(samples, 50) / base, 1),
                "wrong": self.wrong[way],
            }
            for way, samples in self.samples.items()
        }


async def measure(case: Case, rounds: int, deadline: float) -> None:
    """Let every way of `case` have its turn, `rounds` times or to the monotonic `deadline`, but twice."""
    for way, call in case.ways.items():  # warm: the first call of a way opens its connections
        with contextlib.nullcontext() if way == GATEWAY else contextlib.suppress(Wrong):
            await call()
        case.samples[way], case.wrong[way] = [], 0
    for number in range(rounds):
        if number >= 2 and time.monotonic() > deadline:
            break
        for way, call in case.ways.items():
            for _ in range(case.series):
                began = time.perf_counter()
                try:
                    await call()
                except Wrong:
                    if way == GATEWAY:
                        raise
                    # `incus exec` ends well without its output now and then: it is told, and measured on
                    case.wrong[way] += 1
                case.samples[way].append(time.perf_counter() - began)


# --- the two other ways -------------------------------------------------------------------------------


class Bare:
    """The Incus API as directly as it can be used: one session, an exec's four sockets at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.session: aiohttp.ClientSession

    async def __aenter__(self) -> Bare:
        self.session = aiohttp.ClientSession("http://incus", connector=aiohttp.UnixConnector(SOCKET, limit=0))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the answer's metadata, of an operation once it is over."""
        async with self.session.request(method, path, json=body, params={"project": PROJECT}) as response:
            answer = await response.json()
        failed = answer.get("error")
        if answer["type"] == "async":
            async with self.session.get(f"{answer['operation']}/wait?timeout=120") as response:
                answer = await response.json()
            failed = answer.get("error") or (answer.get("metadata") or {}).get("err")
        if failed:
            raise RuntimeError(failed)
        return answer["metadata"]

    async def exec(self, argv: Sequence[str], taken: Callable[[bytes], Awaitable[None]] | None = None) -> int:
        """Run a command with all sockets, give its output to `taken`; return its exit code."""
        body = {
            "command": list(argv),
            "wait-for-websocket": True,
            "interactive": False,
            "user": int(USER),
            "cwd": WORKSPACE,
        }
        path = f"/1.0/instances/{self.name}/exec"
        async with self.session.post(path, json=body, params={"project": PROJECT}) as response:
            answer = await response.json()
        operation, fds = answer["operation"], answer["metadata"]["metadata"]["fds"]

        async def opened(fd: str) -> aiohttp.ClientWebSocketResponse:
            url = f"{operation}/websocket?secret={fds[fd]}"
            return await self.session.ws_connect(url, max_msg_size=0, compress=0, autoping=False)

        # control first: without it the command starts, and can end, before the others are connected
        control = await opened("control")
        stdin, stdout, stderr = await asyncio.gather(*(opened(fd) for fd in "012"))
        waiting = asyncio.ensure_future(self._wait(operation))

        async def drain(stream: aiohttp.ClientWebSocketResponse, wanted: bool) -> None:
            async for message in stream:
                if message.type is aiohttp.WSMsgType.TEXT:
                    break  # an empty text frame ends a stream
                if wanted and taken is not None and message.type is aiohttp.WSMsgType.BINARY:
                    await taken(message.data)

        await asyncio.gather(drain(stdout, True), drain(stderr, False))
        code = await waiting
        for stream in (stdin, stdout, stderr, control):
            with contextlib.suppress(aiohttp.ClientError, OSError):
                # incusd hangs up without a closing handshake: there is nothing to wait for
                stream._response.close()
        return code

    async def _wait(self, operation: str) -> int:
        async with self.session.get(f"{operation}/wait?timeout=120") as response:
            answer = await response.json()
        return int(answer["metadata"]["metadata"]["return"])

    async def file(self, path: str) -> bytes:
        url, query = f"/1.0/instances/{self.name}/files", {"path": path, "project": PROJECT}
        async with self.session.get(url, params=query) as response:
            check(response.status == 200, f"file GET of {path}: {response.status}")
            return await response.read()


async def spawned(*command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command by `subprocess.run`, which forks nothing of this process.

    uvloop does, and takes 2 to 25 ms for it, by this process's size: a cost of no way that is measured here.
    """
    return await asyncio.to_thread(
        lambda: subprocess.run(command, check=False, capture_output=True, **options)
    )


async def incus(*arguments: str, stdin: bytes | None = None) -> bytes:
    """Run the `incus` command and return its output."""
    environment = {"INCUS_DIR": str(Path(SOCKET).parent), **os.environ, "INCUS_PROJECT": PROJECT}
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    done = await spawned("incus", *arguments, env=environment, **given)
    check(done.returncode == 0, f"incus {' '.join(arguments[:6])}: {done.stderr.decode()[-300:]}")
    return done.stdout


# --- the tenant ---------------------------------------------------------------------------------------


def workspace() -> bytes:
    """Return a tar of a project as Vite, React and shadcn lay it out: 140 source files, 1500 of packages."""
    files = {
        ".gitignore": "node_modules\ndist\n",
        "package.json": json.dumps({"name": "bench", "private": True}, indent=2),
        "src/App.tsx": _component("App", 60),
    }
    for page in ("Index", "Index.cli"):
        files[f"src/pages/{page}.tsx"] = '<main data-round="0">\n' + _component("Index", 80)
    files["src/components/ui/button.tsx"] = _component("Button", 55)
    for number in range(135):
        folder = ("ui", "form", "layout", "charts")[number % 4]
        files[f"src/components/{folder}/part{number}.tsx"] = _component(f"Part{number}", 20 + number)
    for number in range(1500):
        files[f"node_modules/package{number // 10}/lib/file{number % 10}.js"] = (
            f"module.exports={number};\n" * 20
        )
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
    return packed.getvalue()


def _component(name: str, lines: int) -> str:
    body = "\n".join(
        f'  const value{n} = useMemo(() => compute({n}, "label {n}"), [{n}]);'
        if n % 7
        else f'  <form onSubmit={{handleSubmit}} className="space-y-{n}">'
        for n in range(lines)
    )
    return f'import {{ useMemo }} from "react";\n\nexport function {name}() {{\n{body}\n}}\n'


@contextlib.asynccontextmanager
async def container(say: Callable[[str], None], suffix: str = "") -> AsyncIterator[Bare]:
    """Make a tenant with a workspace; destroy it afterwards, and what killed runs left."""
    async with Bare(f"{PREFIX}{os.getpid()}{suffix}") as bare:
        for name in await _leftovers(bare):
            say(f"removing {name}, left by a run that was killed")
            await _destroy(bare, name)
        say(f"creating {bare.name} from {IMAGE}")
        body = {
            "name": bare.name,
            "type": "container",
            "source": {"type": "image", "alias": IMAGE},
            "profiles": [PROFILE],
            "start": True,
        }
        try:
            await bare.request("POST", "/1.0/instances", body)
            # ends by itself once systemd has everything up, whatever it thinks of it
            await incus(
                "exec", bare.name, "--", "sh", "-c", "timeout 60 systemctl is-system-running --wait || :"
            )
            unpack = ("--user", USER, "--group", USER, "--cwd", WORKSPACE, "--", "tar", "xf", "-")
            await incus("exec", bare.name, *unpack, stdin=workspace())
            yield bare
        finally:
            await asyncio.shield(_destroy(bare, bare.name))


async def _leftovers(bare: Bare) -> list[str]:
    names = [url.rsplit("/", 1)[-1] for url in await bare.request("GET", "/1.0/instances")]
    ours = [name for name in names if name.startswith(PREFIX)]
    return [name for name in ours if not Path("/proc", name.removeprefix(PREFIX).split("-")[0]).exists()]


async def _destroy(bare: Bare, name: str) -> None:
    with contextlib.suppress(RuntimeError):  # it may be stopped
        await bare.request(
            "PUT", f"/1.0/instances/{name}/state", {"action": "stop", "force": True, "timeout": 30}
        )
    with contextlib.suppress(RuntimeError):  # or never have come to be
        await bare.request("DELETE", f"/1.0/instances/{name}")


# --- the gateway --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def gateway(say: Callable[[str], None], *names: str) -> AsyncIterator[Client]:
    """Start a gateway of this source tree; give a client for the tenants of `names`; end it by SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        environment = {
            **os.environ,
            "GATEWAY_RUNTIME": "incus",
            "GATEWAY_LISTEN": address,
            "GATEWAY_STATE_DIR": f"{folder}/state",
            "PYTHONPATH": os.pathsep.join(sys.path[:2]),
        }
        environment.pop("GATEWAY_SECRET", None)
        log = Path(folder, "gateway.log")
        command = (sys.executable, "-m", "gateway")
        making = await asyncio.create_subprocess_exec(
            *(*command, "token", "--scope", SCOPES, "--ttl", "1h"),
            *(word for name in names for word in ("--tenant", name)),
            stdout=asyncio.subprocess.PIPE,
            env=environment,
        )
        token = (await making.communicate())[0].decode().strip()
        check(making.returncode == 0 and token, "incus-gateway token failed")
        say(f"starting a gateway at {address}")
        with log.open("wb") as file:
            serving = await asyncio.create_subprocess_exec(
                *command, "serve", stdout=file, stderr=file, env=environment
            )
        try:
            async with Client(f"http://{address}", token=token, name="bench") as client:
                await _ready(client, serving, log)
                yield client
        except (GatewayError, Wrong):
            say(f"the gateway's log ends with\n{log.read_text()[-3000:]}")
            raise
        finally:
            if serving.returncode is None:
                serving.send_signal(signal.SIGTERM)
                try:
                    async with asyncio.timeout(30):
                        await serving.wait()
                except TimeoutError:
                    serving.kill()
                    say("the gateway did not end within 30 s of SIGTERM")


async def _ready(client: Client, serving: asyncio.subprocess.Process, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            await client.http("GET", "/readyz")
            return
        except GatewayError as error:
            if serving.returncode is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the gateway does not start: {error}\n{log.read_text()[-2000:]}"
                ) from None
            await asyncio.sleep(0.05)  # nobody tells when a port begins to answer


# --- what is measured ---------------------------------------------------------------------------------

FORM: Final = _component("ContactForm", 70)
APP, BUTTON = "src/App.tsx", "src/components/ui/button.tsx"
INDEX, INDEX_CLI = "src/pages/Index.tsx", "src/pages/Index.cli.tsx"
NEW, NEW_CLI = "src/components/ContactForm.tsx", "src/components/ContactForm.cli.tsx"
FORMS: Final = "onSubmit=.handleSubmit"


def cases(shop: Tenant, bare: Bare) -> Iterator[Case]:
    def cli(*argv: str, stdin: bytes | None = None) -> Awaitable[bytes]:
        options = ("--user", USER, "--group", USER, "--cwd", WORKSPACE)
        return incus("exec", bare.name, *options, "--", *argv, stdin=stdin)

    async def gateway_true() -> None:
        async with shop.exec(["/bin/true"]) as run:
            check((await run.wait()).code == 0, "true failed")

    async def api_true() -> None:
        check(await bare.exec(["/bin/true"]) == 0, "true failed")

    async def cli_true() -> None:
        await cli("/bin/true")

    yield Case("/bin/true", {GATEWAY: gateway_true, API: api_true, CLI: cli_true})

    async def gateway_read() -> None:
        check("export function App" in (await shop.read(APP)).text, "Read")

    async def cli_read() -> None:
        check(b"export function App" in await cli("cat", APP), "cat")

    async def api_read() -> None:
        check(b"export function App" in await bare.file(f"{WORKSPACE}/{APP}"), "file GET")

    yield Case("Read", {GATEWAY: gateway_read, FILES: api_read, CLI: cli_read})

    async def gateway_write() -> None:
        await shop.write(NEW, FORM)

    async def cli_write() -> None:
        await cli("sh", "-c", f"cat > {NEW_CLI}", stdin=FORM.encode())

    yield Case("Write", {GATEWAY: gateway_write, CLI: cli_write})

    edits = {INDEX: 0, INDEX_CLI: 0}  # each edit undoes nothing: the round in the file counts up

    async def gateway_edit() -> None:
        n = edits[INDEX]
        await shop.edit(INDEX, f'data-round="{n}"', f'data-round="{n + 1}"')
        edits[INDEX] += 1

    async def cli_edit() -> None:
        n = edits[INDEX_CLI]
        await cli("sed", "-i", f's/data-round="{n}"/data-round="{n + 1}"/', INDEX_CLI)
        edits[INDEX_CLI] += 1

    yield Case("Edit", {GATEWAY: gateway_edit, CLI: cli_edit})

    async def gateway_glob() -> None:
        check("button.tsx" in (await shop.glob("src/components/ui/*.tsx")).text, "Glob")

    async def cli_glob() -> None:
        check(b"button.tsx" in await cli("find", "src/components/ui", "-name", "*.tsx"), "find")

    yield Case("Glob", {GATEWAY: gateway_glob, CLI: cli_glob})

    async def gateway_grep() -> None:
        check("part7.tsx" in (await shop.grep(FORMS, "src")).text, "Grep")

    async def cli_grep() -> None:
        check(b"part7.tsx" in await cli("grep", "-rlE", FORMS, "src"), "grep")

    yield Case("Grep", {GATEWAY: gateway_grep, CLI: cli_grep})

    async def gateway_eight() -> None:
        """Add a contact form: the eight calls of an agent."""
        await gateway_read_index()
        await gateway_read()
        await gateway_glob()
        check("Button" in (await shop.read(BUTTON)).text, "Read")
        await gateway_grep()
        await gateway_write()
        await gateway_edit()
        await gateway_read_index()

    async def gateway_read_index() -> None:
        check(f'data-round="{edits[INDEX]}"' in (await shop.read(INDEX)).text, "Read after Edit")

    async def cli_read_index() -> None:
        check(f'data-round="{edits[INDEX_CLI]}"'.encode() in await cli("cat", INDEX_CLI), "cat after sed")

    async def cli_eight() -> None:
        await cli_read_index()
        await cli_read()
        await cli_glob()
        check(b"Button" in await cli("cat", BUTTON), "cat")
        await cli_grep()
        await cli_write()
        await cli_edit()
        await cli_read_index()

    yield Case("eight calls", {GATEWAY: gateway_eight, CLI: cli_eight})


class Hash:
    """SHA-256 of a stream in a thread, four MiB at a time, at most one such piece ahead."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._chunks: list[bytes | memoryview] = []
        self._size = 0
        self._working: asyncio.Future[None] | None = None
        self.count = 0

    async def take(self, chunk: bytes | memoryview) -> None:
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size >= 4 * MiB:
            await self._flush()

    async def _flush(self) -> None:
        piece, self._chunks, self._size = b"".join(self._chunks), [], 0
        self.count += len(piece)
        if self._working is not None:
            await self._working
        self._working = asyncio.get_running_loop().run_in_executor(None, self._hash.update, piece)

    async def digest(self) -> str:
        await self._flush()
        assert self._working is not None
        await self._working
        return self._hash.hexdigest()


@contextlib.asynccontextmanager
async def plain(client: Client, name: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """Connect by the websocket client that the Incus API is read with too, and initialize."""
    headers = {"Authorization": f"Bearer {client.credentials.token}"}
    async with aiohttp.ClientSession(client.address.url, headers=headers) as session:
        path = f"/v1/tenants/{name}/ws"
        async with session.ws_connect(path, protocols=["gateway.v1"], max_msg_size=0) as socket:
            await socket.send_str(protocol.request(0, "initialize"))
            await socket.receive()
            yield socket


async def stream(client: Client, bare: Bare, size: int, times: int) -> dict[str, Any]:
    """Return MB/s of `size` zero bytes from a command to a client, by way. Raises `Wrong`.

    The gateway and the Incus API are read by the same client, so that the difference is the gateway's;
    our own Python client is a third way.
    """
    shop = client.tenant(bare.name)
    zeros = hashlib.sha256()
    for _ in range(size // MiB):
        zeros.update(bytes(MiB))
    argv = ["head", "-c", str(size), "/dev/zero"]

    async def by_gateway(hashed: Hash) -> None:
        async with plain(client, bare.name) as socket:
            await socket.send_str(protocol.request(1, "exec/start", {"argv": argv}))
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    await hashed.take(memoryview(message.data)[protocol.HEADER_SIZE :])
                else:
                    said = protocol.decode_server_text(message.data)
                    if isinstance(said, protocol.Notification):
                        check(said.params["exitCode"] == 0, "head failed")
                        break

    async def by_client(hashed: Hash) -> None:
        async with shop.exec(argv) as run:
            async for chunk in run.stdout:
                await hashed.take(chunk)
            check((await run.wait()).code == 0 and run.stdout.lost == 0, "the stream's end")

    async def by_api(hashed: Hash) -> None:
        check(await bare.exec(argv, hashed.take) == 0, "head failed")

    ways = {GATEWAY: by_gateway, CLIENT: by_client, API: by_api}
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(times):
        for way, call in ways.items():
            hashed, began = Hash(), time.perf_counter()
            await call(hashed)
            digest = await hashed.digest()
            speeds[way].append(size / 1e6 / (time.perf_counter() - began))
            check(hashed.count == size, f"{way}: {hashed.count} of {size} bytes arrived")
            check(digest == zeros.hexdigest(), f"{way}: the hash differs")
    best = {way: max(values) for way, values in speeds.items()}
    return {
        "bytes": size,
        "sha256": zeros.hexdigest(),
        "mb_per_s": {way: [round(value) for value in values] for way, values in speeds.items()},
        "share_of_api": round(best[GATEWAY] / best[API], 2),
    }


# --- the run ------------------------------------------------------------------------------------------


async def bench(quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything. Bounded: a case ends after its share of time even with rounds left."""
    rounds, seconds = (6, 8.0) if quick else (30, 30.0)
    results: dict[str, Any] = {}
    async with asyncio.timeout(900), container(say) as bare, gateway(say, bare.name) as client:
        shop = client.tenant(bare.name)
        for case in cases(shop, bare):
            say(f"measuring {case.name}")
            await measure(case, rounds, time.monotonic() + seconds)
            results[case.name] = case.report()
        size, times = (256 * MiB, 1) if quick else (1024 * MiB, 3)
        say(f"streaming {size // MiB} MiB")
        streamed = await stream(client, bare, size, times)
    return {"machine": machine(), "cases": results, "stream": streamed}


def machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def rows(cases: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table of what `Case.report` returned."""
    lines = [f"{'':16}{'':20}{'n':>5}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'first':>10}{'ratio':>9}"]
    for name, ways in cases.items():
        for way, row in ways.items():
            numbers = "".join(f"{row[key]:10.2f}" for key in ("p50_ms", "p95_ms", "p99_ms", "first_ms"))
            lines.append(f"{name:16}{way:20}{row['n']:5}{numbers}{row['ratio']:8.1f}x")
            if row["wrong"]:
                lines[-1] += f"  ({row['wrong']} answers were wrong)"
            name = ""
    return lines


def table(result: Mapping[str, Any]) -> str:
    """Return the result for a person."""
    lines = rows(result["cases"])
    streamed = result["stream"]
    lines.append("")
    for way, speeds in streamed["mb_per_s"].items():
        lines.append(
            f"{streamed['bytes'] >> 20} MiB by {way:16}{' '.join(f'{speed:5}' for speed in speeds)} MB/s"
        )
    lines.append(f"hash equal; {streamed['share_of_api']:.0%} of the bare socket's best")
    read, eight = (result["cases"][name][CLI]["ratio"] for name in ("Read", "eight calls"))
    lines.append(f"Read {read}x and the eight calls {eight}x faster than by incus exec (aims: 50x and 40x)")
    return "\n".join(lines)


def main() -> int:
    return run("tests/bench/run", __doc__, bench, table)


Bench = Callable[[bool, Callable[[str], None]], Coroutine[Any, Any, dict[str, Any]]]


def run(prog: str, about: str | None, bench: Bench, table: Callable[[Mapping[str, Any]], str]) -> int:
    """Do one bench as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and bytes: about 30 s")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(f"· {text}", file=sys.stderr, flush=True)

    import uvloop

    try:
        result = uvloop.run(bench(options.quick, say))
    except Wrong as wrong:
        print(f"wrong answer: {wrong}", file=sys.stderr)
        return 1
    except (GatewayError, RuntimeError, TimeoutError, OSError, aiohttp.ClientError) as error:
        print(f"could not be measured: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 0
