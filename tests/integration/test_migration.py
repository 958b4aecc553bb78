"""A site in a folder of the host, with a real Node server, moves into a tenant while visitors use it.

Its unit is one of a real systemd: of this machine's if it is PID 1, else of a user's own (`systemd --user`).
Where there is none, the test starts and stops a process instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
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

from gateway.errors import Conflict
from gateway.host import HostError
from gateway.host.daemon import systemd_runs
from gateway.migration import Migration, Wanted, opened
from gateway.migration.source import Systemctl, Unit
from gateway.rootfs import shown_folders
from gateway.rootfs.broker_client import instances
from gateway.runtime.incus import records
from gateway.settings import Settings
from tests.contracts.gateway import no_traceback
from tests.integration import environment
from tests.integration.conftest import Container
from tests.integration.sites import Hosting, hosting
from tests.integration.user_systemd import PROGRAM, UserSystemd
from tests.live import free_ports
from tests.waits import pause, until, until_true

OWNER = 4242  # the old site's; no user of this host
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
    """The unit of an old site, without systemd: a process of the site's user."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.enabled, self.refuses = folder, True, False
        (self.port,) = free_ports(1)
        (folder / "server.js").write_text(SERVER)
        (folder / "text.txt").write_text("first")
        (folder / "notes.txt").write_text("")
        self.name = f"gw-migration-{self.port}@shop.service"
        for path in (folder, *folder.iterdir()):
            os.chown(path, OWNER, OWNER)
        self.process: subprocess.Popen[bytes] | None = None
        self.start("")

    @property
    def runs(self) -> bool:
        return self.process is not None

    @property
    def words(self) -> tuple[str, ...]:
        text = f"{self.folder}/text.txt"  # an absolute path, which must work in the tenant too
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
            self.wait()

    def wait(self) -> None:
        """Wait until something listens on its port."""
        look = ["ss", "-Hltn", f"sport = :{self.port}"]
        until_true(lambda: subprocess.run(look, capture_output=True).stdout != b"")

    def stop(self, name: str) -> None:
        if self.refuses:
            raise HostError("systemd refuses")
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def enable(self, name: str, on: bool) -> None:
        self.enabled = on

    def remove(self) -> None:
        self.stop("")


class SystemdService(OldService):
    """The unit of an old site under a real systemd, and its user."""

    UNIT = """\
[Service]
WorkingDirectory={folder}
Environment=PORT={port} "SECRET=a \\"quoted\\" $ecret"
ExecStart={words}
Restart=always
"""
    USER = "User={name}\n[Install]\nWantedBy=multi-user.target\n"
    before: tuple[str, ...] = ()

    @property
    def systemctl(self) -> Systemctl:
        return Systemctl(self.before)

    @property
    def folder_of_units(self) -> Path:
        return Path("/etc/systemd/system")

    @property
    def file(self) -> Path:
        return self.folder_of_units / self.name.replace("@shop", "@")

    @property
    def runs(self) -> bool:
        return bool(self.systemctl.unit(self.name).pid)

    @property
    def user(self) -> str:
        return f"gw-migration-{self.port}"

    def start(self, name: str) -> None:
        if not self.file.exists():
            self.make_user()
            unit = self.UNIT.format(folder=self.folder, port=self.port, words=" ".join(self.words))
            self.file.write_text(unit + self.USER.format(name=self.user))
            self.reload()
            self.systemctl.enable(self.name, True)
        self.systemctl.start(self.name)
        self.wait()

    def make_user(self) -> None:
        words = ("useradd", "--no-create-home", f"--uid={OWNER}", self.user)
        subprocess.run(words, check=True, capture_output=True)

    def remove_user(self) -> None:
        subprocess.run(["userdel", self.user], check=True, capture_output=True)

    def reload(self) -> None:
        subprocess.run([*self.before, "systemctl", "daemon-reload"], check=True)

    def unit(self, name: str) -> Unit:
        found = self.systemctl.unit(name)
        self.enabled = found.enabled
        return found

    def stop(self, name: str) -> None:
        if self.refuses:
            raise HostError("systemd refuses")
        self.systemctl.stop(self.name)

    def enable(self, name: str, on: bool) -> None:
        self.systemctl.enable(name, on)
        self.unit(name)

    def remove(self) -> None:
        self.stop("")
        self.systemctl.enable(self.name, False)
        self.file.unlink()
        self.reload()
        self.remove_user()


class UserService(SystemdService):
    """The same where systemd is not the first process: under a manager of the site's user."""

    USER = "[Install]\nWantedBy=default.target\n"
    manager: UserSystemd

    @property
    def folder_of_units(self) -> Path:
        return self.manager.units

    def start(self, name: str) -> None:
        if not hasattr(self, "manager"):
            self.manager = UserSystemd(self.user, OWNER)
            self.before = self.manager.before
        super().start(name)

    def make_user(self) -> None:
        self.manager.start()

    def remove_user(self) -> None:
        self.manager.stop()


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    state = tmp_path_factory.mktemp("migration") / "state"
    async with hosting(incus_settings, state, reconcile_interval=2.0) as host:
        yield host
        await no_traceback(host.gateway)


def mounted(settings: Settings) -> list[Path]:
    """Return where folders are mounted for this test's tenants."""
    places = shown_folders.place(settings.incus_socket.parent)
    return [where for where in places.iterdir() if shown_folders.mounts(where)] if places.is_dir() else []


@pytest.fixture
def old() -> Iterator[OldService]:
    kind = SystemdService if systemd_runs() else UserService if PROGRAM.exists() else OldService
    with an_old_service(kind) as service:
        yield service


@contextlib.contextmanager
def an_old_service(kind: type[OldService]) -> Iterator[OldService]:
    folder = Path(tempfile.mkdtemp(prefix="gw-migration-", dir="/srv"))
    service = kind(folder)
    try:
        yield service
    finally:
        service.refuses = False
        service.remove()
        shutil.rmtree(folder)


@pytest.fixture
async def domain(host: Hosting) -> AsyncIterator[str]:
    domain = f"moved-{os.getpid()}-{time.monotonic_ns() % 10**6}.example.com"
    yield domain
    tenant = domain.replace(".", "-")
    environment.incus("delete", "--force", tenant, check=False)
    instances(host.settings).release_folders()


@contextlib.asynccontextmanager
async def migrating(
    host: Hosting, domain: str, units: Any, said: list[str] | None = None
) -> AsyncIterator[Migration]:
    said = [] if said is None else said
    async with opened(host.settings, domain, said.append, units) as migration:
        yield migration


class Visitors:
    """Visitors who keep writing. `failed` are the refused writes, `noted` the acknowledged ones."""

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

    async def more(self, number: int) -> None:
        """Wait until so many more were answered or refused."""
        wanted = len(self.noted) + len(self.failed) + number
        await until(lambda: len(self.noted) + len(self.failed) >= wanted)

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
                await pause(0.005)


async def told(host: Hosting, domain: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{host.settings.caddy_ask}/"
        async with session.get(url, headers={"Host": domain}) as answer:
            assert answer.status == 200, await answer.text()
            return dict(await answer.json(content_type=None))


async def tool(host: Hosting, tenant: str, name: str, **given: Any) -> tuple[int, Any]:
    status, answer, _ = await host.call("POST", f"/v1/tenants/{tenant}/tools/{name}", given)
    return status, answer


def inside(tenant: str, script: str, user: int = 0) -> str:
    return Container(tenant).sh(script, user=user, check=False).strip()


def seen(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return a folder's contents with owners, modes and times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (facts.st_uid, facts.st_mode, facts.st_mtime_ns, content)
    return found


async def test_a_site_moves_in_and_back_while_visitors_ask(
    host: Hosting, old: OldService, domain: str
) -> None:
    """No visitor is refused, no write is lost, and tools work in every state."""
    tenant, said = domain.replace(".", "-"), list[str]()
    wanted = Wanted(old.folder, unit=old.name)
    async with migrating(host, domain, old, said) as migration:
        plan = await migration.plan(domain, wanted)
        assert plan.stops == () and not plan.read_only
        assert "quoted" not in "\n".join([*plan.lines(), str(plan.to_dict())])
        assert environment.incus("info", tenant, check=False).returncode != 0
        assert await migration.forward(domain, wanted, "attach") == "attached"
        assert (await told(host, domain))["where"] == str(old.folder)
        assert not (await tool(host, tenant, "Write", file_path="text.txt", content="second"))[1]["isError"]
        assert (await told(host, domain))["text"] == "second"
        assert (old.folder / "text.txt").stat().st_uid == OWNER
        (where,) = mounted(host.settings)
        container_root_has_no_power(tenant, old.folder, where)
        status, refused, _ = await host.call(
            "POST", "/v1/deployments", {"domain": domain, "template": "static"}
        )
        assert status == 202
        assert (await host.ended(refused["id"]))["error"]["reason"] == "migrating"
        old.refuses = True
        with pytest.raises(HostError, match="refuses"):
            await migration.forward(domain, None, "switch")
        old.refuses = False
        assert (await told(host, domain))["where"] == str(old.folder)
        async with Visitors(host, domain) as visitors:
            assert await migration.forward(domain, None, "copy") == "copied"
            assert (await told(host, domain))["where"] == str(old.folder)
            assert await migration.forward(domain, None, "switch") == "switched"
            left = seen(old.folder)
            await visitors.more(20)
        print("\n".join(said), f"longest {visitors.longest:.2f} s of {len(visitors.noted)}")
        assert visitors.failed == []
        assert (await told(host, domain)) == {
            "where": "/srv/site", "secret": 'a "quoted" $ecret', "text": "second"
        }  # fmt: skip
        notes = inside(tenant, "cat /srv/site/notes.txt").split()
        assert set(visitors.noted) <= set(notes) and len(notes) == len(set(notes))
        assert not old.runs and old.enabled and seen(old.folder) == left
        assert "second" in (await tool(host, tenant, "Read", file_path="text.txt"))[1]["content"][0]["text"]

        assert await migration.back(domain, sure=False) == "attached"
        assert (await told(host, domain))["where"] == str(old.folder)
        assert "second" in (await tool(host, tenant, "Read", file_path="text.txt"))[1]["content"][0]["text"]
        kept = "/srv/.site-kept-1"
        assert set(visitors.noted) <= set(inside(tenant, f"cat {kept}/notes.txt").split())
        with pytest.raises(Conflict, match="route"):
            await migration.back(domain, sure=False)

        assert await migration.forward(domain, None, "finish") == ""
        assert not old.enabled and not old.runs
        assert (await told(host, domain))["where"] == "/srv/site"
        found = next(entry for entry in environment.instances() if entry["name"] == tenant)
        assert not [key for key in found["config"] if key.startswith(records.MIGRATION_STATE)]
        assert "migrate" not in found["devices"] and not mounted(host.settings)
    the_real_systemd(tenant)


def container_root_has_no_power(tenant: str, folder: Path, where: Path) -> None:
    """Root in the container has the folder owner's rights, and none of root's on the host."""
    (folder / "roots").write_text("secret")
    (folder / "roots").chmod(0o600)
    try:
        inside(tenant, "cp /bin/true /srv/site/planted; chmod 4755 /srv/site/planted")
        assert not (folder / "planted").exists()
        assert "secret" not in inside(tenant, "cat /srv/site/roots; chown 0:0 /srv/site/text.txt")
        inside(tenant, "rm -f /srv/site/roots; chmod 777 /srv/site/roots; mv /srv/site/roots /srv/site/r")
        assert (folder / "roots").stat().st_mode & 0o777 == 0o600
        inside(tenant, "cp /bin/true /srv/site/mine && chmod 4755 /srv/site/mine", user=1000)
        assert (folder / "mine").stat().st_uid == OWNER
        inside(tenant, "mount -t tmpfs none /srv/site && touch /srv/site/over; umount /srv/site")
        assert not (folder / "over").exists() and not (where / "over").exists()
        assert {path.lstat().st_uid for path in folder.rglob("*")} == {OWNER, 0}
    finally:
        (folder / "roots").unlink()
        (folder / "mine").unlink()


class SystemctlOf(Systemctl):
    """The systemd of a container."""

    def __init__(self, tenant: str) -> None:
        super().__init__()
        self._tenant = tenant

    def _run(self, *words: str) -> str:
        done = environment.incus("exec", self._tenant, "--", *words, check=False)
        if done.returncode != 0:
            raise HostError(done.stderr.decode())
        return done.stdout.decode()


def the_real_systemd(tenant: str) -> None:
    """Reading and changing a unit with systemd's commands; the words of its command are exact."""
    unit = "[Service]\nExecStart=/bin/sleep \"1 2\" 'a;b' infinity\n[Install]\nWantedBy=multi-user.target\n"
    words = ("file", "push", "-", f"{tenant}/etc/systemd/system/old@1.service")
    environment.incus(*words, stdin=unit.replace("\"1 2\" 'a;b' ", "").encode())
    units = SystemctlOf(tenant)
    inside(tenant, "systemctl daemon-reload")
    assert units.unit("old@1.service") == Unit(0, ("/bin/sleep", "infinity"), False)
    units.enable("old@1.service", True)
    units.start("old@1.service")
    found = units.unit("old@1.service")
    assert found.enabled and found.pid > 1
    units.stop("old@1.service")
    units.enable("old@1.service", False)
    environment.incus(*words, stdin=unit.encode())
    inside(tenant, "systemctl daemon-reload")
    assert units.unit("old@1.service") == Unit(0, ("/bin/sleep", "1 2", "a;b", "infinity"), False)
    with pytest.raises(HostError, match="cannot load a unit"):
        units.unit("nobody.service")


async def test_a_folder_is_shown_to_its_tenant_alone(host: Hosting, old: OldService, domain: str) -> None:
    """Not to a later one of the same name, nor to a clone; and its mount goes with the tenant."""
    tenant = domain.replace(".", "-")
    async with migrating(host, domain, old) as migration:
        assert await migration.forward(domain, Wanted(old.folder, unit=old.name), "attach") == "attached"
    (first,) = mounted(host.settings)
    assert (await host.call("DELETE", f"/v1/tenants/{tenant}"))[0] == 204
    with an_old_service(OldService) as other:
        (other.folder / "text.txt").write_text("other")
        async with migrating(host, domain, other) as migration:
            wanted = Wanted(other.folder, unit=other.name)
            assert await migration.forward(domain, wanted, "attach") == "attached"
            assert (await tool(host, tenant, "Read", file_path="text.txt"))[1]["content"][0][
                "text"
            ] == "1\tother"
            assert "other" in inside(tenant, "cat /srv/site/text.txt")
            inside(tenant, "echo changed >/srv/site/text.txt", user=1000)
            assert (old.folder / "text.txt").read_text() == "first"
            assert (other.folder / "text.txt").read_text() == "changed\n"
            await until(lambda: not first.exists())
            # somebody else's mount in its place is not taken for its own
            (where,) = mounted(host.settings)
            shown_folders.unmount(where)
            where.mkdir()
            subprocess.run(["mount", "--bind", old.folder, where], check=True)
            assert await migration.forward(domain, None, "attach") == "attached"
            assert "changed" in inside(tenant, "cat /srv/site/text.txt")
            status, refused, _ = await host.call("POST", f"/v1/tenants/{tenant}/clone", {"tenant": "copied"})
            assert (status, refused["code"]) == (409, "conflict"), refused
            assert await migration.back(domain, sure=True) == ""
    assert not mounted(host.settings)


async def test_a_killed_run_is_gone_on_with(host: Hosting, old: OldService, domain: str) -> None:
    """By the command line, without a unit, in root's folder: killed while visitors wait, and run again.

    A shell's line starts the old service, and its words name loopback; the tenant starts the server itself.
    """
    old.stop("")
    for path in (old.folder, *old.folder.iterdir()):
        os.chown(path, 0, 0)
    tenant, config = domain.replace(".", "-"), {**os.environ, **environment.variables(host.settings)}
    line = f"{shlex.join(old.words)}; echo ended"
    process = subprocess.Popen(("sh", "-c", line), cwd=old.folder, start_new_session=True)
    words = (*host.gateway.program, "migrate", domain)

    async def migrate(*more: str) -> tuple[int, str]:
        run = await asyncio.create_subprocess_exec(
            *words, *more, env=config, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        text, _ = await asyncio.wait_for(run.communicate(), 100)
        return run.returncode or 0, text.decode()

    try:
        old.wait()
        assert (await migrate("--from", str(old.folder), "--plan"))[0] == 0
        code, text = await migrate("--from", str(old.folder), "--until", "attach")
        assert code == 0, text
        code, answer = await tool(host, tenant, "Write", file_path="text.txt", content="third")
        assert answer["structuredContent"]["code"] == "forbidden"  # as root: its files could be executed
        killed = await asyncio.create_subprocess_exec(*words, env=config, stdout=asyncio.subprocess.DEVNULL)

        def stopped() -> bool:
            assert killed.returncode is None
            return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

        await until(stopped, 60, every=0.005)
        killed.kill()
        await killed.wait()
        visitor = asyncio.create_task(told(host, domain))
        code, text = await migrate()
        assert code == 0 and "undone first" in text, text
        assert (await told(host, domain))["where"] == "/srv/site"
        # visitors during the interruption were told to come again, or waited long enough
        await asyncio.gather(visitor, return_exceptions=True)
        assert process.poll() is None  # still running: there is no unit to stop
        code, text = await migrate("--finish", "--json")
        assert (code, json.loads(text)["state"]) == (0, None)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
