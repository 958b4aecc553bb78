"""Two files side by side: tabs are dragged from one place to the other, or moved by keys."""

from __future__ import annotations

import pytest
from playwright.async_api import Locator, expect

from tests.e2e.conftest import OpenEditor
from tests.e2e.editor import Editor, violations
from tests.e2e.test_editor import tool
from tests.integration.sites import Hosting


@pytest.fixture(scope="module")
def site(desk: str) -> str:
    return desk


async def window_with(editor: OpenEditor, *names: str) -> Editor:
    window = await editor()
    await window.load_connected()
    for name in names:
        await window.open_file(name)
    return window


def pane(window: Editor, number: int) -> Locator:
    return window.page.locator(".panes .pane").nth(number)


async def shows(window: Editor, *paths: str) -> None:
    """Wait until the panes show these files, and no other pane is there."""
    await expect(window.page.locator(".panes .pane")).to_have_count(len(paths))
    for number, path in enumerate(paths):
        await expect(pane(window, number).locator(f'.cm-content[aria-label="{path}"]')).to_be_visible()


async def test_a_tab_is_dragged_to_the_other_pane_and_back(editor: OpenEditor) -> None:
    window = await window_with(editor, "src/one.css", "src/two.css", "serve.ts")
    page = window.page
    await shows(window, "serve.ts")

    # to the right half of what is one pane yet, which shows where it would go
    box = await pane(window, 0).bounding_box()
    assert box is not None
    await window.tab("one.css").hover()
    await page.mouse.down()
    for part in (0.6, 0.75):
        await page.mouse.move(box["x"] + box["width"] * part, box["y"] + box["height"] / 2)
    await expect(pane(window, 0)).to_have_attribute("data-taking", "half")
    await page.mouse.up()
    await shows(window, "serve.ts", "src/one.css")
    await expect(page.locator("[data-taking]")).to_have_count(0)
    assert not await violations(page)

    await window.tab("two.css").drag_to(pane(window, 0))
    await shows(window, "src/two.css", "src/one.css")
    await window.tab("serve.ts").drag_to(pane(window, 1))
    await shows(window, "src/two.css", "serve.ts")
    await page.keyboard.type("// here")  # where the tab went
    await expect(pane(window, 1).locator(".cm-content")).to_contain_text("// here")
    await page.keyboard.press("Control+z")
    await window.tab("serve.ts").drag_to(pane(window, 0))
    await shows(window, "serve.ts")

    # what is dropped among the tabs changes their order
    tabs = page.get_by_role("tablist", name="Open files").get_by_role("tab").locator(".name")
    before = await tabs.all_text_contents()
    await window.tab(before[2]).drag_to(window.tab(before[0]))
    await expect(tabs).to_have_text([before[2], before[0], before[1]])
    await shows(window, "serve.ts")


async def test_a_tab_is_moved_to_the_other_pane_and_back_by_keys(editor: OpenEditor) -> None:
    window = await window_with(editor, "src/one.css", "src/two.css")
    page = window.page
    await page.keyboard.press("Control+Alt+b")
    await shows(window, "src/one.css", "src/two.css")
    await expect(pane(window, 1).locator(".cm-content")).to_be_focused()
    await page.keyboard.press("Alt+PageUp")
    await expect(pane(window, 0).locator(".cm-content")).to_be_focused()
    await page.keyboard.press("Control+Alt+b")  # both change places
    await shows(window, "src/two.css", "src/one.css")
    await expect(pane(window, 1).locator(".cm-content")).to_be_focused()
    await page.keyboard.press("Control+Alt+b")
    await shows(window, "src/one.css")
    await expect(pane(window, 0).locator(".cm-content")).to_be_focused()

    # by the tab's menu
    await window.tab("two.css").focus()
    await page.keyboard.press("Shift+F10")
    await page.get_by_role("menuitem", name="Open beside").press("Enter")
    await shows(window, "src/one.css", "src/two.css")
    await window.tab("two.css").focus()
    await page.keyboard.press("Shift+F10")
    await page.get_by_role("menuitem", name="Back to the others").press("Enter")
    await shows(window, "src/two.css")


async def test_who_types_is_not_led_into_a_file_that_an_agent_writes(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    """Its tab opens; it is shown once nobody types, and then without the focus."""

    async def write(name: str) -> None:
        await tool(host, site, "Write", file_path=f"/srv/site/src/{name}", content="/* an agent's */\n")
        await expect(window.tab(name)).to_be_visible()

    window = await window_with(editor, "src/one.css")
    page = window.page
    activity = await window.view("Activity")
    follow = activity.get_by_role("button", name="Follow")
    await follow.click()
    await window.text.click()
    await page.keyboard.press("Control+Home")
    await page.keyboard.type("/* half")
    await write("agent.css")
    await page.keyboard.type(" a word */")
    await shows(window, "src/one.css")
    await expect(window.text).to_contain_text("/* half a word */")
    await activity.get_by_role("button", name="Stop following").click()
    await follow.click()
    await write("other.css")
    await shows(window, "src/other.css")
    await expect(activity.get_by_role("button", name="Stop following")).to_be_focused()
    await page.keyboard.type("lost")
    await expect(window.text).to_have_text("/* an agent's */")
