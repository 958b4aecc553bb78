"""Each view in a picture for the docs, and whether everybody can use it: roles, names, contrast."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Route, expect

from tests.e2e.conftest import TEMPLATES, OpenEditor
from tests.e2e.editor import DEADLINE, Editor, violations
from tests.e2e.test_editor import run, tool
from tests.e2e.test_sessions import token
from tests.integration.sites import Hosting


async def picture(window: Editor, folder: Path, name: str) -> None:
    """Take a picture of a view, and let axe-core look at it."""
    page = window.page
    await page.evaluate("document.fonts.ready.then(() => null)")
    await page.screenshot(path=folder / f"{name}.png", animations="disabled", caret="hide")
    found = await violations(page)
    assert not found, name + "\n" + "\n".join(found)


async def at_work(window: Editor, site: str) -> None:
    """Have a file, a terminal with something in it, and the site in view."""
    await window.load_connected(f"{site}/src/app.tsx")
    await expect(window.text).to_contain_text("lucide-react")
    await window.row("src").wait_for()
    await window.prompt()
    await window.command("clear; ls --color=always; cat /etc/os-release | head -3")
    await expect(window.screen).to_contain_text("PRETTY_NAME")


async def site_is_whole(window: Editor) -> None:
    """Wait until the preview shows what the site's API answers, too."""
    await window.site_shows("Your site is live.")
    await expect(window.site.get_by_text(re.compile(r"^Bun [\d.]+$"))).to_be_visible()


@pytest.mark.parametrize("scheme", ["dark", "light"])
async def test_the_editor_with_files_terminal_and_preview(
    editor: OpenEditor, site: str, pictures: Path, scheme: str
) -> None:
    window = await editor(whole=True, color_scheme=scheme)
    await at_work(window, site)
    await site_is_whole(window)
    await picture(window, pictures, f"editor-{scheme}")


async def test_a_conflict(editor: OpenEditor, host: Hosting, site: str, pictures: Path) -> None:
    before = run(site, "cat server/api.ts")
    window = await editor(whole=True)
    await window.load_connected(f"{site}/server/api.ts")
    await expect(window.text).to_contain_text("Hono")
    lines = before.splitlines(keepends=True)
    await window.replace_all("".join([lines[0], "// mine: say hello first\n", *lines[1:]]))
    theirs = "".join([lines[0], "// the agent: count the visits\n", *lines[1:]])
    await tool(host, site, "Write", file_path="/srv/site/server/api.ts", content=theirs)
    await site_is_whole(window)  # beside the dialog
    await window.page.get_by_role("button", name="Compare and choose").click()
    await expect(window.page.get_by_label("Mine, to be saved")).to_contain_text("say hello")
    await picture(window, pictures, "conflict")
    await window.page.get_by_role("button", name="Take theirs").click()
    await tool(host, site, "Write", file_path="/srv/site/server/api.ts", content=before)


async def test_views_at_the_side(editor: OpenEditor, host: Hosting, site: str, pictures: Path) -> None:
    """Activity with an agent at work, its history, a deployment, metrics and the log, search, the palette."""
    window = await editor(whole=True)
    _, said, _ = await host.call("GET", "/v1/templates")
    shown = [one for one in said["templates"] if one["name"] not in TEMPLATES]  # not those for tests alone

    async def templates(route: Route) -> None:
        await route.fulfill(json={**said, "templates": shown})

    await window.page.route("**/v1/templates", templates)
    await at_work(window, site)
    side = await window.view("Activity")
    await tool(host, site, "Glob", pattern="src/**/*.tsx")
    await tool(host, site, "Read", file_path="/srv/site/src/app.tsx")
    await tool(host, site, "Grep", pattern="useState")
    command = "until [ -e /tmp/go ]; do sleep 0.1; done; bun test"
    bash = asyncio.create_task(tool(host, site, "Bash", command=command))
    running = side.get_by_role("button").filter(has_text="until [ -e").get_by_label("Running")
    await expect(running).to_be_visible()
    await site_is_whole(window)
    await picture(window, pictures, "activity")
    run(site, "touch /tmp/go")
    await asyncio.gather(bash, return_exceptions=True)  # there are no tests to run

    side = await window.view("History")
    turn = f"/v1/tenants/{site}/turn"
    await host.call("POST", turn, {"title": "Say hello on the page", "agent": "Claude"})
    await tool(host, site, "Write", file_path="/srv/site/public/hello.txt", content="hello\n")
    await host.call("DELETE", turn)
    await side.get_by_role("button").filter(has_text="Say hello").click()
    await expect(side.get_by_label("What changed")).to_contain_text("+hello")
    await picture(window, pictures, "history")
    await side.get_by_role("button", name="Open as a diff").click()
    dialog = window.page.get_by_role("dialog", name="Turn: Say hello on the page")
    await expect(dialog.get_by_role("article", name="public/hello.txt")).to_contain_text("hello")
    await picture(window, pictures, "turn")
    await window.page.keyboard.press("Escape")

    side = await window.view("Deploy")
    await side.get_by_placeholder("shop.example.com").fill("blog.localhost")
    await side.get_by_role("radio", name="static").check()
    await side.get_by_role("button", name="Deploy", exact=True).click()
    card = side.get_by_role("article", name="Deployment of blog.localhost")
    await expect(card.get_by_text("Live")).to_be_visible(timeout=2 * DEADLINE)
    await expect(side.get_by_label("This site").get_by_role("listitem").first).to_contain_text("Live")
    await picture(window, pictures, "deploy")

    side = await window.view("Metrics and logs")
    await expect(side.get_by_role("log")).to_contain_text("5173")
    # each line is drawn from a sample every two seconds
    drawn = side.locator(".chart").first.locator("polyline")
    await expect(drawn).to_have_attribute("points", re.compile(r"(\S+ ){4}"), timeout=2 * DEADLINE)
    await picture(window, pictures, "metrics")

    side = await window.view("Search")
    await side.get_by_label("Search all files").fill("className")
    await expect(side.locator(".found-line").first).to_be_visible()
    await picture(window, pictures, "search")
    await window.page.keyboard.press("Control+Shift+p")
    await expect(window.page.get_by_role("option").first).to_be_visible()
    await picture(window, pictures, "palette")
    await window.page.keyboard.press("Escape")
    await window.page.keyboard.press("Control+,")
    await expect(window.page.get_by_role("dialog", name="Settings")).to_be_visible()
    await picture(window, pictures, "settings")
    await window.page.keyboard.press("Escape")
    await window.row_menu("src")
    await picture(window, pictures, "menu")


async def test_each_view_in_light_colours(editor: OpenEditor, site: str) -> None:
    """And what opens in them: all parts of a site, the question before a file is deleted, finding."""
    window = await editor(color_scheme="light")
    await at_work(window, site)
    page = window.page
    views = page.get_by_role("navigation", name="Views").locator("[aria-pressed]")
    names = [await view.get_attribute("aria-label") for view in await views.all()]
    assert {"Agent", "Files", "Search", "Activity", "History", "Deploy", "Metrics and logs"} <= {*names}
    for name in names:
        if name == "Terminals":
            continue
        side = await window.view(str(name))
        if name == "Deploy":
            await expect(side.get_by_label("This site").get_by_role("listitem").first).to_contain_text("Live")
            for part in await side.locator("details > summary").all():
                if not await part.evaluate("summary => summary.parentElement.open"):
                    await part.click()
        assert not await violations(page), name
    await window.row_menu("package.json")
    await page.get_by_role("menuitem", name="Delete").click()
    await expect(page.get_by_role("dialog", name="Delete package.json")).to_be_visible()
    assert not await violations(page), "before a file is deleted"
    await page.get_by_role("button", name="Cancel", exact=True).click()
    await window.text.click()
    await page.keyboard.press("Control+f")
    await expect(page.get_by_role("search")).to_be_visible()
    assert not await violations(page), "finding in a file"
    await page.keyboard.press("Control+p")
    await expect(page.get_by_role("option").first).to_be_visible()
    assert not await violations(page), "finding a file"


async def test_on_a_phone(editor: OpenEditor, host: Hosting, site: str, pictures: Path) -> None:
    size: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}
    window = await editor(whole=True, **size, has_touch=True, is_mobile=True)
    await window.load_connected()
    await window.page.get_by_role("button", name="Activity").click()
    await tool(host, site, "Read", file_path="/srv/site/package.json")
    await expect(window.page.get_by_role("log")).to_contain_text("package.json")
    await picture(window, pictures, "phone")
    await window.page.get_by_role("button", name="Terminal", exact=True).click()
    await window.prompt()
    await window.page.get_by_role("toolbar", name="Keys").get_by_role("button", name="Ctrl").click()
    await picture(window, pictures, "phone-terminal")
    places = window.page.get_by_role("navigation", name="Views").get_by_role("button")
    names = await places.all_inner_texts()
    assert {"Agent", "Files", "Editor", "Preview", "Metrics"} <= {*names}
    for name in names:
        await places.filter(has_text=name).click()
        if name == "Files":
            await window.row("package.json").click()  # which shows it in the editor
            await expect(window.text).to_contain_text("dependencies")
            await places.filter(has_text=name).click()
        if name == "Preview":
            await window.site_shows("Your site is live.")
        assert not await violations(window.page), name
        wide = await window.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390, f"nothing sticks out at the side of {name}"


async def test_at_1024_pixels(editor: OpenEditor, site: str, pictures: Path) -> None:
    window = await editor(whole=True, viewport={"width": 1024, "height": 768})
    await at_work(window, site)
    await picture(window, pictures, "narrow")


_SHAPES: dict[str, dict[str, Any]] = {
    "dark": {"color_scheme": "dark"},
    "light": {"color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}


@pytest.mark.parametrize("shape", ["dark", "light", "phone"])
async def test_what_is_asked_of_a_session(
    editor: OpenEditor, site: str, pictures: Path, tmp_path: Path, shape: str
) -> None:
    """The question of a link, that before a stop, and the end of the session."""
    window = await editor(whole=True, signed_in=False, **_SHAPES[shape])
    window.watched.expected.append("401")
    page = window.page

    async def fits(name: str) -> None:
        shown = shape == "dark" and name in ("asked", "session-ended")  # in docs/editor.md
        await picture(window, pictures if shown else tmp_path, f"{name}-{shape}")
        wide = await page.evaluate("document.documentElement.scrollWidth")
        assert wide <= page.viewport_size["width"]  # type: ignore[index]  # it has one

    await window.load(f"token={token(site)}&tenant={site}")
    await window.connected()
    await page.evaluate(f"location.hash = 'token={token('blog', subject='mallory')}&tenant=blog'")
    await expect(page.get_by_role("dialog", name="Another sign-in")).to_be_visible()
    await fits("asked")
    await page.keyboard.press("Escape")
    if shape == "phone":
        await page.get_by_role("navigation", name="Views").get_by_role("button", name="Metrics").click()
    else:
        await window.view("Metrics and logs")
    await page.get_by_role("button", name="Stop the tenant").click()
    await expect(page.get_by_role("list", name="What ends")).to_be_visible()
    await fits("stop")
    await page.keyboard.press("Escape")
    await page.evaluate(f"location.hash = 'token={token(site, ttl=11)}&tenant={site}'")
    await expect(page.get_by_label("New access token")).to_be_visible()
    await fits("session-ends")
    await expect(page.get_by_role("dialog", name="The session has ended")).to_be_visible()
    await window.connection("Signed out")
    await fits("session-ended")


async def test_signing_in(editor: OpenEditor, pictures: Path) -> None:
    window = await editor(whole=True, signed_in=False)
    window.watched.expected.append("401")
    await window.load("")
    await expect(window.page.get_by_label("Access token")).to_be_focused()
    await picture(window, pictures, "sign-in")
