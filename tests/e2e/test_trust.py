"""What the editor keeps when something goes wrong: unsaved text, open files, cursors, terminals."""

from __future__ import annotations

import asyncio
import contextlib

from playwright.async_api import Error, expect

from gateway_client import Client, Tenant
from gateway_client.errors import StaleRead
from tests.e2e.conftest import OpenEditor
from tests.e2e.editor import Editor
from tests.e2e.test_editor import run
from tests.integration import environment
from tests.integration.sites import Hosting

TEXT = "one\ntwo\nthree\nfour\n"


async def test_unsaved_text_survives_a_reload_a_rename_and_a_crash_and_takes_in_what_others_write(
    editor: OpenEditor, site: str
) -> None:
    run(site, f"printf '{TEXT}' >public/first.txt; printf '{TEXT}' >public/second.txt")
    window = await editor()
    await window.load_connected(f"{site}/public/first.txt")
    await window.open_file("public/second.txt")
    page = window.page
    await window.text.click()
    await page.keyboard.press("Control+Home")
    await page.keyboard.press("ArrowDown")
    await page.keyboard.type("unsaved ")
    await kept(window, "one\nunsaved two\nthree\nfour\n")  # until then the page asks before it is left
    await page.reload()
    await window.connected()
    await expect(window.text).to_contain_text("unsaved two")
    await expect(window.tab("first.txt")).to_be_visible()
    await expect(page.locator(".status-bar")).to_contain_text("Ln 2, Col 9")

    await window.row("second.txt").click()
    await page.get_by_role("tree").focus()
    await page.keyboard.press("F2")
    await page.keyboard.press("Control+a")
    await page.keyboard.type("renamed.md")
    await page.keyboard.press("Enter")
    await expect(window.tab("renamed.md")).to_be_visible()
    run(site, "sed -i s/four/theirs/ public/renamed.md")
    await expect(window.text).to_contain_text("theirs")
    await expect(window.text).to_contain_text("unsaved two")
    await expect(page.locator(".told")).to_have_count(0)

    await kept(window, "one\nunsaved two\nthree\ntheirs\n")
    crashed = page.wait_for_event("crash")
    protocol = await window.watched.context.new_cdp_session(page)
    crash = asyncio.ensure_future(protocol.send("Page.crash"))
    await crashed
    after = Editor(await window.watched.page(), window.watched, site)
    await after.load_connected()
    await expect(after.text).to_contain_text("unsaved two")
    await after.save()
    await expect(after.page.get_by_label("Close renamed.md", exact=True)).to_be_attached()
    assert run(site, "cat public/renamed.md; rm public/*.txt public/*.md") == (
        "one\nunsaved two\nthree\ntheirs\n"
    )
    crash.cancel()
    with contextlib.suppress(Error, asyncio.CancelledError):
        await crash


KEPT = """() => new Promise((resolve) => {
  const opened = indexedDB.open("gateway-editor", 1);
  opened.onsuccess = () => {
    const all = opened.result.transaction("drafts").objectStore("drafts").getAll();
    all.onsuccess = () => { opened.result.close(); resolve(all.result.map(({text}) => text)); };
  };
})"""


async def kept(window: Editor, text: str) -> None:
    """Wait until this unsaved text alone is where a crash leaves it."""

    async def there() -> None:
        assert await window.page.evaluate(KEPT) == [text]

    await window.until(there)


async def test_two_tabs_edit_one_file_and_neither_loses_a_word(editor: OpenEditor, site: str) -> None:
    """What one saves arrives in the other; of lines that both changed the later one chooses."""
    run(site, f"printf '{TEXT}' >public/both.txt")
    first = await editor()
    second = Editor(await first.watched.page(), first.watched, site)
    for tab in (first, second):
        await tab.load_connected(f"{site}/public/both.txt")
        await expect(tab.text).to_contain_text("four")

    async def types(tab: Editor, words: str, *keys: str) -> None:
        await tab.page.bring_to_front()
        await tab.text.click()
        for key in keys:
            await tab.page.keyboard.press(key)
        await tab.page.keyboard.type(words)

    async def holds(text: str) -> None:
        async def saved() -> None:
            assert run(site, "cat public/both.txt") == text

        await first.until(saved)

    await types(second, "below ", "Control+End", "ArrowUp")
    await types(first, "above ", "Control+Home")
    await first.save()
    await holds("above one\ntwo\nthree\nfour\n")
    await expect(second.text).to_contain_text("above one")
    await expect(second.text).to_contain_text("below four")
    await second.save()
    await holds("above one\ntwo\nthree\nbelow four\n")
    await expect(first.text).to_contain_text("below four")

    await types(second, "of the second ", "Control+Home")
    await types(first, "of the first ", "Control+Home")
    await first.save()
    await holds("of the first above one\ntwo\nthree\nbelow four\n")
    await expect(second.page.get_by_role("button", name="Compare and choose")).to_be_visible()
    await second.page.bring_to_front()
    await second.save()
    dialog = second.page.get_by_role("dialog", name="Conflict in both.txt")
    await expect(dialog.get_by_label("Theirs, as the file is now")).to_contain_text("of the first above one")
    await expect(dialog.get_by_label("Mine, to be saved")).to_contain_text("of the second above one")
    assert run(site, "head -1 public/both.txt").startswith("of the first"), "nothing is overwritten unasked"
    await dialog.get_by_role("button", name="Save mine").click()
    await holds("of the second above one\ntwo\nthree\nbelow four\n")
    await expect(first.text).to_contain_text("of the second above one")
    run(site, "rm public/both.txt")


SHARED = "# ann\n# bob\n# agent\n# end\n"


async def test_two_people_and_an_agent_in_one_file_see_one_anothers_changes(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    """All three write at the same time, each in a part of its own: no word is lost, and nobody is asked.

    Then two write the same words in the same place, which is no conflict, and other words, which is one.
    """
    run(site, f"printf '{SHARED}' >public/shared.txt")
    ann, bob = [await editor() for _ in range(2)]  # two browsers
    for window in (ann, bob):
        await window.load_connected(f"{site}/public/shared.txt")
        await expect(window.text).to_contain_text("# end")
    rounds = range(6)

    async def person(window: Editor, name: str, down: int) -> None:
        """Write words before the heading that follows the own one, and save each."""
        keys = window.page.keyboard
        await window.text.click()
        await keys.press("Control+Home")
        for _ in range(down):
            await keys.press("ArrowDown")
        await keys.press("End")
        for number in rounds:
            await keys.type(f" {name}-{number}")
            await window.save()

    async def agent(tenant: Tenant) -> None:
        for number in rounds:
            while True:  # as a model does: what was written in between has to be read before
                await tenant.read("public/shared.txt")
                try:
                    await tenant.edit("public/shared.txt", "\n# end", f" agent-{number}\n# end")
                    break
                except StaleRead:
                    continue

    words = {name: "".join(f" {name}-{number}" for number in rounds) for name in ("ann", "bob", "agent")}
    whole = f"# ann{words['ann']}\n# bob{words['bob']}\n# agent{words['agent']}\n# end\n"
    async with Client(url=host.url, token=host.gateway.token(site)) as client:
        tenant = client.tenant(site)
        await asyncio.gather(person(ann, "ann", 0), person(bob, "bob", 1), agent(tenant))

        async def saved() -> None:
            assert run(site, "cat public/shared.txt") == whole

        await ann.until(saved)
        for window in (ann, bob):
            await expect(window.text.locator(".cm-line")).to_have_text([*whole.split("\n")])
            await expect(window.page.get_by_label("Close shared.txt", exact=True)).to_be_attached()
            await expect(window.page.locator(".told, .toast.error")).to_have_count(0)
            # the lines of the two others
            await expect(window.page.locator(".cm-theirs-gutter .cm-theirs")).to_have_count(2)

        choose = "Compare and choose"
        await end_with(ann, "the same")
        await tenant.read("public/shared.txt")
        await tenant.edit("public/shared.txt", "# end\n", "# end\nthe same")
        await expect(bob.text).to_contain_text("the same")
        await ann.save()
        await expect(ann.page.get_by_label("Close shared.txt", exact=True)).to_be_attached()
        await expect(ann.page.get_by_role("button", name=choose)).to_have_count(0)

        await end_with(ann, ", says ann")
        await tenant.read("public/shared.txt")
        await tenant.edit("public/shared.txt", "the same", "the same, says an agent")
        await expect(ann.page.get_by_role("button", name=choose)).to_be_visible()
        await expect(bob.text).to_contain_text("says an agent")
        await expect(bob.page.get_by_role("button", name=choose)).to_have_count(0)
    run(site, "rm public/shared.txt")


async def end_with(window: Editor, words: str) -> None:
    await window.text.click()
    await window.page.keyboard.press("Control+End")
    await window.page.keyboard.type(words)


async def test_a_stopped_tenant_offers_to_start_and_its_terminals_come_back(
    editor: OpenEditor, site: str
) -> None:
    window = await editor()
    await window.load_connected()
    await window.prompt()
    await window.command("echo before the stop")
    environment.incus("stop", site, "--force")
    start = window.page.get_by_role("button", name="Start it")
    await expect(start).to_be_visible()
    await start.click()
    await expect(start).to_have_count(0)
    await window.prompt_after("Enter starts a new shell")
    await window.command("echo after $((1 + 1)) starts")
    await expect(window.screen).to_contain_text("after 2 starts")
