"""The examples of docs/clients.md, as they stand there, against one deployed tenant."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.caddy import shipped
from gateway.settings import Settings
from tests.integration.sites import Hosting, hosting
from tests.integration.test_readme import README, run
from tests.messages import model, use
from tests.waits import until

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
ADDRESS = "http://127.0.0.1:8080"
SAVE = """
import asyncio
import os
from gateway_client import Client


async def main() -> None:
    async with Client("http://127.0.0.1:8080", token=os.environ["TOKEN"]) as client:
        shop = client.tenant("shop")
        await shop.files.write("visits.txt", "")
        await asyncio.gather(*(add_line(shop, "visits.txt", f"{number}\\n") for number in range(5)))
        print(sorted((await shop.files.read("visits.txt")).text.split()))


asyncio.run(main())
"""


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    """A gateway whose tenant `shop` was deployed by the page's own example, of a folder `site`."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(shipped("deploy/templates") / "static", folder / "site")
    (folder / "site" / "package.json").write_text('{"scripts": {"build": "echo built"}}')
    async with hosting(incus_settings, folder / "state") as host:
        printed = await python(host, "client.deploy(", folder)
        assert "deployment.phase.finished verify" in printed
        assert re.search(r"^http://shop\.localhost:\d+ \d+$", printed, re.M), printed
        yield host


def example(word: str, page: Path = PAGE, language: str = "python") -> str:
    """Return the one example with `word` in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)
    (found,) = (block for block in blocks if word in block)
    return str(found)


async def python(host: Hosting, word: str, folder: Path, more: str = "", **environment: str) -> str:
    """Run an example, for this gateway instead of the page's, and return what it printed."""
    program = (example(word) + more).replace(ADDRESS, host.url)
    token = host.gateway.token("shop")
    return await run(sys.executable, "-c", program, cwd=folder, TOKEN=token, **environment)


async def test_tools_and_commands(host: Hosting, tmp_path: Path) -> None:
    printed = await python(host, 'shop.exec("bun run build")', tmp_path)
    assert "src/App.tsx:1:export default" in printed
    assert "stdout b'built\\n'" in printed and "Exit(code=0" in printed


async def test_without_asyncio(host: Hosting, tmp_path: Path) -> None:
    await python(host, 'shop.exec("bun run build")', tmp_path)
    printed = await python(host, 'shop.exec("bun install")', tmp_path)
    assert printed.startswith("1\texport default") and "Exit(code=0" in printed


async def test_a_turn_that_is_shown_and_taken_back(host: Hosting, tmp_path: Path) -> None:
    red = "h1 { color: red }\n"
    async with host.gateway.wire("shop") as wire:
        written = {"file_path": "src/style.css", "content": red}
        assert not (await wire.call("tools/call", name="Write", arguments=written))["isError"]
        await wire.call("turn/end")
    printed = await python(host, "begin_turn", tmp_path)
    assert "\n-h1 { color: red }\n+h1 { color: green }\n" in printed
    async with host.gateway.http("shop") as http:
        assert await (await http.get("/v1/tenants/shop/files/src/style.css")).text() == red


@pytest.mark.parametrize("word", ['session="tester"', "on_change=changed"])
async def test_what_only_makes_a_client(host: Hosting, tmp_path: Path, word: str) -> None:
    assert await python(host, word, tmp_path) == ""


async def test_a_token_that_is_read_when_it_is_needed(host: Hosting, tmp_path: Path) -> None:
    """It runs for longer than any of the tokens lives that lie there meanwhile."""
    newer, running = tmp_path / "new", None
    while running is None or not (await asyncio.wait({running}, timeout=1))[0]:
        newer.write_text(host.gateway.token("shop", ttl=4) + "\n")
        newer.replace(tmp_path / "token")
        running = running or asyncio.create_task(python(host, "token=Path(", tmp_path))
    assert await running == "done\n"


async def test_a_conflict_is_met_by_trying_again(host: Hosting, tmp_path: Path) -> None:
    printed = await python(host, "except Conflict", tmp_path, SAVE)
    assert printed == "['0', '1', '2', '3', '4']\n"


async def test_the_agent_sdk(host: Hosting, tmp_path: Path) -> None:
    write = use("Write", file_path="blue.css", content="h1 { color: blue }\n")
    look = use("Bash", command="cat blue.css")
    async with model([write], [look]) as scripted:
        printed = await python(host, "on_output=show", tmp_path, **scripted.environment(tmp_path))
        assert scripted.result(look).text == "h1 { color: blue }"
    assert "h1 { color: blue }\n" in printed, "output while it runs"


async def test_the_messages_api(host: Hosting, tmp_path: Path) -> None:
    create = use(
        "str_replace_based_edit_tool",
        command="create",
        path="/srv/site/red.css",
        file_text="h1 { color: red }",
    )
    look = use("bash", command="cat red.css")
    async with model([create], [look]) as scripted:
        printed = await python(host, "AsyncAnthropic", tmp_path, **scripted.environment(tmp_path))
        assert "h1 { color: red }" in scripted.result(look).text
    assert "done" in printed


async def test_who_decides_what_an_agent_may_do(host: Hosting, tmp_path: Path) -> None:
    """The person says no to the first question and yes to the second; a git command is none."""
    pushed, listed = use("Bash", command="git push origin"), use("Bash", command="git --version")
    refused, allowed = use("Bash", command="touch refused"), use("Bash", command="ls; echo asked")
    async with model([pushed], [listed], [refused], [allowed]) as scripted:
        shown = {"TOKEN": host.gateway.token("shop"), **scripted.environment(tmp_path)}
        program = example("PermissionResultDeny").replace(ADDRESS, host.url)
        program = f"import io, sys\nsys.stdin = io.StringIO('n\\ny\\n')\n{program}"
        printed = await run(sys.executable, "-c", program, cwd=tmp_path, **shown)
        said = [scripted.result(one).text for one in (pushed, listed, refused, allowed)]
    assert printed.count("[y/n]") == 2
    assert "has been denied" in said[0] and said[1].startswith("git version")
    assert said[2] == "The person said no." and said[3].endswith("asked") and "refused" not in said[3]


# --- the cookbook's programs, and those to copy ---------------------------------------------------------

FOUND = {
    page.name: re.findall(r"^```python(?: title=\S+)?\n(.*?)^```$", page.read_text(), re.M | re.S)
    for page in (PAGE.with_name("cookbook.md"), PAGE.with_name("start") / "python-agent.md")
}
WORK, SHOW, TAKE_BACK, PUBLISH, FOLLOW, SLEEP = FOUND["cookbook.md"]
(COPIED,) = FOUND["python-agent.md"]


async def copied(host: Hosting, folder: Path, program: str, *words: str, **environment: str) -> str:
    token = host.gateway.token("shop", "www-shop-localhost", domains=("www.shop.localhost",))
    where = {"GATEWAY_URL": host.url, "GATEWAY_TOKEN": token}
    return await run(sys.executable, "-c", program, *words, cwd=folder, **where, **environment)


async def test_an_agent_works_is_shown_and_is_taken_back(host: Hosting, tmp_path: Path) -> None:
    write = use("Write", file_path="hours.html", content="<h1>9 to 17</h1>\n")
    said = use("Bash", command="echo opened")
    watching = tmp_path / "watching"
    # the page's program follows for ever: it is ended once it has shown this test's turn
    follow = SHOW.replace("asyncio.run(main())", "asyncio.run(asyncio.wait_for(main(), 60))")
    shows = """print("turn", event.data["turn"], event.data["title"])\n"""
    assert follow.count(shows) == 1
    shown_it = 'if event.data["title"].startswith("Add a page"): raise SystemExit'
    follow = follow.replace(shows, f"{shows}{' ' * 24}{shown_it}\n")
    follow = follow.replace(
        "as events:\n", f"as events:\n            open({str(watching)!r}, 'w').close()\n", 1
    )
    showing = asyncio.create_task(copied(host, tmp_path, follow))
    await until(lambda: watching.exists() or showing.done(), 60)
    async with model([write], [said]) as scripted:
        printed = await copied(host, tmp_path, WORK, **scripted.environment(tmp_path))
        assert re.search(r"^[0-9a-f]{40}$", printed, re.M), printed
    shown = await showing
    assert "stdout opened" in shown and "tool.started Write" in shown
    assert re.search("turn [0-9a-f]{40} Add a page", shown), shown
    taken = await copied(host, tmp_path, TAKE_BACK)
    assert re.search(r"^[0-9a-f]{8} Claude Add a page", taken, re.M), taken
    async with host.gateway.http("shop") as http:
        assert (await http.get("/v1/tenants/shop/files/hours.html")).status == 404


async def test_an_agent_to_copy(host: Hosting, tmp_path: Path) -> None:
    async with model([use("Write", file_path="blue.css", content="h1 { color: blue }")]) as scripted:
        printed = await copied(host, tmp_path, COPIED, **scripted.environment(tmp_path))
    assert "'title': 'Make the heading blue'" in printed.splitlines()[-1], printed


async def test_a_site_is_published_followed_and_put_to_sleep(host: Hosting, tmp_path: Path) -> None:
    domain = "www.shop.localhost"
    printed = await copied(host, tmp_path, PUBLISH.replace("www.shop.example.com", domain))
    assert re.search(rf"^http://{re.escape(domain)}:\d+$", printed, re.M), printed
    async with host.gateway.http("www-shop-localhost") as http:
        listed = await (await http.get("/v1/tenants/www-shop-localhost/deployments")).json()
    followed = await copied(host, tmp_path, FOLLOW, listed["deployments"][0]["id"])
    assert "deployment.succeeded" in followed
    await copied(host, tmp_path, SLEEP)
    async with host.gateway.http("shop") as http:
        assert (await (await http.get("/v1/tenants/shop")).json())["status"] in ("stopped", "running")


def test_every_program_is_run() -> None:
    """A new one needs its test: what is only compiled does not show that it works."""
    assert {name: len(programs) for name, programs in FOUND.items()} == {
        "cookbook.md": 6,
        "python-agent.md": 1,
    }
    assert len(re.findall("^```python", PAGE.read_text(), re.M)) == 11
    assert len(re.findall("^```python", README.read_text(), re.M)) == 2


def test_the_line_for_claude_code_is_the_readmes() -> None:
    """Which tests/integration/test_readme.py runs."""
    words = [example("claude mcp add", page, "sh").split() for page in (PAGE, README)]
    line, readmes = (" ".join(found[found.index("claude") :]) for found in words)
    assert line.startswith("claude mcp add --transport http")
    assert line.replace("shop", "demo").split("--header")[0] == readmes.split("--header")[0]
