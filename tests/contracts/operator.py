"""What the operator does: take tokens back, see who did what. A subclass gives `disposable` and `tenant`."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import aiohttp

from gateway.auth import tokens
from tests.contracts.lifecycle import ask
from tests.contracts.processes import mark
from tests.live import SECRET, LiveGateway


def operator(gateway: LiveGateway) -> Any:
    return gateway.http("*", scopes=("admin",))


class OperatorContract:
    async def test_a_revoked_token_ends_at_once_and_for_ever(
        self, disposable: LiveGateway, tenant: str
    ) -> None:
        """Its sockets, event streams and requests; another token of the same subject goes on."""
        raw = disposable.token(tenant)
        id_, headers = tokens.verify(SECRET, raw).id, {"Authorization": f"Bearer {raw}"}
        async with (
            disposable.raw(tenant, Authorization=f"Bearer {raw}") as wire,
            disposable.raw(tenant) as late,
            disposable.wire(tenant) as other,
            aiohttp.ClientSession(disposable.url, headers=headers) as http,
            operator(disposable) as admin,
        ):
            await wire.call("initialize", client={"name": "t", "version": "1"})
            await late.call("initialize", client={"name": "t", "version": "1"}, token=raw)
            async with http.get("/v1/events") as events:
                assert await ask(http, "GET", f"/v1/tenants/{tenant}")
                answer = await ask(admin, "POST", "/v1/revocations", {"id": id_})
                assert answer == {"id": id_, "closed": 2}
                assert (await wire.closed(), await late.closed()) == (4401, 4401)
                async with asyncio.timeout(10):
                    await events.read()
            assert (await ask(http, "GET", f"/v1/tenants/{tenant}", status=401))["code"] == "unauthorized"
            assert await other.call("ping") == {}
        await disposable.stop(signal.SIGKILL)
        await disposable.start()
        async with aiohttp.ClientSession(disposable.url, headers=headers) as http:
            await ask(http, "GET", f"/v1/tenants/{tenant}", status=401)
            await ask(http, "POST", "/v1/session", {"token": raw}, 401)

    async def test_only_an_operator_may(self, disposable: LiveGateway, tenant: str) -> None:
        for tenants, scopes in ((("*",), ("deploy",)), ((tenant,), ("admin",))):
            async with disposable.http(*tenants, scopes=scopes) as http:
                await ask(http, "POST", "/v1/revocations", {"id": "x"}, 403)
                await ask(http, "GET", "/v1/audit", status=403)

    async def test_who_did_what(self, disposable: LiveGateway, tenant: str) -> None:
        """Also before a kill, and nothing of what was written or run."""
        secret = mark()
        async with disposable.wire(tenant) as wire, disposable.http(tenant) as http:
            write = {"file_path": f"a-{secret[-3:]}", "content": secret}
            await wire.call("tools/call", name="Write", arguments=write)
            exit_, _, _ = await wire.run(command=f"echo {secret}")
            await ask(http, "POST", f"/v1/tenants/{tenant}/restart")
            await ask(http, "POST", f"/v1/tenants/{tenant}/snapshots/none/restore", status=404)
        expected = [
            ("test", "file.written", {"path": write["file_path"]}),
            ("test", "exec.started", {"exec": exit_["exec"]}),
            ("test", "tenant.restart", {}),
        ]
        for kill in (False, True):
            if kill:
                await disposable.stop(signal.SIGKILL)
                await disposable.start()
            async with operator(disposable) as admin:
                async with asyncio.timeout(10):
                    while True:
                        url = f"/v1/audit?tenant={tenant}"
                        entries = (await ask(admin, "GET", url))["entries"]
                        found = [(one["who"], one["action"], one["facts"]) for one in entries]
                        if sorted(found[:3], key=str) == sorted(expected, key=str):
                            break
                assert secret not in str(entries)
                older = (await ask(admin, "GET", f"{url}&before={entries[0]['id']}&limit=1"))["entries"]
                assert older == entries[1:2]
                await ask(admin, "GET", "/v1/audit?limit=0", status=400)
