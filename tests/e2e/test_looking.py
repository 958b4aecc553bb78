"""Files of a site that is not ours, looked at as pages and pictures."""

from __future__ import annotations

import pytest
from playwright.async_api import expect

from tests.e2e.conftest import OpenEditor
from tests.e2e.editor import Editor, violations
from tests.e2e.test_editor import run


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

    await window.open_file("logo.svg")
    await page.get_by_role("button", name="Preview", exact=True).click()
    picture = page.get_by_role("img", name="logo.svg")
    await expect(picture).to_be_visible()
    assert await picture.evaluate("(image) => image.decode().then(() => image.naturalWidth > 0)")
