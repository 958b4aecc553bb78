"""The prompt box: the server of the docs, the real Agent SDK and CLI, a scripted model, a container."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from playwright.async_api import Locator, expect

from tests.contracts.processes import Tree
from tests.e2e.conftest import ADDRESS, OpenEditor
from tests.e2e.editor import Editor, violations
from tests.e2e.test_editor import run
from tests.e2e.test_pictures import at_work, picture
from tests.e2e.test_sessions import led_to, token
from tests.integration.sites import Hosting
from tests.messages import MODEL, Model, claude_program, model, say, use
from tests.typescript import PACKAGE, installed
from tests.waits import until

HOSTILE = """\
**It is done.** See [the page](https://example.com/) and <img src=x onerror="document.title='run'"> and
[this](javascript:alert(1)) and ![pixel](https://evil.example/pixel.png).

<script>document.title = "run"</script>
"""


@dataclass
class Server:
    """The example server of docs/agents.md, which can be ended and started again."""

    program: Path
    environment: dict[str, str]
    url: str
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec("node", str(self.program), env=self.environment)
        async with aiohttp.ClientSession() as http:

            async def up() -> bool:
                try:
                    async with http.options(self.url) as answer:
                        return answer.status == 204
                except aiohttp.ClientError:
                    return False

            await until(up, 60)

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()


@pytest.fixture(scope="module")
async def scripted() -> AsyncIterator[Model]:
    async with model() as scripted:
        yield scripted


@pytest.fixture(scope="module")
async def server(
    host: Hosting, scripted: Model, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp("agents")
    url = host.settings.agent_url
    assert url is not None
    options = {"model": MODEL, "pathToClaudeCodeExecutable": str(claude_program())}
    environment = {
        "PATH": os.environ["PATH"],
        "GATEWAY_URL": host.url,
        "EDITOR_ORIGIN": f"http://{ADDRESS}:{host.settings.caddy_http}",
        "PORT": str(urlsplit(url).port),
        "AGENT_OPTIONS": json.dumps(options),
        **scripted.environment(folder),
    }
    example = (PACKAGE / "examples/agent-server.js").read_text()
    assert len(example.splitlines()) <= 60, "as the docs say"
    server = Server(await installed(folder, "examples/agent-server.js"), environment, url)
    await server.start()
    yield server
    await server.stop()


async def agent(window: Editor) -> Locator:
    await window.view("Agent")
    return window.page.get_by_role("region", name="Agent")


async def test_an_agent_is_asked_works_and_is_asked_again_after_a_reload(
    editor: OpenEditor, site: str, server: Server, scripted: Model
) -> None:
    """By keys alone. Its work has its own name, its turn is a diff, and nothing that it says runs."""
    write = use("Write", file_path="public/agent.txt", content="by the agent\n")
    scripted.turns[:] = [[write], [use("Bash", command="echo from the container")], [say(HOSTILE)]]
    window = await editor(whole=True)
    await window.load_connected()
    page = window.page
    await page.keyboard.press("Control+Alt+i")
    box, view = page.get_by_label("Ask the agent"), await agent(window)
    await expect(box).to_be_focused()
    await page.keyboard.type("Write a file,")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("<b>now</b>.")
    await page.keyboard.press("Enter")
    talk = view.get_by_role("log")
    await expect(talk.locator(".asked")).to_have_text("You: Write a file,\n<b>now</b>.")
    await expect(talk.locator("strong", has_text="It is done.")).to_be_visible()
    await expect(talk.locator(".call.done")).to_have_count(2)
    await expect(view.get_by_role("button", name="Send")).to_be_visible()
    assert await talk.locator("img, script, b:not(.call b), [onerror]").count() == 0
    links = await talk.locator("a").evaluate_all("links => links.map(link => [link.href, link.target])")
    assert links == [["https://example.com/", "_blank"]]
    assert await page.title() != "run"
    assert run(site, "cat public/agent.txt") == "by the agent\n"

    await talk.locator(".call", has_text="Bash").locator("summary").click()
    await expect(talk.locator(".call pre", has_text="from the container").last).to_be_visible()
    assert not await violations(page)
    await talk.get_by_role("button", name="Show its output").click()
    await expect(window.screen).to_contain_text("from the container")
    await talk.get_by_role("button", name="See what it changed").click()
    turn = page.get_by_role("dialog", name="Turn: Write a file,")
    await expect(turn).to_contain_text("by the agent")
    await expect(turn).to_contain_text("test (agent)")
    assert not await violations(page)
    await page.keyboard.press("Escape")
    await expect((await window.view("Activity")).get_by_text("test (agent)").first).to_be_visible()

    await page.reload()
    await window.connected()
    await agent(window)
    await expect(talk.locator("strong", has_text="It is done.")).to_be_visible()
    scripted.turns[:] = [[say("Twice.")]]
    await box.fill("And again")
    await page.keyboard.press("Enter")
    await expect(talk.get_by_text("Twice.")).to_be_visible()
    heard = json.dumps(scripted.requests[-1]["messages"])
    assert "Write a file" in heard and "And again" in heard, "the same conversation"
    kept = await page.evaluate("JSON.stringify([localStorage, sessionStorage])")
    assert "eyJ" not in kept, "a token is kept nowhere"
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_label("Access token")).to_be_visible()
    assert "Write a file" not in await page.evaluate("JSON.stringify(sessionStorage)")
    run(site, "rm public/agent.txt")


async def test_an_agent_at_work_in_a_picture(
    editor: OpenEditor, site: str, server: Server, scripted: Model, pictures: Path
) -> None:
    write = use("Write", file_path="public/robots.txt", content="User-agent: *\nAllow: /\n")
    answer = "Search engines may now read every page: `public/robots.txt` says so. Shall I add a **sitemap**?"
    scripted.turns[:] = [[write], [use("Bash", command="ls public")], [say(answer)]]
    window = await editor(whole=True)
    await at_work(window, site)
    view = await agent(window)
    await view.get_by_label("Ask the agent").fill("May search engines find us?")
    await view.get_by_role("button", name="Send").click()
    await expect(view.locator("strong", has_text="sitemap")).to_be_visible()
    await expect(view.get_by_role("button", name="See what it changed")).to_be_visible()
    await picture(window, pictures, "agent")
    run(site, "rm public/robots.txt")


async def test_an_agent_is_stopped_with_all_that_it_runs(
    editor: OpenEditor, site: str, server: Server, scripted: Model
) -> None:
    tree = Tree()
    scripted.turns[:] = [[use("Bash", command=tree.script)]]
    window = await editor()
    await window.load_connected()
    view = await agent(window)
    await view.get_by_label("Ask the agent").fill("Run it")
    await view.get_by_role("button", name="Send").click()
    await until(lambda: tree.alive() == tree.SIZE, 60)
    await expect(view.locator(".prompt-state")).to_contain_text("Bash")
    await view.get_by_role("button", name="Stop").click()
    await expect(view.get_by_text("Stopped.", exact=True)).to_be_visible()
    await until(lambda: tree.alive() == 0, 60)


async def test_what_is_typed_stays_where_the_agent_cannot_be_asked(
    editor: OpenEditor, host: Hosting, site: str, server: Server, scripted: Model
) -> None:
    """Its server is away; the session ends; and another tab has a conversation of its own."""
    window = await editor(signed_in=False)
    window.watched.expected += ["ERR_CONNECTION_REFUSED", "401", "ERR_ABORTED"]
    await window.load(f"token={token(site)}&tenant={site}")
    await window.connected()
    view = await agent(window)
    box, page = view.get_by_label("Ask the agent"), window.page
    await server.stop()
    await box.fill("Hello")
    await page.keyboard.press("Enter")
    await expect(view.get_by_role("alert")).to_contain_text("cannot be reached")
    assert not await violations(page)
    await server.start()
    scripted.turns[:] = [[say("Hello too.")]]
    await box.fill("Hello again")
    await page.keyboard.press("Enter")
    await expect(view.get_by_text("Hello too.")).to_be_visible()
    await led_to(window, token(site, ttl=4), site)
    await box.fill("Not sent yet")
    dialog = page.get_by_role("dialog", name="The session has ended")
    await expect(dialog).to_be_visible()
    await page.keyboard.press("Escape")
    await box.focus()
    await page.keyboard.press("Enter")
    await expect(box).to_have_value("Not sent yet")
    await page.get_by_label("New access token").fill(token(site))
    await page.keyboard.press("Enter")
    await window.connected()
    await expect(box).to_have_value("Not sent yet")
    await expect(view.get_by_text("Hello too.")).to_be_visible()

    other = Editor(await window.watched.page(), window.watched, site)
    await other.load_connected(site)
    beside = await agent(other)
    await expect(beside.get_by_text("Ask for a change", exact=True).first).to_be_visible()
    await expect(beside.get_by_label("Ask the agent")).to_have_value("")
    scripted.turns[:] = [[say("Sent.")]]
    await box.focus()
    await page.keyboard.press("Enter")
    await expect(view.get_by_text("Sent.", exact=True)).to_be_visible()
    await expect(beside.get_by_text("Sent.", exact=True)).to_have_count(0)


async def test_the_server_works_only_for_tokens_of_its_gateway_and_their_own_conversations(
    host: Hosting, site: str, server: Server, scripted: Model
) -> None:
    async def asked(raw: str, **more: str) -> tuple[int, str]:
        body = {"tenant": site, "prompt": "Hello", **more}
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {raw}"}) as http,
            http.post(server.url, json=body) as answer,
        ):
            return answer.status, await answer.text()

    before = len(scripted.requests)
    for raw, more in (
        ("nonsense", {}),
        (token("another-tenant"), {}),
        (token(site), {"tenant": "another-tenant"}),
        (token(site), {"session": "00000000-0000-0000-0000-000000000000"}),
    ):
        status, said = await asked(raw, **more)
        assert status == 400 and json.loads(said)["detail"], (raw, more)
    assert len(scripted.requests) == before, "the model was asked nothing"
    scripted.turns[:] = [[say("Hello.")]]
    status, said = await asked(token(site))
    assert status == 200
    found = re.search(r'"session_id":"([0-9a-f-]{36})"', said)
    assert found is not None
    status, said = await asked(token(site, subject="mallory"), session=found[1])
    assert status == 400 and "not known" in said
