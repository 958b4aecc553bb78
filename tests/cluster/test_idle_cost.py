"""What a cluster costs that nobody uses."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.cluster.conftest import MakeTenant, Served
from tests.cluster.rig import Member, Rig
from tests.cluster.test_dying import booted
from tests.contracts.processes import mark
from tests.waits import pause, until

pytestmark = [pytest.mark.timeout(600), pytest.mark.thorough]

Client = Callable[[Member], Served]

_SECONDS: Final = 60.0  # that are measured; what is looked at most seldom is so each 15 s
_SETTLE: Final = 20.0  # seconds until what comes after the last request is done
_MOST: Final = 0.05  # of a core, of all gateways
_WORDS: Final = {  # in the command line of a process whose parent is a member's first one
    "gateway": ("incus-gateway serve", "incus-gateway broker", "gateway.holder"),
    "incusd": ("/incusd --",),
    "Caddy": ("/caddy run",),
}


async def test_idle_gateways_of_six_tenants_take_a_twentieth_of_a_core(
    cluster: Rig, client: Client, make_tenant: MakeTenant
) -> None:
    """All three together, with two tenants on each member that were used before, of which one has a site."""
    gateways = [client(member) for member in cluster.members]
    for gateway in gateways:
        tenants = [await make_tenant(gateway.member) for _ in range(2)]
        record = await gateway.deploy(f"i-{mark()}.example.com", tenant=tenants[0])
        assert record["state"] == "succeeded", record.get("error")
        for name in tenants:
            for other in gateways:
                await until(lambda: booted(other, name), 60, every=0.3)  # noqa: B023 - awaited at once
    await until(lambda: all_listed(gateways), 30, every=0.5)
    await pause(_SETTLE)

    before, began = [spent(member) for member in cluster.members], time.monotonic()
    await pause(_SECONDS)
    seconds, took = time.monotonic() - began, Counter[str]()
    for member, earlier in zip(cluster.members, before, strict=True):
        now = spent(member)
        assert now["gateway"] > earlier["gateway"], f"nothing was measured of {member.name}"
        took += now - earlier
    print(
        f"of a core, of three members in {seconds:.0f} s with a load of {os.getloadavg()[0]:.0f}:",
        ", ".join(f"{of} {took[of] / 1000 / seconds:.2%}" for of in sorted(took)),
    )
    assert took["gateway"] / 1000 / seconds <= _MOST
    assert await all_listed(gateways)


async def all_listed(gateways: list[Served]) -> bool:
    """Return whether each gateway knows the tenants of all, with those of the tests running."""
    lists = await asyncio.gather(*(gateway.listed() for gateway in gateways))
    running = [{name for name, tenant in listed.items() if tenant["status"] == "running"} for listed in lists]
    return all(len(names) == 6 and names == running[0] for names in running)


def spent(member: Member) -> Counter[str]:
    """Return the milliseconds of CPU that the processes of a member took so far, by what they belong to.

    Each with its children, those that have ended too. What belongs to nothing here is a tenant's.
    """
    parents, ticks = dict[int, int](), dict[int, int]()
    for pid, parent, took in processes():
        parents[pid], ticks[pid] = parent, took
    found = Counter[str]()
    for pid, took in ticks.items():
        top = pid
        while parents.get(top, member.pid) != member.pid:
            top = parents[top]
        if top in parents:
            found[belongs(top)] += took * 1000 // os.sysconf("SC_CLK_TCK")
    return found


def belongs(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        words = ""
    return next((of for of, some in _WORDS.items() if any(word in words for word in some)), "tenants")


def processes() -> Iterator[tuple[int, int, int]]:
    """Yield the processes of this machine: pid, parent, and the ticks it and its ended children took."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            yield int(folder.name), int(fields[1]), sum(map(int, fields[11:15]))
