"""A tenant's life over HTTP. A subclass gives `gateway`, `fresh`, a running tenant, and how its site logs.

`tight` and `full` are gateways of the same tenants, started with `TIGHT` and `FULL`.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from typing import Any

import aiohttp
import pytest

from gateway.protocol import CloseCode
from gateway.runtime.sizes import SIZES
from tests.contracts.gateway import sse
from tests.live import LiveGateway
from tests.waits import until


async def ask(http: aiohttp.ClientSession, method: str, url: str, body: Any = None, status: int = 200) -> Any:
    async with http.request(method, url, json=body) as response:
        text = await response.read()
        assert response.status == status, text
        return await response.json() if text else None


SNAPSHOTS = 64 << 20
TIGHT = {"GATEWAY_SNAPSHOT_BYTES": str(SNAPSHOTS)}
FULL = {"GATEWAY_POOL_RESERVE": "0.999"}


class LifeContract:
    sized = True  # whether tenants have limits
    ENDS = 6  # rounds of stops and destroys

    async def log(self, gateway: LiveGateway, tenant: str, line: str) -> None:
        """Have the tenant's site log a line."""
        raise NotImplementedError

    async def followers(self, gateway: LiveGateway, tenant: str) -> int:
        """Return how many processes follow the tenant's log."""
        raise NotImplementedError

    async def test_stop_start_and_restart(self, gateway: LiveGateway, fresh: str) -> None:
        """Each answers when it is done, twice is as good as once, and everybody hears of it."""
        url = f"/v1/tenants/{fresh}"
        async with gateway.wire(fresh) as wire, gateway.http(fresh) as http:
            await wire.call("events/subscribe", types=["tenant.*"])
            for action, status in (
                *(("stop", "stopped"), ("stop", "stopped"), ("start", "running")),
                *(("start", "running"), ("restart", "running")),
            ):
                assert (await ask(http, "POST", f"{url}/{action}"))["status"] == status
                assert (await ask(http, "GET", url))["status"] == status
            for kind in ("tenant.stopped", "tenant.started"):
                await wire.until(lambda kind=kind: wire.notified("event", type=kind, subject=fresh))

    async def test_changes_of_one_tenant_wait_for_one_another(self, gateway: LiveGateway, fresh: str) -> None:
        url = f"/v1/tenants/{fresh}"
        async with gateway.http(fresh) as http:
            actions = ("restart", "stop", "start")
            await asyncio.gather(*(ask(http, "POST", f"{url}/{action}") for action in actions))
            assert (await ask(http, "POST", f"{url}/start"))["status"] == "running"

    async def test_snapshots(self, gateway: LiveGateway, fresh: str) -> None:
        url = f"/v1/tenants/{fresh}/snapshots"
        async with gateway.wire(fresh) as wire, gateway.http(fresh) as http:

            async def write(text: str) -> None:
                given = {"file_path": "a", "content": text}
                assert not (await wire.call("tools/call", name="Write", arguments=given))["isError"]

            await write("one")
            assert (await ask(http, "POST", url, {"name": "s1"}, 201))["name"] == "s1"
            assert (await ask(http, "POST", url, {"name": "s1"}, 409))["code"] == "conflict"
            for bad in ("a/b", "-", "x" * 64, ""):
                await ask(http, "POST", url, {"name": bad}, 400 if bad else 201)
            await write("two")
            assert (await ask(http, "GET", url))["snapshots"][0]["name"] == "s1"
            assert (await ask(http, "POST", f"{url}/s1/restore"))["status"] == "running"
            said = await wire.call("tools/call", name="Read", arguments={"file_path": "a"})
            assert said["content"][0]["text"].endswith("one")
            await ask(http, "DELETE", f"{url}/s1", status=204)
            for method, path in (("DELETE", "/s1"), ("POST", "/s1/restore"), ("DELETE", "/..%2f..")):
                assert (await ask(http, method, url + path, status=404))["code"] == "not_found"

    async def test_snapshots_are_told(self, gateway: LiveGateway, fresh: str) -> None:
        """By whom a client's request was made; to who covers the tenant alone."""
        url, query = f"/v1/tenants/{fresh}/snapshots", {"type": "tenant.snapshot.*"}
        async with (
            gateway.wire(fresh) as wire,
            gateway.http(fresh) as http,
            gateway.http(f"{fresh}-o") as other,
            http.get("/v1/events", params=query) as response,
            other.get("/v1/events", params=query) as nothing,
        ):
            await wire.call("events/subscribe", types=["tenant.snapshot.*"])
            await ask(http, "POST", url, {"name": "s1"}, 201)
            await ask(http, "POST", url, {"name": "s1"}, 409)
            await ask(http, "POST", f"{url}/s1/restore")
            await ask(http, "DELETE", f"{url}/s1", status=204)
            told = await sse(response, 3)
            assert [event["event"].rpartition(".")[2] for event in told] == ["created", "restored", "deleted"]
            for event in told:
                assert event["data"]["subject"] == fresh
                assert (event["data"]["data"]["snapshot"], event["data"]["data"]["by"]) == ("s1", "test")
                await wire.until(lambda event=event: wire.notified("event", id=event["id"]))
            with pytest.raises(TimeoutError):
                await sse(nothing, 1, 0.3)

    async def test_snapshots_hold_no_more_than_they_may(self, tight: LiveGateway, fresh: str) -> None:
        """What the disk has new since the last one counts, whatever becomes of it; deleting makes room."""
        url = f"/v1/tenants/{fresh}"
        async with tight.http(fresh) as http:

            async def write() -> None:
                data = io.BytesIO(os.urandom(SNAPSHOTS // 8 * 5))
                async with http.put(f"{url}/files/a", data=data) as response:
                    assert response.status in (200, 201)

            async def refused(name: str) -> None:
                said = await ask(http, "POST", f"{url}/snapshots", {"name": name}, 413)
                assert (said["code"], said["reason"], said["limit"]) == ("too_large", "quota", SNAPSHOTS)
                assert "delete" in said["detail"]

            await write()
            await ask(http, "POST", f"{url}/snapshots", {"name": "s1"}, 201)
            await write()
            await refused("s2")
            listed = await ask(http, "GET", f"{url}/snapshots")
            assert [one["name"] for one in listed["snapshots"]] == ["s1"]
            await ask(http, "DELETE", f"{url}/snapshots/s1", status=204)
            await ask(http, "POST", f"{url}/snapshots", {"name": "s2"}, 201)

    async def test_nothing_is_copied_into_the_reserve_of_the_pool(
        self, full: LiveGateway, fresh: str
    ) -> None:
        """Neither as a snapshot nor as a clone or a new tenant; what is there goes on."""
        url, name = f"/v1/tenants/{fresh}", f"{fresh}-new"
        async with full.http(fresh, name) as http:
            for path, body in (("snapshots", {"name": "s1"}), ("clone", {"tenant": name})):
                async with http.post(f"{url}/{path}", json=body) as response:
                    said = await response.json()
                    assert (response.status, said["code"], said["reason"]) == (
                        503,
                        "unavailable",
                        "disk_full",
                    )
                    assert int(response.headers["Retry-After"]) > 0 and said["retry_after"] > 0
            given = {"domain": f"{name}.localhost", "template": "static", "tenant": name}
            made = await ask(http, "POST", "/v1/deployments", given, 202)

            async def ended() -> bool:
                return (await ask(http, "GET", f"/v1/deployments/{made['id']}"))["ended"] is not None

            await until(ended)
            record = await ask(http, "GET", f"/v1/deployments/{made['id']}")
            assert (record["state"], record["error"]["reason"]) == ("rolledback", "disk_full")
            await ask(http, "GET", f"/v1/tenants/{name}", status=404)
            async with http.put(f"{url}/files/a", data=b"x") as response:
                assert response.status == 201

    async def test_a_stop_right_before_the_end_is_told(self, gateway: LiveGateway, fresh: str) -> None:
        """To who listens, in order; who comes back after it learns that something is missing.

        Whose token was made later hears of the end alone.
        """
        for number in range(self.ENDS):
            name = f"{fresh}-{number}"
            url, query = (
                f"/v1/tenants/{name}",
                {"tenant": name, "type": "tenant.stopped,tenant.destroyed,gap"},
            )
            async with gateway.http(fresh, name) as http:
                await ask(http, "POST", f"/v1/tenants/{fresh}/clone", {"tenant": name}, 201)
                try:
                    async with (
                        gateway.http(name) as narrow,
                        gateway.wire(name) as wire,
                        narrow.get("/v1/events", params=query) as live,
                    ):
                        await wire.call("events/subscribe", types=["tenant.*"])
                        begun = live.headers["Last-Event-ID"]
                        if number % 2:
                            await ask(http, "POST", f"{url}/stop")
                        await ask(http, "DELETE", url, status=204)
                        told = await sse(live, 2)
                        kinds = ["tenant.stopped", "tenant.destroyed"]
                        assert [event["event"] for event in told] == kinds, number
                        for kind in kinds:
                            await wire.until(lambda kind=kind: wire.notified("event", type=kind))
                        query["lastEventId"] = begun
                        async with narrow.get("/v1/events", params=query) as resumed:
                            kinds = [event["event"] for event in await sse(resumed, 2)]
                            assert kinds == ["gap", "tenant.destroyed"]
                        query["lastEventId"] = str(int(told[1]["id"]) - 1)
                        async with narrow.get("/v1/events", params=query) as resumed:
                            assert [event["event"] for event in await sse(resumed, 1)] == ["tenant.destroyed"]
                    query["lastEventId"] = begun
                    async with (
                        gateway.http(name) as later,
                        later.get("/v1/events", params=query) as resumed,
                    ):
                        assert [event["event"] for event in await sse(resumed, 1)] == ["tenant.destroyed"]
                finally:
                    async with http.delete(url):  # of a round that failed
                        pass

    async def test_a_clone(self, gateway: LiveGateway, fresh: str) -> None:
        copy = f"{fresh}-copy"
        url = f"/v1/tenants/{fresh}"
        async with gateway.http(fresh, copy) as http, gateway.http(fresh) as narrow:
            await http.put(f"{url}/files/a", data=b"mine")
            refused = await ask(narrow, "POST", f"{url}/clone", {"tenant": copy}, 400)
            assert refused["field"] == "tenant"
            made = await ask(http, "POST", f"{url}/clone", {"tenant": copy}, 201)
            try:
                assert (made["name"], made["status"], made["domain"]) == (copy, "running", None)
                async with http.get(f"/v1/tenants/{copy}/files/a") as response:
                    assert await response.read() == b"mine"
                await ask(http, "POST", f"{url}/clone", {"tenant": copy}, 409)
            finally:
                await ask(http, "DELETE", f"/v1/tenants/{copy}", status=204)
            await ask(http, "GET", f"/v1/tenants/{copy}", status=404)

    async def test_who_has_a_name_hears_nothing_of_who_had_it(self, gateway: LiveGateway, fresh: str) -> None:
        """Not from the moment in which the end of that one was answered."""
        name = f"{fresh}-again"
        url, query = f"/v1/tenants/{name}", {"lastEventId": "0", "tenant": name, "type": "file.*,tenant.*"}
        async with gateway.http(fresh, name) as http, gateway.http(name) as narrow, gateway.http("*") as all_:
            for path in ("theirs", "mine"):
                await ask(http, "POST", f"/v1/tenants/{fresh}/clone", {"tenant": name}, 201)
                try:
                    await http.put(f"{url}/files/{path}", data=b"x")
                finally:
                    await ask(http, "DELETE", url, status=204)
                if path == "theirs":
                    async with narrow.get("/v1/events", params=query) as response:
                        assert [event["event"] for event in await sse(response, 2)] == [
                            "gap",
                            "tenant.destroyed",
                        ]
            async with narrow.get("/v1/events", params=query) as response:
                assert [event["event"] for event in await sse(response, 2)] == ["gap", "tenant.destroyed"]
            query["type"] = "file.*"
            async with all_.get("/v1/events", params=query) as response:
                told = [event["data"]["data"] for event in (await sse(response, 3))[1:]]
                assert [data["path"].rpartition("/")[2] for data in told] == ["theirs", "mine"]

    async def test_a_clone_that_fails_destroys_nobody_else(self, gateway: LiveGateway, fresh: str) -> None:
        """Neither the tenant whose name was wanted, nor its snapshots, nor the one to be copied."""
        other = f"{fresh}-o"
        url, theirs = f"/v1/tenants/{fresh}", f"/v1/tenants/{other}"
        async with gateway.http(fresh, other) as http:
            await ask(http, "POST", f"{url}/clone", {"tenant": other}, 201)
            try:
                await http.put(f"{theirs}/files/a", data=b"theirs")
                await ask(http, "POST", f"{theirs}/snapshots", {"name": "s1"}, 201)
                wanted = {"tenant": other, "snapshot": "none"}
                assert (await ask(http, "POST", f"{url}/clone", wanted, 404))["code"] == "not_found"
                assert (await ask(http, "POST", f"{url}/clone", {"tenant": other}, 409))["code"] == "conflict"
                assert (await ask(http, "POST", f"{url}/clone", {"tenant": fresh}, 409))["code"] == "conflict"
                for one in (url, theirs):
                    assert (await ask(http, "GET", one))["status"] == "running"
                kept = (await ask(http, "GET", f"{theirs}/snapshots"))["snapshots"]
                assert [snapshot["name"] for snapshot in kept] == ["s1"]
                async with http.get(f"{theirs}/files/a") as response:
                    assert await response.read() == b"theirs"
                await ask(http, "POST", f"{url}/clone", {"tenant": f"{fresh}-p", "snapshot": "none"}, 400)
            finally:
                await ask(http, "DELETE", theirs, status=204)

    async def test_another_domain(self, gateway: LiveGateway, fresh: str) -> None:
        url, domain = f"/v1/tenants/{fresh}", f"{fresh}.example.com"
        other = f"{fresh}-o"
        async with gateway.wire(fresh) as wire, gateway.http(fresh, other) as http:
            await wire.call("events/subscribe", types=["tenant.renamed"])
            assert (await ask(http, "PATCH", url, {"domain": domain.upper()}))["domain"] == domain
            told = await wire.until(lambda: wire.notified("event", type="tenant.renamed"))
            assert (told["data"]["domain"], told["data"]["from"]) == (domain, None)
            await ask(http, "PATCH", url, {"domain": "no domain"}, 400)
            await ask(http, "POST", f"{url}/clone", {"tenant": other}, 201)
            try:
                taken = await ask(http, "PATCH", f"/v1/tenants/{other}", {"domain": domain}, 409)
                assert taken["code"] == "conflict"
            finally:
                await ask(http, "DELETE", f"/v1/tenants/{other}", status=204)
            assert (await ask(http, "PATCH", url, {"domain": None}))["domain"] is None
            assert await ask(http, "GET", f"{url}/site") == {"answers": None, "status": None}
            await ask(http, "GET", f"/v1/tenants/{other}/site", status=404)

    async def test_another_size(self, gateway: LiveGateway, fresh: str) -> None:
        """All limits change at once, and everybody hears of it; where there are no limits that is said."""
        url = f"/v1/tenants/{fresh}"
        async with gateway.wire(fresh) as wire, gateway.http(fresh) as http:
            await wire.call("events/subscribe", types=["tenant.*"])
            for body in ({"size": "huge"}, {"size": 1}, {"size": "medium", "domain": None}, {}):
                assert (await ask(http, "PATCH", url, body, 400))["code"] == "invalid_params"
            if not self.sized:
                told = await ask(http, "PATCH", url, {"size": "medium"}, 400)
                assert (told["code"], told["reason"]) == ("invalid_params", "not_enforced")
                return
            before = (await ask(http, "GET", url))["limits"]
            now = await ask(http, "PATCH", url, {"size": "medium"})
            assert SIZES["medium"].items() <= now["limits"].items()
            event = await wire.until(lambda: wire.notified("event", type="tenant.resized", subject=fresh))
            assert event["data"]["size"] == "medium" and event["data"]["by"]
            assert (event["data"]["limits"], event["data"]["from"]) == (now["limits"], before)
            assert (await ask(http, "PATCH", url, {"size": "small"}))["limits"] == before
            await ask(http, "PATCH", f"{url}-none", {"size": "small"}, 404)

    async def test_the_sites_log(self, gateway: LiveGateway, fresh: str) -> None:
        """The last lines, then what comes; who leaves leaves nothing running."""
        url = f"/v1/tenants/{fresh}/logs"
        for n in range(3):
            await self.log(gateway, fresh, f"line {n}")
        async with gateway.http(fresh) as http:

            async def last(lines: int) -> list[bytes]:
                async with http.get(url, params={"lines": lines}) as response:
                    assert response.status == 200
                    return (await response.read()).splitlines()

            deadline = time.monotonic() + 10
            while not (found := await last(2)) or not found[-1].endswith(b"line 2"):
                assert time.monotonic() < deadline, found
            assert [line[-6:] for line in found] == [b"line 1", b"line 2"]
            async with http.get(url, params={"lines": 1, "follow": 1}) as response:
                async with asyncio.timeout(10):
                    assert (await response.content.readline()).endswith(b"line 2\n")
                    await self.log(gateway, fresh, "line 3")
                    assert (await response.content.readline()).endswith(b"line 3\n")
                assert await self.followers(gateway, fresh) == 1
                response.close()
            deadline = time.monotonic() + 10
            while await self.followers(gateway, fresh):
                assert time.monotonic() < deadline
            for query in ({"lines": "x"}, {"lines": "100001"}, {"follow": "yes"}):
                async with http.get(url, params=query) as response:
                    assert response.status == 400
            await ask(http, "POST", f"/v1/tenants/{fresh}/stop")
            async with http.get(url) as response:
                assert (response.status, (await response.json())["code"]) == (409, "tenant_not_running")

    async def test_who_may(self, gateway: LiveGateway, fresh: str) -> None:
        changes = (
            *(("POST", "/stop"), ("POST", "/clone"), ("POST", "/snapshots"), ("PATCH", "")),
            *(("POST", "/snapshots/s/restore"), ("DELETE", "/snapshots/s"), ("DELETE", ""), ("GET", "/logs")),
        )
        async with gateway.http(fresh, scopes=("exec",)) as less, gateway.http("t-other") as other:
            for method, path in changes:
                url = f"/v1/tenants/{fresh}{path}"
                assert (await ask(less, method, url, {}, 403))["code"] == "forbidden"
                assert (await ask(other, method, url, {}, 404))["code"] == "not_found"

    async def test_deploying_does_not_allow_what_costs_or_destroys(
        self, gateway: LiveGateway, fresh: str
    ) -> None:
        url = f"/v1/tenants/{fresh}"
        changes = (("PATCH", "", {"size": "large"}), ("DELETE", "/snapshots/s1", None), ("DELETE", "", None))
        async with gateway.http(fresh, scopes=("deploy",)) as http:
            await ask(http, "POST", f"{url}/snapshots", {"name": "s1"}, 201)
            for method, path, body in changes:
                refused = await ask(http, method, url + path, body, 403)
                assert (refused["code"], refused["scope"]) == ("forbidden", "manage")
            assert len((await ask(http, "GET", f"{url}/snapshots"))["snapshots"]) == 1
        async with gateway.http(fresh, scopes=("manage",)) as http:
            await ask(http, "DELETE", f"{url}/snapshots/s1", status=204)

    async def test_a_destroyed_tenant_is_gone(self, gateway: LiveGateway, fresh: str) -> None:
        url = f"/v1/tenants/{fresh}"
        async with gateway.wire(fresh) as wire, gateway.http(fresh) as http:
            call = {"name": "Write", "arguments": {"file_path": "a", "content": "x"}, "callId": "mine"}
            await wire.call("tools/call", **call)
            await wire.call("events/subscribe", types=["tenant.destroyed"])
            await ask(http, "POST", f"{url}/snapshots", {"name": "s1"}, 201)
            await ask(http, "DELETE", url, status=204)
            assert await wire.closed() == CloseCode.UNKNOWN_TENANT
            assert wire.notified("event", type="tenant.destroyed")
            await ask(http, "DELETE", url, status=404)
            for path in ("", "/site", "/snapshots", "/logs"):
                await ask(http, "GET", url + path, status=404)
