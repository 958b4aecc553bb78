"""The contract of `TenantRuntime` and `Process`. A subclass gives `runtime` and `name`, a running tenant."""

from __future__ import annotations

import asyncio
import contextlib
import string
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import (
    Conflict,
    ExecFailed,
    GatewayError,
    InvalidParams,
    NotFound,
    TenantNotRunning,
    TooLarge,
)
from gateway.rootfs.locations import found_by
from gateway.runtime import REPORT_MAX, ExecSpec, Exit, Process, Pty, StreamName, TenantRuntime
from gateway.runtime.sizes import SIZES
from tests.contracts.processes import Tree, alive, mark
from tests.waits import until


async def drain(process: Process, stream: StreamName) -> bytes:
    found = b""
    while data := await process.read(stream):
        found += data
    return found


async def finish(process: Process) -> tuple[Exit, list[bytes]]:
    """Read everything, wait, close."""
    try:
        outputs = await asyncio.gather(*(drain(process, stream) for stream in process.streams))
        return await process.wait(), list(outputs)
    finally:
        await process.aclose()


async def run(runtime: TenantRuntime, name: str, *argv: str, **options: Any) -> tuple[Exit, list[bytes]]:
    return await finish(await runtime.commands.exec(name, ExecSpec(argv, **options)))


class RuntimeContract:
    sized = True
    """Whether tenants have limits."""

    whole_trees = True
    """Whether commands have cgroups; without, who cleared its environment is not found."""

    async def test_outputs_come_apart_and_whole(self, runtime: TenantRuntime, name: str) -> None:
        exit_, outputs = await run(runtime, name, "sh", "-c", "printf out; printf err >&2; exit 3")
        assert (exit_, outputs) == (Exit(3), [b"out", b"err"])

    async def test_merged_outputs_keep_their_order_and_the_report_stays_apart(
        self, runtime: TenantRuntime, name: str
    ) -> None:
        """Also where the report is written before anything else, and where it is longer than what is kept."""
        script = (
            "printf x >&3; for i in 1 2 3; do echo o$i; echo e$i >&2; done; printf '%09000d' 0 >&3; exit 4"
        )
        process = await runtime.commands.exec(name, ExecSpec(("sh", "-c", script), merged=True))
        assert process.streams == ("stdout",)
        exit_, outputs = await finish(process)
        assert (exit_, outputs) == (Exit(4), [b"o1\ne1\no2\ne2\no3\ne3\n"])
        assert process.report == b"x" + b"0" * (REPORT_MAX - 1)

    async def test_a_merged_command_that_cannot_start_says_so(
        self, runtime: TenantRuntime, name: str
    ) -> None:
        with pytest.raises(ExecFailed) as caught:
            await runtime.commands.exec(name, ExecSpec(("no-such-program",), merged=True))
        assert caught.value.facts["reason"] == "not_found"

    async def test_input_arrives_and_ends(self, runtime: TenantRuntime, name: str) -> None:
        process = await runtime.commands.exec(name, ExecSpec(("cat",), stdin=True))
        data = bytes(range(256)) * 4096

        async def feed() -> None:
            await process.write(data)
            await process.close_stdin()

        feeding = asyncio.create_task(feed())
        exit_, outputs = await finish(process)
        await feeding
        assert (exit_.code, outputs[0]) == (0, data)

    async def test_without_stdin_the_input_is_at_its_end(self, runtime: TenantRuntime, name: str) -> None:
        assert (await run(runtime, name, "cat"))[0] == Exit(0)

    async def test_a_signal_death_is_told(self, runtime: TenantRuntime, name: str) -> None:
        assert (await run(runtime, name, "sh", "-c", "kill -9 $$"))[0] == Exit(137, "KILL")

    @pytest.mark.parametrize("code", [126, 127])
    async def test_a_programs_own_126_and_127_are_exits(
        self, runtime: TenantRuntime, name: str, code: int
    ) -> None:
        exit_, outputs = await run(runtime, name, "sh", "-c", f"echo mine >&2; exit {code}")
        assert (exit_.code, outputs[1]) == (code, b"mine\n")

    @pytest.mark.parametrize("pty", [None, Pty()])
    @pytest.mark.parametrize(
        ("argv", "reason", "code"),
        [(("no-such-program",), "not_found", 127), (("/etc/passwd",), "not_executable", 126)],
    )
    async def test_what_cannot_be_run_is_an_error(
        self,
        runtime: TenantRuntime,
        name: str,
        argv: tuple[str, ...],
        reason: str,
        code: int,
        pty: Pty | None,
    ) -> None:
        with pytest.raises(ExecFailed) as caught:
            await runtime.commands.exec(name, ExecSpec(argv, pty=pty))
        assert caught.value.facts == {"reason": reason, "exitCode": code}

    async def test_a_missing_folder_is_an_error_and_not_the_root(
        self, runtime: TenantRuntime, name: str
    ) -> None:
        with pytest.raises(ExecFailed, match="no such folder") as caught:
            await runtime.commands.exec(name, ExecSpec(("pwd",), cwd="/srv/site/none"))
        assert caught.value.facts["reason"] == "cwd"

    async def test_arguments_and_environment_arrive_as_they_are(
        self, runtime: TenantRuntime, name: str
    ) -> None:
        odd = 'it\'s "a"\nb\tc $x `y` \\ ; é \x01 *'
        script = 'printf %s "$1"; printf %s "$ODD" >&2'
        _, outputs = await run(runtime, name, "sh", "-c", script, "sh", odd, env={"ODD": odd})
        assert outputs == [odd.encode(), odd.encode()]

    async def test_no_name_in_the_environment_disturbs_the_start(
        self, runtime: TenantRuntime, name: str
    ) -> None:
        """Not one that the shells which start it use themselves."""
        env = {letter: f"a\n'{letter}' b" for letter in string.ascii_letters} | {"IFS": "o", "CDPATH": "/"}
        _, outputs = await run(runtime, name, "env", "-0", env=env)
        told = dict(part.split("=", 1) for part in outputs[0].decode().split("\0")[:-1])
        assert {letter: told.get(letter) for letter in env} == env

    async def test_a_program_is_found_by_the_path_of_its_environment(
        self, runtime: TenantRuntime, name: str
    ) -> None:
        with pytest.raises(ExecFailed, match="command not found: env"):
            await run(runtime, name, "env", env={"PATH": "/nowhere"})
        exit_, _ = await run(runtime, name, "env", env={"PATH": "/nowhere:/usr/bin"})
        assert exit_.code == 0

    async def test_too_long_an_argument_is_told_before_anything_runs(
        self, runtime: TenantRuntime, name: str
    ) -> None:
        assert (await run(runtime, name, "true", "x" * 131_000))[0].code == 0
        with pytest.raises(TooLarge):
            await runtime.commands.exec(name, ExecSpec(("true", "x" * 131_072)))
        with pytest.raises(TooLarge):
            await runtime.commands.exec(name, ExecSpec(("true",), env={"X": "x" * 131_072}))

    @pytest.mark.parametrize(
        "options",
        [
            {"user": -1},
            {"user": 4_294_967_295},
            {"user": ""},
            {"user": "-1"},
            {"env": {"A=B": ""}},
            {"env": {"": "x"}},
            {"cwd": "/a\0b"},
        ],
    )
    async def test_impossible_wishes_are_refused(
        self, runtime: TenantRuntime, name: str, options: dict[str, Any]
    ) -> None:
        with pytest.raises(InvalidParams):
            await runtime.commands.exec(name, ExecSpec(("true",), **options))

    async def test_a_terminal_has_its_size_and_echoes_nothing_of_ours(
        self, runtime: TenantRuntime, name: str
    ) -> None:
        # the new size and the line go by two connections, whose order nobody promises
        script = 'stty size; read x; while [ "$(stty size)" = "30 100" ]; do sleep 0.05; done; stty size'
        process = await runtime.commands.exec(name, ExecSpec(("sh", "-c", script), pty=Pty(100, 30)))
        assert process.streams == ("stdout",)
        first = b""
        while not first.endswith(b"\n"):
            first += await process.read("stdout")
        assert first == b"30 100\r\n"
        await process.resize(120, 40)
        await process.write(b"go\n")
        exit_, outputs = await finish(process)
        assert (exit_.code, outputs[0]) == (0, b"go\r\n40 120\r\n")

    async def test_ctrl_c_on_a_terminal_interrupts(self, runtime: TenantRuntime, name: str) -> None:
        # by exec: a child that dash is just starting takes no notice of it, and would hold the terminal
        process = await runtime.commands.exec(
            name, ExecSpec(("sh", "-c", "echo r; exec sleep 60"), pty=Pty())
        )
        assert (await process.read("stdout")).startswith(b"r")
        await process.write(b"\x03")
        assert (await finish(process))[0] == Exit(130, "INT")

    async def test_a_signal_reaches_the_command(self, runtime: TenantRuntime, name: str) -> None:
        script = "trap 'echo caught; exit 9' USR1; echo r; while :; do sleep 0.05; done"
        process = await runtime.commands.exec(name, ExecSpec(("sh", "-c", script)))
        assert await process.read("stdout") == b"r\n"
        await process.signal(10)
        exit_, outputs = await finish(process)
        assert (exit_.code, outputs[0]) == (9, b"caught\n")

    async def test_a_signal_reaches_the_whole_tree(self, runtime: TenantRuntime, name: str) -> None:
        """By bash: dash takes no notice of a signal while a child of it is just starting."""
        seconds = mark()
        # without control groups the signal reaches the command alone
        script = f"sleep {seconds}; echo after" if self.whole_trees else f"exec sleep {seconds}"
        process = await runtime.commands.exec(name, ExecSpec(("bash", "-c", script)))
        await until(lambda: alive(seconds) == 1)
        await process.signal(2, tree=True)
        exit_, outputs = await finish(process)
        assert (exit_, outputs[0], alive(seconds)) == (Exit(130, "INT"), b"", 0)

    @pytest.mark.parametrize("grace", [0, 2.0])
    async def test_a_kill_leaves_nothing_of_the_tree(
        self, runtime: TenantRuntime, name: str, grace: float
    ) -> None:
        tree = Tree()
        process = await runtime.commands.exec(name, ExecSpec(("bash", "-c", tree.script)))
        await tree.grown()
        killed = await process.kill(grace)
        assert killed.survivors == 0
        assert killed.method == ("cgroup" if self.whole_trees else "scan")
        assert tree.alive() <= (0 if self.whole_trees else 1)
        assert killed.killed >= Tree.SIZE - tree.alive()
        exit_, _ = await finish(process)
        assert exit_.signal in ("KILL", "TERM")

    async def test_a_kill_escalates_where_term_is_ignored(self, runtime: TenantRuntime, name: str) -> None:
        process = await runtime.commands.exec(name, ExecSpec(("sh", "-c", "trap '' TERM; echo r; sleep 60")))
        assert await process.read("stdout") == b"r\n"
        killed = await process.kill(0.1)
        assert killed.escalated and killed.survivors == 0
        assert (await finish(process))[0] == Exit(137, "KILL")

    async def test_what_a_command_leaves_behind_can_be_killed_after_its_exit(
        self, runtime: TenantRuntime, name: str
    ) -> None:
        seconds = mark()
        script = f"setsid sleep {seconds} </dev/null >/dev/null 2>&1 & exit 0"
        process = await runtime.commands.exec(name, ExecSpec(("bash", "-c", script)))
        assert (await finish(process))[0].code == 0
        await until(lambda: alive(seconds) == 1)
        killed = await process.kill(0)
        assert (killed.killed, killed.survivors, alive(seconds)) == (1, 0, 0)

    async def test_unknown_tenants_do_not_exist(self, runtime: TenantRuntime) -> None:
        work = (
            runtime.tenants.get("t-none"),
            runtime.commands.exec("t-none", ExecSpec(("true",))),
            runtime.filesystem("t-none"),
            runtime.tenants.start("t-none"),
            runtime.tenants.destroy("t-none"),
        )
        for result in await asyncio.gather(*work, return_exceptions=True):
            assert isinstance(result, NotFound)

    async def test_a_tenants_life(self, runtime: TenantRuntime, fresh: str) -> None:
        """`fresh` is a name that is free; the test creates and destroys it."""
        made = await runtime.tenants.create(fresh, domain="fresh.example.com")
        assert (made.name, made.status, made.domain) == (fresh, "running", "fresh.example.com")
        assert made.instance
        try:
            with pytest.raises(GatewayError) as caught:
                await runtime.tenants.create(fresh)
            assert caught.value.code == "conflict"
            await runtime.tenants.stop(fresh)
            await runtime.tenants.stop(fresh)
            assert (await runtime.tenants.get(fresh)).status == "stopped"
            with pytest.raises(TenantNotRunning):
                await runtime.commands.exec(fresh, ExecSpec(("true",)))
            workspace = (await runtime.filesystem(fresh)).workspace
            assert Path(found_by(runtime.locations).disk(fresh, workspace).path).exists()
            await runtime.tenants.start(fresh)
            await runtime.tenants.start(fresh)
            assert (await run(runtime, fresh, "true"))[0].code == 0
            await runtime.tenants.restart(fresh)
            now = {tenant.name: tenant.instance for tenant in await runtime.tenants.list()}
            assert now[fresh] == made.instance
        finally:
            await runtime.tenants.destroy(fresh)
        with pytest.raises(NotFound):
            await runtime.tenants.get(fresh)

    async def test_a_disk_is_kept_and_brought_back(self, runtime: TenantRuntime, fresh: str) -> None:
        """And nothing but the disk: the domain stays what it is by then. The tenant runs as before."""

        async def sh(line: str) -> bytes:
            return (await run(runtime, fresh, "sh", "-c", line))[1][0]

        made = await runtime.tenants.create(fresh, domain="old.example.com")
        try:
            assert await runtime.snapshots.list(fresh) == []
            await sh("echo one >a")
            await runtime.snapshots.create(fresh, "s1")
            await sh("echo two >a; echo new >b; sync")
            await runtime.snapshots.create(fresh, "s2")
            with pytest.raises(Conflict):
                await runtime.snapshots.create(fresh, "s1")
            kept = await runtime.snapshots.list(fresh)
            assert [snapshot.name for snapshot in kept] == ["s1", "s2"]
            assert all(snapshot.created for snapshot in kept)
            await runtime.tenants.rename(fresh, "new.example.com")
            await runtime.snapshots.restore(fresh, "s1")
            tenant = await runtime.tenants.get(fresh)
            assert (tenant.status, tenant.domain) == ("running", "new.example.com")
            assert await sh("cat a b 2>/dev/null") == b"one\n"
            await runtime.tenants.stop(fresh)
            await runtime.snapshots.restore(fresh, "s2")
            assert (await runtime.tenants.get(fresh)).status == "stopped"
            await runtime.tenants.start(fresh)
            assert await sh("cat a b") == b"two\nnew\n"
            await runtime.snapshots.delete(fresh, "s1")
            assert [snapshot.name for snapshot in await runtime.snapshots.list(fresh)] == ["s2"]
            for work in (runtime.snapshots.restore(fresh, "s1"), runtime.snapshots.delete(fresh, "s1")):
                with pytest.raises(NotFound):
                    await work
            assert (await runtime.tenants.get(fresh)).status == "running"  # not stopped for nothing
            await runtime.tenants.rename(fresh, None)
            assert (await runtime.tenants.get(fresh)).domain is None
            assert (await runtime.tenants.get(fresh)).instance == made.instance
        finally:
            await runtime.tenants.destroy(fresh)

    async def test_a_size_is_given_as_a_whole(self, runtime: TenantRuntime, fresh: str) -> None:
        """While a command runs on, or not at all; a runtime without limits says so."""
        with pytest.raises(NotFound):
            await runtime.tenants.resize(fresh, "medium")
        await runtime.tenants.create(fresh)
        try:
            process = await runtime.commands.exec(fresh, ExecSpec(("cat",), stdin=True))
            if not self.sized:
                with pytest.raises(InvalidParams) as caught:
                    await runtime.tenants.resize(fresh, "medium")
                assert caught.value.facts["reason"] == "not_enforced"
            else:
                before = dict((await runtime.tenants.get(fresh)).limits)
                for size in ("medium", "large"):
                    await runtime.tenants.resize(fresh, size)
                    limits = (await runtime.tenants.get(fresh)).limits
                    assert SIZES[size].items() <= limits.items()
                    assert limits["processes"] == before["processes"]
                await runtime.tenants.resize(fresh, "small")
                assert dict((await runtime.tenants.get(fresh)).limits) == before
            await process.close_stdin()
            assert (await finish(process))[0] == Exit(0)
        finally:
            await runtime.tenants.destroy(fresh)

    async def test_a_clone_has_the_disk_and_nothing_else(self, runtime: TenantRuntime, fresh: str) -> None:
        async def sh(name: str, line: str) -> bytes:
            return (await run(runtime, name, "sh", "-c", line))[1][0]

        copies = (f"{fresh}-a", f"{fresh}-b")
        await runtime.tenants.create(fresh, domain="mine.example.com")
        try:
            await sh(fresh, "echo one >a; sync")
            await runtime.snapshots.create(fresh, "s1")
            await sh(fresh, "echo two >a; sync")
            one = await runtime.tenants.clone(fresh, copies[0])
            assert (one.name, one.status, one.domain) == (copies[0], "running", None)
            two = await runtime.tenants.clone(fresh, copies[1], domain="two.example.com", snapshot="s1")
            assert two.domain == "two.example.com"
            assert [await sh(name, "cat a") for name in copies] == [b"two\n", b"one\n"]
            assert await runtime.snapshots.list(copies[0]) == []
            tenants = [await runtime.tenants.get(name) for name in (fresh, *copies)]
            assert len({tenant.instance for tenant in tenants}) == 3
            await sh(copies[0], "echo else >a")
            assert await sh(fresh, "cat a") == b"two\n"
            with pytest.raises(Conflict):
                await runtime.tenants.clone(fresh, copies[0])
            assert (await runtime.tenants.get(copies[0])).status == "running"
            with pytest.raises(NotFound):
                await runtime.tenants.clone(fresh, f"{fresh}-c", snapshot="none")
            await self.differ(runtime, fresh, *copies)
        finally:
            for name in (fresh, *copies):
                with contextlib.suppress(NotFound):
                    await runtime.tenants.destroy(name)

    async def differ(self, runtime: TenantRuntime, *names: str) -> None:
        """Prove that tenants of the same disk are told apart."""

    async def test_a_stop_ends_what_runs(self, runtime: TenantRuntime, fresh: str) -> None:
        await runtime.tenants.create(fresh)
        try:
            tree = Tree()
            process = await runtime.commands.exec(fresh, ExecSpec(("bash", "-c", tree.script)))
            await tree.grown()
            await runtime.tenants.stop(fresh)
            assert tree.alive() <= (0 if self.whole_trees else 1)
            await asyncio.gather(finish(process), return_exceptions=True)
        finally:
            await runtime.tenants.destroy(fresh)
