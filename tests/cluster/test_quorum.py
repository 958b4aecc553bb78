"""What a gateway does while most members of its cluster are away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import aiohttp
import pytest

from gateway.host import HostError
from tests.cluster.conftest import MakeTenant, Served, heal
from tests.cluster.rig import Member
from tests.cluster.test_dying import booted
from tests.cluster.test_standby import write
from tests.contracts.processes import mark
from tests.live import Wire
from tests.waits import pause, until

pytestmark = [pytest.mark.timeout(300), pytest.mark.thorough]

_SOON: Final = 5.0  # seconds, on a machine that is busy with three members; 2 are the goal
_LONG: Final = 35.0  # seconds


# each start of it has another page
_SITE: Final = """
set -e
mkdir -p /srv/site
cat >/srv/page.py <<'PY'
import functools, http.server, socketserver
# not `python3 -m http.server`, which asks for its own name first, ten seconds without a resolver
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="/srv/site")
socketserver.TCPServer(("", 3000), handler).serve_forever()
PY
cat >/etc/systemd/system/page.service <<'UNIT'
[Service]
ExecStartPre=/bin/sh -c 'date +%%s%%N >/srv/site/index.html'
ExecStart=/usr/bin/python3 /srv/page.py
[Install]
WantedBy=multi-user.target
UNIT
systemctl daemon-reload
systemctl enable --now page
"""


async def site(gateway: Served, tenant: str) -> str:
    """Give a tenant a site that starts with it, and return its domain once it is there."""
    domain, home = f"{tenant}.example.com", gateway.member
    await until(lambda: booted(gateway, tenant), 60, every=0.2)
    home.incus("config", "set", tenant, f"user.gateway.domain={domain}", "user.gateway.port=3000")
    await asyncio.to_thread(home.incus, "exec", tenant, "--", "sh", "-c", _SITE)
    await until(lambda: served(gateway, domain), 60, every=0.3)
    return domain


async def served(gateway: Served, domain: str) -> bool:
    """Return whether a site answers within a second: while it starts, a connection to it may hang."""
    words = ["curl", "--silent", "--fail", "--max-time", "1", "--output", "/dev/null"]
    try:
        at = "http://127.0.0.1:2020/"
        await asyncio.to_thread(gateway.member.run, *words, "--header", f"Host: {domain}", at)
    except HostError:
        return False
    return True


async def readiness(gateway: Served) -> tuple[int, str]:
    """Return status and reason of `/readyz`, which answers in time."""
    begun = time.monotonic()
    async with aiohttp.ClientSession() as session, session.get(f"{gateway.url}/readyz") as answer:
        said = await answer.json()
    assert time.monotonic() - begun < 5  # on a machine that is busy with three members' starts
    return answer.status, said.get("reason", "")


async def echoed(wire: Wire, channel: int, line: str) -> bool:
    """Return whether a command that copies its input does so."""
    await wire.stdin(channel, f"{line}\n".encode())
    return bool(await wire.until(lambda: line.encode() in wire.output[channel, 1], 10))


async def answered(gateway: Served, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Return what a gateway answers, which it does soon."""
    began = time.monotonic()
    status, said = await gateway.ask(method, path, body)
    took = time.monotonic() - began
    print(f"{method} {path}: {status} {said.get('reason', '')} in {took:.2f} s")
    assert took < _SOON, (method, path)
    return status, said


async def test_without_a_quorum_a_gateway_says_so_and_its_commands_go_on(
    members: tuple[Member, ...], client: Callable[[Member], Served], make_tenant: MakeTenant
) -> None:
    """So do sites and files; what Incus has to decide is refused, at once and with the reason."""
    living, *others = members
    gateway = client(living)
    name = await make_tenant(living)
    domain = await site(gateway, name)
    path = f"/v1/tenants/{name}"
    note = {"file_path": "/srv/site/note.txt", "content": "there"}
    await write(gateway, name, "note.txt", "there")
    assert await readiness(gateway) == (200, "")
    async with gateway.wire(name) as wire:
        started = await wire.call("exec/start", argv=["cat"], stdin=True)
        assert await echoed(wire, started["channel"], "before")
        try:
            for member in others:
                member.cut_power()

            async def says_so() -> bool:
                return await readiness(gateway) == (503, "no_quorum")

            await until(says_so, 30, every=0.2)
            await pause(_LONG)  # longer than anything is known without being asked for again
            assert await echoed(wire, started["channel"], "meanwhile")
            assert (await gateway.visit(domain))[0] == 200
            assert (await answered(gateway, "POST", f"{path}/tools/Write", note))[0] == 200
            read = {"file_path": note["file_path"]}
            assert (await answered(gateway, "POST", f"{path}/tools/Read", read))[0] == 200
            status, listed = await answered(gateway, "GET", "/v1/tenants")
            assert status == 200 and name in [one["name"] for one in listed["tenants"]]
            assert listed["unanswered"] == [member.name for member in others]
            # the first ones have shells that wait for them
            ends = [await answered(gateway, "POST", f"{path}/exec", {"argv": ["true"]}) for _ in range(8)]
            refused = [said["reason"] for status, said in ends if status != 200]
            assert refused and {*refused} == {"no_quorum"}
            asked = {"domain": f"t-{mark()}.example.com", "template": "static"}
            status, said = await answered(gateway, "POST", "/v1/deployments", asked)
            assert (status, said["reason"]) == (503, "no_quorum"), said
            await asyncio.to_thread(heal, others[0])
            began = time.monotonic()

            async def well() -> bool:
                ready = await readiness(gateway) == (200, "")
                return ready and await booted(gateway, name)

            await until(well, 60, every=0.2)
            print(f"all is well {time.monotonic() - began:.1f} s after one is back")
        finally:
            await asyncio.gather(*(asyncio.to_thread(heal, member) for member in others))
        assert await echoed(wire, started["channel"], "after")
