"""Bash and background shells outlive the gateway: each call runs once and is answered once, over any kill.

A client calls again with the same `callId` after each break, as ours do, and asks BashOutput all the while.
GATEWAY_TEST_KILLS says how often the gateway is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from gateway.server import LEAVE
from gateway_client import Client, Retry
from tests.dying import POINTS
from tests.integration.conftest import Container
from tests.integration.hosts import SEED, Host, host
from tests.integration.resuming import Caller
from tests.live import DEADLINE, RpcFailure
from tests.typescript import PACKAGE, built
from tests.waits import pause, until

__all__ = ["host"]

KILLS = int(os.environ.get("GATEWAY_TEST_KILLS", "2"))
DYING = Path(__file__).parents[1] / "dying.py"


def processes(tenant: Container, pattern: str) -> int:
    """Return how many processes have a command line that matches, but for those that look for it."""
    pattern = pattern if pattern.startswith("^") else f"[{pattern[0]}]{pattern[1:]}"
    return int(tenant.sh(f"pgrep -cf '{pattern}'", check=False).strip() or 0)


def numbers(upto: int) -> str:
    return "".join(f"{number}\n" for number in range(1, upto + 1))


async def kills(host: Host) -> None:
    """Kill the gateway `KILLS` times, at random moments."""
    chance = random.Random(SEED)
    for _ in range(KILLS):
        await pause(chance.uniform(0.02, 0.6))
        await host.kill()


@pytest.mark.timeout(120 + 20 * KILLS)
async def test_calls_in_front_are_answered_once(host: Host, shared_tenant: Container) -> None:
    """Short ones, slow ones, and ones that print more than is kept, with every byte of it in their file."""
    tenant = shared_tenant
    tenant.sh("mkdir -p /srv/site/front && chown site: /srv/site/front")

    async def one(number: int) -> None:
        caller = Caller(host, tenant.name, random.choice([None, f"front-{number % 3}"]))
        ran = f"/srv/site/front/{number}"
        size = random.choice([3, 1000, 40_000, 400_000])
        code = random.choice([0, 0, 3])
        slow = random.choice(["", "sleep 0.5;", "for i in 1 2 3 4 5 6; do sleep 0.1; done;"])
        command = f"echo x >> {ran}; {slow} seq 1 {size}; {slow} exit {code}"
        try:
            is_error, text, facts = await caller.bash(command)
        except RpcFailure as failure:
            if failure.code != "gone":
                raise
            gone.append(number)
            return
        whole = numbers(size)
        assert (is_error, facts["exitCode"], facts["size"]) == (code != 0, code, len(whole)), text
        assert tenant.sh(f"cat {ran}") == "x\n", "it ran more than once"
        expected = whole.rstrip() if code == 0 else f"Exit code 3\n{whole.rstrip()}"
        if len(whole) > (10_000 if code else 30_000):
            assert facts["truncated"]
            if len(whole) > 120_000 or not code:
                assert tenant.sh(f"sha256sum < {facts['outputFile']}") == tenant.sh(
                    f"seq 1 {size} | sha256sum"
                )
            if code:
                head, tail = text[:5000], text[-4990:]
                assert expected.startswith(head) and expected.endswith(tail), text
                cut = re.search(r"\[(\d+) characters truncated", text)
                assert cut is not None and int(cut[1]) in (
                    len(expected) - 10_000,
                    len(expected) + 1 - 10_000,
                ), text
        else:
            assert text == expected

    gone = list[int]()
    killing = asyncio.create_task(kills(host))
    number = 0
    while not killing.done() or number < 8:
        await asyncio.gather(*(one(number + beside) for beside in range(4)))
        number += 4
    await killing
    host.report(f"{number} calls, each ran and was answered once, {len(gone)} gone")
    # a start that takes longer than GATEWAY_EXEC_START_TIMEOUT, on a busy machine, is recorded and given up
    assert len(gone) <= 1 + KILLS // 50
    await until(lambda: processes(tenant, "seq 1") == 0)


async def test_a_call_that_a_kill_met_at_its_start_runs_once(host: Host, shared_tenant: Container) -> None:
    """Whether its command had begun or not, and whether its shell had waited for it."""
    serving = host.gateway.program
    shared_tenant.sh("mkdir -p /srv/site/met && chown site: /srv/site/met")
    for point in POINTS:
        await host.gateway.stop(signal.SIGKILL)
        host.gateway.program = (sys.executable, str(DYING), point)
        await host.gateway.start()
        assert host.gateway.process is not None
        caller = Caller(host, shared_tenant.name)
        calling = asyncio.create_task(caller.bash(f"echo x >> met/{point}; seq 1 3"))
        assert await asyncio.wait_for(host.gateway.process.wait(), DEADLINE) == -signal.SIGKILL
        host.gateway.program = serving
        await host.gateway.start()
        assert (await calling)[1] == "1\n2\n3"
        assert shared_tenant.sh(f"cat /srv/site/met/{point}") == "x\n"
    await until(lambda: host.held == 0)


@pytest.mark.timeout(120 + 20 * KILLS)
async def test_background_shells_go_on_where_they_stood(host: Host, shared_tenant: Container) -> None:
    """Of each output BashOutput returns every line once, in order, and KillShell ends the tree."""
    tenant = shared_tenant
    caller = Caller(host, tenant.name, "behind")
    command = (
        "i=0; while [ ! -e /srv/site/enough ]; do i=$((i+1)); echo $i; echo e$i >&2; sleep 0.02; done; "
        "echo last $i; exit 4"
    )
    tenant.sh("rm -f /srv/site/enough")
    _, text, facts = await caller.bash(command, run_in_background=True)
    shell_id = facts["shellId"]
    assert f"ID: {shell_id}" in text
    _, _, lasting = await caller.bash("setsid sleep 1001 & exec sleep 1001", run_in_background=True)
    _, moved, after = await caller.bash("echo early; sleep 1; seq 1 7; sleep 1; echo late", timeout=500)
    assert moved.startswith("early\n") and "moved to the background" in moved
    got: dict[str, list[str]] = {"stdout": [], "stderr": []}
    lost = 0

    async def poll() -> dict[str, str]:
        nonlocal lost
        parts, facts = await caller.output(shell_id, filter=".")
        for name, lines in got.items():
            lines += parts.get(name, "").splitlines()
        lost += sum(facts["lost"].values())
        return parts

    killing = asyncio.create_task(kills(host))
    while not killing.done():
        await poll()
        await pause(random.uniform(0, 0.1))
    await killing
    tenant.sh("touch /srv/site/enough")

    parts: dict[str, str] = {}

    async def ended() -> bool:
        nonlocal parts
        parts = await poll()
        return parts["status"] != "running"

    await until(ended)
    assert (parts["status"], parts["exit_code"]) == ("failed", "4")
    last = int(got["stdout"][-1].removeprefix("last "))
    assert lost == 0
    assert got["stdout"][:-1] == [str(number) for number in range(1, last + 1)]
    assert got["stderr"] == [f"e{number}" for number in range(1, last + 1)]
    assert not (await poll()).get("stdout")
    written = tenant.sh(f"cat {facts['outputFile']}").split("\n")
    assert sorted(written) == sorted([*got["stdout"], *got["stderr"], ""])
    lines = list[str]()

    async def completed() -> bool:
        parts, _ = await caller.output(after["shellId"])
        lines.extend(parts.get("stdout", "").splitlines())
        return parts["status"] == "completed"

    await until(completed)
    assert lines == ["early", *map(str, range(1, 8)), "late"]

    said = await caller.call("KillShell", {"shell_id": lasting["shellId"]})
    assert not said["isError"] and said["structuredContent"]["killed"] >= 2, said
    assert processes(tenant, "sleep 1001") == 0
    host.report(f"{caller.breaks} breaks, {last} lines of each output, each returned once")


async def test_what_ends_while_nobody_is_there(host: Host, shared_tenant: Container) -> None:
    """The exit is told, the folder carries on, and a deadline counts from the start."""
    tenant = shared_tenant
    tenant.sh("mkdir -p /srv/site/below && chown site: /srv/site/below")
    caller = Caller(host, tenant.name, "gone")
    asking = [
        asyncio.ensure_future(caller.bash("cd below; echo up; sleep 1.5; echo down")),
        asyncio.ensure_future(Caller(host, tenant.name).bash("echo up; sleep 1.5; kill -KILL $$")),
        asyncio.ensure_future(caller.bash("grep -q no /dev/null; sleep 1.5; grep no /dev/null")),
    ]
    _, _, behind = await caller.bash("echo out; echo err >&2; sleep 1.5; exit 5", run_in_background=True)
    _, _, due = await caller.bash("sleep 1002", run_in_background=True, timeout=2500)
    await until(lambda: processes(tenant, "^sleep 1.5") == 4)
    assert host.gateway.process is not None
    host.gateway.process.kill()
    await host.gateway.process.wait()
    began = time.monotonic()
    await until(lambda: processes(tenant, "^sleep 1.5") == 0)
    await host.gateway.start()
    down, killed, found = await asyncio.gather(*asking)
    assert down[:2] == (False, "up\ndown") and down[2]["cwd"] == "/srv/site/below"
    assert killed[0] and killed[1].startswith("Exit code 137\nup")
    assert (found[0], found[2]["interpretation"]) == (False, "No matches found")
    assert (await caller.bash("pwd"))[1] == "/srv/site/below"
    parts, _ = await caller.output(behind["shellId"])
    assert (parts["status"], parts["stdout"], parts["stderr"]) == ("failed", "out", "err")
    assert parts["exit_code"] == "5"

    async def over() -> bool:
        parts, _ = await caller.output(due["shellId"])
        return parts["status"] == "killed"

    await until(over)
    assert time.monotonic() - began < 15 and processes(tenant, "sleep 1002") == 0


async def test_what_nobody_can_ask_for_again_ends(host: Host, shared_tenant: Container) -> None:
    """A call without an id, one whose caller does not come back, and what a session without a name ran."""
    tenant = shared_tenant
    async with host.gateway.wire(tenant.name) as wire:
        given = {"command": "sleep 1003 & sleep 1003", "run_in_background": True}
        await wire.call("tools/call", name="Bash", arguments=given, callId="unnamed")
        for facts in ({}, {"callId": "leaves", "lingerMs": 0}):
            await wire.start_call(
                "tools/call", name="Bash", arguments={"command": "sleep 1003 & sleep 1003"}, **facts
            )
        cancelled = "sleep 1004 & sleep 1004"
        await wire.start_call("tools/call", name="Bash", arguments={"command": cancelled}, callId="cancelled")
        await until(lambda: processes(tenant, "^sleep 100[34]") == 8)
        await host.gateway.stop(signal.SIGKILL)
    await host.gateway.start()
    await until(lambda: processes(tenant, "^sleep 1003") == 0)
    async with host.gateway.wire(tenant.name) as wire:
        assert processes(tenant, "^sleep 1004") == 2
        await wire.call("tools/cancel", callId="cancelled")
        assert processes(tenant, "^sleep 1004") == 0
        for call_id, command, code in (
            ("leaves", "sleep 1003 & sleep 1003", "cancelled"),
            ("cancelled", cancelled, "cancelled"),
        ):
            with pytest.raises(RpcFailure) as caught:
                await wire.call("tools/call", name="Bash", arguments={"command": command}, callId=call_id)
            assert caught.value.code == code
    await until(lambda: host.held == 0)


async def test_a_planned_restart_leaves_them_too(host: Host, shared_tenant: Container) -> None:
    """Nobody is told that a call was cancelled: over a socket nothing is said, over HTTP to ask again."""
    tenant = shared_tenant
    caller = Caller(host, tenant.name, "planned")
    asking = asyncio.ensure_future(caller.bash("echo up; sleep 2; echo down"))
    _, _, behind = await caller.bash("echo out; sleep 1005", run_in_background=True)
    body, headers = {"command": "echo one; sleep 2; echo two"}, {"Idempotency-Key": "by-http"}
    url = f"/v1/tenants/{tenant.name}/tools/Bash"
    async with host.gateway.http(tenant.name) as http:
        first = asyncio.ensure_future(http.post(url, json=body, headers=headers))
        await until(lambda: processes(tenant, "^sleep 2") == 2)
        await host.gateway.stop(LEAVE)
        async with await first as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
        await host.gateway.start()
        async with http.post(url, json=body, headers=headers) as response:
            assert (await response.json())["content"][0]["text"] == "one\ntwo"
    assert (await asking)[:2] == (False, "up\ndown")
    parts, _ = await caller.output(behind["shellId"])
    assert (parts["status"], parts["stdout"]) == ("running", "out")
    async with host.gateway.wire(tenant.name, session="planned") as wire:
        await wire.call("session/end")
    assert processes(tenant, "sleep 1005") == 0
    await until(lambda: host.held == 0)


@pytest.mark.timeout(120 + 20 * KILLS)
async def test_nothing_of_warm_shells_stays(host: Host, shared_tenant: Container) -> None:
    """Whether they wait, are being started or are just taken, no process of them is left."""
    tenant = shared_tenant
    for _ in range(KILLS):
        async with contextlib.AsyncExitStack() as stack:
            wire = await stack.enter_async_context(host.gateway.wire(tenant.name))
            for _ in range(random.randint(0, 6)):
                await wire.start_call("exec/start", command="exec true")
                await pause(random.uniform(0, 0.05))
            await host.gateway.stop(signal.SIGKILL)
        await host.gateway.start()
    async with host.gateway.wire(tenant.name) as wire:
        assert (await wire.run(command="exec true"))[0]["exitCode"] == 0
    await host.gateway.stop()
    assert processes(tenant, "_gateway_") == 0
    await host.gateway.start()


TYPESCRIPT = """
import { Gateway } from "./dist/index.js";
import { WebSocket } from "PACKAGE/node_modules/ws/wrapper.mjs";
const gateway = new Gateway(process.argv[2], { token: process.argv[3], WebSocket });
const tenant = gateway.tenant(process.argv[4], { session: "typescript" });
const said = await tenant.bash(`echo x >> ran-ts; ${process.argv[5]}`);
console.log(said.text);
tenant.close();
"""


async def test_our_clients_call_again(host: Host, shared_tenant: Container, tmp_path: Path) -> None:
    """The Python and the TypeScript client, amid a call that is answered after a kill: it ran once."""
    tenant, gateway = shared_tenant, host.gateway
    assert shutil.which("node") is not None, "there is no Node"
    shutil.copytree(await built(), tmp_path / "dist")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    program = tmp_path / "call.js"
    program.write_text(TYPESCRIPT.replace("PACKAGE", str(PACKAGE)))
    token, waits = gateway.token(tenant.name), "echo up; while [ ! -e gate ]; do sleep 0.1; done; echo down"
    node = await asyncio.create_subprocess_exec(
        *("node", str(program), gateway.url, token, tenant.name, waits), stdout=asyncio.subprocess.PIPE
    )
    async with Client(gateway.url, token=token, retry=Retry(first=0.01, most=0.2, patience=30)) as client:
        shop = client.tenant(tenant.name, session="python")
        asking = asyncio.ensure_future(shop.bash(f"echo x >> ran-py; {waits}"))
        behind = await shop.bash("seq 1 5; sleep 1006", background=True)
        await until(lambda: "2" in tenant.sh("cat /srv/site/ran-* | wc -l", check=False))
        await host.kill()
        tenant.sh("touch /srv/site/gate")
        assert (await asking).text == "up\ndown"
        output = await shop.bash_output(str(behind.structured["shellId"]))
        assert "<stdout>\n1\n2\n3\n4\n5\n</stdout>" in output.text
        await shop.kill_shell(str(behind.structured["shellId"]))
    said, _ = await asyncio.wait_for(node.communicate(), 60)
    assert said.decode() == "up\ndown\n"
    assert tenant.sh("cat /srv/site/ran-py /srv/site/ran-ts") == "x\nx\n"
    assert processes(tenant, "sleep 1006") == 0
