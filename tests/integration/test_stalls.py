"""What a hostile tenant makes large does not hold up its neighbours, nor stay in the gateway's memory.

While each attack runs another tenant's client reads a file every 20 ms (`tests.neighbour`). The goal on a
calm machine is a p99 under 25 ms and no call over 100 ms; here both are held against what it saw without an
attack in the same run, and against the time for which the machine gave the gateway no CPU. The numbers are
printed (`pytest -s`).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import io
import re
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings
from tests.archives import archive, header
from tests.contracts.processes import mark
from tests.integration import environment
from tests.integration.conftest import Container, MakeTenant, make_containers, settle
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway, RpcFailure, Wire
from tests.neighbour import Beside, reading
from tests.waits import pause, until

KEPT = 32 << 20  # bytes by which the gateway may be larger after an attack
DEADLINE = 90
EVERY = 0.02  # seconds between a neighbour's reads

# `execve` with an environment of empty strings, which no shell can make
EMPTY_STRINGS = """
my ($empty, $program, $name, $time) = ("\\0", "/usr/bin/sleep\\0", "sleep\\0", "600\\0");
my $arguments = pack("P P Q", $name, $time, 0);
my $environment = pack("P", $empty) x 220000 . pack("Q", 0);
for (1 .. 40) {
  next if fork;
  syscall(59, $program, $arguments, $environment);
  exit 1;
}
print "ready\\n";
sleep 600;
"""

# what stands in the place of /bin/sh: it knows which of the gateway's scripts it was given
EVIL = """\
#!/bin/bash
case "$2" in
  *setpriv*) {start} ;;
  *cgroup.kill*) {kill} ;;
esac
exec /usr/bin/dash "$@"
"""


@pytest.fixture(scope="module")
async def gateway(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveGateway]:
    log = tmp_path_factory.mktemp("stalls") / "gateway.log"
    short = {"GATEWAY_EXEC_START_TIMEOUT": "8", "GATEWAY_CANCEL_TIMEOUT": "5"}
    async with live(incus_settings, log, **short) as gateway:
        yield gateway


@pytest.fixture(scope="module")
async def baseline(gateway: LiveGateway, shared_tenant: Container) -> Beside:
    """What the neighbour sees while nothing else happens."""
    shared_tenant.sh("echo hello >/srv/site/read", user=1000)
    async with reading(gateway, shared_tenant.name, "/srv/site/read", every=EVERY) as beside:
        await pause(3)  # so long is measured
    return beside


async def held(
    gateway: LiveGateway,
    neighbour: Container,
    baseline: Beside,
    what: str,
    attack: Callable[[], Awaitable[None]],
) -> None:
    """Carry an attack out beside a neighbour that reads, and look at what it saw and what is kept.

    On a machine that others keep busy it is tried up to three times: a stall that the attack makes comes each
    time, one that the machine makes does not.
    """
    for left in reversed(range(3)):
        before, lag, starved = gateway.memory("VmRSS"), await lags(gateway), gateway.starved()
        gateway.reset_peak()
        async with reading(gateway, neighbour.name, "/srv/site/read", every=EVERY) as beside:
            async with asyncio.timeout(DEADLINE):
                (failure,) = await asyncio.gather(attack(), return_exceptions=True)
            await pause(0.5)  # what comes after it counts too
        with contextlib.suppress(AssertionError):  # it is told below with the rest
            await until(lambda: gateway.memory("VmRSS") - before <= KEPT, 10, every=0.1)  # noqa: B023
        grown, starved = gateway.memory("VmRSS") - before, gateway.starved() - starved
        peak = (gateway.memory("VmHWM") - before) >> 20
        late = {bound: int(count - lag[bound]) for bound, count in (await lags(gateway)).items()}
        print(
            f"\n{what}: {beside}; alone: {baseline}; {grown >> 20} MiB more, {peak} MiB at the peak; "
            f"{starved:.3f} s without a CPU; "
            f"loop late: {[f'{bound} s {count}' for bound, count in late.items() if count]}"
        )
        if failure is not None:
            raise failure
        assert grown <= KEPT
        worst, p99 = starved + max(0.25, 5 * baseline.worst), starved + max(0.1, 5 * baseline.p99)
        # of a short attack's few reads the p99 is the worst
        if beside.worst <= worst and (beside.p99 <= p99 or len(beside.seconds) < 150):
            return
        assert left, f"{beside}, which is over {worst:.3f} or {p99:.3f} s"


async def lags(gateway: LiveGateway) -> dict[str, float]:
    """Return how often the gateway's loop was late by more than so many seconds."""
    async with gateway.http("any") as http, http.get("/metrics") as response:
        found = re.findall(r'gateway_loop_lag_seconds_bucket\{le="(.*?)"\} (\S+)', await response.text())
    total = float(found[-1][1])
    return {bound: total - float(count) for bound, count in found}


@pytest.fixture(scope="module")
async def same_hostile(incus_settings: Settings) -> AsyncIterator[Container]:
    async with make_containers("hostile", incus_settings, 1) as (container,):
        await settle(container)
        yield container


@pytest.fixture
def hostile(same_hostile: Container) -> Iterator[Container]:
    """A tenant that attacks, which has its own shell again after the test, and nothing that still runs."""
    yield same_hostile
    same_hostile.run("ln", "-sf", "dash", "/usr/bin/sh")
    same_hostile.run("pkill", "-KILL", "-x", "sh|dash|evil|sleep|perl|yes|head|tr", check=False)


@pytest.fixture
async def crowded(make_tenant: MakeTenant) -> Container:
    """A tenant of one test alone, for what stays in it, and what depends on which processes run there."""
    return await make_tenant(ready=True)


def replace_shell(tenant: Container, *, start: str = ":", kill: str = ":") -> None:
    script = EVIL.format(start=start, kill=kill)
    tenant.run("tee", "/usr/local/bin/evil", stdin=script.encode())
    tenant.run("chmod", "755", "/usr/local/bin/evil")
    tenant.run("ln", "-sf", "/usr/local/bin/evil", "/usr/bin/sh")
    tenant.run(
        "pkill", "-KILL", "-x", "sh|dash", check=False
    )  # those that wait for a command are its own still


async def listed(wire: Wire) -> list[str]:
    """Return the ids of the commands that a tenant's list has."""
    return [one["exec"] for one in (await wire.call("exec/list"))["execs"]]


async def refused(call: Awaitable[Any]) -> RpcFailure:
    with pytest.raises(RpcFailure) as failure:
        await call
    return failure.value


async def test_environments_of_empty_strings(
    gateway: LiveGateway, shared_tenant: Container, hostile: Container, baseline: Beside
) -> None:
    async def attack() -> None:
        async with gateway.wire(hostile.name) as wire:
            # in no group of a command's: those are what is looked through
            hostile.run("tee", "/root/empty.pl", stdin=EMPTY_STRINGS.encode())
            unit = "systemd-run --quiet --unit=empty perl /root/empty.pl"
            await asyncio.to_thread(hostile.sh, unit)

            async def sleepers() -> bool:
                return int((await asyncio.to_thread(hostile.sh, "pgrep -cx sleep || :")).split()[0]) >= 40

            await until(sleepers, DEADLINE, every=0.2)
            for _ in range(3):
                started = await wire.call("exec/start", command="sleep 600 & exec sleep 600")
                answer = await wire.call("exec/cancel", exec=started["exec"], graceMs=0)
                assert answer["survivors"] == 0

    await held(gateway, shared_tenant, baseline, "empty strings", attack)


async def test_a_shell_of_line_ends(
    gateway: LiveGateway, shared_tenant: Container, hostile: Container, baseline: Beside
) -> None:
    replace_shell(hostile, start="head -c 400000 /dev/zero | tr '\\0' '\\n' >&2")

    async def attack() -> None:
        async with gateway.wire(hostile.name) as wire:
            before = await listed(wire)
            failure = await refused(wire.call("exec/start", command="true"))
            assert failure.code == "exec_failed"
            assert await listed(wire) == before

    await held(gateway, shared_tenant, baseline, "line ends", attack)


async def test_a_shell_that_never_ends_to_speak(
    gateway: LiveGateway, shared_tenant: Container, hostile: Container, baseline: Beside
) -> None:
    replace_shell(hostile, start="exec yes >&2")

    async def attack() -> None:
        async with gateway.wire(hostile.name) as wire:
            failures = [refused(wire.call("exec/start", command="true")) for _ in range(4)]
            assert {failure.code for failure in await asyncio.gather(*failures)} == {"exec_failed"}

    await held(gateway, shared_tenant, baseline, "an endless shell", attack)


async def test_a_process_number_that_no_kernel_gives(
    gateway: LiveGateway, shared_tenant: Container, hostile: Container, baseline: Beside
) -> None:
    async def attack() -> None:
        for pid in ("9223372036854775808", "99999999999999999999", "0", "4194305"):
            said = f"printf '\\001R {pid} cgroup \\n\\001K\\n' >&2; exec sleep 600"
            await asyncio.to_thread(replace_shell, hostile, start=said)
            async with gateway.wire(hostile.name) as wire:
                before = await listed(wire)
                failure = await refused(wire.call("exec/start", command="true", execId=f"phantom-{mark()}"))
                assert failure.code in ("exec_failed", "timeout"), pid
                assert await listed(wire) == before
                async with gateway.http(hostile.name) as http, http.get("/metrics") as response:
                    assert "\ngateway_execs 0.0\n" in await response.text()

    await held(gateway, shared_tenant, baseline, "odd process numbers", attack)


async def test_a_kill_script_that_floods_its_answer(
    gateway: LiveGateway, shared_tenant: Container, crowded: Container, baseline: Beside
) -> None:
    said = "printf '\\001R 7 scan \\n\\001K\\n' >&2; exec sleep 600"
    zeros, endless = "exec head -c 250000000 /dev/zero", "exec yes"
    odd, negative = "echo 0 1 2; exit", "echo 1 0 -4 cgroup; exit"

    async def attack() -> None:
        for kill in (zeros, endless, odd, negative):
            await asyncio.to_thread(replace_shell, crowded, start=said, kill=kill)
            async with gateway.wire(crowded.name) as wire:
                started = await wire.call("exec/start", command="true")
                failure = await refused(wire.call("exec/cancel", exec=started["exec"], graceMs=0))
                assert failure.code in ("unavailable", "timeout"), kill
                assert "its log" not in str(failure)
                assert (await wire.exited(started["exec"]))["reason"] == "cancelled"  # by its leader's end

    await held(gateway, shared_tenant, baseline, "kill scripts", attack)


def sparse_map() -> bytes:
    """Return an archive of some kB whose one file has a map of millions of pieces, by a pax header."""
    pieces = ",".join(["9999,0"] * 11_000_000)
    made = header("big", tarfile.REGTYPE)
    made.pax_headers = {"GNU.sparse.map": pieces, "GNU.sparse.size": "1", "GNU.sparse.name": "big"}
    return gzip.compress(archive(made, form=tarfile.PAX_FORMAT), 9)


async def test_an_archive_with_a_map_of_millions(
    gateway: LiveGateway, shared_tenant: Container, baseline: Beside
) -> None:
    data = base64.b64encode(await asyncio.to_thread(sparse_map)).decode()

    async def attack() -> None:
        async with gateway.http("t-sparse", scopes=("deploy", "events")) as http:
            body = {"domain": "sparse.localhost", "tenant": "t-sparse", "template": {"archive": data}}
            async with http.post("/v1/deployments", json=body) as response:
                made = await response.json()
                assert response.status == 202, made

            async def over() -> bool:
                async with http.get(f"/v1/deployments/{made['id']}") as response:
                    made.update(await response.json())
                return bool(made["state"] == "rolledback")

            await until(over, DEADLINE, every=0.1)
            assert made["error"]["reason"] == "template_invalid", made

    await held(gateway, shared_tenant, baseline, "sparse map", attack)


async def test_messages_of_millions_of_values(
    gateway: LiveGateway, shared_tenant: Container, hostile: Container, baseline: Beside
) -> None:
    rows = "[" + "{}," * 5_000_000 + "{}]"
    params = f'{{"name":"Read","arguments":{{"file_path":{rows}}}}}'
    message = f'{{"jsonrpc":"2.0","id":"deep","method":"tools/call","params":{params}}}'

    async def attack() -> None:
        async with gateway.wire(hostile.name) as wire:
            await wire.send(message)
            await wire.call("ping")
        async with gateway.http(hostile.name) as http:
            for path in ("exec", "start"):
                body = io.BytesIO(f'{{"argv":{rows}}}'.encode())
                async with http.post(f"/v1/tenants/{hostile.name}/{path}", data=body) as response:
                    assert response.status == 413, await response.text()

    await held(gateway, shared_tenant, baseline, "millions of values", attack)


async def test_thousands_of_addresses(
    gateway: LiveGateway, shared_tenant: Container, crowded: Container, baseline: Beside
) -> None:
    make = (
        "for a in $(seq 0 39); do for b in $(seq 1 250); do echo address add 10.9.$a.$b/32 dev lo; done; done"
    )
    await asyncio.to_thread(crowded.sh, f"({make}) | ip -batch -", timeout=120)

    async def attack() -> None:
        async with gateway.http(crowded.name, shared_tenant.name) as http:
            for _ in range(5):
                async with http.get("/v1/tenants") as response:
                    assert response.status == 200
                async with http.get(f"/v1/tenants/{crowded.name}/metrics") as response:
                    await response.read()
        async with gateway.wire(crowded.name) as wire:
            assert (await wire.run(command="exit 3"))[0]["exitCode"] == 3

    await held(gateway, shared_tenant, baseline, "thousands of addresses", attack)


async def test_thousands_of_groups_and_processes(
    gateway: LiveGateway, shared_tenant: Container, crowded: Container, baseline: Beside
) -> None:
    """Commands that end at once leave hundreds of processes, and folders below their group."""
    leave = (
        "g=/sys/fs/cgroup/unified; [ -d $g ] || g=/sys/fs/cgroup; "
        "cd $g$(sed -n 's/^0:://p' /proc/self/cgroup) && seq 1500 | xargs mkdir; "
        "for n in $(seq 20); do sleep 600 & done; exit 0"
    )

    async def attack() -> None:
        async with gateway.wire(crowded.name) as wire:
            for _ in range(6):
                ended, _, _ = await wire.run(argv=["/usr/bin/dash", "-c", leave], user="root")
                assert ended["reason"] == "exited"
            for _ in range(10):
                execs = (await wire.call("exec/list"))["execs"]
            for one in execs:
                await wire.call("exec/cancel", exec=one["exec"], graceMs=0)

    await held(gateway, shared_tenant, baseline, "groups and processes", attack)


async def test_output_of_line_ends(
    gateway: LiveGateway, shared_tenant: Container, hostile: Container, baseline: Beside
) -> None:
    """A command floods its output, with a reader and without one."""

    async def attack() -> None:
        async with gateway.wire(hostile.name) as wire:
            line = "head -c 200000000 /dev/zero | tr '\\0' '\\n'"
            await wire.call("tools/call", name="Bash", arguments={"command": line})
            with contextlib.suppress(RpcFailure):
                await wire.call("exec/start", command=f"({line})", lingerMs=5000)

    await held(gateway, shared_tenant, baseline, "output of line ends", attack)


@pytest.mark.parametrize("byte", ["000", "377"], ids=["zeros", "no text"])
async def test_a_waited_for_output_that_is_no_text(
    gateway: LiveGateway, shared_tenant: Container, hostile: Container, baseline: Beside, byte: str
) -> None:
    """JSON and UTF-8 make six bytes, or three, of each."""
    one = f"head -c 8000000 /dev/zero | tr '\\000' '\\{byte}'"

    async def attack() -> None:
        async with gateway.http(hostile.name) as http:
            body = {"command": f"{one}; {one} >&2"}
            async with http.post(f"/v1/tenants/{hostile.name}/exec", json=body) as response:
                assert response.status == 200
                size = 0
                async for piece in response.content.iter_chunked(1 << 20):
                    size += len(piece)
                assert size > 40_000_000

    await held(gateway, shared_tenant, baseline, f"output of {byte}", attack)


async def test_a_list_of_commands_with_enormous_arguments(
    gateway: LiveGateway, shared_tenant: Container, hostile: Container, baseline: Beside
) -> None:
    argv = ["sleep", "600", *(["x" * 100_000] * 9)]

    async def attack() -> None:
        async with gateway.wire(hostile.name) as wire:
            for _ in range(20):
                await wire.call("exec/start", argv=["/usr/bin/bash", "-c", "exec sleep 600", *argv])
            for _ in range(10):
                execs = (await wire.call("exec/list"))["execs"]
                assert sum(len("".join(one["argv"])) for one in execs) < 1_000_000
            for one in execs:
                await wire.call("exec/cancel", exec=one["exec"], graceMs=0)

    await held(gateway, shared_tenant, baseline, "enormous arguments", attack)


async def test_groups_with_odd_names_do_not_end_the_watch(
    incus_settings: Settings, tmp_path: Path, crowded: Container
) -> None:
    """What an earlier gateway left is looked for by names; a tenant makes groups with such names too."""
    log = tmp_path / "odd.log"
    async with live(incus_settings, log) as first:
        async with first.wire(crowded.name) as wire:
            line = "sed -n 's/^0:://p' /proc/self/cgroup"
            _, own, _ = await wire.run(command=line, user="root")
            make = (
                "g=/sys/fs/cgroup/unified; [ -d $g ] || g=/sys/fs/cgroup; cd $g/gateway; "
                "own=$(ls | head -n1); own=${own%%-*}; "
                'mkdir "$own-x y" "$own-é" "$own-$(printf "\\033[2J")"; '
                'for n in $(seq 250); do mkdir "$own-n$n"; done; ls | wc -l'
            )
            ended, said, _ = await wire.run(command=make, user="root")
            # the gateway is ending what an earlier one left at the same time, up to 32 of them
            assert ended["exitCode"] == 0 and int(said) > 200, (own, said)
        await first.stop()
        await first.start()
        async with first.wire(crowded.name) as wire:
            await wire.call("events/subscribe", types=["tenant.*", "incus.*"])
            crowded.run("true")
            await asyncio.to_thread(environment.incus, "config", "set", crowded.name, "user.odd=1")
            await wire.until(lambda: wire.notified("event"))
