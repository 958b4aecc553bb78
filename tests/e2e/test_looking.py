"""How files look: as one likes, and as the pages and pictures that they are."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import expect

from tests.e2e.conftest import OpenEditor
from tests.e2e.editor import Editor, violations
from tests.e2e.test_editor import run

# of 2 × 2 pixels
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAAAAABX3VL4AAAAC0lEQVR4nGNgAAEAAAYAAf6MZ8gAAAAASUVORK5CYII="


@pytest.fixture(scope="module")
def site(desk: str) -> str:
    return desk


async def opened(editor: OpenEditor, desk: str, *names: str) -> Editor:
    window = await editor()
    await window.load_connected(desk)
    for name in names:
        await window.open_file(name)
    return window


async def test_text_is_looked_at_as_a_page_and_as_a_picture(editor: OpenEditor, desk: str) -> None:
    """Which follows what others write."""
    window = await opened(editor, desk, "README.md")
    page = window.page
    await page.get_by_role("button", name="Preview", exact=True).click()
    look = page.get_by_role("region", name="Preview of README.md")
    await expect(look.get_by_role("heading", name="Desk")).to_be_visible()
    await expect(look.locator("em")).to_have_text("somebody else")
    await expect(look.get_by_role("cell")).to_have_text(["1", "2"])
    assert not await violations(page)
    run(desk, "sed -i 's/somebody else/an agent/' README.md")
    await expect(look.locator("em")).to_have_text("an agent")
    await page.get_by_role("button", name="Text", exact=True).click()
    await expect(window.text).to_contain_text("an agent")

    # made to be slow: a single line of 80 KB, which is neither parsed nor wrapped for long
    run(desk, """printf '[a](%.0s' $(seq 20000) >slow.md""")
    await window.open_file("slow.md")
    await expect(window.text).to_contain_text("[a](")
    await page.get_by_role("button", name="Preview", exact=True).click()
    await expect(page.get_by_role("region", name="Preview of slow.md")).to_contain_text("[a](")
    run(desk, "rm slow.md")

    await window.open_file("logo.svg")
    await page.get_by_role("button", name="Preview", exact=True).click()
    picture = page.get_by_role("img", name="logo.svg")
    await expect(picture).to_be_visible()
    decoded = "(image) => image.decode().then(() => image.naturalWidth)"
    assert await picture.evaluate(decoded) > 0

    run(desk, f"echo {PNG} | base64 -d >dot.png")
    await window.row("dot.png").click()
    picture = page.get_by_role("img", name="dot.png")
    await expect(picture).to_be_visible()
    assert await picture.evaluate(decoded) == 2
    run(desk, "rm dot.png")


async def test_what_one_likes_holds_for_this_browser(editor: OpenEditor, desk: str) -> None:
    """The size of code, the width of a tab, wrapping, and saving by itself."""
    run(desk, f"printf '\\ta {'{ } ' * 200}' >src/liked.css")
    window = await opened(editor, desk, "src/liked.css")
    page = window.page
    await page.keyboard.press("Control+,")
    dialog = page.get_by_role("dialog", name="Settings")
    await dialog.get_by_label("Font size").select_option("18")
    await dialog.get_by_label("Width of a tab").select_option("8")
    await dialog.get_by_label("Wrap long lines").check()
    await dialog.get_by_label("Save automatically").check()
    await dialog.get_by_role("button", name="Done").click()

    async def liked() -> None:
        await expect(window.text).to_have_css("font-size", "18px")
        await expect(window.text).to_have_css("tab-size", "8")
        await expect(window.text).to_have_class(re.compile(r"\bcm-lineWrapping\b"))

    await liked()
    await window.text.click()
    await page.keyboard.press("Control+Home")
    await page.keyboard.type("saved ")

    async def saved() -> None:
        assert run(desk, "cat src/liked.css").startswith("saved \ta")

    await window.until(saved)
    await page.reload()
    await window.connected()
    await liked()
    run(desk, "rm src/liked.css")
