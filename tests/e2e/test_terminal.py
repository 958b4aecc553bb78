"""The terminal as one works in it all day: links, wide characters, a phone's keys."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.async_api import expect

from tests.e2e.conftest import OpenEditor
from tests.e2e.editor import Editor, violations
from tests.integration.sites import Hosting

# as a program that draws asks where it is
COLUMN = (
    r"""bash -c "printf '\U1F44D'; IFS='[;' read -sdR -p $'\e[6n' _ row col; echo; echo stands in \$col" """
)


@pytest.fixture(scope="module")
def site(desk: str) -> str:
    return desk


async def at_prompt(editor: OpenEditor, **window: Any) -> Editor:
    made = await editor(**window)
    await made.load_connected()
    await made.prompt()
    return made


async def test_a_link_opens_and_an_emoji_takes_two_cells(editor: OpenEditor, host: Hosting) -> None:
    address = f"http://desk.localhost:{host.settings.caddy_http}/deep/link"
    window = await at_prompt(editor)
    await window.command(COLUMN)
    await expect(window.screen).to_contain_text("stands in 3")
    await window.command(f"clear; echo; echo {address.replace('//', chr(39) * 2 + '//')}")
    row = window.screen.locator("> div").filter(has_text=re.compile(f"^{re.escape(address)}"))
    await expect(row).to_be_visible()
    box = await row.bounding_box()
    assert box is not None
    async with window.page.expect_popup() as opened:
        await window.page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2)
        await window.page.mouse.move(box["x"] + 62, box["y"] + box["height"] / 2)
        await window.page.mouse.click(box["x"] + 62, box["y"] + box["height"] / 2)
    await (await opened.value).wait_for_url(address)


async def test_what_is_searched_and_found_is_copied(editor: OpenEditor) -> None:
    """From the field of the search, and from the terminal once that is closed; programs notice nothing."""
    window = await at_prompt(editor, permissions=["clipboard-read", "clipboard-write"])
    page = window.page
    await window.command("trap 'echo resized' WINCH; for n in $(seq 60); do echo line-$n; done; echo ready")
    await expect(window.screen).to_contain_text("ready")
    await page.evaluate("navigator.clipboard.writeText('nothing')")
    copied = "navigator.clipboard.readText()"

    await page.keyboard.press("Control+Shift+f")
    field = page.get_by_role("textbox", name="Search in the terminal")
    await expect(field).to_be_focused()
    await page.keyboard.type("line-7")
    await expect(window.screen).to_contain_text("line-7")
    assert not await violations(page)
    await page.keyboard.press("Control+Shift+c")
    assert await page.evaluate(copied) == "line-7"

    await page.keyboard.press("Control+a")
    await page.keyboard.type("line-1")
    await page.keyboard.press("Enter")
    await page.keyboard.press("Escape")
    await expect(field).to_have_count(0)
    await page.keyboard.press("Control+Shift+c")
    assert await page.evaluate(copied) == "line-1"
    await page.keyboard.type("echo pasted: ")
    await page.keyboard.press("Control+Shift+v")
    await page.keyboard.press("Enter")
    await expect(window.screen).to_contain_text("pasted: line-1")
    assert "resized" not in "".join(await window.screen_rows())


async def test_many_terminals_are_gone_through_by_keys_and_by_the_wheel(editor: OpenEditor) -> None:
    window = await at_prompt(editor, viewport={"width": 900, "height": 700})
    page = window.page
    strip = page.get_by_role("tablist", name="Terminals")
    tabs = strip.get_by_role("tab")
    keyboard = page.locator(".screen-host:not([hidden]) .xterm-helper-textarea")
    for _ in range(5):
        await page.keyboard.press("Control+Shift+Backquote")
    await expect(tabs).to_have_count(6)
    await expect(tabs.nth(5)).to_be_in_viewport(ratio=1)
    await expect(tabs.nth(0)).not_to_be_in_viewport()
    await strip.hover()
    await page.mouse.wheel(0, -2000)
    await expect(tabs.nth(0)).to_be_in_viewport(ratio=1)
    await expect(tabs.nth(5)).not_to_be_in_viewport()
    # who has scrolled away stays there when the strip gets smaller
    await page.set_viewport_size({"width": 860, "height": 700})
    await window.prompt()
    await expect(tabs.nth(0)).to_be_in_viewport(ratio=1)

    await expect(keyboard).to_be_focused()
    await page.keyboard.press("Alt+PageUp")
    await expect(tabs.nth(4)).to_have_attribute("aria-selected", "true")
    await expect(tabs.nth(4)).to_be_in_viewport(ratio=1)
    await expect(keyboard).to_be_focused()
    for number in (5, 0):
        await page.keyboard.press("Alt+PageDown")
        await expect(tabs.nth(number)).to_be_in_viewport(ratio=1)
        await expect(keyboard).to_be_focused()
    await window.prompt()

    await tabs.nth(0).focus()
    await page.keyboard.press("ArrowLeft")
    await expect(tabs.nth(5)).to_be_focused()
    await expect(tabs.nth(5)).to_be_in_viewport(ratio=1)
    await page.keyboard.press("Delete")
    await expect(tabs).to_have_count(5)
    await expect(tabs.nth(4)).to_be_focused()
    await expect(tabs.nth(4)).to_have_attribute("aria-selected", "true")
    await page.keyboard.press("Enter")
    await expect(keyboard).to_be_focused()


async def test_a_phone_has_the_keys_that_its_keyboard_lacks(editor: OpenEditor) -> None:
    size = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}
    window = await editor(**size, has_touch=True, is_mobile=True)
    await window.load_connected()
    page = window.page
    places = page.get_by_role("navigation", name="Views").get_by_role("button")
    await places.filter(has_text="Terminal").click()
    await window.prompt()
    keys = page.get_by_role("toolbar", name="Keys")
    # said by what Ctrl-C is for: while bash starts a command, neither may get the signal
    await window.command("sh -c 'printf \"it %s\\n\" sleeps; exec sleep 1000'")
    await expect(window.screen).to_contain_text("it sleeps")
    await keys.get_by_role("button", name="Ctrl").click()
    await page.keyboard.type("c")
    # at its prompt bash 5.2 takes letters within milliseconds of Ctrl-C for the line that this ends: on a pty
    # without anything of ours 17 of 20 lines lost some, and none with 10 ms between
    await window.prompt_after("^C")
    await window.command("echo interrupted $((3 * 3))")
    await expect(window.screen).to_contain_text("interrupted 9")
    await page.keyboard.type("cat packa")
    await keys.get_by_role("button", name="Tab").click()
    await expect(window.screen).to_contain_text("cat package.json")
    await keys.get_by_role("button", name="Ctrl").click()
    await page.keyboard.type("u")
    await keys.get_by_role("button", name="Up").click()
    for _ in "))":
        await keys.get_by_role("button", name="Left").click()
    await page.keyboard.type("4")
    await page.keyboard.press("Enter")
    await expect(window.screen).to_contain_text("interrupted 102")

    await places.filter(has_text="Files").click()
    await window.row("package.json").click()
    await expect(window.text).to_contain_text("scripts")
    save = page.get_by_role("button", name="Save", exact=True)
    await expect(save).to_have_count(0)
    await window.text.click()
    await page.keyboard.insert_text(" ")
    await expect(save).to_be_visible()
    await page.keyboard.press("Control+z")
    await expect(save).to_have_count(0)


async def test_a_terminal_that_is_loaded_again_types_nothing(editor: OpenEditor) -> None:
    """Programs asked it who and where it is, and in what colours: that is answered once."""
    window = await at_prompt(editor)
    asks = r"printf '\033[c\033[>c\033[6n\033]10;?\007\033]11;?\007\033[5n'"
    await window.command(f"{asks}; IFS= read -rsd n answers; clear; echo answered ${{#answers}}; cat -v")
    await expect(window.screen).to_contain_text(re.compile(r"answered [5-9]\d"))
    await window.page.reload()
    await window.connected()
    await expect(window.screen).to_contain_text("answered")
    await window.page.locator(".screen-host:not([hidden])").click()
    await window.command("typed")  # comes back by the terminal's echo, and by cat
    rows = [row for row in await window.screen_rows() if row]
    await window.until(lambda: same(window, [rows[0], "typed", "typed"]))


async def same(window: Editor, rows: list[str]) -> None:
    assert [row for row in await window.screen_rows() if row] == rows
