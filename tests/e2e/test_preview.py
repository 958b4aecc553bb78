"""The preview: back and forward, ports, and what its page complains of, which may be hostile."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest
from playwright.async_api import Frame, Locator, Route, expect

from gateway.api import preview
from tests.e2e.conftest import ADDRESS, OpenEditor
from tests.e2e.editor import Editor, violations
from tests.e2e.test_editor import run
from tests.integration.sites import Hosting
from tests.live import SECRET
from tests.waits import until

BROKEN = """<!doctype html><html><head><title>Broken</title></head><body><h1>Broken</h1>
<script>console.error("it is", {bad: 1}); console.warn("careful"); setTimeout(() => nothing());</script>
<img src="/none.png"><a href="/pages/second.html">second</a></body></html>"""
SECOND = """<!doctype html><title>Second</title><h1>Second</h1>
<script>console.error("%s the %s", "of", "second")</script>"""
HOSTILE = """<!doctype html><title>Hostile</title><h1>Hostile</h1><script>
const say = (gatewayPreview, text, url = location.href) =>
  parent.postMessage({gatewayPreview, text, url}, "*");
say("page", "", "http://gateway.localhost/#evil");
say("page", "", "javascript:alert(1)");
say("going", "https://evil.example/");
say("error", {toString: 1}); say("error", "x".repeat(5000)); parent.postMessage(null, "*");
for (let count = 0; count < 5000; count++) say("error", `<img src=x onerror=parent.run=1> ${count} \\u202e`);
</script>"""


@pytest.fixture(scope="module")
async def pages(site: str) -> AsyncIterator[str]:
    for name, text in {"broken": BROKEN, "second": SECOND, "hostile": HOSTILE}.items():
        script = f"mkdir -p public/pages; cat >public/pages/{name}.html <<'END'\n{text}\nEND"
        run(site, script)
    yield site
    run(site, "rm -r public/pages")


async def opened(editor: OpenEditor) -> tuple[Editor, Locator]:
    window = await editor(whole=True)
    await window.load_connected()
    view = window.page.get_by_role("region", name="Preview of the site")
    # until the site is known a path means nothing
    await expect(view.get_by_label("Address of the site")).to_have_value(re.compile("^http"))
    return window, view


def frame(window: Editor) -> Frame:
    return window.page.frames[1]


async def test_a_page_is_gone_back_from_and_its_errors_are_shown_only_where_one_asks(
    editor: OpenEditor, pages: str
) -> None:
    window, view = await opened(editor)
    window.watched.expected.append("nothing is not defined")  # the page's own, which the browser tells too
    address = view.get_by_label("Address of the site")
    errors = view.get_by_role("log", name="Errors and warnings")
    await address.fill("/pages/broken.html")
    await address.press("Enter")
    await window.site_shows("Broken")
    await expect(errors).to_have_count(0)
    assert "native code" in await frame(window).evaluate("String(console.error)"), "nobody asked for a script"

    await view.get_by_role("button", name="Show the page's errors").click()
    for text in ('it is {"bad":1}', "careful", "nothing is not defined", "not loaded: http"):
        await expect(errors).to_contain_text(text)
    assert not await violations(window.page)
    async with window.page.expect_popup() as opening:
        assert await frame(window).evaluate("open('second.html') !== null"), "a site can open windows"
    popup = await opening.value
    # which lead the editor nowhere
    lead = "() => { try { opener.top.location = 'about:blank'; return 'led' } catch { return 'refused' } }"
    assert await popup.evaluate(lead) == "refused"
    await popup.close()
    shown = await frame(window).evaluate("[location.href, document.head.innerHTML, document.cookie]")
    assert preview.PARAMETER not in "".join(shown) and "eyJ" not in "".join(shown)
    assert await frame(window).evaluate("document.compatMode") == "CSS1Compat"
    await window.site.get_by_role("link", name="second").click()
    await expect(errors).to_contain_text("of the second")
    await expect(address).to_have_value(f"http://shop.localhost:{_port(window)}/pages/second.html")
    await expect(errors).not_to_contain_text("careful")
    await view.get_by_role("button", name="Back").click()
    await window.site_shows("Broken")
    await expect(errors).to_contain_text("careful")
    await view.get_by_role("button", name="Forward").click()
    await window.site_shows("Second")
    await expect(view.get_by_role("button", name="Forward")).to_be_disabled()
    await view.get_by_role("button", name="Hide the page's errors").click()
    await expect(errors).to_have_count(0)
    await expect(view.locator("iframe:not([src*=__gateway_preview])")).to_have_count(1)
    await window.site_shows("Second")
    said = await window.site.locator("h1").evaluate("() => String(console.error)")
    assert "native code" in said


async def test_a_page_reports_however_one_came_to_it(editor: OpenEditor, pages: str) -> None:
    window, view = await opened(editor)
    window.watched.expected.append("nothing is not defined")
    address = view.get_by_label("Address of the site")
    errors = view.get_by_role("log", name="Errors and warnings")
    await view.get_by_role("button", name="Show the page's errors").click()
    held = asyncio.Event()

    async def hold(route: Route) -> None:
        await held.wait()
        await route.abort()

    await window.page.route("**/none.png", hold)
    await address.fill("/pages/broken.html")
    await address.press("Enter")
    await expect(errors).to_contain_text("nothing is not defined")
    await window.site.get_by_role("link", name="second").click(no_wait_after=True)
    await expect(errors).to_contain_text("of the second")
    await expect(address).to_have_value(f"http://shop.localhost:{_port(window)}/pages/second.html")
    held.set()
    # what was asked for before is asked for again
    await address.fill("/pages/broken.html")
    await address.press("Enter")
    await window.site_shows("Broken")
    await expect(errors).to_contain_text("careful")
    # a page tells where it goes, and may be gone when that is heard, on a slow machine
    site = f"http://shop.localhost:{_port(window)}"
    told = {"gatewayPreview": "going", "text": f"{site}/pages/second.html", "url": site}
    hear = "([data, origin]) => dispatchEvent(new MessageEvent('message', {data, origin, source: null}))"
    await window.page.evaluate(hear, [told, site])
    await frame(window).goto(f"{site}/pages/second.html")
    await expect(errors).to_contain_text("of the second")


def _port(window: Editor) -> str:
    return window.watched.address.rpartition(":")[2]


async def test_a_site_is_shown_at_the_size_of_a_device(editor: OpenEditor, pages: str) -> None:
    """As a browser of that size would show it, however small the preview is."""
    window, view = await opened(editor)
    await window.site_shows("Your site is live.")
    size = view.get_by_role("button", name="Size of the site")
    for name, width, height in (("Tablet", 820, 1180), ("Phone", 390, 844)):
        await size.click()
        await window.page.get_by_role("menuitem", name=name).click()
        await expect(size).to_have_accessible_name(f"Size of the site: {name}")

        await frame(window).wait_for_function(f"innerWidth === {width} && innerHeight === {height}")
        box = await view.locator("iframe").bounding_box()
        assert box is not None and box["width"] <= 421 and box["height"] < 900
    await size.click()
    await window.page.get_by_role("menuitem", name="Responsive").click()
    await expect(size).to_have_accessible_name("Size of the site: Responsive")


async def test_a_hostile_page_writes_nothing_but_some_lines_of_text(editor: OpenEditor, pages: str) -> None:
    window, view = await opened(editor)
    address = view.get_by_label("Address of the site")
    errors = view.get_by_role("log", name="Errors and warnings")
    await view.get_by_role("button", name="Show the page's errors").click()
    await address.fill("/pages/hostile.html")
    await address.press("Enter")
    await window.site_shows("Hostile")
    await expect(errors).to_contain_text("<img src=x onerror=parent.run=1>")
    assert await errors.locator("p").count() <= 100 and await errors.locator("img").count() == 0
    assert "\u202e" not in str(await errors.text_content())
    await expect(address).to_have_value(f"http://shop.localhost:{_port(window)}/pages/hostile.html")
    # from anywhere else than the frame nothing is heard
    forged = {"gatewayPreview": "error", "text": "forged", "url": f"http://shop.localhost:{_port(window)}/"}
    await window.page.evaluate("(said) => window.postMessage(said, '*')", forged)
    await address.fill("/pages/second.html")
    await address.press("Enter")
    await expect(errors).to_contain_text("of the second")
    await expect(errors).not_to_contain_text("forged")
    assert await window.page.evaluate("window.run") is None
    assert "evil" not in window.page.url


async def test_only_a_page_that_the_editor_asks_for_has_the_script(
    host: Hosting, site: str, pages: str
) -> None:
    """By a key for its domain, which has not ended. What is no page, or no GET, comes as it is."""
    origin, ends = f"http://{ADDRESS}:{host.settings.caddy_http}", int(time.time()) + 60
    url = f"http://127.0.0.1:{host.settings.caddy_http}"
    headers = {"Host": f"shop.localhost:{host.settings.caddy_http}"}

    async def ask(path: str, key: str, method: str = "GET") -> tuple[int, str, str]:
        async with http.request(
            method, f"{url}{path}?{preview.PARAMETER}={key}", headers=headers, allow_redirects=False
        ) as answer:
            return answer.status, answer.headers.get("Location", ""), await answer.text()

    good = preview.key(SECRET, "shop.localhost", origin, ends)
    async with aiohttp.ClientSession() as http:
        status, _, text = await ask("/pages/second.html", good)
        assert status == 200 and text.startswith("<!doctype html><script>") and f'"{origin}"' in text
        assert SECRET not in text and text.endswith(SECOND.removeprefix("<!doctype html>") + "\n")
        for key in (
            "nonsense",
            preview.key(SECRET, "second.localhost", origin, ends),
            preview.key(SECRET, "shop.localhost", origin, 1),
            preview.key("another secret, long enough to sign with", "shop.localhost", origin, ends),
        ):
            assert await ask("/pages/second.html", key) == (307, "/pages/second.html", "")
        assert "gatewayPreview" not in (await ask("/src/app.tsx", good))[2]
        assert "gatewayPreview" not in (await ask("/pages/second.html", good, "POST"))[2]
        # past Caddy it is no way to another host
        forged = {"Host": "shop.localhost", "X-Gateway-Uri": f"//evil.example/?{preview.PARAMETER}={good}"}
        async with http.get(f"{host.url}/v1/preview", headers=forged) as answer:
            assert answer.status == 404
    status, said, _ = await host.call("POST", f"/v1/tenants/{site}/preview", Origin=host.url)
    assert status == 200 and preview.opened(SECRET, "shop.localhost", said["key"]) == host.url
    assert (await host.call("POST", f"/v1/tenants/{site}/preview"))[0] == 400
    for method, what in (("POST", "preview"), ("GET", "ports")):
        path = f"/v1/tenants/{site}/{what}"
        assert (await host.call(method, path, tenants=("another",), Origin=host.url))[0] == 404


async def test_what_listens_in_the_tenant_is_listed_and_shown(
    editor: OpenEditor, host: Hosting, pages: str
) -> None:
    serve = "timeout 120 python3 -m http.server"
    script = f"cd public/pages && ({serve} 8123 & {serve} 8124 -b 127.0.0.1 &) >/dev/null 2>&1"
    await asyncio.to_thread(run, pages, script)

    async def listens() -> bool:
        _, said, _ = await host.call("GET", f"/v1/tenants/{pages}/ports")
        return {8123, 8124} <= {one["port"] for one in said["ports"]}

    await until(listens, 60)
    window = await editor(whole=True)
    asked = asyncio.Event()

    # the site's address is not known yet when the ports are asked for
    async def held_back(route: Route) -> None:
        await asked.wait()
        await route.continue_()

    async def noticed(route: Route) -> None:
        asked.set()
        await window.page.locator(".preview iframe").wait_for(state="attached")
        await route.continue_()

    await window.page.route(f"**/v1/tenants/{pages}", held_back)
    await window.page.route(f"**/v1/tenants/{pages}/ports", noticed)
    await window.load_connected()
    view = window.page.get_by_role("region", name="Preview of the site")
    menu = window.page.get_by_role("menu")
    await view.get_by_role("button", name="Ports that listen").click()
    await expect(menu.get_by_role("menuitem", name="the site")).to_be_visible()
    await expect(menu.get_by_role("menuitem", name="8124, only inside the tenant")).to_be_visible()
    assert not await violations(window.page)
    await menu.get_by_role("menuitem", name="8123").click()
    await expect(window.site.get_by_role("link", name="second.html")).to_be_visible()
    await view.get_by_role("button", name="Back").click()
    await window.site_shows("Your site is live.")
    await asyncio.to_thread(run, pages, "pkill -f 'http.server 812[34]' || true")
    await view.get_by_role("button", name="Ports that listen").click()
    await expect(menu).to_be_visible()
    await window.site.get_by_role("heading", name="Your site is live.").click()
    await expect(menu).to_be_hidden()


async def test_what_is_typed_stays_while_the_address_becomes_known(editor: OpenEditor, pages: str) -> None:
    window = await editor(whole=True)
    known = asyncio.Event()

    async def held_back(route: Route) -> None:
        await known.wait()
        await route.continue_()

    await window.page.route(f"**/v1/tenants/{pages}", held_back)
    await window.load_connected()
    address = window.page.get_by_label("Address of the site")
    await address.fill("/pages/second.html")
    await address.press("Enter")
    await expect(address).to_have_value("/pages/second.html")  # there is nothing to go to yet
    known.set()
    await expect(window.page.get_by_role("link", name="Open in a new tab")).to_be_visible()
    await expect(address).to_have_value("/pages/second.html")
    await address.press("Enter")
    await window.site_shows("Second")
