"""From a domain to a site that answers through real Caddy, on real containers."""

from __future__ import annotations

import asyncio
import base64
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings
from gateway_client import Client, errors
from tests.archives import folder, link, sparse
from tests.contracts.gateway import sse
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.waits import pause

PHASES = ["validate", "create", "push", "install", "start", "expose", "route", "verify"]


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    async with hosting(incus_settings, tmp_path_factory.mktemp("deployments") / "state") as host:
        yield host


async def test_a_domain_becomes_a_site_that_answers_and_events_tell_how(host: Hosting) -> None:
    """One POST ends in a site by HTTP and HTTPS; every phase is told, in order and timed."""
    async with host.gateway.http("*") as session:
        answer = await session.get("/v1/events?type=deployment.*")
        status, begun, headers = await host.call(
            "POST", "/v1/deployments", {"domain": "Shop.Example.com", "template": "static"}
        )
        assert status == 202
        assert headers["Location"] == f"/v1/deployments/{begun['id']}"
        assert begun["tenant"] == "shop-example-com"
        record = await host.ended(begun["id"])
        assert record["state"] == "succeeded", record["error"]
        events = await sse(answer, 2 + 2 * len(PHASES) + 1)
    assert [entry["name"] for entry in record["phases"]] == PHASES
    assert all(entry["state"] == "done" and entry["ms"] is not None for entry in record["phases"])
    told = [(event["event"], event["data"]["data"].get("phase")) for event in events]
    assert told[0] == ("deployment.started", None)
    assert [phase for kind, phase in told if kind == "deployment.phase.started"] == PHASES
    assert [phase for kind, phase in told if kind == "deployment.phase.finished"] == PHASES
    assert told[-1] == ("deployment.succeeded", None)
    for event in events:
        assert event["data"]["data"]["deployment"] == begun["id"]
        assert event["data"]["subject"] == "shop-example-com"
    assert "Your site is up." in (await host.visit("shop.example.com"))[1]
    assert "Your site is up." in (await host.visit("shop.example.com", https=True))[1]
    assert (await host.visit("other.example.com"))[0] == 404
    _, tenant, _ = await host.call("GET", "/v1/tenants/shop-example-com")
    assert tenant["domain"] == "shop.example.com"
    assert tenant["url"] == record["url"] == f"https://shop.example.com:{host.settings.caddy_https}"
    assert tenant["port"] == 3000


async def test_an_update_serves_the_old_site_until_the_new_one_was_seen(host: Hosting) -> None:
    """A redeploy never lets a request fail, keeps what the site wrote, and ends with the new files.

    What it could not keep, since the site's user cannot read it, stops it and is named.
    """
    first = await host.deploy("live.example.com")
    assert first["state"] == "succeeded", first["error"]
    environment.incus("exec", "live-example-com", "--", "sh", "-c", "echo kept >/srv/site/mine")
    answers: list[int] = []
    done = asyncio.Event()

    async def visit() -> None:
        while not done.is_set():
            answers.append((await host.visit("live.example.com"))[0])
            await pause(0.02)  # at full speed they would take the machine from what they watch

    visiting = asyncio.create_task(visit())
    record = await host.deploy("live.example.com", env={"GREETING": 'a "b" $c'})
    done.set()
    await visiting
    assert record["state"] == "succeeded", record["error"]
    assert record["kind"] == "update"
    assert set(answers) == {200}
    assert len(answers) > 10
    said = environment.incus("exec", "live-example-com", "--", "cat", "/srv/site/mine").stdout
    assert said == b"kept\n"
    seen = environment.incus(
        *("exec", "live-example-com", "--", "sh", "-c"),
        "tr '\\0' '\\n' </proc/$(systemctl show -P MainPID site.service)/environ; ls -A /srv",
    ).stdout.decode()
    assert 'GREETING=a "b" $c\n' in seen
    assert "PORT=3000\n" in seen
    assert seen.endswith("\n.site-kept\nsite\n"), "no folder of the update is left"

    hidden = """mkdir public/in && touch "public/in/it's\nmine" && chmod 0600 public/in/*"""
    environment.incus("exec", "live-example-com", "--cwd=/srv/site", "--", "sh", "-c", hidden)
    record = await host.deploy("live.example.com")
    assert (record["state"], record["error"]["reason"]) == ("rolledback", "unreadable"), record["error"]
    assert "/srv/site/public/in/it's\\nmine is not readable by the site's user" in record["error"]["message"]
    assert (await host.visit("live.example.com"))[0] == 200
    left = environment.incus("exec", "live-example-com", "--", "ls", "-A", "/srv").stdout
    assert left == b".site-kept\nsite\n"


async def test_an_update_waits_for_a_container_that_is_just_starting(host: Hosting) -> None:
    """Its systemd does not listen yet, as on a busy machine: it takes two seconds to read its units."""
    record = await host.deploy("slow.example.com")
    assert record["state"] == "succeeded", record["error"]
    place = "/etc/systemd/system-generators"
    words = f"mkdir -p {place}; cat >{place}/slow; chmod +x {place}/slow"
    slow = b"#!/bin/sh\n[ -S /run/systemd/private ] || sleep 2\n"
    environment.incus("exec", "slow-example-com", "--", "sh", "-ec", words, stdin=slow)
    for change in ("restart", "stop"):  # an update starts what is stopped
        assert (await host.call("POST", f"/v1/tenants/slow-example-com/{change}"))[0] == 200
        record = await host.deploy("slow.example.com")
        assert record["state"] == "succeeded", (change, record["error"])


async def test_an_update_by_a_folder_removes_what_the_folder_no_longer_has(host: Hosting) -> None:
    """But neither what it names nor what no folder had, with what the live site writes there meanwhile.

    No request fails. One that fails removes nothing; one that is `clean` keeps only what the folder names.
    """
    domain, tenant = "mirror.example.com", "mirror-example-com"

    async def inside(script: str) -> list[str]:
        words = ("exec", tenant, "--cwd=/srv/site", "--user=1000", "--", "sh", "-c", script)
        said = await asyncio.to_thread(environment.incus, *words)
        return said.stdout.decode().split("\n")[:-1]

    def upload(manifest: str, *more: Any) -> dict[str, str]:
        return {"archive": base64.b64encode(folder(manifest, *more)).decode()}

    start = 'start = ["bun", "serve.ts"]\n'
    first = await host.deploy(domain, upload(start, ("old/page.html", b""), ("both.txt", b"old")))
    assert first["state"] == "succeeded", first["error"]
    await inside("mkdir -p data node_modules/m logs; touch data/db node_modules/m/x logs/a.log mine -- -odd")
    # but for the repository that a site becomes once it is deployed
    everything = "find . -path './.git*' -prune -o -print | sort"
    before = await inside(everything)
    ignore = (".gitignore", b"*.log\n")
    broken = 'start = ["false"]\nkeep = ["data/"]\n'
    failed = await host.deploy(domain, upload(broken, ignore))
    assert (failed["state"], failed["error"]["reason"]) == ("rolledback", "never_healthy")
    assert await inside(everything) == before

    answers: list[int] = []
    done = asyncio.Event()

    async def visit() -> None:
        while not done.is_set():
            answers.append((await host.visit(domain))[0])
            await pause(0.02)  # at full speed they would take the machine from what they watch

    visiting = asyncio.create_task(visit())
    slow = f'{start}install = ["sleep", "2"]\nkeep = ["data/"]\n'
    body = {"domain": domain, "template": upload(slow, ignore, ("both.txt", b"new"))}
    async with host.gateway.http("*") as session:
        events = await session.get(f"/v1/events?type=deployment.phase.*&tenant={tenant}")
        status, begun, _ = await host.call("POST", "/v1/deployments", body)
        assert status == 202, begun
        await host.reached(begun["id"], "install")
        await inside("echo late >data/late; echo late >late")
        record = await host.ended(begun["id"])
        assert record["state"] == "succeeded", record["error"]
        told = [(event["event"], event["data"]["data"]) for event in await sse(events, 8)]
    done.set()
    await visiting
    assert set(answers) == {200}
    there = ["./.gitignore", "./both.txt", "./data/db", "./data/late", "./logs/a.log"]
    there += ["./node_modules/m/x", "./serve.ts", "./site.toml"]
    files = "find . -path ./.git -prune -o -path ./.gateway -prune -o -type f -print | sort"
    assert await inside(files) == sorted([*there, "./-odd", "./late", "./mine"])
    assert await inside("cat both.txt data/late") == ["newlate"]
    (pushed,) = (data for kind, data in told if kind.endswith("finished") and data["phase"] == "push")
    assert (pushed["removed"], pushed["kept"]) == (1, 3)
    lines = [line for kind, data in told if kind == "deployment.phase.log" for line in data["lines"]]
    kept = "kept -odd, logs/, mine: never part of a deployed folder; clean (--clean) removes such files"
    assert lines == ["removed old", kept]
    record = await host.deploy(domain, upload(slow, ignore, ("both.txt", b"new")), clean=True)
    assert record["state"] == "succeeded", record["error"]
    assert await inside(files) == there


async def test_a_client_deploys_its_folder_follows_it_and_is_told_what_failed(
    host: Hosting, tmp_path: Path
) -> None:
    """Events come from the first to the last, also to who asks after the end; a failure raises its type."""
    (tmp_path / "site.toml").write_text('start = ["bun", "serve.ts"]\n')
    (tmp_path / "serve.ts").write_text(
        'Bun.serve({port: process.env.PORT, hostname: "0.0.0.0", fetch: () => new Response("mine")})'
    )
    token = host.gateway.token("*")
    async with Client(host.url, token=token) as client:
        begun = await client.deploy("client.example.com", tmp_path, key="first")
        assert (await client.deploy("client.example.com", tmp_path, key="first")).id == begun.id
        told = [event.type async for event in begun.events()]
        assert (told[0], told[-1]) == ("deployment.started", "deployment.succeeded")
        assert told.count("deployment.phase.finished") == len(PHASES)
        ended = await begun.wait()
        assert (ended.tenant, ended.state) == ("client-example-com", "succeeded")
        assert await host.visit("client.example.com") == (200, "mine")
        assert [event.type async for event in client.deployment(begun.id).events()] == told
        assert begun.id in [record.id for record in await client.deployments()]
        assert "static" in [template["name"] for template in await client.templates()]
        with pytest.raises(errors.NotFound, match="none") as caught:
            await (await client.deploy("client.example.com", "none")).wait()
        assert caught.value.facts["reason"] == "template_missing"
    # another one of that name does not find it, but who began it does
    async with Client(host.url, token=host.gateway.token("client-example-com")) as client:
        assert begun.id in [record.id for record in await client.deployments()]
        assert (await host.call("DELETE", "/v1/tenants/client-example-com"))[0] == 204
        assert await client.deployments() == []
        assert [event.type async for event in client.deployment(begun.id).events()] == told


async def test_a_hostile_upload_costs_nothing_and_a_hostile_workspace_holds_nothing_up(host: Hosting) -> None:
    """What is refused says why before a container is made; what a tenant put in its folder stays its own."""
    before = host.leavings()
    host.gateway.reset_peak()
    held = host.gateway.memory("VmRSS")
    uploads = {
        "sparse file": sparse(10 << 30) + folder('start = ["x"]'),
        "points outside": folder('start = ["x"]', link("out", "../../etc")),
        "is not plain": folder('start = ["x"]', ("esc\x1b[2J", b"")),
        "TOML": folder("start = " + "[" * 20_000),
        "not a tar": b"\xff" * 10_000,
    }
    for number, (told, archive) in enumerate(uploads.items()):
        template = {"archive": base64.b64encode(gzip.compress(archive)).decode()}
        record = await host.deploy(f"hostile-{number}.test", template)
        assert record["state"] == "rolledback"
        assert record["error"]["reason"] == "template_invalid", record
        assert told in record["error"]["message"]
        assert record["error"]["message"].isprintable()
    assert host.gateway.memory("VmHWM") - held < 64 << 20
    assert host.leavings() == before

    assert (await host.deploy("hostile.test"))["state"] == "succeeded"
    hostile = """
    cd /srv/site
    mv public /home/site/elsewhere
    ln -s /home/site/elsewhere public
    rm site.toml server.ts
    mkfifo site.toml pipe
    ln -s /etc/passwd server.ts
    ln -s / everything
    truncate -s 100G sparse
    touch "$(printf 'new\\nline')" -- --checkpoint-action=exec=false
    """
    environment.incus("exec", "hostile-test", "--user=1000", "--", "sh", "-ec", hostile)
    record = await host.deploy("hostile.test")
    assert record["state"] == "succeeded", record["error"]
    assert "Your site is up." in (await host.visit("hostile.test"))[1]
    passwd = environment.incus("exec", "hostile-test", "--", "stat", "-c", "%U %F", "/etc/passwd")
    assert passwd.stdout == b"root regular file\n"


async def test_a_key_gives_the_same_deployment_and_a_tenant_has_one_at_a_time(host: Hosting) -> None:
    """Also once it has ended; another body under that key, or another deployment meanwhile, is a conflict."""
    install = 'install = ["sleep", "1000"]'
    archive = base64.b64encode(folder(f'start = ["bun", "serve.ts"]\n{install}')).decode()
    body = {"domain": "once.test", "template": {"archive": archive}}

    async def post(key: str, **changes: Any) -> tuple[int, dict[str, Any]]:
        status, said, _ = await host.call("POST", "/v1/deployments", {**body, **changes}, Idempotency_Key=key)
        return status, said

    asked = await asyncio.gather(*(post("one") for _ in range(5)))
    assert {status for status, _ in asked} == {202}
    (identity,) = {said["id"] for _, said in asked}
    status, said = await post("one", size="medium")
    assert (status, said["code"]) == (409, "conflict")
    status, said = await post("two", template="static")
    assert (status, said["code"], said["deployment"]) == (409, "conflict", identity)
    status, said = await post("two", template="static", tenant="other-name")  # of its domain, too
    assert (status, said["code"], said["deployment"]) == (409, "conflict", identity)
    await host.reached(identity, "install")
    _, record, _ = await host.call("DELETE", f"/v1/deployments/{identity}")
    assert (record["state"], record["error"]["code"]) == ("rolledback", "cancelled")
    assert await post("one") == (200, {"id": identity, "tenant": "once-test", "state": "rolledback"})
    status, said = await post("three", template="static")
    assert status == 202
    assert (await host.ended(said["id"]))["state"] == "succeeded"
