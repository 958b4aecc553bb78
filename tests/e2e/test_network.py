"""A network that fails, and a web that is hostile: what the editor says, keeps and refuses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from playwright.async_api import Route, expect

from tests.e2e.conftest import OpenEditor
from tests.e2e.editor import Editor, violations
from tests.e2e.test_editor import run
from tests.integration.sites import Hosting

CUT = ["WebSocket connection to", "ERR_", "Failed to load resource", "502"]
"""What Chromium itself notes of a connection that breaks."""


async def test_a_cut_network_is_told_and_everything_goes_on_where_it_was(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    """The proxy dies under a counting terminal: no line is lost or doubled, and typed text is kept."""
    run(site, "echo before >public/kept.txt")
    window = await editor()
    window.watched.expected.extend(CUT)
    await window.load_connected(f"{site}/public/kept.txt")
    await window.prompt()
    await window.command(
        "for i in $(seq 100 125); do echo n$i; until [ $i -ne 112 -o -e go ]; do sleep 0.1; done; done"
    )
    await expect(window.screen).to_contain_text("n112")
    await host.caddy.stop()
    await window.connection("Reconnecting")
    await expect(window.page.get_by_text("Your text stays here")).to_be_visible()
    await window.replace_all("typed without a network")
    run(site, "touch go")
    await host.caddy.start()
    await window.connected()
    await expect(window.screen).to_contain_text("n125")
    shown = [row for row in await window.screen_rows() if re.fullmatch(r"n\d+", row)]
    assert shown == [f"n{number}" for number in range(126 - len(shown), 126)]
    await window.save()
    await expect(window.page.get_by_label("Close kept.txt", exact=True)).to_be_attached()
    assert run(site, "cat public/kept.txt; rm go public/kept.txt") == "typed without a network"


async def test_a_restart_of_the_gateway_is_told_and_survived(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    window = await editor()
    window.watched.expected.extend(CUT)
    await window.load_connected()
    await window.prompt()
    await host.gateway.stop()
    await expect(
        window.page.get_by_label(re.compile("Connection: (Restarting|Reconnecting)"))
    ).to_be_visible()
    await host.gateway.start()
    await window.connected()
    await expect(window.screen).to_contain_text("The command")
    await window.page.get_by_role("button", name="New terminal").click()
    await window.prompt()


async def test_a_device_without_network_is_told(editor: OpenEditor) -> None:
    window = await editor()
    window.watched.expected.extend(CUT)
    await window.load_connected()
    await window.prompt()  # everything is loaded
    await window.watched.context.set_offline(True)
    await window.connection("Offline")
    await window.watched.context.set_offline(False)
    await window.connected()


# --- a network that changes for a moment, as by another Wi-Fi ---------------------------------------------

FILES = re.compile(r"/assets/[^/]*[.](js|css)$")


def failing(times: int) -> Callable[[Route], Awaitable[None]]:
    """Return what fails so many times each request of the page that only reads."""
    failed: Counter[str] = Counter()

    async def decide(route: Route) -> None:
        request = route.request
        reads = request.method == "GET" and request.resource_type in ("script", "stylesheet", "fetch")
        if reads and failed[request.url] < times:
            failed[request.url] += 1
            await route.abort("connectionreset")
        else:
            await route.continue_()

    return decide


async def test_a_network_that_fails_for_a_moment_is_not_noticed(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    """Each script, sheet and answer fails twice before it comes."""
    window = await editor(signed_in=False)
    window.watched.expected.extend(CUT)
    page = window.page
    await page.route("**/*", failing(2))
    await window.load(f"token={host.gateway.token(site, subject='ann')}&tenant={site}")
    await window.connected()
    assert "token" not in page.url
    await window.prompt()
    await window.open_file("src/app.tsx")
    await expect(window.text.locator("span").first).to_be_visible()  # coloured
    # a link is followed, too, and asks first as it should
    token = host.gateway.token(site, subject="mallory")
    await page.route("**/v1/session", failing(2))
    await page.evaluate(f"location.hash = 'token={token}&tenant={site}'")
    await expect(page.get_by_role("dialog", name="Another sign-in")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.locator(".toast.error, .interruption")).to_have_count(0)


async def test_an_editor_whose_files_do_not_come_says_so_and_loads_them_when_asked(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    window = await editor(signed_in=False)
    window.watched.expected.extend(CUT)
    page = window.page
    await page.route(FILES, lambda route: route.abort("connectionreset"))
    await window.load(f"token={host.gateway.token(site)}&tenant={site}")
    again = page.get_by_role("button", name="Load it again")
    await expect(again).to_be_visible()
    await page.unroute(FILES)
    await again.click()
    await window.connected()
    await expect(page.locator(".tenant-switch strong")).to_have_text(site)


async def test_a_part_of_the_editor_that_does_not_load_is_told_and_comes_with_the_page(
    editor: OpenEditor, site: str
) -> None:
    """As after an upgrade of the gateway, whose files have other names."""
    window = await editor()
    window.watched.expected.extend([*CUT, "404"])
    page = window.page
    await page.add_init_script("localStorage.setItem('gateway.panelOpen', 'false')")
    await window.load_connected(site)
    await window.open_file("package.json")
    await page.route(FILES, lambda route: route.fulfill(status=404))
    await page.get_by_role("button", name="Terminals", exact=True).click()
    told = page.get_by_role("alert").filter(has_text="A part of the editor did not load")
    await expect(told).to_be_visible()
    assert not await violations(page)
    await page.unroute(FILES)
    await told.get_by_role("button", name="Load again").click()
    await window.connected()
    await expect(told).to_have_count(0)
    await expect(window.tab("package.json")).to_be_visible()
    await page.get_by_role("button", name="Terminals", exact=True).click()
    await window.prompt()


# --- a hostile web --------------------------------------------------------------------------------------

_ATTACK = """
async (gateway) => {
  const asked = async (work) => { try { return await work(); } catch (error) { return error.name; } };
  return {
    tenants: await asked(async () => (await fetch(gateway + "/v1/tenants", {credentials: "include"})).status),
    session: await asked(async () => (await fetch(gateway + "/v1/session",
      {method: "POST", mode: "no-cors", credentials: "include", body: "{}"})).type),
    socket: await asked(() => new Promise((resolve) => {
      const socket = new WebSocket(gateway.replace("http", "ws") + "/v1/tenants/shop/ws", "gateway.v1");
      socket.onopen = () => resolve("open");
      socket.onerror = () => resolve("refused");
    })),
    parent: await asked(() => parent.document.title),
  };
}
"""


@pytest.mark.parametrize("where", ["frame", "tab"])
async def test_the_site_of_a_tenant_may_not_ask_as_who_looks_at_it(
    editor: OpenEditor, host: Hosting, where: str
) -> None:
    """The site's own script, in the preview and in a tab, with the user's cookie in the same browser."""
    window = await editor(whole=True)
    window.watched.expected.extend([*CUT, "CORS", "Blocked a frame", "403"])
    await window.load_connected()
    answers: list[int] = []
    if where == "frame":
        await window.site_shows("Your site is live.")
        page, frame = window.page, window.page.frames[1]
    else:
        page = await window.watched.context.new_page()
        await page.goto(f"http://shop.localhost:{host.settings.caddy_http}/", wait_until="commit")
        frame = page.main_frame
    page.on("response", lambda got: answers.append(got.status) if "/v1/session" in got.url else None)
    said = await frame.evaluate(_ATTACK, window.watched.address)
    assert said["tenants"] == "TypeError"
    assert said["socket"] == "refused"
    assert answers == [403]
    if where == "frame":
        assert said["parent"] == "SecurityError"


async def transferred(window: Editor) -> list[float]:
    """Collect from now on how many bytes come from the gateway, as they are sent: compressed."""
    protocol = await window.watched.context.new_cdp_session(window.page)
    sizes: list[float] = []
    own: set[str] = set()
    address = window.watched.address
    protocol.on(
        "Network.responseReceived",
        lambda e: own.add(e["requestId"]) if e["response"]["url"].startswith(address) else None,
    )
    protocol.on(
        "Network.loadingFinished",
        lambda e: sizes.append(e["encodedDataLength"]) if e["requestId"] in own else None,
    )
    await protocol.send("Network.enable")
    return sizes


async def test_the_first_view_is_small_and_painted_at_once(editor: OpenEditor) -> None:
    """Under 500 kB compressed with editor, terminal and fonts; its first paint within a second."""
    window = await editor(whole=True)
    page = window.page
    sizes = await transferred(window)
    paints: list[float] = []
    for _ in range(3):  # the best of three: other work on the machine is not the editor's
        await page.goto("about:blank")
        await window.load_connected()
        await window.prompt()
        paint = await page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        paints.append(paint)
        if len(paints) == 1:
            total = sum(sizes)
    print(f"first paint {min(paints):.0f} ms, first view {total / 1000:.0f} kB")
    assert total < 500_000
    assert min(paints) < 3000  # ten times what it takes where nothing else runs


async def test_what_opens_a_file_is_small(editor: OpenEditor, site: str) -> None:
    """Under 355 kB compressed, with fonts and the language, without terminal, preview, language servers.

    It takes 349 kB where one tenant answers; what the answers about others take comes on top.
    """
    window = await editor()
    sizes = await transferred(window)
    await window.watched.context.add_init_script(
        "for (const part of ['panelOpen', 'previewOpen', 'languageServers'])"
        " localStorage.setItem(`gateway.${part}`, 'false')"
    )
    await window.load_connected(f"{site}/src/app.tsx")
    await expect(window.text.locator("span").first).to_be_visible()  # coloured
    print(f"what opens a file: {sum(sizes) / 1000:.0f} kB")
    assert sum(sizes) < 355_000
