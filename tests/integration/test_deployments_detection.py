"""A folder without a manifest becomes a site: what it is was found, and each way to it is seen to work."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings
from tests.archives import archive
from tests.integration import environment
from tests.integration.conftest import Container
from tests.integration.sites import Hosting, hosting
from tests.waits import pause

pytestmark = pytest.mark.timeout(300)

VITE = "8.0.5"
NODE = """const http = require("http");
http.createServer((request, answer) => answer.end("of node, by " + process.env.npm_lifecycle_event))
  .listen(process.env.PORT);
"""


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    async with hosting(incus_settings, tmp_path_factory.mktemp("detection") / "state") as host:
        yield host


def upload(files: Mapping[str, str]) -> dict[str, str]:
    members = ((name, text.encode()) for name, text in files.items())
    return {"archive": base64.b64encode(archive(*members, manifest=None)).decode()}


async def deployed(host: Hosting, domain: str, files: Mapping[str, str], **more: Any) -> dict[str, Any]:
    record = await host.deploy(domain, upload(files), **more)
    assert record["state"] == "succeeded", record["error"]
    return record


async def cli(host: Hosting, *words: str) -> tuple[int | None, str]:
    """Return exit code and all that the command line said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", *words),
        env={**host.gateway.environment, "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode, out.decode()


async def test_a_folder_with_nothing_but_a_page_is_served(host: Hosting, tmp_path: Path) -> None:
    """By one command, which says in three lines what it chose; hidden files are not served."""
    (tmp_path / "index.html").write_text("<h1>mine</h1>")
    (tmp_path / "about.html").write_text("about")
    (tmp_path / ".env").write_text("SECRET=1")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.html").write_text("docs")
    code, said = await cli(host, "deploy", "plain.test", str(tmp_path), "--write")
    assert code == 0, said
    for line in (
        f"wrote {tmp_path}/site.toml",
        "static files: there is index.html",
        "install nothing: files need none",
        "serve the files of the folder: the gateway's own file server",
        "plain.test",
    ):
        assert line in said
    assert 'static = "."' in (tmp_path / "site.toml").read_text()
    answers = {
        path: await host.visit("plain.test", path)
        for path in ("/", "/about", "/docs", "/docs/", "/.env", "/%2e%2e/etc/passwd", "/site.toml", "/no")
    }
    assert answers["/"] == (200, "<h1>mine</h1>")
    assert answers["/about"] == (200, "about")
    assert answers["/docs"] == answers["/docs/"] == (200, "docs")
    assert {answers[path][0] for path in ("/.env", "/%2e%2e/etc/passwd", "/site.toml", "/no")} == {404}
    # the manifest that was written means the same, and what was before it comes back
    (tmp_path / "index.html").write_text("<h1>next</h1>")
    code, said = await cli(host, "deploy", "plain.test", str(tmp_path))
    assert code == 0, said
    assert await host.visit("plain.test") == (200, "<h1>next</h1>")
    status, begun, _ = await host.call("POST", "/v1/tenants/plain-test/rollback", {})
    assert status == 202, begun
    assert (await host.ended(begun["id"]))["state"] == "succeeded"
    assert await host.visit("plain.test") == (200, "<h1>mine</h1>")


async def published(host: Hosting) -> None:
    """What an agent made of the app is built and served at another domain, and its dev server goes on."""
    for said in ("first", "second"):
        async with host.gateway.http("vite-test") as session:
            url = "/v1/tenants/vite-test/files/main.js"
            answer = await session.put(url, data=f"document.body.textContent = '{said} edit'".encode())
            assert answer.status in (200, 201), await answer.text()
        code, output = await cli(host, "publish", "vite.test", "www.vite.test")
        assert code == 0 and re.search(r"//www\.vite\.test:\d+ is published", output), output
        status, page = await host.visit("www.vite.test")
        assert status == 200 and "/@vite/client" not in page
        script = re.search(r'src="(/assets/[^"]+)"', page)
        assert script is not None, page
        assert f"{said} edit" in (await host.visit("www.vite.test", script[1]))[1]
        # the app's own paths are pages of it, and what it lacks is not there
        assert await host.visit("www.vite.test", "/users/jane.doe") == (200, page)
        assert (await host.visit("www.vite.test", "/assets/gone.js"))[0] == 404
        assert "/@vite/client" in (await host.visit("vite.test"))[1]
    status, refused, _ = await host.call("POST", "/v1/tenants/vite-test/publish", {"domain": "Vite.test"})
    assert (status, refused["code"]) == (400, "invalid_params"), refused


async def test_a_vite_app_is_served_by_its_dev_server(host: Hosting) -> None:
    files = {
        "package.json": json.dumps({"devDependencies": {"vite": VITE}, "scripts": {"dev": "vite"}}),
        "index.html": '<!doctype html><script type=module src="/main.js"></script>',
        "main.js": "document.body.textContent = 'x'",
    }
    record = await deployed(host, "vite.test", files)
    assert record["detected"] == {
        "name": "vite",
        "title": "Vite",
        "install": "bun install",
        "start": "bun run dev --host 0.0.0.0 --port $PORT",
        "static": None,
        "port": 3000,
        "lines": [
            "Vite: package.json names vite",
            "install bun install: there is no lockfile",
            "start bun run dev --host 0.0.0.0 --port $PORT: its script `dev` (vite), told where to listen",
        ],
    }
    status, page = await host.visit("vite.test")
    assert status == 200 and "/@vite/client" in page
    # built, and served without a process of Node
    await published(host)
    record = await deployed(host, "vite.test", files, mode="production")
    assert (record["kind"], record["detected"]["static"]) == ("update", "dist")
    status, page = await host.visit("vite.test")
    assert status == 200 and "/@vite/client" not in page and "/assets/" in page


async def test_a_node_server_is_started_by_its_script(host: Hosting) -> None:
    """And anew by each edit of its source; one that is broken stays down until it is mended."""
    files = {"package.json": json.dumps({"scripts": {"start": "node index.js"}}), "index.js": NODE}
    record = await deployed(host, "node.test", files)
    assert record["detected"]["start"] == "bun run start"
    assert await host.visit("node.test") == (200, "of node, by start")
    for source, said in (
        (NODE.replace("of node", "of an edit"), "of an edit, by start"),
        ("not JavaScript", ""),
        (NODE, "of node, by start"),
    ):
        async with host.gateway.http("node-test") as session:
            answer = await session.put("/v1/tenants/node-test/files/index.js", data=source.encode())
            assert answer.status in (200, 201), await answer.text()
        await host.answers("node.test", *((200, said) if said else (502,)), deadline=8)
    # what tools write beside their configuration, and remove again, restarts nothing
    passing = """
    touch vite.config.ts.timestamp-1700000000000-abcdef.mjs tsup.config.bundled_x.mjs gone.js
    rm gone.js
    """
    main = ("exec", "node-test", "--cwd=/srv/site", "--", "pgrep", "-f", "^node index.js")
    before = environment.incus(*main).stdout
    environment.incus("exec", "node-test", "--cwd=/srv/site", "--user=1000", "--", "sh", "-ec", passing)
    await pause(1.5)  # longer than a new file is given
    assert environment.incus(*main).stdout == before
    # what is given goes before what is found, also in an update
    record = await deployed(host, "node.test", files, start="bun run --bun start", port=4000)
    assert (record["port"], record["detected"]["start"]) == (4000, "bun run --bun start")
    assert await host.visit("node.test") == (200, "of node, by start")


HOG = "const kept = []; for (;;) kept.push(Buffer.alloc(16 << 20, 1))"
START = json.dumps({"scripts": {"start": "node index.js"}})


async def test_what_does_not_come_up_says_why_and_what_to_do(host: Hosting) -> None:
    """Each in the words that a person reads, once, and with nothing left."""
    before = host.leavings()

    async def said(name: str, files: Mapping[str, str], reason: str, **more: Any) -> str:
        record = await host.deploy(f"{name}.test", upload(files), **more)
        assert record["state"] == "rolledback"
        assert record["error"]["reason"] == reason, record["error"]
        return str(record["error"]["message"])

    locked = {"package.json": json.dumps({"dependencies": {"is-odd": "3.0.1"}}), "index.js": NODE}
    locked["bun.lock"] = '{"lockfileVersion": 1, "workspaces": {"": {"name": "x"}}, "packages": {}}'
    ends, lockfile, memory, program, nowhere = await asyncio.gather(
        said("ends", {"package.json": START, "index.js": "console.log('done')"}, "never_healthy"),
        said("lockfile", locked, "install_failed"),
        said("memory", {"index.js": NODE, "hog.js": HOG}, "install_failed", install="bun hog.js"),
        said("program", {"index.html": ""}, "never_healthy", start="no-such-program $PORT"),
        said(
            "nowhere",
            {"package.json": START, "index.js": NODE.replace("PORT", "PORT, '127.0.0.1'")},
            "wrong_address",
        ),
    )
    assert ends == (
        "the site keeps ending: it ends by itself, without an error; a site's command must keep "
        "running. Its last output: $ node index.js\ndone"
    )
    assert lockfile.startswith("bun.lock does not match what the folder requires: run `bun install` there")
    assert memory.startswith(
        "`bun hog.js` needs more memory than the tenant has (512 MiB): the size medium has 1024 MiB"
    )
    assert program.startswith(
        "the tenant's image has no no-such-program, which `no-such-program $PORT` needs"
    )
    assert "it listens on 127.0.0.1:3000; it must listen on 0.0.0.0:$PORT" in nowhere
    assert 'with node, server.listen(process.env.PORT, "0.0.0.0")' in nowhere
    assert host.leavings() == before


# what others wrote, each by its own generator from npm
STARTERS = {
    "create-vite": ("npm create -y vite@9.3.0 app -- --template react-ts", "Vite", "/@vite/client"),
    "express": ("npx -y express-generator@4.16.1 --no-view app", "Express", "Express"),
    "fastify": ("npx -y fastify-cli@8.0.2 generate app --lang=js", "Fastify", '{"root":true}'),
}


async def test_starters_of_others_are_sites_as_they_are(host: Hosting, shared_tenant: Container) -> None:
    """Made and deployed without a manifest, and updated with one more file while it answers."""

    async def made(name: str, command: str, *more: str) -> dict[str, str]:
        script = f"""
            export HOME=/home/site CI=1; mkdir -p /tmp/{name} && cd /tmp/{name}
            [ -d app ] || {command} </dev/null >&2 || exit 1
            cd app && for file in {" ".join(more)}; do echo more >"$file"; done; tar -c . | base64 -w0"""
        done = await asyncio.to_thread(
            shared_tenant.run, "sh", "-c", script, user=1000, timeout=120, stdin=b"\n"
        )
        return {"archive": done.stdout.decode().strip()}

    async def tried(name: str) -> None:
        command, title, said = STARTERS[name]
        record = await host.deploy(f"{name}.test", await made(name, command))
        assert record["state"] == "succeeded", (name, record["error"])
        assert record["detected"]["title"] == title
        status, page = await host.visit(f"{name}.test")
        assert status == 200 and said in page, (name, page[:500])

    await asyncio.gather(*map(tried, STARTERS))
    record = await host.deploy("express.test", await made("express", "", "public/more.txt"))
    assert (record["state"], record["kind"]) == ("succeeded", "update"), record["error"]
    assert await host.visit("express.test", "/more.txt") == (200, "more\n")


async def test_a_python_app_outlives_its_update(host: Hosting) -> None:
    """Its venv is made in the folder of the update, and moved with it."""
    app = 'from flask import Flask\napp = Flask(__name__)\n@app.get("/")\ndef page(): return "{}"\n'
    files = {"app.py": app.format("one"), "requirements.txt": "flask==3.1.2\n"}
    first = await deployed(host, "flask.test", files)
    assert first["detected"]["title"] == "Flask"
    assert await host.visit("flask.test") == (200, "one")
    second = await deployed(host, "flask.test", files | {"app.py": app.format("two")})
    assert second["kind"] == "update"
    assert await host.visit("flask.test") == (200, "two")


# a site with a database that nobody named, beside one that its manifest names in `keep`
SHOP = """const fs = require("fs"), http = require("http");
const read = (name) => fs.existsSync(name) ? fs.readFileSync(name, "utf8") : "";
http.createServer((request, answer) => {
  const [, verb, word] = request.url.split("/");
  if (verb == "add") for (const name of ["shop.db", "shop.db-wal", "data/orders.json"]) {
    fs.mkdirSync("data", { recursive: true });
    fs.appendFileSync(name, word + " ");
  }
  answer.end(`${process.env.HOW} VERSION ${read("shop.db")}| ${read("data/orders.json")}`);
}).listen(process.env.PORT, "0.0.0.0");
"""


async def test_what_a_published_site_has_written_outlives_the_next_publish(host: Hosting) -> None:
    """A new one begins with the data of the site that it was made from; from then on it has its own."""
    commands = {"dev": "HOW=dev node server.js", "start": "HOW=start node server.js"}
    files = {
        "package.json": json.dumps({"scripts": commands}),
        "server.js": SHOP.replace("VERSION", "one"),
        "site.toml": 'keep = ["data/"]\n',
    }
    await deployed(host, "shop.test", files)
    await host.visit("shop.test", "/add/trial")
    for number, version in enumerate(("one", "two")):
        source = SHOP.replace("VERSION", version).encode()
        async with host.gateway.http("shop-test") as session:
            answer = await session.put("/v1/tenants/shop-test/files/server.js", data=source)
            assert answer.status in (200, 201), await answer.text()
        code, output = await cli(host, "publish", "shop.test", "www.shop.test")
        assert code == 0, output
        written = "trial " + "sold " * number
        assert await host.visit("www.shop.test") == (200, f"start {version} {written}| {written}")
        await host.visit("www.shop.test", "/add/sold")
        await host.visit("shop.test", "/add/more")
    # it goes back with all that was sold
    status, begun, _ = await host.call("POST", "/v1/tenants/www-shop-test/rollback", {})
    assert status == 202, begun
    record = await host.ended(begun["id"])
    assert record["state"] == "succeeded", record["error"]
    assert await host.visit("www.shop.test") == (200, "start one trial sold sold | trial sold sold ")


async def test_a_command_for_production_is_published_and_a_dev_server_is_not(host: Hosting) -> None:
    """The refusal says which line to write; nothing is made by it."""
    node = NODE.replace("process.env.npm_lifecycle_event", "process.env.HOW + process.env.NODE_ENV")
    commands = {"dev": "HOW=dev nodemon server.js"}
    files = {"package.json": json.dumps({"scripts": commands}), "server.js": node}
    await deployed(host, "own.test", files, start="env HOW=dev node server.js")
    code, output = await cli(host, "publish", "own.test", "www.own.test")
    assert code != 0, output
    for part in (
        "its script `dev` (HOW=dev nodemon server.js) starts nodemon, which is for development only",
        "add a script `start` to package.json",
        "or give a command that does with `start` (--start)",
    ):
        assert part in " ".join(output.split()), output
    status, said, _ = await host.call("GET", "/v1/tenants/www-own-test")
    assert (status, said["code"]) == (404, "not_found")
    for how in ("first", "second"):
        words = ("publish", "own.test", "www.own.test", "--start", f"env HOW={how} node server.js")
        code, output = await cli(host, *words)
        assert code == 0, output
        assert await host.visit("www.own.test") == (200, f"of node, by {how}production")
    assert await host.visit("own.test") == (200, "of node, by devdevelopment")
