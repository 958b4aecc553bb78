"""One gateway behind Caddy with one deployed site, and one Chromium, for all tests of this folder."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, async_playwright, expect

from gateway.settings import Settings
from tests.archives import archive
from tests.e2e.editor import DEADLINE, Editor, Watched
from tests.integration.conftest import incus_settings
from tests.integration.sites import Hosting, hosting
from tests.live import free_ports

__all__ = ["incus_settings"]

CHECKOUT = Path(__file__).parents[2]
CHROMIUM = Path(__file__).with_name("chromium.py")
PICTURES = "GATEWAY_TEST_PICTURES"
ADDRESS = "gateway.localhost"
"""The gateway's own domain. Browsers resolve `*.localhost` to this machine, and trust it as they do HTTPS."""

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP *.example.com 127.0.0.1",  # real domains, which lead to this machine
)

SITE = """\
install = ["sh", "-c", '{install}']
start = ["bun", "-e", 'Bun.serve({{ port: +process.env.PORT, fetch: () => new Response("News of today") }})']
"""
TEMPLATES = {
    # goes on when a test says so
    "talkative": "echo step 1 is done; until [ -e go-on ]; do sleep 0.1; done; echo step 2 is done",
    "broken": "echo there is no such thing; exit 1",
}

# a site that is not ours: a server of a few lines, which is up at once
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle cx="4" cy="4" r="4"/></svg>'
DESK = {
    "package.json": json.dumps({"scripts": {"dev": "bun serve.ts", "start": "bun serve.ts --production"}}),
    "serve.ts": """const built = process.argv.includes("--production");
const page = `<h1>A desk, ${built ? "published" : "in the making"}</h1>`;
const headers = { "Content-Type": "text/html" };
Bun.serve({ port: process.env.PORT, hostname: "0.0.0.0", fetch: () => new Response(page, { headers }) });
""",
    "README.md": "# Desk\n\nA site of *somebody else*.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    "logo.svg": SVG,
    "src/one.css": "h1 { color: red }\n",
    "src/two.css": "h2 { color: green }\n",
}

expect.set_options(timeout=DEADLINE)

# The page of a dev server and a TypeScript server take more CPU than the editor, and a blinking cursor has it
# painted again and again: most tests go without them.
STILL = {"reduced_motion": "reduce"}
LIGHT = """
try {
  for (const part of ["previewOpen", "languageServers"]) localStorage.setItem(`gateway.${part}`, "false");
} catch {} // a frame that may keep nothing
"""

OpenEditor = Callable[..., Awaitable[Editor]]


@pytest.fixture(scope="package")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    await asyncio.to_thread(subprocess.run, [str(CHECKOUT / "deploy" / "build-web")], check=True)
    folder = tmp_path_factory.mktemp("e2e")
    for name, install in TEMPLATES.items():
        (folder / "templates" / name).mkdir(parents=True)
        (folder / "templates" / name / "site.toml").write_text(SITE.format(install=install))
    templates = folder / "templates"
    agents, pages = free_ports(2)
    settings: dict[str, Any] = {
        "domain": ADDRESS,
        "origins": (f"http://127.0.0.1:{pages}",),
        "templates_dir": templates,
        "verify_timeout": 150.0,
        "agent_url": f"http://127.0.0.1:{agents}/",
    }
    async with hosting(incus_settings, folder / "state", **settings) as host:
        yield host


@pytest.fixture(scope="package")
async def site(host: Hosting) -> str:
    """The tenant of a deployed React site with its dev server; its address is `http://shop.localhost`."""
    # not the smallest: with its cache full a dev server waits for its own pages to be read back
    record = await host.deploy("shop.localhost", "vite-react", tenant="shop", size="medium")
    assert record["state"] == "succeeded", record["error"]
    return str(record["tenant"])


@pytest.fixture(scope="package")
async def desk(host: Hosting) -> str:
    """The tenant of a small site, for tests that need no dev server: they name it `site`."""
    packed = archive(*((name, text.encode()) for name, text in DESK.items()), manifest=None)
    record = await host.deploy(
        "desk.localhost", {"archive": base64.b64encode(packed).decode()}, tenant="desk"
    )
    assert record["state"] == "succeeded", record["error"]
    return str(record["tenant"])


@pytest.fixture(scope="package")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        await browser.close()


@pytest.fixture
async def editor(browser: Browser, host: Hosting, site: str) -> AsyncIterator[OpenEditor]:
    """A function that makes windows for the editor, signed in. In none may anything go wrong unseen.

    They are without preview, language servers and motion, unless they are to be `whole`, as who opens one has
    them.
    """
    windows: list[Watched] = []

    async def open_editor(
        *, signed_in: bool = True, tenants: tuple[str, ...] = ("*",), whole: bool = False, **window: object
    ) -> Editor:
        watched = Watched(f"http://{ADDRESS}:{host.settings.caddy_http}")
        windows.append(watched)
        await watched.open(browser, window if whole else {**STILL, **window})
        if not whole:
            await watched.context.add_init_script(LIGHT)
        if signed_in:
            await watched.sign_in(host.gateway.token(*tenants))
        return Editor(await watched.page(), watched, site)

    yield open_editor
    for watched in windows:
        await watched.close()
    complaints = [line for watched in windows for line in watched.complaints]
    assert not complaints, "\n".join(complaints)


@pytest.fixture(scope="package")
def pictures() -> Path:
    """Where pictures are put: the folder that GATEWAY_TEST_PICTURES names, else one that is thrown away."""
    folder = Path(os.environ.get(PICTURES) or tempfile.mkdtemp(prefix="gateway-pictures-"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
