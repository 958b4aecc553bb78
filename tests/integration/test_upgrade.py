"""An upgrade that nobody notices: a successor takes over while clients ask, or changes nothing.

What is measured is printed (`pytest -s`). The bounds are generous: CI's machines are busy.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.host.gateway_process import Environments, QuickstartFiles
from gateway.server.handover import VERSION, path_in
from gateway.settings import Settings
from gateway_client import Change, Client
from tests.archives import folder
from tests.integration import environment
from tests.integration.conftest import Container
from tests.integration.hosts import Host, held
from tests.integration.resuming import ENDLESS, Resuming, endless_sum, sums
from tests.integration.sites import Hosting, hosting
from tests.integration.test_claude_typescript import program
from tests.live import DEADLINE, LiveGateway, free_ports
from tests.waits import pause, until

__all__ = ["program"]  # a fixture

INSTALLED = Path(sys.executable).with_name("incus-gateway")
UPGRADES = int(os.environ.get("GATEWAY_TEST_UPGRADES", "1"))
LONGEST = 5.0  # seconds of an answer, on a machine with much else to do; 0.3 is what is promised


GATED = (
    'start = ["bun", "serve.ts"]\ninstall = ["sh", "-c", "until [ -e /home/site/go ]; do sleep 0.1; done"]\n'
)


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    """A gateway and its holder for all tests, each of which leaves one that serves."""
    async with held(incus_settings, tmp_path_factory.mktemp("upgrade") / "state") as host:
        yield host


class Orphan:
    """A gateway that a command has started: what of `asyncio.subprocess.Process` is used of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._process = os.pidfd_open(pid)

    def send_signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._process, number)

    async def wait(self) -> int:
        if self.returncode is None:
            loop, over = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(self._process, over.set)
            try:
                await over.wait()
            finally:
                loop.remove_reader(self._process)
            os.close(self._process)
            self.returncode = 0
        return self.returncode


def said_by(gateway: LiveGateway) -> Path:
    """Return the file with what the command says that upgrades a gateway."""
    return gateway.log.with_suffix(".said")


async def upgrade(gateway: LiveGateway, *words: str, fails: bool = False, **changes: str) -> str:
    """Run `incus-gateway upgrade`, and return what it said; `gateway` is the new one then."""
    # the new gateway logs where the command complains
    log = gateway.log.with_suffix(".failed") if fails else gateway.log
    with log.open("ab") as errors, said_by(gateway).open("wb") as said:
        before = errors.tell()
        command = await asyncio.create_subprocess_exec(
            *(str(INSTALLED), "upgrade", *words),
            env={**gateway.environment, "PYTHONUNBUFFERED": "1", **changes},
            stdout=said,
            stderr=errors,
        )
        code = await asyncio.wait_for(command.wait(), 2 * DEADLINE)
    told = said_by(gateway).read_text() + log.read_text()[before:]
    assert code == int(fails), told
    if not fails:
        found = re.search(r"replaced, pid (\d+)", told)
        assert found is not None, told
        old, gateway.process = gateway.process, Orphan(int(found[1]))  # type: ignore[assignment]
        assert old is not None
        assert await asyncio.wait_for(old.wait(), DEADLINE) == 0
    return told


class Hail:
    """Clients that ask all the time, each `every` seconds after its last answer and on a new connection.

    Keeps how long each answer took, and what went wrong.
    """

    def __init__(
        self, gateway: LiveGateway, path: str = "/healthz", clients: int = 2, every: float = 0.03
    ) -> None:
        self._gateway = gateway
        self._clients = clients
        self._every = every
        token = gateway.token("*", scopes=("admin",))
        self._request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
            "Connection: close\r\n\r\n"
        ).encode()
        self.took: list[float] = []
        self.wrong: list[str] = []
        self._over = False

    async def __aenter__(self) -> Hail:
        self._asking = [asyncio.create_task(self._ask_again()) for _ in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await asyncio.gather(*self._asking)

    async def _ask_again(self) -> None:
        while not self._over:
            await self._ask()
            await pause(self._every)

    async def _ask(self) -> None:
        began = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._gateway.port)
            writer.write(self._request)
            answer = await reader.read()
            writer.close()
        except OSError as error:
            self.wrong.append(repr(error))
            return
        self.took.append(time.perf_counter() - began)
        if not answer.startswith(b"HTTP/1.1 200 "):
            self.wrong.append(answer[:200].decode(errors="replace") or "no answer")

    def report(self, what: str) -> None:
        """Print what was seen, and fail where anything went wrong."""
        took = sorted(self.took)
        print(f"{what}: {len(took)} answers, p50 {took[len(took) // 2] * 1000:.1f} ms, "
              f"longest {took[-1] * 1000:.0f} ms, wrong {len(self.wrong)}")  # fmt: skip
        assert not self.wrong, self.wrong[:5]
        assert took[-1] < LONGEST


async def some(hail: Hail, number: int = 15) -> None:
    """Return once so many more answers came."""
    wanted = len(hail.took) + number
    await until(lambda: len(hail.took) >= wanted)


async def test_no_connect_is_refused_and_no_answer_takes_long(host: Host, shared_tenant: Container) -> None:
    """Of the process itself, and of what asks Incus; the old gateway ends, and the next one is upgraded."""
    for number in range(UPGRADES):
        assert host.gateway.process is not None
        before = host.gateway.process.pid
        async with (
            Hail(host.gateway) as alive,
            Hail(host.gateway, "/readyz", 1) as ready,
            Hail(host.gateway, f"/v1/tenants/{shared_tenant.name}", 1, 0.05) as tenant,  # Incus is asked
        ):
            await some(tenant)
            await upgrade(host.gateway)
            await some(tenant)
        assert host.gateway.process.pid != before
        alive.report(f"upgrade {number}, /healthz")
        ready.report(f"upgrade {number}, /readyz")
        tenant.report(f"upgrade {number}, a tenant")


async def test_websockets_are_told_and_resume_with_exact_bytes(host: Host, shared_tenant: Container) -> None:
    """A stream as fast as can be and what is typed into `cat`, by the bare wire, over several upgrades."""
    stream, echo = Resuming(host, shared_tenant.name), Resuming(host, shared_tenant.name)
    await stream.start(command=ENDLESS)
    await echo.start(command="cat; exit 3", stdin=True)
    for number in range(UPGRADES):
        await echo.write(b"%d\n" % number * 1000)
        async with host.gateway.wire(shared_tenant.name) as wire:
            await upgrade(host.gateway)
            assert await wire.closed() == 1012
            told = wire.notified("server/draining")
            assert told is not None and told["retryAfterMs"] < 500
        await stream.there()
        await echo.there()
    await echo.close_input()
    assert (await echo.ended())["exitCode"] == 3
    assert echo.sums[1].hexdigest() == echo.sent.hexdigest()
    await stream.call("exec/signal", signal=signal.SIGTERM)
    assert (await stream.ended())["signal"] == "TERM"
    assert stream.sums[1].hexdigest() == await endless_sum(stream.offsets[1])
    assert min(stream.breaks, echo.breaks) >= UPGRADES


def workers(pid: int) -> list[int]:
    """Return the processes below a gateway that serve tenants' files, which are not root's."""
    found = list[int]()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [*([child] if Path(f"/proc/{child}").stat().st_uid else []), *workers(child)]
    return found


async def test_a_write_under_way_is_answered_once_it_is_made(host: Host, shared_tenant: Container) -> None:
    """Also where its worker is slow: it is waited for while the old gateway serves all others."""
    assert host.gateway.process is not None
    given = {"file_path": "under-way.txt", "content": "after"}
    params = {"name": "Write", "arguments": given, "callId": "under-way"}
    async with host.gateway.wire(shared_tenant.name) as wire:
        await wire.call("tools/call", name="Write", arguments={**given, "content": "before"})
        slow = workers(host.gateway.process.pid)
        assert slow
        for pid in slow:
            os.kill(pid, signal.SIGSTOP)
        _, answer = await wire.start_call("tools/call", **params)
        said = len(host.gateway.log.read_text())
        upgrading = asyncio.create_task(upgrade(host.gateway))
        await until(lambda: "a successor is starting" in host.gateway.log.read_text()[said:], DEADLINE)
        async with Hail(host.gateway) as hail:
            await pause(2.5)  # in which a successor is ready
            assert wire.notified("server/draining") is None
            for pid in slow:
                os.kill(pid, signal.SIGCONT)
            assert not (await answer)["isError"]
            await upgrading
        hail.report("with a slow Write")
    async with host.gateway.wire(shared_tenant.name) as wire:
        assert not (await wire.call("tools/call", **params))["isError"]
    assert shared_tenant.sh("cat /srv/site/under-way.txt") == "after"


async def test_the_python_client_resumes_soon(host: Host, shared_tenant: Container) -> None:
    """A command goes on in it, calls succeed while the gateway is replaced, and the pause is short."""
    changes: list[tuple[float, Change]] = []

    def noted(change: Change) -> None:
        changes.append((time.perf_counter(), change))

    token = host.gateway.token(shared_tenant.name)
    async with Client(host.gateway.url, token=token, on_change=noted) as client:
        shop = client.tenant(shared_tenant.name)
        async with shop.exec("cat; exit 4", stdin=True) as run:
            await run.write(b"before\n")
            over = asyncio.Event()

            async def write() -> int:
                number = 0
                while not over.is_set():
                    number += 1
                    await shop.write("upgraded.txt", str(number))
                    assert (await shop.read("upgraded.txt")).text == f"1\t{number}"
                return number

            writing = asyncio.create_task(write())
            await upgrade(host.gateway)
            await run.write(b"after\n")
            await run.close_stdin()
            assert b"".join([chunk async for chunk in run.stdout]) == b"before\nafter\n"
            assert (await run.wait()).code == 4
            over.set()
            print(f"{await writing} writes and reads")
    pauses = [
        after - before
        for (before, one), (after, next_) in itertools.pairwise(changes)
        if (one.state, next_.state) == ("reconnecting", "connected")
    ]
    print(f"the Python client was away for {[round(one * 1000) for one in pauses]} ms")
    assert pauses and max(pauses) < LONGEST


_TYPESCRIPT = """
import { Gateway } from "@incus-gateway/client";
const { url, token, tenant } = JSON.parse(process.argv[2]);
const say = (told) => process.stdout.write(`${JSON.stringify(told)}\\n`);
const gateway = new Gateway(url, { token: () => token });
const shop = gateway.tenant(tenant);
let left = 0;
shop.onStatus(({ state }) => {
  if (state === "open" && left) say({ type: "resumed", ms: performance.now() - left });
  if (state === "draining" && !left) left = performance.now();
});
const run = await shop.exec(["cat"], { stdin: true });
await run.write("before\\n");
say({ type: "ready" });
process.stdin.once("data", async () => {
  await run.write("after\\n");
  await run.closeStdin();
  let text = "";
  for await (const chunk of run.stdout) text += new TextDecoder().decode(chunk);
  say({ type: "exited", text, code: (await run.wait()).code });
  shop.close();
});
"""


async def test_the_typescript_client_resumes_soon(
    host: Host, shared_tenant: Container, program: Path
) -> None:
    """Its command goes on, and its pause is short."""
    script = program.with_name("upgraded.js")
    script.write_text(_TYPESCRIPT)
    given = {
        "url": host.gateway.url,
        "token": host.gateway.token(shared_tenant.name),
        "tenant": shared_tenant.name,
    }
    process = await asyncio.create_subprocess_exec(
        *("node", str(script), json.dumps(given)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=script.parent,
    )
    assert process.stdout is not None and process.stdin is not None

    async def told(kind: str) -> Any:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            while line := await process.stdout.readline():
                if (said := json.loads(line))["type"] == kind:
                    return said
        raise AssertionError(f"it ended without {kind}")

    try:
        await told("ready")
        await upgrade(host.gateway)
        away = (await told("resumed"))["ms"]
        print(f"the TypeScript client was away for {away:.0f} ms")
        assert away < LONGEST * 1000
        process.stdin.write(b"go\n")
        exited = await told("exited")
        assert (exited["text"], exited["code"]) == ("before\nafter\n", 0)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_an_event_stream_has_no_gap_and_tells_nothing_twice(host: Host, tenant: Container) -> None:
    """Of what the gateway does, and of what Incus tells while one gateway takes over from the other."""
    name, seen, over = tenant.name, list[Any](), asyncio.Event()
    snapshots = list[str]()
    token = host.gateway.token(name)
    async with Client(host.gateway.url, token=token) as client:
        shop = client.tenant(name)
        stream = shop.events()

        async def follow() -> None:
            async for event in stream:
                seen.append(event)

        async def change() -> None:
            number = 0
            while not over.is_set():
                number += 1
                snapshot = f"s{number}"
                await asyncio.to_thread(environment.incus, "snapshot", "create", name, snapshot)
                snapshots.append(snapshot)
                await asyncio.to_thread(environment.incus, "snapshot", "delete", name, snapshot)
                await pause(0.3)

        async with stream:
            following, changing = asyncio.create_task(follow()), asyncio.create_task(change())
            await until(lambda: len(snapshots) > 2)
            written = list[str]()
            for number in range(UPGRADES):
                await shop.write(f"file-{number}", "x")
                written.append(f"file-{number}")
                await upgrade(host.gateway)
                await shop.write(f"after-{number}", "x")
                written.append(f"after-{number}")
            over.set()
            await changing
            await shop.write("last", "x")

            def last() -> bool:
                return any(event.data.get("path") == "last" for event in seen)

            await until(last)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
    ids = [event.id for event in seen]
    assert ids == sorted(set(ids))
    assert not [event for event in seen if event.type == "gap"]
    paths = [event.data["path"] for event in seen if event.type == "file.written"]
    assert paths == [*written, "last"]
    for kind in ("created", "deleted"):
        told = [event.data["snapshot"] for event in seen if event.type == f"tenant.snapshot.{kind}"]
        assert sorted(told) == sorted(set(told)), "told twice"
        # the first ones may be from before the stream was there
        assert set(snapshots) <= {*told}, (kind, sorted(set(snapshots) - {*told}))
    print(f"{len(seen)} events, {len(snapshots)} snapshots")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder in which a package that the gateway needs cannot be imported."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "uvloop.py").write_text("raise ImportError('uvloop is of another machine')\n")
    return folder


async def test_a_successor_that_cannot_serve_changes_nothing(
    host: Host, shared_tenant: Container, broken: Path
) -> None:
    """Whatever is wrong: the old one goes on, no client notices, and the command says why."""
    assert host.gateway.process is not None
    pid, (used,) = host.gateway.process.pid, free_ports(1)
    client = Resuming(host, shared_tenant.name)
    await client.start(command="cat", stdin=True)
    wrong: list[tuple[dict[str, str], str]] = [
        ({"GATEWAY_MAX_EXECS": "many"}, "GATEWAY_MAX_EXECS"),
        ({"PYTHONPATH": str(broken)}, "uvloop is of another machine"),
        (
            {"GATEWAY_INCUS_SOCKET": "/nonexistent/unix.socket"},
            "the old gateway keeps running: cannot reach Incus",
        ),
        ({"GATEWAY_LISTEN": f"127.0.0.1:{used}"}, f"127.0.0.1:{used} is in use"),
    ]
    with socket.create_server(("127.0.0.1", used)):
        async with Hail(host.gateway) as hail:
            await some(hail)
            for changes, why in wrong:
                said = await upgrade(host.gateway, fails=True, **changes)
                assert why in said.splitlines()[-1], said
            # of a version with newer records
            with sqlite3.connect(host.settings.state_dir / "gateway.db") as records:
                (version,) = records.execute("PRAGMA user_version").fetchone()
                records.execute("PRAGMA user_version=9999")
            records.close()
            assert "newer gateway" in await upgrade(host.gateway, fails=True)
            with sqlite3.connect(host.settings.state_dir / "gateway.db") as records:
                records.execute(f"PRAGMA user_version={version}")
            records.close()
            assert "no earlier version to go back to" in await upgrade(host.gateway, "--back", fails=True)
            await some(hail)
        hail.report("failed upgrades")
    assert host.gateway.process.pid == pid and host.gateway.process.returncode is None
    await client.write(b"still\n")
    await until(lambda: client.offsets[1] == len(b"still\n"))
    assert client.breaks == 0
    await client.close_input()
    assert (await client.ended())["exitCode"] == 0
    await upgrade(host.gateway)  # and the next one that can, does


async def test_a_successor_that_dies_with_everything_in_its_hands_is_made_good(
    host: Host, shared_tenant: Container
) -> None:
    """The old gateway starts itself anew: no connect is refused, and commands go on."""
    assert host.gateway.process is not None
    pid = host.gateway.process.pid
    client = Resuming(host, shared_tenant.name)
    await client.start(command="cat", stdin=True)
    await client.write(b"before\n")
    async with Hail(host.gateway) as hail:
        await some(hail)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as successor:
            successor.connect(str(path_in(host.settings.state_dir)))
            successor.send(json.dumps({"v": VERSION, "take": True}).encode())
            await asyncio.to_thread(successor.recv, 65536)  # without the descriptor, which is dropped
            successor.send(json.dumps({"ready": True}).encode())
            while "go" not in json.loads(await asyncio.to_thread(successor.recv, 65536)):
                pass
        await some(hail)
    hail.report("a successor that died")
    assert host.gateway.process.pid == pid and host.gateway.process.returncode is None
    await client.there()
    await client.write(b"after\n")
    await client.close_input()
    assert (await client.ended())["exitCode"] == 0
    assert client.sums[1].hexdigest() == sums(b"before\nafter\n")
    await upgrade(host.gateway)


@pytest.fixture
async def hosted(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Hosting]:
    async with hosting(incus_settings, tmp_path_factory.mktemp("upgrade") / "state") as hosted:
        yield hosted


async def begin(hosted: Hosting, domain: str) -> dict[str, Any]:
    """Begin a deployment whose install waits for `go_on`, and return its record once it does."""
    body = {"domain": domain, "template": {"archive": base64.b64encode(folder(GATED)).decode()}}
    status, begun, _ = await hosted.call("POST", "/v1/deployments", body)
    assert status == 202, begun
    await hosted.reached(begun["id"], "install")
    found: dict[str, Any] = begun
    return found


async def go_on(begun: dict[str, Any]) -> None:
    words = ("exec", begun["tenant"], "--", "touch", "/home/site/go")
    await asyncio.to_thread(environment.incus, *words)


async def test_a_deployment_under_way_ends_well(hosted: Hosting) -> None:
    """An upgrade waits for it; no client is refused meanwhile, and the next deployment works too."""
    begun = await begin(hosted, "one.example.com")
    async with Hail(hosted.gateway) as hail:
        said = said_by(hosted.gateway)
        said.touch()
        upgrading = asyncio.create_task(upgrade(hosted.gateway))
        await until(lambda: "waits for 1 deployments" in said.read_text(), DEADLINE)
        await some(hail)
        assert not upgrading.done()
        await go_on(begun)
        await upgrading
        record = await hosted.ended(begun["id"])
        assert record["state"] == "succeeded", record
        await hosted.answers("one.example.com")
        second = await hosted.deploy("two.example.com")
        assert second["state"] == "succeeded", second
    hail.report("with a deployment")


async def test_an_upgrade_that_would_cut_a_deployment_is_given_up(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Once its patience is over: then nothing has changed, and deployments begin again."""
    place = tmp_path_factory.mktemp("impatient") / "state"
    async with hosting(incus_settings, place, upgrade_patience=0.1) as hosted:
        begun = await begin(hosted, "three.example.com")
        assert "1 deployments are still running" in await upgrade(hosted.gateway, fails=True)
        await go_on(begun)
        assert (await hosted.ended(begun["id"]))["state"] == "succeeded"
        assert (await hosted.deploy("four.example.com"))["state"] == "succeeded"


async def test_the_units_reload_names_its_new_main_process_before_the_old_one_ends(
    host: Host, tmp_path: Path
) -> None:
    """As systemd runs `ExecReload=`: the command tells NOTIFY_SOCKET, and waits for it."""
    assert host.gateway.process is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(DEADLINE)
        with host.gateway.log.open("ab") as log:
            command = await asyncio.create_subprocess_exec(
                *(str(INSTALLED), "upgrade", "--reload"),
                env={**host.gateway.environment, "NOTIFY_SOCKET": str(tmp_path / "notify")},
                stdout=log,
                stderr=log,
            )
        data = await asyncio.to_thread(systemd.recv, 4096)
        found = re.fullmatch(rb"MAINPID=(\d+)", data)
        assert found is not None, data
        barrier, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, systemd, 4096, 1)
        assert barrier == b"BARRIER=1"
        assert host.gateway.process.returncode is None and command.returncode is None
        os.close(descriptors[0])
        assert await asyncio.wait_for(command.wait(), DEADLINE) == 0
    assert await asyncio.wait_for(host.gateway.process.wait(), DEADLINE) == 0
    host.gateway.process = Orphan(int(found[1]))  # type: ignore[assignment]
    async with Hail(host.gateway) as hail:
        await some(hail)
    hail.report("after a reload")


# --- two environments side by side -----------------------------------------------------------------------


def make_environment(folder: Path) -> Path:
    """Make a Python environment that runs this checkout, as quickstart makes one of a version."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (theirs,) = Path(sys.prefix).glob("lib/python3*/site-packages")
    root = Path(__file__).parents[2]
    (packages / "gateway.pth").write_text(f"{root}\n{root}/clients/python\n{theirs}\n")
    command = folder / "bin" / "incus-gateway"
    command.write_text(f"#!{folder}/bin/python\nfrom gateway.cli.main import main\nmain()\n")
    command.chmod(0o755)
    return folder


_ENSURE = """
import sys
from pathlib import Path
from gateway.host.gateway_process import GatewayProcess, QuickstartFiles
from gateway.settings import load
settings = load()
command = Path(sys.executable).with_name("incus-gateway")
process = GatewayProcess(settings, QuickstartFiles(settings.state_dir), None, command, {})
print(process.ensure(sys.argv[1], print) if sys.argv[1] != "stop" else process.stop())
"""


async def test_versions_lie_side_by_side_and_the_last_one_is_kept_to_go_back(
    incus_settings: Settings, tmp_path: Path, broken: Path
) -> None:
    """As quickstart does it: the link is switched with the gateway, and stays where the new one fails."""
    state = tmp_path / "state"
    (state / "venvs").mkdir(parents=True, mode=0o700)
    one, two, three = (make_environment(state / "venvs" / str(number)) for number in (1, 2, 3))
    gateway = LiveGateway(
        {
            **environment.variables(incus_settings.model_copy(update={"state_dir": state})),
            "GATEWAY_LISTEN": f"127.0.0.1:{free_ports(1)[0]}",
        },
        tmp_path / "log",
    )
    gateway.at(int(gateway.environment["GATEWAY_LISTEN"].rpartition(":")[2]))
    environments, place = Environments(state), QuickstartFiles(state)

    async def run(*words: str | Path, code: int = 0) -> str:
        done = await asyncio.to_thread(
            subprocess.run, words, env=gateway.environment, capture_output=True, text=True, timeout=120
        )
        said: str = done.stdout + done.stderr
        assert done.returncode == code, said
        return said

    def running() -> str:
        return Path(f"/proc/{place.pidfile.read_text().strip()}/cmdline").read_text().split("\0")[1]

    try:
        assert "started" in await run(one / "bin/python", "-c", _ENSURE, "1")
        assert (environments.current, environments.previous) == (one, None)
        async with Hail(gateway) as hail:
            await some(hail)
            assert "replaced" in await run(two / "bin/python", "-c", _ENSURE, "2")
            assert (environments.current, environments.previous) == (two, one)
            assert running() == str(two / "bin/incus-gateway")
            assert not three.exists()  # what is neither in use nor kept is removed
            said = await run(state / "venv/bin/incus-gateway", "upgrade", "--back")
            assert str(one) in said
            assert (environments.current, environments.previous) == (one, two)
            assert running() == str(one / "bin/incus-gateway")
            (packages,) = two.glob("lib/python3*/site-packages")
            (broken / "uvloop.py").rename(packages / "uvloop.py")
            said = await run(one / "bin/incus-gateway", "upgrade", "--back", code=1)
            assert "uvloop is of another machine" in said and "the old gateway keeps running" in said
            assert (environments.current, environments.previous) == (one, two)
            assert running() == str(one / "bin/incus-gateway")
            await some(hail)
        hail.report("there and back")
    finally:
        with contextlib.suppress(AssertionError):
            await run(one / "bin/python", "-c", _ENSURE, "stop")
