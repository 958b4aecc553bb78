"""Rollbacks on real containers, and on the `local` runtime, both behind a real Caddy."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from gateway.settings import Settings
from tests.archives import Member
from tests.contracts.rollback import KEPT, RollbackContract, Story, upload
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.live import RpcFailure

pytestmark = pytest.mark.timeout(300)

BUN = """import { existsSync, readFileSync } from "fs";
const page = readFileSync("index.html", "utf8");
if (page == "fragile" && existsSync("data/off")) process.exit(3);
Bun.serve({port: process.env.PORT, hostname: "0.0.0.0", fetch(request) {
  const { GREETING, SECRET } = process.env;
  const { pathname } = new URL(request.url);
  return new Response(pathname == "/env" ? `${GREETING ?? "none"} ${SECRET ?? "none"}` : page);
}});
"""
PYTHON = """import http.server, os, sys
page = open("index.html").read()
if page == "fragile" and os.path.exists("data/off"):
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    wbufsize = 1 << 16  # an answer goes whole or not at all
    def do_GET(self):
        env = [os.environ.get(name, "none") for name in ("GREETING", "SECRET")]
        said = (" ".join(env) if self.path == "/env" else page).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
async def contained(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Hosting]:
    state = tmp_path_factory.mktemp("rollback") / "state"
    async with hosting(incus_settings, state, rollbacks_kept=KEPT) as host:
        yield host


@pytest.fixture(scope="module")
async def local(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    state = tmp_path_factory.mktemp("local") / "state"
    async with hosting(incus_settings, state, runtime="local", rollbacks_kept=KEPT) as host:
        yield host


def site(program: str, name: str, text: str, page: str, keep: str) -> list[Member]:
    manifest = f'start = ["{program}", "{name}"]\n{keep}'
    return [(name, text.encode()), ("index.html", page.encode()), ("site.toml", manifest.encode())]


class TestIncus(RollbackContract):
    @pytest.fixture
    def host(self, contained: Hosting) -> Hosting:
        return contained

    def site(self, page: str, keep: str = "") -> list[Member]:
        return site("bun", "serve.ts", BUN, page, keep)

    async def test_the_oldest_kept_site_goes_where_the_disk_is_full(self, contained: Hosting) -> None:
        """A deployment that needs its room succeeds, and the younger one is still kept.

        An update keeps the large file; only the first site has the bytes from before it was written anew.
        """
        story = Story(contained, "full.example.com")
        first = await contained.deploy(story.domain, upload(*self.site("one")))
        assert first["state"] == "succeeded", first["error"]
        await inside(story.tenant, "head -c 200M /dev/zero >/srv/site/large; sync")
        second = await contained.deploy(story.domain, upload(*self.site("two")))
        assert second["state"] == "succeeded", second["error"]
        await inside(story.tenant, "head -c 200M /dev/zero >/srv/site/large; sync")
        await shrink(story.tenant, left=64 << 20)
        install = 'install = ["sh", "-c", "head -c 120M /dev/zero >more && sync"]\n'
        third = await contained.deploy(story.domain, upload(*self.site("three", install)))
        assert third["state"] == "succeeded", third["error"]
        assert await story.visit() == "three"
        assert await story.known() == (third["id"], [second["id"]])

    async def test_the_oldest_kept_site_goes_where_an_agent_finds_the_disk_full(
        self, contained: Hosting
    ) -> None:
        """Its Write succeeds, and a command that fills the disk takes none; one stays."""
        story = Story(contained, "crammed.example.com")
        records = []
        for page in ("one", "two", "three", "four"):
            records.append(await contained.deploy(story.domain, upload(*self.site(page))))
            assert records[-1]["state"] == "succeeded", records[-1]["error"]
            await inside(story.tenant, "head -c 100M /dev/zero >/srv/site/large; sync")
        first, second, third, fourth = (record["id"] for record in records)
        assert await story.known() == (fourth, [third, second]), (KEPT, first)
        await shrink(story.tenant, left=4 << 20)
        await inside(story.tenant, "head -c 50M /dev/zero >/srv/site/runaway || :")
        assert await story.known() == (fourth, [third, second])
        text = "x" * (6 << 20)
        async with contained.gateway.wire(story.tenant) as wire:

            async def write() -> dict[str, Any]:
                given = {"file_path": "/srv/site/new.txt", "content": text}
                return dict(await wire.call("tools/call", name="Write", arguments=given))

            result = await write()
            assert not result["isError"], result
            assert await story.known() == (fourth, [third])
            await inside(story.tenant, "head -c 500M /dev/zero >/srv/site/runaway || :")
            result = await write()
            assert result["structuredContent"]["reason"] == "no_space", result
            with pytest.raises(RpcFailure, match="disk quota exceeded"):
                await wire.call("files/write", path="saved.txt", text=text)
            assert await story.known() == (fourth, [third])

    async def test_a_changed_environment_is_served_without_a_copy_of_the_files(
        self, contained: Hosting
    ) -> None:
        """The next site has layers over the live one's files; the former site is kept all the same."""
        story = Story(contained, "layers.example.com")
        start = 'start = "stat -f -c %T . >>/home/site/kinds; exec bun serve.ts"\n'
        members = [*self.site("page")[:2], ("site.toml", start.encode())]
        first = await contained.deploy(story.domain, upload(*members), env={"GREETING": "one"})
        assert first["state"] == "succeeded", first["error"]
        async with story.visited():
            second = await story.change("PATCH", "env", {"env": {"GREETING": "two"}})
        assert second["state"] == "succeeded", second["error"]
        assert await story.visit("/env") == "two none"
        kinds = await inside(
            story.tenant, "cat /home/site/kinds; ls -A /srv; grep -c overlay /proc/mounts || :"
        )
        assert kinds.split() == ["btrfs", "overlayfs", "btrfs", ".site-kept", "site", "0"]
        third = await story.rollback()
        assert third["state"] == "succeeded", third["error"]
        assert (await story.visit(), await story.visit("/env")) == ("page", "one none")


async def shrink(tenant: str, left: int) -> None:
    """Leave so many bytes of a tenant's disk."""
    await inside(tenant, "sync")
    disk = environment.INCUS_DIR / "storage-pools" / "gwtest" / "containers" / tenant
    shown = subprocess.run(
        ["btrfs", "qgroup", "show", "--raw", "-f", disk], check=True, capture_output=True, text=True
    )
    referenced = int(shown.stdout.splitlines()[-1].split()[1])
    device = ("config", "device", "override", tenant, "root", f"size={referenced + left}")
    await asyncio.to_thread(environment.incus, *device)


async def inside(tenant: str, script: str) -> str:
    done = await asyncio.to_thread(environment.incus, "exec", tenant, "--", "sh", "-c", script)
    return done.stdout.decode()


class TestLocal(RollbackContract):
    @pytest.fixture
    def host(self, local: Hosting) -> Hosting:
        return local

    def site(self, page: str, keep: str = "") -> list[Member]:
        return site(sys.executable, "serve.py", PYTHON, page, keep)


async def command(
    host: Hosting, *words: str, given: bytes = b"", token: str | None = None
) -> tuple[int | None, str, str]:
    """Return exit code, output and errors of a command line."""
    more = {} if token is None else {"GATEWAY_TOKEN": token}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", *words),
        env={**host.gateway.environment, **more},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(given)
    return process.returncode, out.decode(), err.decode()


async def test_the_command_line_shows_goes_back_and_changes_variables(local: Hosting) -> None:
    domain = "typed.example.com"
    for page in ("one", "two"):
        archive = upload(*site(sys.executable, "serve.py", PYTHON, page, ""))
        record = await local.deploy(domain, archive, env={"GREETING": page})
        assert record["state"] == "succeeded", record["error"]
    code, out, _ = await command(local, "deployments", domain)
    rows = [line.split() for line in out.splitlines()]
    assert (code, rows[0][0], [row[-1] for row in rows[1:]]) == (0, "id", ["live", "kept"])
    first = rows[2][0]

    code, out, err = await command(local, "rollback", domain)
    assert code == 0, err
    assert "verify" in out and f"is {first} again, after " in out.splitlines()[-1]
    assert (await local.visit(domain))[1] == "one"
    code, out, _ = await command(local, "deployments", "typed-example-com", "--json")
    assert (code, orjson.loads(out)["deployments"][0]["rollback"]) == (0, first)
    code, _, err = await command(local, "rollback", domain, first)
    assert code == 1
    assert f"does not keep the site of {first}; it keeps d-" in err

    lines = b"# of a file\n\nexport SECRET='a b'\nGREETING=three=3\n"
    code, out, err = await command(local, "env", domain, "set", given=lines)
    assert code == 0, err
    assert "has GREETING, SECRET, after" in out and "a b" not in out
    assert (await local.visit(domain, "/env"))[1] == "three=3 a b"
    assert (await command(local, "env", domain, "list", "--values"))[1] == "GREETING=three=3\nSECRET=a b\n"
    code, out, err = await command(local, "env", domain, "unset", "SECRET")
    assert (code, (await local.visit(domain, "/env"))[1]) == (0, "three=3 none"), err
    assert (await command(local, "env", domain, "set", "SECRET"))[0] == 2
    code, _, err = await command(local, "env", domain, "unset", "SECRET")
    assert (code, err) == (1, "incus-gateway: SECRET is not set\n")
    code, _, err = await command(local, "rollback", "nowhere.example.com")
    assert (code, err[:50]) == (1, "incus-gateway: no tenant has the domain nowhere.ex")
    token = local.gateway.token("*", scopes=("deploy", "events"))
    code, _, err = await command(local, "env", domain, "list", "--values", token=token)
    assert code == 1 and "exec" in err
