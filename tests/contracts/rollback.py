"""Going back: kept sites, rollbacks, and an environment that is changed by itself.

A subclass gives `host`, with `KEPT` sites kept of each tenant, and `site`, the files of a site.

A site says by `/env` what GREETING and SECRET are, serves its files, and ends with 3 where its page says
"fragile" and there is a file `data/off`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from tests.archives import Member, archive
from tests.integration.sites import Hosting
from tests.waits import pause

KEPT = 2
SECRET = "correct-horse-battery"


def upload(*members: Member) -> dict[str, str]:
    return {"archive": base64.b64encode(archive(*members, manifest=None)).decode()}


class Story:
    """One tenant, as its owner deals with it."""

    def __init__(self, host: Hosting, domain: str) -> None:
        self.host, self.domain, self.tenant = host, domain, domain.replace(".", "-")
        self.url = f"/v1/tenants/{self.tenant}"

    async def put(self, path: str, text: str) -> None:
        async with self.host.gateway.http(self.tenant) as session:
            answer = await session.put(f"{self.url}/files/{path}", data=text.encode())
            assert answer.status in (200, 201), await answer.text()

    async def get(self, path: str) -> str | None:
        async with self.host.gateway.http(self.tenant) as session:
            answer = await session.get(f"{self.url}/files/{path}")
            return None if answer.status == 404 else await answer.text()

    async def visit(self, path: str = "/") -> str:
        status, text = await self.host.visit(self.domain, path)
        assert status == 200, text
        return text

    async def change(self, method: str, what: str, body: Any = None) -> dict[str, Any]:
        status, begun, _ = await self.host.call(method, f"{self.url}/{what}", body)
        assert status == 202, begun
        return await self.host.ended(begun["id"])

    async def rollback(self, to: str | None = None) -> dict[str, Any]:
        return await self.change("POST", "rollback", {} if to is None else {"to": to})

    async def known(self) -> tuple[str, list[str]]:
        """Return which deployment is live, and which are kept, newest first."""
        status, said, _ = await self.host.call("GET", f"{self.url}/deployments")
        assert status == 200, said
        return said["live"], [one["id"] for one in said["kept"]]

    @contextlib.asynccontextmanager
    async def visited(self) -> AsyncIterator[None]:
        """Have somebody visit all the while; no request may fail."""
        answers: list[tuple[int, str]] = []
        done = asyncio.Event()

        async def visit() -> None:
            while not done.is_set():
                answers.append(await self.host.visit(self.domain))
                await pause(0.02)  # at full speed they would take the machine from what they watch

        visiting = [asyncio.create_task(visit()) for _ in range(3)]
        try:
            yield
        finally:
            done.set()
            await asyncio.gather(*visiting)
        failed = [answer for answer in answers if answer[0] != 200]
        assert failed == [], (
            len(answers),
            [(at, answers[at]) for at in range(len(answers)) if answers[at][0] != 200],
        )
        assert len(answers) > 10


class RollbackContract:
    def site(self, page: str, keep: str = "") -> list[Member]:
        raise NotImplementedError

    async def test_a_site_goes_back_and_forth(self, host: Hosting) -> None:
        """What was deployed over comes back with its environment; what the site is to keep stays as it is.

        What the site has written without a `keep` stays in the update; then each site has its own.
        The site that goes is kept in turn, nobody's request fails, and a key makes one rollback.
        """
        story = Story(host, "back.example.com")
        keep = 'keep = ["data/"]\n'
        env = {"GREETING": "one", "SECRET": SECRET}
        first = await host.deploy(
            story.domain, upload(*self.site("one", keep), ("edited", b"deployed")), env=env
        )
        assert first["state"] == "succeeded", first["error"]
        await story.put("edited", "by an agent")
        await story.put("data/db", "first")
        await story.put("written/db", "first")
        await story.put(".git/HEAD", "ref: refs/heads/old")
        assert await story.known() == (first["id"], [])
        status, said, _ = await host.call("POST", f"{story.url}/rollback", {})
        assert (status, said["code"], said["reason"]) == (404, "not_found", "not_kept")

        env = {"GREETING": "two", "SECRET": SECRET}
        second = await host.deploy(story.domain, upload(*self.site("two", keep)), env=env)
        assert second["state"] == "succeeded", second["error"]
        seen = await story.visit(), await story.get("edited"), await story.get("written/db")
        assert seen == ("two", None, "first"), (seen, second)
        await story.put("data/db", "second")
        await story.put("written/db", "second")
        await story.put(".git/HEAD", "ref: refs/heads/new")
        assert await story.known() == (second["id"], [first["id"]])

        began = time.monotonic()
        async with story.visited():
            answers = [
                await host.call("POST", f"{story.url}/rollback", {}, Idempotency_Key="once") for _ in range(2)
            ]
            assert answers[0][1]["id"] == answers[1][1]["id"]
            third = await host.ended(answers[0][1]["id"])
        assert third["state"] == "succeeded", third["error"]
        assert time.monotonic() - began < 20
        assert (third["rollback"], third["kind"], third["template"]) == (first["id"], "update", "upload")
        assert [phase["state"] for phase in third["phases"]] == ["done"] * 8
        assert await story.visit() == "one"
        assert await story.visit("/env") == f"one {SECRET}"
        assert await story.get("edited") == "by an agent"
        assert await story.get("written/db") == "first"
        assert await story.get("data/db") == "second", "no rollback takes customers' data back"
        assert await story.get(".git/HEAD") == "ref: refs/heads/new", "history goes on"
        assert await story.known() == (third["id"], [second["id"]])
        status, said, _ = await host.call("POST", f"{story.url}/rollback", {"to": first["id"]})
        assert (status, said["reason"]) == (404, "not_kept")
        assert second["id"] in said["detail"]
        status, said, _ = await host.call("POST", f"{story.url}/rollback", {"to": third["id"]})
        assert (status, said["code"]) == (409, "conflict")
        status, said, _ = await host.call("POST", f"{story.url}/rollback", {"to": "../../etc"})
        assert (status, said["code"], said["field"]) == (400, "invalid_params", "to")

        fourth = await story.rollback(second["id"])
        assert fourth["state"] == "succeeded", fourth["error"]
        assert (await story.visit(), await story.visit("/env")) == ("two", f"two {SECRET}")
        assert (await story.get("written/db"), await story.get("edited")) == ("second", None)
        assert (await story.get("data/db"), await story.get(".git/HEAD")) == (
            "second",
            "ref: refs/heads/new",
        )
        assert await story.known() == (fourth["id"], [third["id"]])
        for number in range(KEPT + 1):
            one = await host.deploy(story.domain, upload(*self.site(f"more {number}")))
            assert one["state"] == "succeeded", one["error"]
        live, kept = await story.known()
        assert live == one["id"] and len(kept) == KEPT and third["id"] not in kept
        _, listed, _ = await host.call("GET", f"{story.url}/deployments")
        known = [entry["id"] for entry in listed["deployments"]]
        assert known[0] == live and set(kept) < set(known)

    async def test_what_either_site_names_stays_in_place(self, host: Hosting) -> None:
        """Also between one whose manifest names a database and an earlier one, whose manifest did not yet."""
        story = Story(host, "named.example.com")
        first = await host.deploy(story.domain, upload(*self.site("one")))
        assert first["state"] == "succeeded", first["error"]
        await story.put("data/db", "first")
        second = await host.deploy(story.domain, upload(*self.site("two", 'keep = ["data/"]\n')))
        assert second["state"] == "succeeded", second["error"]
        assert await story.get("data/db") == "first"
        for page, written in (("one", "second"), ("two", "third"), ("one", "fourth")):
            await story.put("data/db", written)
            record = await story.rollback()
            assert (record["state"], await story.visit()) == ("succeeded", page), record["error"]
            assert await story.get("data/db") == written

    async def test_an_environment_changes_by_itself(self, host: Hosting) -> None:
        """The site has it, what is written meanwhile is not lost, and no value is told but to who may run.

        It is taken back by a rollback as any other deployment.
        """
        story = Story(host, "env.example.com")
        first = await host.deploy(story.domain, upload(*self.site("page")), env={"GREETING": "one"})
        assert first["state"] == "succeeded", first["error"]
        async with story.visited():
            body = {"env": {"GREETING": None, "SECRET": SECRET}}
            status, begun, _ = await host.call("PATCH", f"{story.url}/env", body)
            assert status == 202, begun
            await host.reached(begun["id"], "route")
            await story.put("edited", "meanwhile")
            second = await host.ended(begun["id"])
        assert second["state"] == "succeeded", second["error"]
        assert second["env"] == ["GREETING", "SECRET"]
        assert await story.visit("/env") == f"none {SECRET}"
        assert await story.get("edited") == "meanwhile"
        assert await story.known() == (second["id"], [first["id"]])

        async with host.gateway.http(story.tenant, scopes=("deploy",)) as session:
            answer = await session.get(f"{story.url}/env")
            assert await answer.json() == {"names": ["SECRET"]}
            answer = await session.get(f"{story.url}/env?values=1")
            assert answer.status == 403 and (await answer.json())["scope"] == "exec"
        _, said, _ = await host.call("GET", f"{story.url}/env?values=1")
        assert said == {"names": ["SECRET"], "env": {"SECRET": SECRET}}
        for wrong in ({"NO SUCH": "x"}, {"NEVER": None}, {}, {"A": "x" * (64 << 10)}):
            status, said, _ = await host.call("PATCH", f"{story.url}/env", {"env": wrong})
            assert (status, said["code"]) == (400, "invalid_params"), wrong
        for path in ("env", "deployments"):
            status, _, _ = await host.call("GET", f"{story.url}/{path}", tenants=("another",))
            assert status == 404

        third = await story.rollback()
        assert third["state"] == "succeeded", third["error"]
        assert await story.visit("/env") == "one none"
        _, told, _ = await host.call("GET", "/v1/audit?limit=1000")
        async with host.gateway.http("*") as session:
            answer = await session.get(f"/v1/events?tenant={story.tenant}", headers={"Last-Event-ID": "0"})
            events = b""
            async with asyncio.timeout(20):
                while f"{third['id']}" not in events.decode() or b"deployment.succeeded" not in events:
                    events += await answer.content.readany()
        for text in (str(told), events.decode(), host.gateway.log.read_text(), str(second)):
            assert SECRET not in text

    async def test_a_rollback_that_fails_changes_nothing(self, host: Hosting) -> None:
        """The live site is served all the while, and what was to come back is still kept; a cancel too."""
        story = Story(host, "stay.example.com")
        first = await host.deploy(story.domain, upload(*self.site("fragile")))
        second = await host.deploy(story.domain, upload(*self.site("strong", 'keep = ["data/"]\n')))
        assert first["state"] == second["state"] == "succeeded", (first["error"], second["error"])
        await story.put("data/off", "")
        await story.put(".git/HEAD", "ref: refs/heads/mine")
        async with story.visited():
            failed = await story.rollback(first["id"])
        assert (failed["state"], failed["error"]["phase"]) == ("rolledback", "verify"), failed
        assert await story.visit() == "strong"
        assert await story.get(".git/HEAD") == "ref: refs/heads/mine"
        assert await story.known() == (second["id"], [first["id"]])
        _, begun, _ = await host.call("POST", f"{story.url}/rollback", {})
        await host.call("DELETE", f"/v1/deployments/{begun['id']}")
        cancelled = await host.ended(begun["id"])
        assert cancelled["state"] == "rolledback"
        assert await story.known() == (second["id"], [first["id"]])
        await host.call("DELETE", f"{story.url}/files/data/off")
        third = await story.rollback()
        assert (third["state"], await story.visit()) == ("succeeded", "fragile"), third["error"]
