"""History by turns in real containers."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

import pytest

from gateway.settings import Settings
from tests.archives import MANIFEST, folder
from tests.contracts.claude import call
from tests.contracts.gateway import sse
from tests.contracts.history import QUICK, HistoryContract, bash, text, told
from tests.integration.conftest import Lasting
from tests.integration.sites import hosting
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway


@pytest.fixture(scope="module")
async def gateway(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, tmp_path_factory.mktemp("gateway") / "gateway.log", **QUICK) as gateway:
        yield gateway


class TestIncusHistory(HistoryContract):
    @pytest.fixture(scope="class")
    @classmethod
    async def lasting(cls, incus_settings: Settings) -> AsyncIterator[Lasting]:
        async with Lasting.made("history", incus_settings) as lasting:
            yield lasting

    @pytest.fixture
    async def tenant(self, lasting: Lasting) -> str:
        return (await lasting.as_new()).name


async def test_a_site_has_a_history_and_a_repository_from_its_deployment(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What nobody edits is left out, also after an update, and each deployment can be gone back to."""

    def upload(page: str) -> dict[str, str]:
        return {"archive": base64.b64encode(folder(MANIFEST.decode(), ("page.txt", page.encode()))).decode()}

    async with hosting(incus_settings, tmp_path_factory.mktemp("history") / "state") as host:
        async with host.gateway.http("*") as session:
            events = await session.get("/v1/events?type=turn.committed")
            record = await host.deploy("turns.example.com", upload("one"))
            assert record["state"] == "succeeded", record["error"]
            first = (await sse(events, 1, 60))[0]["data"]["data"]
        tenant = record["tenant"]
        async with host.gateway.wire(tenant) as wire:
            await wire.call("events/subscribe", types=["turn.committed"])
            assert (first["kind"], first["by"]) == ("deployed", "test")
            assert first["title"] == f"Deployed an uploaded folder ({record['id']})"
            await bash(wire, "mkdir node_modules; echo one > node_modules/x; git status --short")
            found = await call(wire, "Grep", {"pattern": "one"})
            assert "page.txt" in found[1] and "node_modules" not in found[1]
            record = await host.deploy("turns.example.com", upload("two"), tenant=tenant)
            assert record["state"] == "succeeded", record["error"]
            await wire.until(lambda: [one["kind"] for one in told(wire)].count("deployed") == 1)
            assert "node_modules/" in await text(wire, ".gitignore")
            assert await text(wire, "page.txt") == "two"
            restored = (await wire.call("history/restore", turn=first["turn"]))["turn"]
            assert await text(wire, "page.txt") == "one"
            assert (await wire.call("history/undo", turn=restored["turn"]))["turn"]["kind"] == "restored"
            assert await text(wire, "page.txt") == "two"

            # who looks at it, before a rollback and after, has nothing to do with what that changes
            looked = await wire.call("exec/start", argv=["cat", "page.txt"])
            await wire.exited(looked["exec"])
            status, begun, _ = await host.call("POST", f"/v1/tenants/{tenant}/rollback", {})
            assert status == 202, begun
            record = await host.ended(begun["id"])
            assert record["state"] == "succeeded", record["error"]
            assert await text(wire, "page.txt") == "one"
            looked = await wire.call("exec/start", argv=["cat", "page.txt"])
            await wire.exited(looked["exec"])
            await wire.call("turn/begin", title="next")
            await wire.until(lambda: any(record["id"] in one["title"] for one in told(wire)))
            listed = (await wire.call("history/list"))["turns"]
            assert not [turn for turn in listed if turn["title"].startswith("Changed by cat")], listed
            changed = next(turn for turn in listed if record["id"] in turn["title"])
            assert changed["kind"] == "deployed" and changed["title"].startswith("Went back to the site of")
