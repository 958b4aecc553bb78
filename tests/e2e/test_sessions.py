"""The sessions of the editor: one for each tab, none replaced unasked, and their end without a loss."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
from playwright.async_api import BrowserContext, Locator, Page, expect

from gateway.auth import tokens
from tests.e2e.conftest import ADDRESS, OpenEditor
from tests.e2e.editor import DEADLINE, Editor
from tests.e2e.test_editor import run
from tests.integration.sites import Hosting
from tests.live import EVERY_SCOPE, SECRET


def token(*tenants: str, subject: str = "ann", ttl: int = 600) -> str:
    return tokens.issue(SECRET, subject, tenants, EVERY_SCOPE, ttl)


@pytest.fixture(scope="package")
async def second(host: Hosting) -> str:
    """A second tenant with a site."""
    record = await host.deploy("second.localhost", "static", tenant="second")
    assert record["state"] == "succeeded", record["error"]
    return str(record["tenant"])


async def led_to(window: Editor, raw: str, tenant: str) -> None:
    """Lead the page that is open to another fragment, as a link of another page would."""
    await window.page.evaluate(f"location.hash = 'token={raw}&tenant={tenant}'")


async def beside(window: Editor, tenant: str) -> Editor:
    """Return a second tab of the same browser."""
    return Editor(await window.watched.page(), window.watched, tenant)


async def shows(window: Editor, tenant: str, subject: str) -> None:
    await window.connected()
    await expect(window.page.locator(".tenant-switch strong")).to_have_text(tenant)
    await expect(window.page.get_by_role("button", name=f"Sign out {subject}")).to_be_visible()


async def cookies(context: BrowserContext) -> list[str]:
    return sorted(cookie.get("name", "") for cookie in await context.cookies())


def question(window: Editor) -> Locator:
    return window.page.get_by_role("dialog", name="Another sign-in")


# --- one for each tab -----------------------------------------------------------------------------------


async def test_two_tabs_with_two_tokens_for_two_tenants_work_side_by_side_and_survive_a_reload(
    editor: OpenEditor, site: str, second: str
) -> None:
    one = await editor(signed_in=False)
    two = await beside(one, second)
    for window in (one, two):
        await window.load(f"token={token(window.tenant)}&tenant={window.tenant}")
        await shows(window, window.tenant, "ann")
    assert all(name.startswith("gateway_session_") for name in await cookies(one.watched.context))
    for window in (one, two):
        await window.page.reload()
        await shows(window, window.tenant, "ann")
        await window.page.get_by_role("button", name="New file").click()
        await window.page.keyboard.type("mine.txt")
        await window.page.keyboard.press("Enter")
        await expect(window.tab("mine.txt")).to_be_visible()
        assert run(window.tenant, "ls mine.txt") == "mine.txt\n"
        await window.page.keyboard.press("Alt+w")
        await expect(window.tab("mine.txt")).to_have_count(0)
        run(window.tenant, "rm mine.txt")
    three = await beside(one, second)
    await three.load("")
    await shows(three, second, "ann")
    await two.page.get_by_role("button", name="Sign out").click()
    await expect(two.page.get_by_label("Access token")).to_be_visible()
    await one.page.reload()
    await shows(one, site, "ann")
    one.watched.complaints.clear()  # the third tab's session ended with the second's


async def test_by_https_each_tab_has_a_cookie_that_only_this_host_can_set(
    editor: OpenEditor, host: Hosting, site: str, second: str
) -> None:
    one = await editor(signed_in=False, ignore_https_errors=True)
    one.watched.address = f"https://{ADDRESS}:{host.settings.caddy_https}"
    two = await beside(one, second)
    for window in (one, two):
        await window.load(f"token={token(window.tenant)}&tenant={window.tenant}")
        await shows(window, window.tenant, "ann")
    names = await cookies(one.watched.context)
    assert len(names) == 2 and all(name.startswith("__Host-gateway_session_") for name in names)
    for window in (one, two):
        await window.page.reload()
        await shows(window, window.tenant, "ann")


# --- no session is replaced unasked -----------------------------------------------------------------------


async def test_a_link_with_the_token_of_somebody_else_asks_first_in_a_new_tab(
    editor: OpenEditor, site: str, second: str
) -> None:
    one = await editor(signed_in=False)
    await one.load(f"token={token(site)}&tenant={site}")
    await shows(one, site, "ann")
    before = await cookies(one.watched.context)
    two = await beside(one, second)
    await two.load(f"token={token(second, subject='mallory')}&tenant={second}")
    await expect(question(two)).to_contain_text(f"Sign in as mallory for {second}?")
    await expect(question(two)).to_contain_text(f"You are signed in as ann for {site}.")
    assert "token" not in two.page.url
    await expect(question(two).get_by_role("button", name="Cancel")).to_be_focused()
    await two.page.keyboard.press("Enter")
    await shows(two, site, "ann")
    assert await cookies(one.watched.context) == before, "the token was thrown away"
    kept = await two.page.evaluate("JSON.stringify([localStorage, sessionStorage])")
    assert "eyJ" not in kept and "mallory" not in kept
    await two.page.reload()
    await shows(two, site, "ann")


async def test_a_page_that_is_led_to_a_token_asks_first_and_leaves_the_other_tabs(
    editor: OpenEditor, site: str, second: str
) -> None:
    """By a fragment alone nothing is loaded: the page is there, with its text."""
    one = await editor(signed_in=False)
    await one.load(f"token={token(site)}&tenant={site}")
    await shows(one, site, "ann")
    two = await beside(one, site)
    await two.load(site)
    await shows(two, site, "ann")
    for subject in ("ann", "mallory"):
        await led_to(two, token(second, subject=subject), second)
        await expect(question(two)).to_contain_text(f"Sign in as {subject} for {second}?")
        assert "token" not in two.page.url
        await two.page.keyboard.press("Escape")
        await expect(question(two)).to_have_count(0)
        assert two.page.url.endswith(f"#{site}")
        await shows(two, site, "ann")
    await led_to(two, token(second, subject="mallory"), second)
    await question(two).get_by_role("button", name="Sign in in this tab").click()
    await shows(two, second, "mallory")
    for _ in range(2):
        await shows(one, site, "ann")
        await shows(two, second, "mallory")
        await one.page.reload()
        await two.page.reload()


async def test_the_same_person_for_the_same_tenant_just_signs_in_and_keeps_the_text(
    editor: OpenEditor, site: str
) -> None:
    window = await editor(signed_in=False)
    await window.load(f"token={token(site)}&tenant={site}")
    await shows(window, site, "ann")
    await expect(window.row("package.json")).to_be_visible()
    await window.open_file("package.json")
    await window.replace_all("unsaved")
    expires = "JSON.parse(localStorage['gateway.sessions'])[0].expires"
    before = await window.page.evaluate(expires)
    await led_to(window, token(site, ttl=900), site)

    async def renewed() -> None:
        assert await window.page.evaluate(expires) > before + 200

    await window.until(renewed)
    await expect(question(window)).to_have_count(0)
    await expect(window.text).to_have_text("unsaved")
    await shows(window, site, "ann")


async def test_unsaved_text_is_asked_about_before_a_tab_signs_in_for_another_tenant(
    editor: OpenEditor, site: str, second: str
) -> None:
    window = await editor(signed_in=False)
    await window.load(f"token={token(site)}&tenant={site}")
    await shows(window, site, "ann")
    await expect(window.row("package.json")).to_be_visible()
    await window.open_file("package.json")
    await window.replace_all("unsaved")
    await led_to(window, token(second), second)
    await question(window).get_by_role("button", name="Sign in in this tab").click()
    leaving = window.page.get_by_role("dialog", name="Unsaved changes")
    await leaving.get_by_role("button", name="Cancel").click()
    await expect(window.text).to_have_text("unsaved")
    await shows(window, site, "ann")
    await led_to(window, token(second), second)
    await question(window).get_by_role("button", name="Sign in in this tab").click()
    await leaving.get_by_role("button", name="Discard").click()
    await shows(window, second, "ann")


# --- the end of a session ---------------------------------------------------------------------------------


_SHOWN = """wanted => new Promise(done => {
  const look = () => {
    const labels = [...document.querySelectorAll("output")].map(output => output.ariaLabel);
    const text = document.body.textContent + labels;
    if (wanted.every(pattern => new RegExp(pattern).test(text))) done();
  };
  const all = {subtree: true, childList: true, characterData: true, attributes: true};
  new MutationObserver(look).observe(document, all);
  look();
})"""


def shown(page: Page, *patterns: str) -> asyncio.Task[object]:
    """Return a task that ends once the page shows all of these at once, for however short a time."""
    return asyncio.ensure_future(asyncio.wait_for(page.evaluate(_SHOWN, patterns), 2 * DEADLINE / 1000))


async def typing(window: Editor, until: asyncio.Task[object], text: str = "") -> str:
    """Type words into the file that is open until something was in view; return all that was typed.

    Quickly, for a person; at full speed ten seconds of it were as many of both cores.
    """
    while not until.done():
        word = f"word{len(text)} "
        await window.page.keyboard.type(word, delay=40)
        text += word
    await until
    return text


async def test_a_session_that_ends_while_somebody_types_loses_no_letter(
    editor: OpenEditor, site: str
) -> None:
    run(site, "printf '' >public/long.txt")
    window = await editor(signed_in=False)
    window.watched.expected.append("401")
    page = window.page
    await window.load(f"token={token(site)}&tenant={site}")
    await window.connected()
    await window.open_file("public/long.txt")
    await window.prompt()
    await window.command("kept=by-the-shell")
    # the page is there: now its session is to end
    soon = shown(page, "This session ends at", "Connection: Connected")
    ended = shown(page, "The session has ended. Your text stays here")
    await led_to(window, token(site, ttl=15), site)
    await window.text.click()
    text = await typing(window, ended, await typing(window, soon))
    await expect(page.get_by_label("Connection: Signed out")).to_be_visible()
    await window.save()
    saved = text
    await page.keyboard.type("after")
    text += "after"
    # a pause covers the window; who types on takes it away, and types into the text
    dialog = page.get_by_role("dialog", name="The session has ended")
    await expect(dialog).to_be_visible()
    await page.keyboard.type(" the end")
    text += " the end"
    await expect(dialog).to_have_count(0)
    await expect(window.text).to_have_text(text)
    await expect(page.get_by_text("send Authorization")).to_have_count(0)

    field = page.get_by_label("New access token")
    await field.fill(token("another-tenant"))
    await page.keyboard.press("Enter")
    await expect(page.get_by_text(f"not {site}. Use one for {site}.")).to_be_visible()
    await field.fill(token(site))
    await page.keyboard.press("Enter")
    await shows(window, site, "ann")

    async def waited() -> None:
        assert run(site, "cat public/long.txt") == saved

    await window.until(waited)
    await expect(window.text).to_have_text(text)
    await expect(window.page.get_by_label("Close long.txt, which has unsaved changes")).to_be_attached()
    await window.text.click()
    await window.save()
    await expect(window.page.get_by_label("Close long.txt", exact=True)).to_be_attached()
    assert run(site, "cat public/long.txt; rm public/long.txt") == text
    await window.command("echo kept=$kept")
    await expect(window.screen).to_contain_text("kept=by-the-shell")


async def test_a_new_token_before_the_end_has_everything_go_on_without_a_break(
    editor: OpenEditor, site: str
) -> None:
    window = await editor(signed_in=False)
    page = window.page
    await window.load(f"token={token(site, ttl=12)}&tenant={site}")
    await window.connected()
    await window.prompt()
    ends = time.monotonic() + 12
    await page.evaluate(
        """() => { window.seen = new Set(); setInterval(() =>
        window.seen.add(document.querySelector(".connection").dataset.state), 20) }"""
    )
    field = page.get_by_label("New access token")
    await field.fill(token(site))
    await page.keyboard.press("Enter")
    await expect(field).to_have_count(0)
    await window.command(f"sleep {max(0.0, ends - time.monotonic()) + 2:.0f}; echo still $((40 + 2))")
    await expect(window.screen).to_contain_text("still 42")
    assert await page.evaluate("[...window.seen]") == ["open"]
    assert await page.get_by_role("dialog").count() == 0


async def test_another_tab_that_signs_in_anew_is_enough_for_all_of_the_session(
    editor: OpenEditor, site: str
) -> None:
    one = await editor(signed_in=False)
    one.watched.expected.append("401")
    await one.load(f"token={token(site, ttl=8)}&tenant={site}")
    await one.connected()
    two = await beside(one, site)
    await two.load(site)
    await two.connected()
    for window in (one, two):
        await expect(window.page.get_by_role("dialog", name="The session has ended")).to_be_visible()
    await one.page.get_by_label("Access token").fill(token(site))
    await one.page.keyboard.press("Enter")
    await shows(one, site, "ann")
    await shows(two, site, "ann")
    await expect(two.page.get_by_role("dialog")).to_have_count(0)


async def test_who_has_a_wrong_clock_is_asked_by_that_of_the_gateway(editor: OpenEditor, site: str) -> None:
    window = await editor(signed_in=False)
    window.watched.expected.append("401")
    page = window.page
    await page.add_init_script("const now = Date.now; Date.now = () => now() + 2 * 3600e3;")
    await window.load(f"token={token(site)}&tenant={site}")
    await window.connected()
    await page.reload()
    await window.connected()
    assert await page.get_by_label("New access token").count() == 0
    soon = shown(page, r"This session ends at .*, in \d+ s")
    await led_to(window, token(site, ttl=20), site)
    await soon
    await expect(page.get_by_label("New access token")).to_be_visible()
    await expect(page.get_by_role("dialog", name="The session has ended")).to_be_visible()


# --- what ends is asked about -----------------------------------------------------------------------------


async def test_stop_and_restart_ask_first_and_say_what_ends(
    editor: OpenEditor, host: Hosting, second: str
) -> None:
    window = await editor()
    await window.load_connected(second)
    await window.prompt()
    view = await window.view("Metrics and logs")
    for word in ("Stop", "Restart"):
        await view.get_by_role("button", name=f"{word} the tenant").click()
        dialog = window.page.get_by_role("dialog", name=f"{word} {second}")
        await expect(dialog.get_by_role("list", name="What ends")).to_contain_text(
            re.compile(r"\d+ terminals?")
        )
        await expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
        await window.page.keyboard.press("Enter")
        await expect(dialog).to_have_count(0)
    _, info, _ = await host.call("GET", f"/v1/tenants/{second}")
    assert info["status"] == "running"
    await view.get_by_role("button", name="Stop the tenant").click()
    dialog = window.page.get_by_role("dialog", name=f"Stop {second}")
    await dialog.get_by_role("button", name="Stop", exact=True).click()
    await expect(view.get_by_text("stopped")).to_be_visible()
    await view.get_by_role("button", name="Start the tenant").click()
    await expect(view.get_by_text("running", exact=True)).to_be_visible()
