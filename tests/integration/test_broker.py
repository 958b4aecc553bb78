"""A gateway without root and a broker with it: files, cancelled trees, bound ports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import NotFound, Unavailable
from gateway.host.caddy_service import CaddyService
from gateway.host.requirements import setup
from gateway.rootfs import FilesystemRoot, process_tree
from gateway.rootfs.broker_client import BrokerClient
from gateway.rootfs.workers import Workers
from gateway.runtime import ExecSpec
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.incus.process import ContainerScripts
from gateway.settings import Settings
from tests.contracts.processes import Tree
from tests.integration import environment
from tests.integration.conftest import Container, MakeTenant
from tests.integration.sites import Hosting
from tests.integration.unread import last_words
from tests.live import LiveGateway, free_ports
from tests.waits import until

NOBODY = 65534
CHECKOUT = Path(__file__).parents[2]
# Only one capability, to read a Python in root's home. It allows neither writing nor signals.
HELD = "-all,+dac_read_search"


def as_nobody() -> tuple[str, ...]:
    """Return a command that starts a program as nobody, whose only privilege is access to incusd."""
    group = environment.settings().incus_socket.stat().st_gid
    user = (f"--reuid={NOBODY}", f"--regid={NOBODY}", f"--groups={group}")
    return ("setpriv", *user, f"--inh-caps={HELD}", f"--ambient-caps={HELD}", "--no-new-privs")


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that other users may enter, and settings of a gateway whose broker runs in it."""

    folder: Path
    settings: Settings


@pytest.fixture
async def place(incus_settings: Settings) -> AsyncIterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="gateway-broker-"))
    folder.chmod(0o755)
    settings = environment.settings(broker_socket=folder / "run" / "socket", broker_user="nobody")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "broker"),
        env={"PATH": os.environ["PATH"], "GATEWAY_CONFIG": "/nonexistent", **environment.variables(settings)},
    )
    try:
        await until((folder / "run" / "socket").exists)
        yield Place(folder, settings)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        shutil.rmtree(folder)


@pytest.fixture
async def gateway(place: Place) -> AsyncIterator[LiveGateway]:
    """`serve` as nobody."""
    state = place.folder / "state"
    state.mkdir()
    os.chown(state, NOBODY, NOBODY)
    variables = environment.variables(place.settings)
    variables |= {"GATEWAY_STATE_DIR": str(state)}
    del variables["GATEWAY_LISTEN"]
    gateway = LiveGateway(variables, place.folder / "log")
    await gateway.start(*as_nobody())
    try:
        yield gateway
    finally:
        assert await gateway.stop() == 0, gateway.log.read_text()
        assert "Traceback" not in gateway.log.read_text()


async def test_files_and_trees(gateway: LiveGateway, tenant: Container) -> None:
    """File tools and cancel need no root in the gateway."""
    assert gateway.process is not None
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    assert f"Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}" in status
    assert f"CapEff:\t{1 << 2:016x}" in status  # CAP_DAC_READ_SEARCH
    async with gateway.wire(tenant.name) as wire:
        for name, given in (
            ("Write", {"file_path": "new/a.txt", "content": "alpha\n"}),
            ("Read", {"file_path": "new/a.txt"}),
            ("Grep", {"pattern": "alp+ha"}),
        ):
            said = await wire.call("tools/call", name=name, arguments=given)
            assert not said.get("isError"), said
        assert "a.txt" in said["content"][0]["text"]
        assert tenant.sh("stat -c %U:%G /srv/site/new/a.txt").strip() == "site:site"
        tree = Tree()
        started = await wire.call("exec/start", argv=["bash", "-c", tree.script])
        await tree.grown()
        killed = await wire.call("exec/cancel", exec=started["exec"])
        assert tree.alive() == 0
        assert (killed["survivors"], killed["method"]) == (0, "cgroup")


async def test_ports(gateway: LiveGateway, make_tenant: MakeTenant) -> None:
    """A starting tenant's hardware address is bound to its port, which needs root."""
    container = await make_tenant()
    told = environment.incus("query", f"/1.0/instances/{container.name}")
    address = json.loads(told.stdout)["config"]["volatile.eth0.hwaddr"]
    bridge = environment.settings().network

    def bound() -> bool:
        command = ["bridge", "-j", "fdb", "show", "br", bridge]
        entries = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return any(entry["mac"] == address and "sticky" in entry.get("flags", ()) for entry in entries)

    await until(bound)
    assert "cannot bind tenants' addresses" not in gateway.log.read_text()


async def test_deploys_by_a_caddy_that_root_started(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """`setup` gives it the routes' folders; it has no access to Caddy's admin API."""
    monkeypatch.setattr("gateway.host.caddy_service.systemd_runs", lambda: False)
    http, https, ask = free_ports(3)
    folder = place.folder / "caddy"
    changes = {
        "caddy_dir": folder,
        "caddy_admin": str(folder / "admin" / "admin.sock"),
        "caddy_http": http,
        "caddy_https": https,
        "caddy_ask": ask,
        "caddy_issuer": "internal",
        "golden": False,
        "warm_pool": 0,
    }
    state = place.folder / "state"
    state.mkdir()
    os.chown(state, NOBODY, NOBODY)
    host = Hosting(place.settings.model_copy(update=changes | {"state_dir": state}), place.folder / "log")
    for path in (
        folder / "routes" / "earlier.localhost",
        folder / "targets" / "x",
    ):  # root's gateway had them
        path.mkdir(parents=True)
    serve = [*as_nobody(), sys.executable, "-m", "gateway", "serve"]
    refused = await asyncio.create_subprocess_exec(
        *serve, env={"PATH": os.environ["PATH"], **host.gateway.environment}, stderr=asyncio.subprocess.PIPE
    )
    said = (await asyncio.wait_for(refused.communicate(), 60))[1].decode()
    assert refused.returncode == 1
    assert f"cannot write {folder / 'routes'}" in said and "incus-gateway setup" in said
    assert "Traceback" not in said

    changed = {change.step for change in setup(host.settings, lambda line: None) if change.changed}
    assert changed - {"disk quotas"} == {
        "folders of Caddy's routes"
    }  # other tests may end the kernel's count
    front = CaddyService(host.settings)
    front.start(CHECKOUT / "deploy")
    try:
        assert (folder / "admin").owner() == "caddy"
        await host.gateway.start(*as_nobody())
        for kind in ("create", "update"):
            record = await host.deploy("split.localhost")
            assert (record["state"], record["kind"]) == ("succeeded", kind), record["error"]
        assert (folder / "routes" / "split.localhost").owner() == "nobody"
        status, text = await host.visit("split.localhost")
        assert (status, "Your site is up." in text) == (200, True)
        assert (await host.call("DELETE", "/v1/tenants/split-localhost"))[0] == 204
        await until(lambda: not (folder / "routes" / "split.localhost").is_symlink())
        assert await host.gateway.stop() == 0
        assert "Traceback" not in host.gateway.log.read_text()
    finally:
        if host.gateway.process is not None:
            await host.gateway.stop()
        front.stop()
        environment.incus("delete", "--force", "split-localhost", check=False)


async def test_ends_trees_by_the_broker(
    place: Place, tenant: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a broker, neither this process nor a command in the tenant works on a cgroup."""

    def never(*_: object) -> None:
        raise AssertionError("not by this process")

    for step in process_tree.STEPS:
        monkeypatch.setitem(process_tree.STEPS, step, never)
    monkeypatch.setattr(ContainerScripts, "kill", never)
    async with IncusRuntime(place.settings) as runtime:
        tree = Tree()
        process = await runtime.commands.exec(tenant.name, ExecSpec(("bash", "-c", tree.script)))
        await tree.grown()
        killed = await process.kill(0.2)
        assert (killed.survivors, tree.alive()) == (0, 0)
        assert killed.killed >= Tree.SIZE
        await process.aclose()
    left = tenant.sh("find /sys/fs/cgroup -path '*/gateway/*' -type d -name '*' | grep -c exec || :")
    assert left.strip() == "0"


async def test_what_incusd_does_not_read_comes_by_the_broker(place: Place, tenant: Container) -> None:
    async with IncusRuntime(place.settings) as runtime:
        process = await runtime.commands.exec(tenant.name, ExecSpec(("sleep", "1")))
        await last_words(process)


@pytest.fixture
async def foreign(incus_settings: Settings) -> AsyncIterator[Container]:
    """A running foreign container on the same pool, with a command's cgroup like ours."""
    container = Container(f"t-foreign-{os.getpid()}")
    mark = f"{environment.OWNER}={environment.owner(os.getpid())}"
    words = ("--no-profiles", "--storage", incus_settings.pool, "--config", mark)
    environment.incus("launch", incus_settings.image, container.name, *words)
    yield container
    environment.incus("delete", "--force", container.name)


# Stays in a group of its own, as `runtime.launcher` makes them, until it is killed.
STAY = """
for try in $(seq 100); do
  g=/sys/fs/cgroup/unified; [ -d $g ] || g=/sys/fs/cgroup
  [ -e $g/cgroup.procs ] && break; sleep 0.05
done
mkdir -p $g/gateway/own/x && echo $$ > $g/gateway/own/x/cgroup.procs && exec sleep 600
"""


async def test_a_gateway_that_was_taken_over(place: Place, tenant: Container, foreign: Container) -> None:
    """It gets no worker on a foreign container and ends nothing there; of a tenant it ends only commands.

    incusd decides, not the request: a tenant without its mark is no longer served.
    """
    processes = [
        await asyncio.create_subprocess_exec(
            *("incus", "exec", name, "-T", "--", "sh", "-c", STAY),
            env=environment.daemon().environment,
            stdin=asyncio.subprocess.DEVNULL,
        )
        for name in (tenant.name, foreign.name)
    ]
    broker = BrokerClient(at=place.settings.broker_socket)
    spawn = Workers(place.settings).spawn(FilesystemRoot(tenant.name, place.settings.workspace)).wire()
    groups = "cat /proc/[0-9]*/cgroup; true"
    await until(lambda: all("own/x" in container.sh(groups) for container in (tenant, foreign)))

    async def refused(**request: Any) -> None:
        with pytest.raises((NotFound, Unavailable)) as caught:
            await broker.request(request)
        assert str(environment.INCUS_DIR) not in caught.value.message

    for name in (foreign.name, f"../{foreign.name}", f"{tenant.name}/../{foreign.name}", "", "/"):
        await refused(**(spawn | {"tenant": name}))
        for step in process_tree.STEPS:
            await refused(do="tree", tenant=name, group="own/x", step=step)
        for what in ("relieve", "reserve"):
            await refused(do=what, tenant=name)
        await refused(do="pipes", tenant=name, group="own/x")
        await refused(do="break_off", tenant=name, port=80, leave=[])
    for group in ("..", "../init.scope", "own/../..", f"../../lxc.payload.{foreign.name}/gateway/own", ""):
        await refused(do="tree", tenant=tenant.name, group=group, step="end")
        await refused(do="pipes", tenant=tenant.name, group=group)
    for folder in ("/", "/etc", "/srv/site/../../etc"):
        await refused(**(spawn | {"workspace": folder}))
    assert await broker.relieve(tenant.name) is None  # no site, and a command is none
    for port, leave in (("x", []), (80, ["x"]), (80, None)):
        await refused(do="break_off", tenant=tenant.name, port=port, leave=leave)
    assert foreign.sh("pgrep -c sleep").strip() == "1"
    assert tenant.sh("pgrep -c sleep").strip() == "1"

    began = time.perf_counter()
    _, (descriptor,) = await broker.request(spawn)
    print(f"opened in {(time.perf_counter() - began) * 1000:.1f} ms")
    os.close(descriptor)
    await broker.request({"do": "tree", "tenant": tenant.name, "group": "own/x", "step": "end"})
    assert await asyncio.wait_for(processes[0].wait(), 10) == 137
    environment.incus("config", "set", tenant.name, "user.gateway.managed=false")
    await refused(**spawn)
    processes[1].terminate()
    await processes[1].wait()
    await broker.aclose()
