"""A working day in the editor within a few minutes: whatever happens meanwhile, no typed word is lost."""

from __future__ import annotations

import pytest
from playwright.async_api import Locator, expect

from tests.e2e.conftest import OpenEditor
from tests.e2e.editor import DEADLINE, Editor
from tests.e2e.test_editor import run
from tests.e2e.test_network import CUT
from tests.e2e.test_sessions import led_to, token
from tests.e2e.test_trust import KEPT
from tests.integration.sites import Hosting

FILES = 20
TEXT = "first\nsecond\nthird\n"
SERVE = (
    "bun -e 'Bun.serve({port: 8123, fetch: () => new Response(`served`)}); console.log(`it ${1 + 1} serves`)'"
)


@pytest.fixture
def site(desk: str) -> str:
    return desk


def path(number: int) -> str:
    return f"day/file-{number:02}.txt"


class Day:
    """A window on the files, and what each of them has to hold in the end."""

    def __init__(self, window: Editor, site: str) -> None:
        self.window = window
        self.site = site
        self.texts = {path(number): TEXT for number in range(FILES)}
        self.unsaved: set[str] = set()

    async def show(self, name: str) -> None:
        await self.window.tab(name.rpartition("/")[2]).click()
        await expect(self.window.page.locator(f'.editor .cm-content[aria-label="{name}"]')).to_be_visible()

    async def type(self, name: str, word: str, *, save: bool) -> None:
        """Write a word before the first line."""
        keys = self.window.page.keyboard
        await self.show(name)
        await self.window.text.click()
        await keys.press("Control+Home")
        await keys.type(word)
        self.texts[name] = word + self.texts[name]
        self.unsaved.add(name)
        if save:
            await self.window.save()
            await self.saved(name)

    async def saved(self, name: str) -> None:
        await expect(self.mark(name, unsaved=False)).to_be_attached()
        self.unsaved.discard(name)

    def mark(self, name: str, *, unsaved: bool) -> Locator:
        label = f"Close {name.rpartition('/')[2]}" + (", which has unsaved changes" if unsaved else "")
        return self.window.page.get_by_label(label, exact=True)

    async def kept(self) -> None:
        """Wait until all unsaved text is where it outlives the page."""
        texts = sorted(self.texts[name] for name in self.unsaved)

        async def there() -> None:
            assert sorted(await self.window.page.evaluate(KEPT)) == texts

        await self.window.until(there)

    async def whole(self) -> None:
        """See that each open file shows its text and says whether it is saved, and the others hold theirs."""
        for name, text in self.texts.items():
            await self.show(name)
            await expect(self.window.text.locator(".cm-line")).to_have_text(text.split("\n"))
            await expect(self.mark(name, unsaved=name in self.unsaved)).to_be_attached()
        await expect(self.window.page.locator(".told, .toast.error")).to_have_count(0)

    def on_disk(self) -> dict[str, str]:
        said = run(
            self.site, "cd day; for name in *; do printf '%s\\0' \"$name\"; cat $name; printf '\\0'; done"
        )
        words = said.split("\0")[:-1]
        return {f"day/{name}": text for name, text in zip(words[::2], words[1::2], strict=True)}


async def test_a_day_of_work_loses_no_word(editor: OpenEditor, host: Hosting, site: str) -> None:
    run(
        site,
        f"rm -rf day; mkdir day; cd day; for n in $(seq -w 0 {FILES - 1});"
        " do printf 'first\\nsecond\\nthird\\n' >file-$n.txt; done",
    )
    window = await editor(signed_in=False)
    window.watched.expected.extend([*CUT, "401"])
    page = window.page
    covered = (site, "day-localhost")  # what it is published to, too
    await window.load(f"token={token(*covered)}&tenant={site}")
    await window.connected()
    day = Day(window, site)
    for name in day.texts:
        await window.open_file(name)
    for number, name in enumerate(day.texts):
        await day.type(name, f"morning-{number} ", save=number % 2 == 0)
    assert len(day.unsaved) == FILES // 2

    # a file with unsaved text gets another name, and goes on under it
    await day.show(path(1))
    await page.keyboard.press("Control+Shift+p")
    await page.keyboard.type("show the file in the tree")
    await page.keyboard.press("Enter")
    await page.get_by_role("treeitem").filter(has_text="file-01.txt").click()
    await page.get_by_role("tree").focus()
    await page.keyboard.press("F2")
    await page.keyboard.press("Control+a")
    await page.keyboard.type("file-01-renamed.txt")
    await page.keyboard.press("Enter")
    await expect(window.tab("file-01-renamed.txt")).to_be_visible()
    texts = [
        ("day/file-01-renamed.txt" if name == path(1) else name, text) for name, text in day.texts.items()
    ]
    day.texts = dict(texts)
    day.unsaved = (day.unsaved - {path(1)}) | {"day/file-01-renamed.txt"}

    # a server in the terminal
    await window.prompt()
    await window.command(SERVE)
    await expect(window.screen).to_contain_text("it 2 serves")

    # an agent's turn, beside saved and unsaved text, and back
    async with host.gateway.wire(site) as wire:
        await wire.call("turn/begin", title="Write the third lines", agent="Claude")
        for name in (path(2), path(3)):
            given = {"file_path": name, "old_string": "third", "new_string": "third, by the agent"}
            await wire.call("tools/call", name="Read", arguments={"file_path": name})
            assert not (await wire.call("tools/call", name="Edit", arguments=given))["isError"]
        await wire.call("turn/end")
    before = dict(day.texts)
    for name in (path(2), path(3)):
        day.texts[name] = day.texts[name].replace("third", "third, by the agent")
        await day.show(name)
        await expect(window.text).to_contain_text("by the agent")
    history = await window.view("History")
    turn = history.get_by_role("listitem").filter(has_text="Write the third lines").first
    await turn.get_by_role("button").first.click()
    await turn.get_by_role("button", name="Undo this turn").click()
    await expect(history.get_by_text("Undo: Write the third lines").first).to_be_visible()
    day.texts = before
    for name in (path(2), path(3)):
        await day.show(name)
        await expect(window.text).not_to_contain_text("by the agent")
    await window.view("Files")
    await day.whole()

    # the page is loaded again
    await day.kept()
    await page.reload()
    await window.connected()
    await expect(window.page.get_by_role("tablist", name="Open files").get_by_role("tab")).to_have_count(
        FILES
    )
    await day.whole()
    await expect(window.screen).to_contain_text("it 2 serves")

    # a second tab writes into one that is unsaved here
    second = Editor(await window.watched.page(), window.watched, site)
    await second.load_connected(f"{site}/{path(5)}")
    await second.text.click()
    await second.page.keyboard.press("Control+End")
    await second.page.keyboard.type("from the second tab")
    await second.save()
    await expect(second.page.get_by_label("Close file-05.txt", exact=True)).to_be_attached()
    await second.page.close()
    await page.bring_to_front()
    day.texts[path(5)] += "from the second tab"

    # no network for a while: what is typed and saved meanwhile is saved then
    await window.watched.context.set_offline(True)
    await window.connection("Offline")
    await day.type(path(6), "offline ", save=False)
    await window.save()
    await day.type(path(7), "offline ", save=False)
    await window.watched.context.set_offline(False)
    await window.connected()
    await day.saved(path(6))

    # the session ends while one types
    await led_to(window, token(*covered, ttl=6), site)
    await day.type(path(8), "late ", save=False)
    await expect(page.get_by_role("dialog", name="The session has ended")).to_be_visible()
    await page.get_by_label("Access token").fill(token(*covered))
    await page.keyboard.press("Enter")
    await window.connected()
    await day.whole()

    # published, while text is unsaved
    side = await window.view("Deploy")
    here = page.get_by_label("This site")
    await here.locator("summary", has_text="Domain").click()
    await here.get_by_label("Publish to").fill("day.localhost")
    await here.get_by_role("button", name="Publish", exact=True).click()
    card = side.get_by_role("article", name="Deployment of day.localhost")
    await expect(card.get_by_text("Live")).to_be_visible(timeout=2 * DEADLINE)
    assert (await host.call("DELETE", "/v1/tenants/day-localhost"))[0] == 204

    await window.view("Files")
    await window.text.click()
    await page.keyboard.press("Control+Alt+s")
    for name in sorted(day.unsaved):
        await day.saved(name)
    assert day.on_disk() == day.texts
    await day.kept()
    await day.whole()
    await window.command("")
    await page.keyboard.press("Control+c")
    await window.prompt_after("^C")
    run(site, "rm -r day")
