"""Fixtures on a real incusd: settings, the daemon itself (to kill it), tenants created without our code.

Nothing here skips: without Incus the tests fail and say why.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gateway.host import HostError
from gateway.host.daemon import Daemon
from gateway.host.setup import enforce_quotas
from gateway.rootfs import process_tree
from gateway.settings import Settings
from tests.integration import environment
from tests.waits import until, until_true

# `--wait` alone ends at once where systemd does not listen yet. A failed unit ("degraded") is for a test to
# find, not a reason to stop here.
BOOTED = """
for try in $(seq 300); do
  case $(systemctl is-system-running --wait 2>/dev/null) in running | degraded) exit 0 ;; esac
  sleep 0.1
done
exit 1
"""

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Container:
    """A container of the base image under the tenants' profile, driven by the `incus` command."""

    name: str

    def run(
        self,
        *command: str,
        user: int = 0,
        check: bool = True,
        stdin: bytes = b"",
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command inside, as root or `user`; with `check`, a non-zero exit raises."""
        words = ("exec", self.name, f"--user={user}", f"--group={user}", "-T", "--", *command)
        return environment.incus(*words, check=check, timeout=timeout, stdin=stdin)

    def sh(self, script: str, user: int = 0, check: bool = True, timeout: float = 60) -> str:
        """Run a shell script inside and return its output and errors as text."""
        done = self.run("sh", "-c", script, user=user, check=check, timeout=timeout)
        return (done.stdout + done.stderr).decode(errors="replace")

    def count(self, words: str) -> int:
        """Return how many of its processes have a command line that begins so.

        As the host sees them: a command inside, again and again, takes more CPU than what is waited for.
        """
        found = 0
        for pid in process_tree.pids(environment.cgroup(self.name)):
            with contextlib.suppress(OSError):  # it has just ended
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                found += line.startswith(words.encode())
        return found

    def address(self, timeout: float = 20.0) -> str:
        """Return the IPv4 address of eth0, waiting up to `timeout` seconds for DHCP."""
        found: list[str] = []

        def addresses() -> list[str]:
            state = json.loads(environment.incus("query", f"/1.0/instances/{self.name}/state").stdout)
            given = ((state.get("network") or {}).get("eth0") or {}).get("addresses", [])
            found[:] = [str(address["address"]) for address in given if address["family"] == "inet"]
            return found

        until_true(lambda: addresses() != [], timeout, every=0.1)
        return found[0]

    @property
    def pid(self) -> int:
        """The host's process id of the container's init."""
        return environment.init_pid(self.name)


MakeTenant = Callable[..., Awaitable[Container]]


@dataclass(frozen=True, slots=True)
class Incusd:
    """The tests' daemon, for tests in which it dies."""

    daemon: Daemon

    @property
    def pid(self) -> int | None:
        return self.daemon.pid()

    async def kill(self) -> None:
        """Kill it with SIGKILL; containers and their commands keep running."""
        await asyncio.to_thread(self.daemon.kill)

    async def restart(self) -> None:
        """Start it if it is not running; return once it is ready, with network and disk quotas."""
        await asyncio.to_thread(self.daemon.ensure, lambda line: None)
        # it may have mounted the pool anew, which is counted by the kernel's own rules until then: where a
        # large disk goes in the meantime, the kernel stops counting
        await asyncio.to_thread(enforce_quotas, environment.settings())
        # where an interface went away just then, incusd has no network, and tries again only after a minute
        network = f"/1.0/networks/{environment.settings().network}"

        async def up() -> bool:  # incusd has no event for this
            shown = await asyncio.to_thread(environment.incus, "query", network)
            return bool(json.loads(shown.stdout)["status"] == "Created")

        await until(up, 90, every=0.5)
        # it may have mounted the pool anew, which is counted by the kernel's own rules then
        await asyncio.to_thread(enforce_quotas, environment.settings())


@pytest.fixture(scope="session")
def incus_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a gateway on the tests' daemon, which is running and set up."""
    said: list[str] = []
    try:
        environment.up(said.append)
    except HostError as error:
        pytest.fail(f"the tests' Incus cannot be prepared: {error.message}\n" + "\n".join(said))
    return environment.settings(state_dir=tmp_path_factory.mktemp("state"))


@pytest.fixture
async def incusd(incus_settings: Settings) -> AsyncIterator[Incusd]:
    """The daemon. It runs again after the test, whatever the test did to it."""
    handle = Incusd(Daemon.at(incus_settings.incus_socket))
    yield handle
    await handle.restart()


async def _make(
    made: list[Container], prefix: str, settings: Settings, *, start: bool, ready: bool, pool: str = ""
) -> Container:
    container = Container(f"t-{prefix}-{os.getpid()}-{next(_numbers)}")
    made.append(container)
    words = (
        *("create" if not start else "launch", settings.image, container.name, "--profile", settings.profile),
        *("--config", f"{environment.OWNER}={environment.owner(os.getpid())}"),
        *(("--storage", pool) if pool else ()),
    )
    await asyncio.to_thread(environment.incus, *words)
    if start and ready:
        await settle(container)
    return container


async def settle(container: Container) -> None:
    """Wait for the container's systemd and for its address."""
    await asyncio.to_thread(container.sh, BOOTED)
    await asyncio.to_thread(container.address)


async def _destroy(made: list[Container]) -> None:
    words = ("delete", "--force")
    ended = (asyncio.to_thread(environment.incus, *words, one.name, check=False) for one in made)
    for done in await asyncio.gather(*ended):
        # the test may have destroyed it
        assert done.returncode == 0 or b"not found" in done.stderr.lower(), done.stderr


@contextlib.asynccontextmanager
async def make_containers(
    prefix: str, settings: Settings, number: int, *, pool: str = ""
) -> AsyncIterator[list[Container]]:
    """Create several running tenants at the same time, for work that is too much for one."""
    made: list[Container] = []
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(number):
                group.create_task(_make(made, prefix, settings, start=True, ready=False, pool=pool))
        yield made
    finally:
        await _destroy(made)


# Ends what a test's commands left running, of whichever user, and removes what they and the tools wrote. The
# group of a command can be removed a moment after its processes were killed; shells that a gateway starts
# meanwhile may stay.
CLEANED = """
groups=$(find /sys/fs/cgroup -depth -path '*/gateway/*/*' -type d)
pkill -KILL -u 1000
pkill -KILL -x sleep
for group in $groups; do [ ! -e $group/cgroup.kill ] || echo 1 >$group/cgroup.kill; done
for try in $(seq 100); do
  rmdir $groups
  left=
  for group in $groups; do [ ! -d $group ] || left=$group; done
  [ -n "$left" ] || break
  sleep 0.02
done 2>/dev/null
find {workspace} /home/site/.local/state -mindepth 1 -delete 2>/dev/null
find /tmp -mindepth 1 -user 1000 -delete 2>/dev/null
[ -z "$left" ]
"""


@dataclass(slots=True)
class Lasting:
    """A tenant that is as a new one for each test: the same one again, unless the last test left traces.

    Its workspace, history and snapshots are removed, and what its commands left running is ended. If it was
    stopped it is started; where its configuration is another than at first, another tenant is made. What a
    test changes as root elsewhere, it puts right itself.
    """

    _prefix: str
    _settings: Settings
    _made: list[Container] = field(default_factory=list)
    _first: Any = None

    @classmethod
    @contextlib.asynccontextmanager
    async def made(cls, prefix: str, settings: Settings) -> AsyncIterator[Lasting]:
        lasting = cls(prefix, settings)
        try:
            yield lasting
        finally:
            await _destroy(lasting._made)

    async def as_new(self, *, other: bool = False) -> Container:
        """Return the tenant; another one in any case where `other` is set."""
        if other or not self._made or not await asyncio.to_thread(self._cleaned, self._made[-1]):
            await _destroy(self._made)
            self._made.clear()
            await _make(self._made, self._prefix, self._settings, start=True, ready=True)
            self._first = self._shown(self._made[0])
        return self._made[0]

    def _cleaned(self, container: Container) -> bool:
        shown = self._shown(container)
        if shown is None or shown[1:] != self._first[1:]:
            return False
        if shown[0] != "Running":
            if environment.incus("start", container.name, check=False).returncode != 0:
                return False
            container.sh(BOOTED)
            container.address()
        for snapshot in environment.snapshots(container.name):
            environment.incus("snapshot", "delete", container.name, snapshot)
        script = CLEANED.replace("{workspace}", self._settings.workspace)
        return container.run("sh", "-c", script, check=False).returncode == 0

    def _shown(self, container: Container) -> Any:
        """Return status, configuration and devices; None if there is no such instance."""
        done = environment.incus("query", f"/1.0/instances/{container.name}", check=False)
        if done.returncode != 0:
            return None
        shown = json.loads(done.stdout)
        config = {key: value for key, value in shown["config"].items() if not key.startswith("volatile.")}
        return shown["status"], config, shown["devices"]


@pytest.fixture
async def make_tenant(incus_settings: Settings) -> AsyncIterator[MakeTenant]:
    """A function that creates tenants, `await make_tenant(start=True, ready=False)`, for this test.

    `ready` waits for the container's systemd and address, a second more.
    """
    made: list[Container] = []

    async def make(*, start: bool = True, ready: bool = False) -> Container:
        return await _make(made, "test", incus_settings, start=start, ready=ready)

    yield make
    await _destroy(made)


@pytest.fixture(scope="session")
async def lasting_tenant(incus_settings: Settings) -> AsyncIterator[Lasting]:
    async with Lasting.made("tenant", incus_settings) as lasting:
        yield lasting


@pytest.fixture
async def tenant(lasting_tenant: Lasting) -> Container:
    """A running tenant for this test alone, as a new one; see `Lasting`.

    Who changes it as root, so that it would not be as new for the next test, asks `make_tenant` for one.
    """
    return await lasting_tenant.as_new()


@pytest.fixture(scope="session")
async def shared_tenant(incus_settings: Settings) -> AsyncIterator[Container]:
    """A running tenant shared by tests that leave no trace in it."""
    made: list[Container] = []
    yield await _make(made, "shared", incus_settings, start=True, ready=True)
    await _destroy(made)


@pytest.fixture
def workspace(tenant: Container, incus_settings: Settings) -> Path:
    """The host's path of a new tenant's workspace, through its init's root."""
    return Path(f"/proc/{tenant.pid}/root{incus_settings.workspace}")
