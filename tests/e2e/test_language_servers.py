"""What language servers in the tenant add to the editor: the site's TypeScript, and one that is installed."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, Locator, expect

from tests.e2e.conftest import ADDRESS
from tests.e2e.editor import Editor, Watched, violations
from tests.e2e.test_editor import run
from tests.integration.sites import Hosting

GREET = """\
/** Says hello to somebody. */
export function greet(name: string): string {
  return `Hello ${name}`
}
"""
USE = 'import { greet } from "./greet"\n\nexport const said = greet("world")\n'
FOLDER = "/srv/site/src/checked"


@pytest.fixture(scope="module")
async def window(browser: Browser, host: Hosting, site: str) -> AsyncIterator[Editor]:
    """One page for all tests of this file, whose clock a test may put forward."""
    run(site, f"mkdir -p {FOLDER}; cd {FOLDER}; printf '%s' '{GREET}' >greet.ts; printf '%s' '{USE}' >use.ts")
    watched = Watched(f"http://{ADDRESS}:{host.settings.caddy_http}")
    await watched.open(browser, {})
    await watched.sign_in(host.gateway.token(site))
    window = Editor(await watched.page(), watched, site)
    await window.page.clock.install()
    await window.page.add_init_script("localStorage.setItem('gateway.previewOpen', 'false')")
    await window.load_connected(f"{site}/src/checked/use.ts")
    await expect(window.text).to_contain_text("greet")
    yield window
    await watched.close()
    run(site, f"rm -rf {FOLDER}")
    assert not watched.complaints, "\n".join(watched.complaints)


def server(window: Editor, name: str = "TypeScript") -> Locator:
    return window.page.locator(".status-bar .server").filter(has_text=name)


async def running(window: Editor, name: str = "TypeScript") -> None:
    """Wait until a server runs; the status bar says what memory it takes."""
    await expect(server(window, name)).to_have_text(re.compile(rf"^{name} \d+ MB$"))


def marked(window: Editor) -> Locator:
    return window.page.locator(".cm-lintRange-error")


def word(window: Editor, text: str) -> Locator:
    """The last place of a word in the text."""
    return window.text.locator("span").filter(has_text=re.compile(rf"^{text}$")).last


async def test_a_type_error_is_underlined_and_said_and_goes_once_the_file_it_is_about_is_changed(
    window: Editor, site: str
) -> None:
    await running(window)
    await expect(marked(window)).to_have_count(0)
    try:
        run(site, f"sed -i 's/name: string/name: number/' {FOLDER}/greet.ts")
        await expect(marked(window)).to_have_text('"world"')

        async def told() -> None:
            """A tooltip goes whenever the server has looked at the text again."""
            await window.page.mouse.move(0, 0)
            await marked(window).hover()
            tip = window.page.locator(".cm-tooltip-lint")
            await expect(tip).to_contain_text("not assignable to parameter of type 'number'", timeout=2000)

        await window.until(told)
        assert not await violations(window.page)
    finally:
        run(site, f"sed -i 's/name: number/name: string/' {FOLDER}/greet.ts")
    await expect(marked(window)).to_have_count(0)


async def test_completions_come_as_one_types_with_what_they_are(window: Editor) -> None:
    await window.text.click()
    await window.page.keyboard.press("Control+End")
    await window.page.keyboard.type("said.toUpp")
    choice = window.page.get_by_role("option", name="toUpperCase")
    await expect(choice).to_be_visible()
    await expect(window.page.locator(".cm-completionInfo")).to_contain_text("uppercase")
    assert not await violations(window.page)
    await window.page.keyboard.press("Enter")
    await expect(window.text).to_contain_text("said.toUpperCase")
    await window.page.keyboard.press("Control+z")
    await window.page.keyboard.press("Control+z")


async def test_hover_tells_of_a_name_and_its_definition_is_a_key_away_in_another_file(window: Editor) -> None:
    told = window.page.locator(".told-of-code")

    async def hovered() -> None:
        await window.page.mouse.move(0, 0)
        await word(window, "greet").hover()
        await expect(told).to_contain_text("function greet(name: string): string", timeout=2000)

    await window.until(hovered)
    await expect(told).to_contain_text("Says hello to somebody.")
    await word(window, "greet").click()
    await window.page.keyboard.press("F12")
    await expect(
        window.page.locator('.editor .cm-content[aria-label="src/checked/greet.ts"]')
    ).to_be_visible()
    await expect(window.page.locator(".status-bar")).to_contain_text("Ln 2, Col 17")


async def test_a_name_is_renamed_in_two_files_and_saved_in_both(window: Editor, site: str) -> None:
    await window.page.keyboard.press("F2")
    field = window.page.get_by_label("New name")
    await expect(field).to_be_focused()
    await expect(field).to_have_value("greet")
    assert not await violations(window.page)
    await field.fill("welcome")
    await window.page.keyboard.press("Enter")
    await expect(window.page.get_by_text("Renamed in 2 files.")).to_be_visible()

    async def saved() -> None:
        assert "welcome(name: string)" in run(site, f"cat {FOLDER}/greet.ts")
        assert 'welcome("world")' in run(site, f"cat {FOLDER}/use.ts")

    await window.until(saved)


async def test_a_file_is_formatted_as_it_is_saved_if_one_likes_that(window: Editor, site: str) -> None:
    await window.page.keyboard.press("Control+,")
    await window.page.get_by_label("Format a file before it is saved").check()
    assert not await violations(window.page)
    await window.page.get_by_role("button", name="Done").click()
    await window.open_file("src/checked/use.ts")
    await window.text.click()
    await window.page.keyboard.press("Control+End")
    await window.page.keyboard.insert_text("export   const more={a:1}\n")
    await window.save()

    async def saved() -> None:
        assert "export const more = { a: 1 }\n" in run(site, f"cat {FOLDER}/use.ts")

    await window.until(saved)
    # by the site's own Prettier, once the site says how
    run(site, f"echo 'bracketSpacing: false' >{FOLDER}/.prettierrc")
    await window.page.keyboard.insert_text("const other={b:2}\n")
    await window.save()

    async def saved_by_prettier() -> None:
        said = run(site, f"cat {FOLDER}/use.ts")
        assert "export const more = {a: 1};\nconst other = {b: 2};\n" in said

    await window.until(saved_by_prettier)


async def like_keys(window: Editor, name: str) -> None:
    await window.page.keyboard.press("Control+,")
    await window.page.get_by_role("combobox", name="Keys").select_option(name)
    await window.page.get_by_role("button", name="Done").click()
    await window.text.click()


async def test_the_text_has_the_keys_of_vim_if_one_likes_them(window: Editor, site: str) -> None:
    await window.page.keyboard.press("Control+,")
    await window.page.get_by_label("Format a file before it is saved").uncheck()
    await window.page.get_by_role("button", name="Done").click()
    await like_keys(window, "vim")
    await expect(window.page.locator(".cm-vim-panel")).to_be_visible()
    assert not await violations(window.page)
    await window.page.keyboard.type("gg")
    await window.page.keyboard.type("O// by Vim")
    await window.page.keyboard.press("Escape")
    await window.page.keyboard.type(":w")
    await window.page.keyboard.press("Enter")

    async def saved_by_vim() -> None:
        assert run(site, f"head -1 {FOLDER}/use.ts") == "// by Vim\n"

    await window.until(saved_by_vim)
    await window.page.keyboard.type("dd:w")
    await window.page.keyboard.press("Enter")

    async def taken_out() -> None:
        assert run(site, f"head -1 {FOLDER}/use.ts").startswith("import {")

    await window.until(taken_out)
    await like_keys(window, "default")
    await expect(window.page.locator(".cm-vim-panel")).to_have_count(0)


async def test_a_server_that_is_killed_comes_back(window: Editor, site: str) -> None:
    before = run(site, "pgrep -f -- '--lsp --stdi[o]'")
    run(site, f"kill -9 {before}")
    await expect(server(window)).to_have_text("TypeScript starting again…")
    await running(window)
    after = run(site, "pgrep -f -- '--lsp --stdi[o]'")
    assert after != before
    await window.text.click()
    await window.page.keyboard.press("Control+End")
    await window.page.keyboard.insert_text("export const wrong: number = said\n")
    await expect(marked(window)).to_have_text("wrong")
    await window.page.keyboard.press("Control+z")
    await expect(marked(window)).to_have_count(0)


async def test_a_server_that_nobody_uses_for_five_minutes_ends_and_the_next_key_starts_it(
    window: Editor, site: str
) -> None:
    await window.page.clock.fast_forward("05:10")
    await expect(server(window)).to_have_text("TypeScript resting")

    async def gone() -> None:
        assert run(site, "pgrep -f -- '--lsp --stdi[o]' || :") == ""

    await window.until(gone)
    await window.page.keyboard.press("ArrowUp")
    await running(window)


async def test_a_server_that_the_site_lacks_is_installed_when_a_file_needs_it(window: Editor) -> None:
    """That of style sheets, by npm in the container."""
    await window.open_file("src/index.css")
    await running(window, "CSS")
    await window.text.click()
    await window.page.keyboard.press("Control+End")
    await window.page.keyboard.type("\n.a { colo")
    # once, though the editor itself knows it too
    await expect(window.page.get_by_role("option", name="color", exact=True)).to_have_count(1)
    await window.page.keyboard.press("Escape")
    await window.page.keyboard.press("Control+z")
