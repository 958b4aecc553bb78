"""Several gateways of the `local` runtime on this machine, as if each was a member of a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from tests.forks import Forked
from tests.live import DEADLINE, LiveGateway, free_ports, local_gateway
from tests.waits import until


@contextlib.asynccontextmanager
async def clustered(
    folder: Path, tenants: Mapping[str, Sequence[str]], **environment: str
) -> AsyncIterator[dict[str, LiveGateway]]:
    """Run a gateway for each member, with these tenants. They are ready when each knows the others."""
    found: dict[str, LiveGateway] = {}
    (folder / "members").mkdir()
    for member in tenants:
        (folder / "members" / member).write_text("{}")  # a member before its gateway has come up
    for member, names in tenants.items():
        found[member] = await member_gateway(folder, member, *names, **environment)
    await asyncio.gather(*(gateway.start() for gateway in found.values()))
    try:
        try:
            await asyncio.gather(*(known(gateway, *tenants.values()) for gateway in found.values()))
        except AssertionError as error:
            for member, gateway in found.items():
                error.add_note(f"{member} said: {gateway.log.read_text()[-2000:]}")
            raise
        yield found
    finally:
        for gateway in found.values():
            if gateway.process is not None and gateway.process.returncode is None:
                await gateway.stop()


async def known(gateway: LiveGateway, *tenants: Sequence[str]) -> None:
    """Wait until a gateway answers for all these tenants, and hears all other members."""
    async with gateway.http("*") as http:
        for tenant in itertools.chain(*tenants):

            async def there(tenant: str = tenant) -> bool:
                async with http.get(f"/v1/tenants/{tenant}") as answer:
                    return answer.status == 200

            await until(there, 30)

        async def answered() -> bool:
            async with http.get("/v1/tenants") as answer:
                return not (await answer.json())["unanswered"]

        await until(answered, 30)


async def member_gateway(folder: Path, member: str, *tenants: str, **environment: str) -> LiveGateway:
    """Return the gateway of one member, whose state dir is its folder in `folder`."""
    (folder / member).mkdir()
    given = {
        "GATEWAY_LOCAL_MEMBER": str(folder / "members" / member),
        "GATEWAY_PEER_LISTEN": f"127.0.0.1:{free_ports(1)[0]}",
        **environment,
    }
    return await local_gateway(folder / member, *tenants, **given)


class Relayed(LiveGateway):
    """The gateway `home`, asked through the gateway of another member, `entry`."""

    def __init__(self, entry: LiveGateway, home: LiveGateway, tenant: str) -> None:
        self.entry, self.home, self._tenant = entry, home, tenant
        self.port, self.url = entry.port, entry.url
        self.environment, self.log, self.signatures = home.environment, home.log, home.signatures

    @property
    def process(self) -> asyncio.subprocess.Process | Forked | None:  # type: ignore[override]  # the home's
        return self.home.process

    async def start(self, *before: str) -> None:
        await self.home.start(*before)
        if self.entry.process is None:
            await self.entry.start()
        await known(self, [self._tenant])

    async def stop(self, number: signal.Signals = signal.SIGTERM, deadline: float = DEADLINE) -> int:
        return await self.home.stop(number, deadline)


async def relayed(folder: Path, tenant: str, **environment: str) -> Relayed:
    """Return a gateway with this tenant as a client of another member's sees it."""
    (folder / "members").mkdir()
    for member in ("entry", "home"):
        (folder / "members" / member).write_text("{}")
    entry = await member_gateway(folder, "entry", **environment)
    home = await member_gateway(folder, "home", tenant, **environment)
    return Relayed(entry, home, tenant)
