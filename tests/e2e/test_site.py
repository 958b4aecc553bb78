"""What can be done with a site in the view *Deploy*: its snapshots, its domain, publishing."""

from __future__ import annotations

import pytest
from playwright.async_api import Locator, expect

from tests.e2e.conftest import OpenEditor
from tests.e2e.editor import DEADLINE, Editor
from tests.e2e.test_editor import run
from tests.integration.sites import Hosting


@pytest.fixture(scope="module")
def site(desk: str) -> str:
    return desk


async def opened(editor: OpenEditor, part: str) -> tuple[Editor, Locator]:
    """Open the view with one of its parts."""
    window = await editor()
    await window.load_connected()
    await window.view("Deploy")
    here = window.page.get_by_label("This site")
    await here.locator("summary", has_text=part).click()
    return window, here


async def agreed(window: Editor, question: str, answer: str) -> None:
    dialog = window.page.get_by_role("dialog", name=question)
    await dialog.get_by_role("button", name=answer).click()
    await expect(dialog).to_have_count(0)


async def test_a_snapshot_is_taken_restored_and_deleted(editor: OpenEditor, site: str) -> None:
    window, here = await opened(editor, "Snapshots")
    await here.get_by_label("New snapshot").fill("before")
    await here.get_by_role("button", name="Take").click()
    row = here.get_by_role("listitem").filter(has_text="before")
    await expect(row).to_be_visible()
    run(site, "rm README.md")
    await expect((await window.view("Files")).get_by_text("README.md")).to_have_count(0)
    await window.view("Deploy")
    await here.locator("summary", has_text="Snapshots").click()
    await row.get_by_role("button", name="Restore").click()
    await agreed(window, "Restore before?", "Restore")
    await expect(here.get_by_text("Restoring before")).to_have_count(0, timeout=2 * DEADLINE)
    await window.connected()
    await window.view("Files")
    await expect(window.row("README.md")).to_be_visible()
    await window.view("Deploy")
    await here.locator("summary", has_text="Snapshots").click()
    await here.get_by_role("button", name="Delete before").click()
    await agreed(window, "Delete before?", "Delete")
    await expect(row).to_have_count(0)


async def test_a_site_changes_its_domain_and_is_published(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    window, here = await opened(editor, "Domain")
    domain = here.get_by_label("Domain", exact=True)
    try:
        await domain.fill("renamed.localhost")
        await here.get_by_role("button", name="Change").click()
        await expect(here.locator("summary", has_text="renamed.localhost")).to_be_visible()
        await host.answers("renamed.localhost", 200, "<h1>A desk, in the making</h1>")
    finally:
        await domain.fill("desk.localhost")
        await here.get_by_role("button", name="Change").click()
    await host.answers("desk.localhost")

    await here.get_by_label("Publish to").fill("public.localhost")
    await here.get_by_role("button", name="Publish", exact=True).click()
    card = window.page.get_by_role("article", name="Deployment of public.localhost")
    await expect(card.get_by_text("Live")).to_be_visible(timeout=2 * DEADLINE)
    await host.answers("public.localhost", 200, "<h1>A desk, published</h1>")
    assert (await host.call("DELETE", "/v1/tenants/public-localhost"))[0] == 204
