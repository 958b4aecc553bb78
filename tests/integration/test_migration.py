"""A site that lives in a folder of the host, with a real Node server, moves into a tenant while visitors ask.

systemd is not PID 1 here: the unit is a process that the test starts and stops in its place, and what is read
of systemd itself is tried with the real one of a container.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.migration import Migration, Wanted, door, opened
from gateway.migration.service import Unit
from gateway.settings import Settings
from tests.contracts.gateway import no_traceback
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.live import free_ports

OWNER = 4242  # of the old site; nobody of this host
SERVER = """
const http = require("node:http"), fs = require("node:fs"), path = require("node:path");
const at = (name) => process.argv[process.argv.indexOf(name) + 1];
http.createServer((request, response) => {
  if (request.method === "POST") {
    fs.appendFileSync("notes.txt", request.url.slice(1) + "\\n");
    return setTimeout(() => response.end("noted"), 20);
  }
  const text = fs.readFileSync(at("--text"), "utf8");
  const told = {where: process.cwd(), secret: process.env.SECRET, text};
  response.end(JSON.stringify(told));
}).listen(Number(at("--port")), at("--host"));
"""


class OldService:
    """The unit of an old site: a process of the site's user, in the place of systemd."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.enabled = folder, True
        (self.port,) = free_ports(1)
        (folder / "server.js").write_text(SERVER)
        (folder / "text.txt").write_text("first")
        (folder / "notes.txt").write_text("")
        for path in (folder, *folder.iterdir()):
            os.chown(path, OWNER, OWNER)
        self.process: subprocess.Popen[bytes] | None = None
        self.start("")

    @property
    def words(self) -> tuple[str, ...]:
        text = f"{self.folder}/text.txt"  # by its full name: it must be found in the tenant, too
        return ("/usr/bin/node", "server.js", "--host", "127.0.0.1", "--port", str(self.port), "--text", text)

    def unit(self, name: str) -> Unit:
        return Unit(self.process.pid if self.process else 0, self.words, self.enabled)

    def start(self, name: str) -> None:
        if self.process is None:
            self.process = subprocess.Popen(
                ("setpriv", f"--reuid={OWNER}", f"--regid={OWNER}", "--clear-groups", *self.words),
                cwd=self.folder,
                env={"PATH": os.environ["PATH"], "SECRET": 'a "quoted" $ecret', "PORT": str(self.port)},
            )
            deadline = time.monotonic() + 20
            while subprocess.run(["ss", "-Hltn", f"sport = :{self.port}"], capture_output=True).stdout == b"":
                assert self.process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)

    def stop(self, name: str) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def enable(self, name: str, on: bool) -> None:
        self.enabled = on


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    async with hosting(incus_settings, tmp_path_factory.mktemp("migration") / "state") as host:
        yield host
        await no_traceback(host.gateway)


@pytest.fixture
def old() -> Iterator[OldService]:
    folder = Path(tempfile.mkdtemp(prefix="gw-migration-", dir="/srv"))
    service = OldService(folder)
    yield service
    service.stop("")
    shutil.rmtree(folder)


@pytest.fixture
async def domain(host: Hosting) -> AsyncIterator[str]:
    domain = f"moved-{os.getpid()}-{time.monotonic_ns() % 10**6}.example.com"
    yield domain
    tenant = domain.replace(".", "-")
    environment.incus("delete", "--force", tenant, check=False)
    door.close_door(tenant)


@contextlib.asynccontextmanager
async def migrating(
    host: Hosting, domain: str, units: Any, said: list[str] | None = None
) -> AsyncIterator[Migration]:
    said = [] if said is None else said
    async with opened(host.settings, domain, said.append, units) as migration:
        yield migration


class Visitors:
    """Some who write all the while: `failed` what was refused, `noted` what they were told is kept."""

    def __init__(self, host: Hosting, domain: str) -> None:
        self._host, self._domain = host, domain
        self.failed: list[Any] = []
        self.noted: list[str] = []
        self.longest = 0.0

    async def __aenter__(self) -> Visitors:
        self._tasks = [asyncio.create_task(self._one(number)) for number in range(4)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()
        await asyncio.gather(*self._tasks)

    def stop(self) -> None:
        self._stopped = True

    _stopped = False

    async def _one(self, number: int) -> None:
        url = f"http://127.0.0.1:{self._host.settings.caddy_ask}/"
        async with aiohttp.ClientSession(headers={"Host": self._domain}) as session:
            for count in range(100_000):
                if self._stopped:
                    return
                note, began = f"{number}-{count}", time.monotonic()
                try:
                    async with session.post(url + note) as answer:
                        if (answer.status, await answer.text()) != (200, "noted"):
                            self.failed.append((note, answer.status, await answer.text()))
                        else:
                            self.noted.append(note)
                except aiohttp.ClientError as error:
                    self.failed.append((note, repr(error)))
                self.longest = max(self.longest, time.monotonic() - began)
                await asyncio.sleep(0.005)


async def told(host: Hosting, domain: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{host.settings.caddy_ask}/"
        async with session.get(url, headers={"Host": domain}) as answer:
            assert answer.status == 200, await answer.text()
            return dict(await answer.json(content_type=None))


async def tool(host: Hosting, tenant: str, name: str, **given: Any) -> tuple[int, Any]:
    status, answer, _ = await host.call("POST", f"/v1/tenants/{tenant}/tools/{name}", given)
    return status, answer


async def test_a_site_moves_in_and_back_while_visitors_ask(
    host: Hosting, old: OldService, domain: str
) -> None:
    """Nobody is refused, and nothing that was written is lost; tools work in every state."""
    tenant, said = domain.replace(".", "-"), list[str]()
    wanted = Wanted(old.folder, unit="site@moved.service")
    async with migrating(host, domain, old, said) as migration:
        plan = await migration.plan(domain, wanted)
        print("\n".join(plan.lines()))
        assert plan.stops == () and not plan.read_only
        assert environment.incus("info", tenant, check=False).returncode != 0
        assert await migration.forward(domain, wanted, "attach") == "attached"
        assert (await told(host, domain))["where"] == str(old.folder)
        print(await tool(host, tenant, "Write", file_path="text.txt", content="second"))
        assert (await told(host, domain))["text"] == "second"
        async with Visitors(host, domain) as visitors:
            assert await migration.forward(domain, None, "copy") == "copied"
            assert await migration.forward(domain, None, "switch") == "switched"
            await asyncio.sleep(1)
        print("\n".join(said), visitors.longest, len(visitors.noted))
        assert visitors.failed == []
        site = await told(host, domain)
        print(site)
