"""The browser editor as a person sees it: where things are in the window, and what is done with them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    expect,
)

from gateway.auth import tokens

DEADLINE = 30_000
"""For each thing that a person would wait for, in milliseconds; many times what it takes."""

_WATCH = """
document.addEventListener("securitypolicyviolation", ({violatedDirective, blockedURI, sample, sourceFile}) =>
  console.error("CSP", violatedDirective, blockedURI, sample, sourceFile));
"""

_AXE = Path(__file__).parents[2] / "clients" / "web" / "node_modules" / "axe-core" / "axe.min.js"
# A tab has its close button in it; the key Delete on the tab does the same.
_FOUND = """async (exclude) => (await axe.run({exclude},
  {iframes: false, runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"],
   rules: {"nested-interactive": {enabled: false}}})).violations.map(({id, nodes}) =>
  id + ": " + nodes.map(({html, any}) => html.slice(0, 120) + " " + (any[0]?.message ?? "")).join("\\n  "))
"""
# not those without an end, nor what fades for long on purpose
_STILL = """() => Promise.allSettled(document.getAnimations()
  .filter((one) => one.effect.getComputedTiming().endTime < 2000).map((one) => one.finished)).then(() => {})
"""


async def violations(page: Page) -> list[str]:
    """Return what axe-core finds in a page, but for the site's own and the terminal's text."""
    if not await page.evaluate("'axe' in window"):
        await page.evaluate(_AXE.read_text())
    await page.evaluate(_STILL)  # what has just opened is half transparent
    found: list[str] = await page.evaluate(_FOUND, ["iframe", ".xterm"])
    return found


@dataclass
class Watched:
    """A browser's window of its own, and what its pages complained of."""

    address: str
    complaints: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    """Parts of complaints that a test provokes."""
    _context: BrowserContext | None = None

    async def open(self, browser: Browser, options: dict[str, Any]) -> None:
        size = {"width": 1440, "height": 900}
        self._context = await browser.new_context(**{"viewport": size, "color_scheme": "dark", **options})
        self._context.set_default_timeout(DEADLINE)
        await self._context.add_init_script(_WATCH)

    @property
    def context(self) -> BrowserContext:
        assert self._context is not None
        return self._context

    async def sign_in(self, token: str) -> None:
        """Take the cookie as the page would, without the page."""
        cookie = {"name": tokens.COOKIE, "value": token, "url": self.address, "httpOnly": True}
        await self.context.add_cookies([cast(Any, {**cookie, "sameSite": "Strict"})])

    async def page(self) -> Page:
        page = await self.context.new_page()
        page.on("console", self._said)
        page.on("pageerror", self._failed)
        return page

    def _said(self, message: ConsoleMessage) -> None:
        # what the tenant's site says in its frame is its own affair
        # A container that starts or stops beside Chromium is a network that changes: the page asks again.
        if "ERR_NETWORK_CHANGED" in message.text:
            return
        if message.type in ("error", "warning") and message.location["url"].startswith(self.address):
            self._note(f"{message.type}: {message.text} ({message.location['url']})")

    def _failed(self, error: Error) -> None:
        self._note(f"{error.name}: {error.message}")

    def _note(self, complaint: str) -> None:
        if not any(part in complaint for part in self.expected):
            self.complaints.append(complaint)

    async def close(self) -> None:
        if self._context is not None:
            await self._context.close()


class Editor:
    """One page with the editor in it."""

    def __init__(self, page: Page, watched: Watched, tenant: str) -> None:
        self.page = page
        self.watched = watched
        self.tenant = tenant

    async def load(self, fragment: str | None = None) -> None:
        await self.page.goto(f"{self.watched.address}/#{self.tenant if fragment is None else fragment}")

    async def load_connected(self, fragment: str | None = None) -> None:
        await self.load(fragment)
        await self.connected()

    async def connected(self) -> None:
        await self.connection("Connected")

    async def connection(self, word: str) -> None:
        """Wait until the window says that the connection is so."""
        await expect(self.page.get_by_label(f"Connection: {word}")).to_be_visible(timeout=DEADLINE)

    # --- files ----------------------------------------------------------------------------------------

    def row(self, name: str) -> Locator:
        return self.page.get_by_role("treeitem").filter(has=self.page.get_by_text(name, exact=True))

    async def row_menu(self, name: str) -> None:
        """Open the context menu of a file or folder of the tree."""
        await self.view("Files")
        await self.row(name).click(button="right")
        await expect(self.page.get_by_role("menu")).to_be_visible()

    def tab(self, name: str) -> Locator:
        return self.page.get_by_role("tablist", name="Open files").get_by_role("tab").filter(has_text=name)

    @property
    def text(self) -> Locator:
        return self.page.locator(".editor .cm-content")

    async def open_file(self, path: str) -> None:
        """Open a file by a part of its name, as by Ctrl-P."""
        await self.page.keyboard.press("Control+p")
        await expect(self.page.locator("[aria-controls=choices]")).to_be_focused()
        await self.page.locator("[aria-controls=choices]").fill(path)
        await self.page.get_by_role("option").filter(has_text=path.rpartition("/")[2]).first.click()
        await expect(self.page.locator(f'.editor .cm-content[aria-label="{path}"]')).to_be_visible()

    async def replace_all(self, text: str) -> None:
        await self.text.click()
        await self.page.keyboard.press("Control+a")
        await self.page.keyboard.insert_text(text)

    async def save(self) -> None:
        await self.page.keyboard.press("Control+s")

    # --- the rest -------------------------------------------------------------------------------------

    async def view(self, name: str) -> Locator:
        """Show one of the views at the side."""
        button = self.page.get_by_role("navigation", name="Views").get_by_role("button", name=name)
        if await button.get_attribute("aria-pressed") != "true":
            await button.click()
        return self.page.locator(".side")

    @property
    def site(self) -> Any:
        return self.page.frame_locator("iframe")

    async def site_shows(self, heading: str) -> None:
        """Wait until the preview has a heading; the first time its dev server bundles a while before."""
        await expect(self.site.get_by_role("heading", name=heading)).to_be_visible(timeout=2 * DEADLINE)

    @property
    def screen(self) -> Locator:
        """The text of the terminal that is shown."""
        return self.page.locator(".screen-host:not([hidden]) .xterm-rows")

    async def command(self, line: str) -> None:
        """Type a line into the terminal that is shown."""
        await self.page.locator(".screen-host:not([hidden])").click()
        await self.page.keyboard.type(line)
        await self.page.keyboard.press("Enter")

    async def prompt(self) -> None:
        """Wait until the shell in the terminal that is shown waits for a line."""
        await expect(self.screen).to_contain_text("$")

    async def prompt_after(self, text: str) -> None:
        """Wait until the shell waits for a line below what the terminal has shown last of this text."""

        async def there() -> None:
            shown = "\n".join(await self.screen_rows())
            assert "$" in shown.rpartition(text)[2] and text in shown, shown

        await self.until(there)

    async def screen_rows(self) -> list[str]:
        """Return the lines of the terminal that is shown, without what is empty at their ends."""
        rows = await self.screen.locator("> div").all_text_contents()
        return [row.replace("\xa0", " ").rstrip() for row in rows]

    async def until(self, check: Callable[[], Awaitable[None]]) -> None:
        """Wait until a check passes; its failure is the reason where it never does."""
        deadline = time.monotonic() + DEADLINE / 1000
        while True:
            try:
                return await check()
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
            await self.page.evaluate("new Promise(requestAnimationFrame)")  # the next picture
