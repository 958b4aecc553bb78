"""The runtime contract over real containers, and what only Incus can do to it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Conflict, ExecFailed, NotFound, TenantNotRunning, Unavailable
from gateway.incus import Incus
from gateway.incus.monitor import first_process
from gateway.runtime import ExecSpec, Pty, Removal, TenantEvent, TenantRuntime
from gateway.runtime.incus import IncusRuntime
from gateway.settings import Settings
from tests.contracts.processes import Tree, alive, mark
from tests.contracts.runtime import RuntimeContract, finish, run
from tests.integration import environment
from tests.integration.conftest import Container, Incusd, MakeTenant
from tests.integration.unread import last_words
from tests.waits import until

_fresh = itertools.count()


async def until_has_address(name: str) -> None:
    await asyncio.to_thread(Container(name).address)


@pytest.fixture(scope="module")
async def runtime(incus_settings: Settings) -> AsyncIterator[IncusRuntime]:
    async with IncusRuntime(incus_settings) as runtime:
        yield runtime


@pytest.fixture
def name(shared_tenant: Container) -> str:
    return shared_tenant.name


@pytest.fixture
def fresh() -> str:
    return f"t-fresh-{os.getpid()}-{next(_fresh)}"


class TestIncus(RuntimeContract):
    async def test_commands_run_as_the_workspaces_owner_unless_told(
        self, runtime: IncusRuntime, name: str
    ) -> None:
        _, outputs = await run(runtime, name, "sh", "-c", "id -un; pwd; echo $HOME")
        assert outputs[0] == b"site\n/srv/site\n/home/site\n"
        for user, said in (("root", b"0\n"), (0, b"0\n"), ("nobody", b"65534\n"), (4321, b"4321\n")):
            _, outputs = await run(runtime, name, "id", "-u", user=user)
            assert outputs[0] == said

    async def test_secrets_in_the_environment_show_nowhere_on_the_host(
        self, runtime: IncusRuntime, name: str
    ) -> None:
        """Not in the process list while it starts, nor in operations and lifecycle events."""
        secret = f"secret-{mark()}"
        events = subprocess.Popen(
            ["incus", "monitor", "--format=json"],
            env=environment.daemon().environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        process = await runtime.commands.exec(
            name, ExecSpec(("sh", "-c", 'read x; test -n "$SECRET"'), env={"SECRET": secret}, stdin=True)
        )
        listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, check=True).stdout
        operations = environment.incus("query", "/1.0/operations?recursion=1").stdout
        await process.write(b"go\n")
        assert (await finish(process))[0].code == 0
        with events:
            events.terminate()
            told = events.communicate()[0]
        for text in (listed, operations, told):
            assert secret.encode() not in text

    async def test_the_second_way_to_kill_leaves_nothing_either(
        self, runtime: IncusRuntime, name: str
    ) -> None:
        """By a command in the container, where the host's cgroups cannot be reached."""
        tree = Tree()
        process = await runtime.commands.exec(name, ExecSpec(("bash", "-c", tree.script)))
        await tree.grown()
        exec_id = process._exec_id  # type: ignore[attr-defined]  # no other way to choose the way
        killed = await runtime.commands.inside.kill(name, exec_id, 0.5)
        assert (killed.survivors, tree.alive()) == (0, 0)
        await finish(process)

    async def test_a_root_tenants_own_cgroups_below_die_too(self, runtime: IncusRuntime, name: str) -> None:
        seconds = mark()
        script = (
            "c=/sys/fs/cgroup/unified; [ -d $c ] || c=/sys/fs/cgroup; "
            "c=$c$(sed -n 's/^0:://p' /proc/self/cgroup); mkdir $c/below; "
            f"sleep {seconds} & echo $! > $c/below/cgroup.procs; echo r; wait"
        )
        process = await runtime.commands.exec(name, ExecSpec(("sh", "-c", script), user="root"))
        assert await process.read("stdout") == b"r\n"
        assert (await process.kill(0)).survivors == 0
        assert alive(seconds) == 0
        await finish(process)

    @pytest.mark.parametrize("inside", [False, True])
    async def test_what_the_tenants_root_moved_out_of_its_group_dies_too(
        self, runtime: IncusRuntime, name: str, inside: bool
    ) -> None:
        """By its environment, by its parents, by its session; with the host's hands and without."""
        seconds, other = mark(), mark()
        script = (
            "c=/sys/fs/cgroup/unified; [ -d $c ] || c=/sys/fs/cgroup; mkdir -p $c/out; "
            f"(echo 0 >$c/out/cgroup.procs; setsid sh -c 'sleep {seconds} & sleep {seconds}') & "
        )
        if not inside:
            script += (
                f"(echo 0 >$c/out/cgroup.procs; env -i /usr/bin/sleep {seconds}) & "
                f"setsid sh -c '(echo 0 >'$c'/out/cgroup.procs; exec env -i /usr/bin/sleep {seconds}) & "
                f"sleep {seconds}' & "
            )
        grown = 2 if inside else 5
        bystander = await runtime.commands.exec(name, ExecSpec(("sleep", other), user="root"))
        process = await runtime.commands.exec(name, ExecSpec(("sh", "-c", script + "wait"), user="root"))
        await until(lambda: alive(seconds) >= grown - 1)
        if inside:
            killed = await runtime.commands.inside.kill(name, process._exec_id, 0)  # type: ignore[attr-defined]
        else:
            killed = await process.kill(0.0)
        assert (killed.survivors, alive(seconds)) == (0, 0)
        assert killed.killed >= grown
        assert alive(other) == 1
        await bystander.kill(0)
        await asyncio.gather(finish(process), finish(bystander))

    async def test_what_left_its_group_hears_term_first(self, runtime: IncusRuntime, name: str) -> None:
        script = (
            "c=/sys/fs/cgroup/unified; [ -d $c ] || c=/sys/fs/cgroup; mkdir -p $c/out; "
            "echo 0 >$c/out/cgroup.procs; trap 'echo heard; exit 7' TERM; echo r; "
            "while :; do sleep 0.05; done"
        )
        process = await runtime.commands.exec(name, ExecSpec(("sh", "-c", script), user="root"))
        assert await process.read("stdout") == b"r\n"
        killed = await process.kill(5)
        assert (killed.escalated, killed.survivors) == (False, 0)
        exit_, outputs = await finish(process)
        assert (exit_.code, outputs[0]) == (7, b"heard\n")

    async def test_a_command_in_a_container_that_just_boots_has_its_cgroup(
        self, runtime: IncusRuntime, fresh: str
    ) -> None:
        """Right after the start systemd has not mounted the tree yet."""
        await runtime.tenants.create(fresh)
        try:
            process = await runtime.commands.exec(fresh, ExecSpec(("sleep", "60")))
            assert (await process.kill(0)).method == "cgroup"
            await finish(process)
        finally:
            await runtime.tenants.destroy(fresh)

    async def differ(self, runtime: TenantRuntime, *names: str) -> None:
        """By machine id, address, hardware address and host uids."""
        seen = []
        for name in names:
            machine = (await run(runtime, name, "cat", "/etc/machine-id"))[1][0]
            await until_has_address(name)
            query = await asyncio.to_thread(environment.incus, "query", f"/1.0/instances/{name}")
            base = json.loads(query.stdout)["config"]["volatile.idmap.base"]
            address = (await runtime.tenants.get(name)).address
            assert len(machine) == 33 and address
            hardware = (await run(runtime, name, "cat", "/sys/class/net/eth0/address"))[1][0]
            seen.append((machine, address, hardware, base))
        assert all(len(set(values)) == len(names) for values in zip(*seen, strict=True)), seen

    async def test_a_frozen_tenant_says_so(self, runtime: IncusRuntime, tenant: Container) -> None:
        await asyncio.to_thread(environment.incus, "pause", tenant.name)
        with pytest.raises(TenantNotRunning, match="frozen"):
            await runtime.commands.exec(tenant.name, ExecSpec(("true",)))
        assert (await runtime.tenants.get(tenant.name)).status == "frozen"
        await runtime.tenants.start(tenant.name)
        assert (await run(runtime, tenant.name, "true"))[0].code == 0

    async def test_a_tenant_destroyed_under_a_command_loses_it(
        self, runtime: IncusRuntime, tenant: Container
    ) -> None:
        process = await runtime.commands.exec(tenant.name, ExecSpec(("sh", "-c", "echo r; sleep 60")))
        assert await process.read("stdout") == b"r\n"
        await runtime.tenants.destroy(tenant.name)
        try:
            exit_, _ = await asyncio.wait_for(finish(process), 20)
        except Unavailable:
            return
        assert exit_.signal == "KILL"  # its death was seen after all

    async def test_other_instances_do_not_exist(self, runtime: IncusRuntime, tenant: Container) -> None:
        """An instance without the tenant profile is the operator's own business."""
        environment.incus("profile", "remove", tenant.name, runtime._settings.profile, check=False)
        environment.incus("config", "set", tenant.name, "user.gateway.managed=false")
        with pytest.raises(NotFound):
            await runtime.tenants.get(tenant.name)
        with pytest.raises(NotFound):
            await runtime.commands.exec(tenant.name, ExecSpec(("true",)))
        assert tenant.name not in [found.name for found in await runtime.tenants.list()]

    async def test_one_that_stops_is_there_all_the_while(
        self, runtime: IncusRuntime, tenant: Container
    ) -> None:
        """Incus itself lists it for a moment by its name alone, and cannot tell its state."""
        for change in (runtime.tenants.stop, runtime.tenants.start, runtime.tenants.restart):
            changing = asyncio.ensure_future(change(tenant.name))
            while not changing.done():
                listed = [found.name for found in await runtime.tenants.list()]
                assert tenant.name in listed
                assert (await runtime.tenants.get(tenant.name)).status in ("running", "stopped")
            await changing

    async def test_what_incusd_does_not_read_is_not_lost(
        self, runtime: IncusRuntime, tenant: Container
    ) -> None:
        """Its end of the outputs is closed; what is in them by then is the command's last output."""
        words = "exec >/dev/null; sleep 60 & exec sleep 1"  # its own output is another one by then
        process = await runtime.commands.exec(tenant.name, ExecSpec(("sh", "-c", words)))
        await last_words(process)

    async def test_no_cgroup_is_left_by_ended_commands(
        self, runtime: IncusRuntime, tenant: Container
    ) -> None:
        for _ in range(5):
            await run(runtime, tenant.name, "true")
        assert tenant.sh("find /sys/fs/cgroup -path '*/gateway/*/*' -type d") == ""


@pytest.fixture
async def expecting(runtime: IncusRuntime, tenant: Container) -> AsyncIterator[str]:
    """A tenant for which shells of both kinds wait."""
    with runtime.commands.expect(tenant.name):
        await standing_by(runtime, tenant.name)
        yield tenant.name
    runtime.commands._warm_shells.drop(tenant.name)


async def standing_by(runtime: IncusRuntime, name: str) -> dict[bool, int]:
    """Wait for a shell of each kind and return the pids of those that are taken first, by kind."""
    waiting = runtime.commands._warm_shells.waiting
    await until(lambda: waiting(name, False) and waiting(name, True))
    shells = {kind: waiting(name, kind)[0] for kind in (False, True)}
    return {kind: shell._preamble.pid for kind, shell in shells.items()}  # type: ignore[attr-defined]


class TestStandby:
    """Shells that wait: a command becomes one of them, once, with all its own."""

    async def test_a_command_becomes_a_waiting_shell_and_each_only_once(
        self, runtime: IncusRuntime, expecting: str
    ) -> None:
        pids = await standing_by(runtime, expecting)
        script = "echo $$; pwd; id -un; echo $A; cat"
        process = await runtime.commands.exec(
            expecting, ExecSpec(("sh", "-c", script), cwd="/tmp", env={"A": "b"}, stdin=True)
        )
        await process.write(b"input")
        await process.close_stdin()
        _, outputs = await finish(process)
        assert outputs == [f"{pids[False]}\n/tmp\nsite\nb\ninput".encode(), b""]
        terminal = await runtime.commands.exec(
            expecting, ExecSpec(("sh", "-c", "echo $$; stty size"), pty=Pty(99, 33))
        )
        _, outputs = await finish(terminal)
        assert outputs[0] == f"{pids[True]}\r\n33 99\r\n".encode()
        later = await standing_by(runtime, expecting)
        assert not set(later.values()) & set(pids.values())

    async def test_a_command_of_another_user_takes_none(self, runtime: IncusRuntime, expecting: str) -> None:
        pids = await standing_by(runtime, expecting)
        _, outputs = await run(runtime, expecting, "id", "-un", user="root")
        assert outputs[0] == b"root\n"
        assert await standing_by(runtime, expecting) == pids

    async def test_a_burst_gets_what_waits_and_then_fresh_ones(
        self, runtime: IncusRuntime, expecting: str
    ) -> None:
        done = await asyncio.gather(*(run(runtime, expecting, "echo", str(n)) for n in range(6)))
        assert [outputs[0] for _, outputs in done] == [b"%d\n" % n for n in range(6)]

    async def test_its_tree_dies_as_any_other(self, runtime: IncusRuntime, expecting: str) -> None:
        tree = Tree()
        process = await runtime.commands.exec(expecting, ExecSpec(("bash", "-c", tree.script)))
        await tree.grown()
        assert (await process.kill(0)).survivors == 0
        assert tree.alive() == 0
        await finish(process)

    async def test_what_cannot_start_is_told_alike(self, runtime: IncusRuntime, expecting: str) -> None:
        for spec, reason in (
            (ExecSpec(("no-such-program",)), "not_found"),
            (ExecSpec(("true",), cwd="/none"), "cwd"),
            (ExecSpec(("no-such-program",), pty=Pty()), "not_found"),
        ):
            await standing_by(runtime, expecting)
            with pytest.raises(ExecFailed) as caught:
                await runtime.commands.exec(expecting, spec)
            assert caught.value.facts["reason"] == reason

    async def test_one_that_died_is_replaced_without_a_word(
        self, runtime: IncusRuntime, expecting: str, tenant: Container
    ) -> None:
        pids = await standing_by(runtime, expecting)
        tenant.sh(f"kill -9 {pids[False]} {pids[True]}")
        for pty in (None, Pty()):
            _, outputs = await run(runtime, expecting, "echo", "anew", pty=pty)
            assert outputs[0].rstrip() == b"anew"

    async def test_a_pause_or_stop_gives_them_up(self, incus_settings: Settings, tenant: Container) -> None:
        async with IncusRuntime(incus_settings) as runtime:
            watching = asyncio.create_task(collect(runtime, []))
            await until(lambda: runtime.changes.standing)
            with runtime.commands.expect(tenant.name):
                await standing_by(runtime, tenant.name)
                await asyncio.to_thread(environment.incus, "pause", tenant.name)
                await until(lambda: not runtime.commands._warm_shells._waiting)
                with pytest.raises(TenantNotRunning):
                    await runtime.commands.exec(tenant.name, ExecSpec(("true",)))
                await runtime.tenants.start(tenant.name)
                await standing_by(runtime, tenant.name)  # again, before anything asks for them
                assert (await run(runtime, tenant.name, "true"))[0].code == 0
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def test_none_is_left_after_the_end(self, incus_settings: Settings, tenant: Container) -> None:
        async with IncusRuntime(incus_settings) as runtime:
            with runtime.commands.expect(tenant.name):
                await standing_by(runtime, tenant.name)
        assert tenant.sh("find /sys/fs/cgroup -path '*/gateway/*/*' -type d") == ""


async def collect(runtime: IncusRuntime, seen: list[TenantEvent]) -> None:
    async for event in runtime.changes.watch():
        seen.append(event)  # noqa: PERF401 - others look at the list while it grows


async def test_watching_tells_what_others_do(incus_settings: Settings, make_tenant: MakeTenant) -> None:
    async with IncusRuntime(incus_settings) as runtime:
        seen: list[TenantEvent] = []

        watching = asyncio.create_task(collect(runtime, seen))
        await until(lambda: any(event.type == "gateway.resynced" for event in seen))
        await runtime.ready()
        other = await make_tenant(start=False)
        await asyncio.to_thread(environment.incus, "start", other.name)
        await asyncio.to_thread(environment.incus, "delete", "--force", other.name)
        await until(
            lambda: [event.type for event in seen if event.tenant == other.name][-1:] == ["tenant.destroyed"]
        )
        types = [event.type for event in seen if event.tenant == other.name]
        assert {"tenant.created", "tenant.started", "tenant.destroyed"} <= set(types)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_a_dead_incusd_is_told_and_its_return_found(
    incus_settings: Settings, incusd: Incusd, tenant: Container, tmp_path: Path
) -> None:
    """A command that ran loses its exit; after the restart what changed meanwhile is published."""
    quick = incus_settings.model_copy(update={"reconcile_interval": 1.0})
    async with IncusRuntime(quick) as runtime:
        seen: list[TenantEvent] = []

        watching = asyncio.create_task(collect(runtime, seen))
        await until(lambda: any(event.type == "gateway.resynced" for event in seen))
        process = await runtime.commands.exec(tenant.name, ExecSpec(("sh", "-c", "echo r; sleep 600")))
        assert await process.read("stdout") == b"r\n"
        await incusd.kill()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(finish(process), 20)
        with pytest.raises(Unavailable):
            await runtime.ready()
        with pytest.raises(Unavailable):
            await runtime.commands.exec(tenant.name, ExecSpec(("true",)))
        # the tree is still there, and still ours to end: its cgroup needs no incusd
        await process.kill(0)
        seen.clear()
        await incusd.restart()
        await until(lambda: any(event.type == "gateway.resynced" for event in seen), 60)
        await runtime.ready()
        assert (await run(runtime, tenant.name, "echo", "back"))[1][0] == b"back\n"
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


class Between:
    """Runs something of an operator's right before or after one request to incusd."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runtime: IncusRuntime) -> None:
        self._before: dict[tuple[str, str], Callable[[], Any]] = {}
        self._after: dict[tuple[str, str], Callable[[], Any]] = {}
        real = runtime.incus.operate

        async def operate(method: str, path: str, body: Any = None, **how: Any) -> Any:
            if before := self._before.pop((method, path), None):
                await asyncio.to_thread(before)
            result = await real(method, path, body, **how)
            if after := self._after.pop((method, path), None):
                await asyncio.to_thread(after)
            return result

        monkeypatch.setattr(runtime.incus, "operate", operate)

    def before(self, method: str, path: str, what: Callable[[], Any]) -> None:
        self._before[method, path] = what

    def after(self, method: str, path: str, what: Callable[[], Any]) -> None:
        self._after[method, path] = what


MAKE = ("POST", "/1.0/instances")


class TestUndo:
    """What fails half-way removes what it made, and nobody else's, whatever that is called by then."""

    @pytest.fixture
    async def told(self) -> list[Removal]:
        return []

    @pytest.fixture
    async def runtime(self, incus_settings: Settings, told: list[Removal]) -> AsyncIterator[IncusRuntime]:
        async def removed(removal: Removal) -> None:
            told.append(removal)

        async with IncusRuntime(incus_settings, removed) as runtime:
            yield runtime

    @pytest.fixture
    async def new(self, tenant: Container) -> AsyncIterator[str]:
        yield f"{tenant.name}-n"
        await asyncio.to_thread(environment.incus, "delete", "--force", f"{tenant.name}-n", check=False)

    @pytest.fixture(params=["create", "clone"])
    def make(self, request: pytest.FixtureRequest, runtime: IncusRuntime, tenant: Container, new: str) -> Any:
        tenants = runtime.tenants
        return lambda: tenants.create(new) if request.param == "create" else tenants.clone(tenant.name, new)

    @staticmethod
    def others(settings: Settings, name: str) -> str:
        """Have an operator make a stopped tenant with a snapshot; return its uuid."""
        environment.incus("create", settings.image, name, "--profile", settings.profile)
        environment.incus("snapshot", "create", name, "mine")
        return uuid(name)

    async def test_the_name_is_taken_after_it_was_looked_for(
        self,
        incus_settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        runtime: IncusRuntime,
        new: str,
        make: Any,
    ) -> None:
        """And with a name that is free the same call works."""
        there: list[str] = []
        Between(monkeypatch, runtime).before(*MAKE, lambda: there.append(self.others(incus_settings, new)))
        with pytest.raises(Conflict):
            await make()
        assert uuid(new) == there[0]
        assert [kept.name for kept in await runtime.snapshots.list(new)] == ["mine"]
        await runtime.tenants.destroy(new)
        assert (await make()).status == "running"

    async def test_it_is_destroyed_and_made_anew_by_somebody_meanwhile(
        self,
        incus_settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        runtime: IncusRuntime,
        told: list[Removal],
        new: str,
        make: Any,
    ) -> None:
        there: list[str] = []

        def remade() -> None:
            environment.incus("delete", "--force", new)
            there.append(self.others(incus_settings, new))

        Between(monkeypatch, runtime).after(*MAKE, remade)
        with pytest.raises(Conflict):
            await make()
        assert uuid(new) == there[0]
        found = await runtime.tenants.get(new)
        assert (found.status, told) == ("stopped", [])
        assert [kept.name for kept in await runtime.snapshots.list(new)] == ["mine"]

    async def test_a_destroy_is_of_the_tenant_that_was_there(
        self, incus_settings: Settings, monkeypatch: pytest.MonkeyPatch, runtime: IncusRuntime, new: str
    ) -> None:
        """One that an operator made while it was being stopped stays."""
        there: list[str] = []
        await runtime.tenants.create(new)

        def remade() -> None:
            environment.incus("delete", "--force", new)
            there.append(self.others(incus_settings, new))

        Between(monkeypatch, runtime).after("PUT", f"/1.0/instances/{new}/state", remade)
        with pytest.raises(NotFound):
            await runtime.tenants.destroy(new)
        assert uuid(new) == there[0]

    async def test_what_was_made_is_removed_and_told(
        self,
        monkeypatch: pytest.MonkeyPatch,
        runtime: IncusRuntime,
        told: list[Removal],
        tenant: Container,
        new: str,
    ) -> None:
        """A clone whose start fails, and one that is cancelled while Incus makes it."""

        async def broken(name: str) -> None:
            raise Unavailable("broken")

        with monkeypatch.context() as patch:
            patch.setattr(runtime.tenants, "start", broken)
            with pytest.raises(Unavailable, match="broken"):
                await runtime.tenants.clone(tenant.name, new)
        with pytest.raises(NotFound):
            await runtime.tenants.get(new)
        for work in (runtime.tenants.clone(tenant.name, new), runtime.tenants.create(new)):
            begun = threading.Event()
            Between(monkeypatch, runtime).before(*MAKE, begun.set)
            task = asyncio.ensure_future(work)
            assert await asyncio.to_thread(begun.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 60)
            with pytest.raises(NotFound):
                await runtime.tenants.get(new)
        assert [(one.tenant, one.name) for one in told] == [(new, new)] * 3
        assert [one.reason for one in told[::2]] == [
            f"the clone of {tenant.name} failed",
            "it could not be created",
        ]

    async def test_a_device_is_taken_away_and_nothing_else_with_it(
        self, monkeypatch: pytest.MonkeyPatch, runtime: IncusRuntime, new: str
    ) -> None:
        """What an operator changes between the look and the change stays."""
        await runtime.tenants.create(new, start=False)
        environment.incus("config", "device", "add", new, "extra", "disk", "path=/mnt", "source=/tmp")
        Between(monkeypatch, runtime).before(
            "PUT", f"/1.0/instances/{new}", lambda: environment.incus("config", "set", new, "user.mine=there")
        )
        await runtime.making.remove_device(new, "extra")
        await runtime.making.remove_device(new, "extra")
        found = json.loads(environment.incus("query", f"/1.0/instances/{new}").stdout)
        assert found["devices"].keys() == {"eth0"}
        assert found["config"]["user.mine"] == "there"

    async def test_made_tenants_have_an_address_that_they_keep(
        self, runtime: IncusRuntime, tenant: Container, new: str, make: Any
    ) -> None:
        """It is known before their network is up, and while they are stopped."""
        made = await make()
        assert made.address
        await runtime.tenants.stop(new)
        assert (await runtime.tenants.get(new)).address == made.address
        await runtime.tenants.start(new)
        assert await asyncio.to_thread(Container(new).address) == made.address


def uuid(name: str) -> str:
    return environment.incus("config", "get", name, "volatile.uuid").stdout.decode().strip()


async def test_the_first_process_is_found_as_incus_tells_it(
    shared_tenant: Container, incus_settings: Settings
) -> None:
    """By its monitor, without a look at the instance's state; another daemon's of that name is not taken."""
    async with Incus(incus_settings.incus_socket) as incus:
        found = await incus.instance(shared_tenant.name)
    directory, pid = incus_settings.incus_socket.parent, found["state"]["pid"]
    assert pid and first_process(directory, shared_tenant.name, found["last_used_at"]) == pid
    assert first_process(directory / "other", shared_tenant.name, found["last_used_at"]) == 0
