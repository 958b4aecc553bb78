"""The browser editor at work: files, search, terminals, conflicts, deployments, what agents do."""

from __future__ import annotations

import asyncio
import re
from typing import Any, cast

from playwright.async_api import expect

from tests.e2e.conftest import OpenEditor
from tests.e2e.editor import DEADLINE, Editor, violations
from tests.integration import environment
from tests.integration.sites import Hosting
from tests.waits import until

HEADING = "Your site is live."


def run(tenant: str, script: str) -> str:
    """Run a script in the container, without any code of ours."""
    words = ("exec", tenant, "--user=1000", "--group=1000", "--cwd=/srv/site", "-T", "--", "sh", "-c", script)
    return environment.incus(*words).stdout.decode()


async def tool(host: Hosting, tenant: str, name: str, **arguments: object) -> str:
    """Call a tool as an agent that is not the editor; return what it says."""
    status, said, _ = await host.call("POST", f"/v1/tenants/{tenant}/tools/{name}", arguments)
    assert status == 200 and not said["isError"], said
    return str(said["content"][0]["text"])


# --- signing in -----------------------------------------------------------------------------------------


async def test_a_token_in_the_fragment_signs_in_and_leaves_the_address(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    window = await editor(signed_in=False)
    await window.load(f"token={host.gateway.token(site)}&tenant={site}")
    await window.connected()
    assert "token" not in window.page.url
    await expect(window.row("package.json")).to_be_visible()
    assert await window.page.evaluate("document.cookie") == "", "no script can read the cookie"
    kept = await window.page.evaluate("JSON.stringify([localStorage, sessionStorage])")
    assert "eyJ" not in kept, "a token is kept nowhere"
    await window.page.reload()
    await window.connected()


async def test_a_wrong_token_is_told_and_a_right_one_typed_signs_in(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    window = await editor(signed_in=False)
    window.watched.expected.append("401")
    await window.load("")
    field = window.page.get_by_label("Access token")
    await expect(field).to_be_focused()
    await field.fill("not a token")
    await window.page.keyboard.press("Enter")
    await expect(window.page.get_by_role("alert")).to_contain_text("token")
    await field.fill(host.gateway.token(site))
    await window.page.keyboard.press("Enter")
    await window.connected()
    await window.page.get_by_role("button", name="Sign out").click()
    await expect(field).to_be_visible()
    await window.page.reload()
    await expect(field).to_be_visible()


# --- files ----------------------------------------------------------------------------------------------


async def test_a_saved_file_is_in_the_container_and_shows_in_the_preview_without_a_reload(
    editor: OpenEditor, site: str
) -> None:
    """Open, edit, save: the dev server replaces the module in the page that is there."""
    window = await editor(whole=True)
    await window.load_connected()
    await window.site_shows(HEADING)
    frame = window.page.frames[1]
    await frame.evaluate("window.sameAsBefore = true")
    await window.row("src").click()
    await window.row("app.tsx").click()
    await expect(window.text).to_contain_text("export function App")
    before = run(site, "cat src/app.tsx")
    await window.replace_all(before.replace(HEADING, "Saved in the editor."))
    await expect(window.row("app.tsx").get_by_title("Unsaved changes")).to_be_visible()
    await expect(window.page.get_by_label("Close app.tsx, which has unsaved changes")).to_be_attached()
    assert HEADING in run(site, "cat src/app.tsx")
    await window.save()
    await expect(window.page.get_by_label("Close app.tsx", exact=True)).to_be_attached()
    await window.site_shows("Saved in the editor.")
    assert run(site, "cat src/app.tsx") == before.replace(HEADING, "Saved in the editor.")
    assert await frame.evaluate("window.sameAsBefore") is True, "the page was not loaded anew"
    await window.replace_all(before)
    await window.save()
    await window.site_shows(HEADING)


def root(tenant: str, script: str) -> None:
    environment.incus("exec", tenant, "-T", "--", "sh", "-c", script)


async def test_the_preview_waits_for_a_site_that_does_not_answer_and_shows_it_by_itself(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    """When opened, and when loaded again: never a proxy's error, and nobody has to press reload."""
    window = await editor(whole=True)
    waiting = window.page.get_by_role("region", name="Preview of the site").get_by_text("Starting…")
    root(site, "systemctl stop site")
    try:
        await window.load_connected()
        await expect(waiting).to_be_visible()
        _, said, _ = await host.call("GET", f"/v1/tenants/{site}/site")
        assert said == {"answers": False, "status": None}
    finally:
        root(site, "systemctl start site")
    await window.site_shows(HEADING)
    _, said, _ = await host.call("GET", f"/v1/tenants/{site}/site")
    assert said == {"answers": True, "status": 200}
    root(site, "systemctl stop site")
    try:
        await window.page.get_by_role("button", name="Reload the site").click()
        await expect(waiting).to_be_visible()
    finally:
        root(site, "systemctl start site")
    await window.site_shows(HEADING)
    await expect(waiting).to_have_count(0)


async def test_the_tree_reads_folders_when_opened_and_follows_what_others_do(
    editor: OpenEditor, site: str
) -> None:
    window = await editor()
    await window.load_connected()
    await expect(window.row("node_modules")).to_have_attribute("aria-expanded", "false")
    await window.row("public").click()
    await expect(window.row("icon.svg")).to_be_visible()
    run(site, "mkdir public/made && echo hello >public/made/by-others.txt")
    await window.row("made").click()
    await expect(window.row("by-others.txt")).to_be_visible()
    run(site, "mv public/made/by-others.txt public/made/moved.txt")
    await expect(window.row("by-others.txt")).to_have_count(0)
    await window.row("moved.txt").click()
    await expect(window.text).to_have_text("hello")
    run(site, "echo hello again >public/made/moved.txt")
    await expect(window.text).to_have_text("hello again")
    run(site, "rm -r public/made")
    await expect(window.row("made")).to_have_count(0)
    await expect(window.page.get_by_text("This file was deleted. Saving creates it again.")).to_be_visible()


async def test_files_are_made_renamed_and_removed_by_keys_alone(editor: OpenEditor, site: str) -> None:
    window = await editor()
    await window.load_connected()
    await window.row("public").click()
    await expect(window.row("icon.svg")).to_be_visible()
    await window.page.get_by_role("button", name="New file").click()
    await window.page.keyboard.type("fresh.css")
    await window.page.keyboard.press("Enter")
    await expect(window.tab("fresh.css")).to_have_attribute("aria-selected", "true")
    assert run(site, "ls public") == "fresh.css\nicon.svg\n"
    await window.page.get_by_role("tree").focus()
    await window.page.keyboard.press("F2")
    await window.page.keyboard.press("Control+a")
    await window.page.keyboard.type("fresher.css")
    await window.page.keyboard.press("Enter")
    await expect(window.tab("fresher.css")).to_be_visible()
    assert run(site, "ls public") == "fresher.css\nicon.svg\n"
    await window.page.get_by_role("tree").focus()
    await window.page.keyboard.press("Delete")
    await window.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await expect(window.row("fresher.css")).to_have_count(0)
    assert run(site, "ls public") == "icon.svg\n"


async def test_text_is_searched_and_files_and_commands_are_found_by_keys(editor: OpenEditor) -> None:
    """Ctrl-Shift-F by Grep, Ctrl-P by Glob, Ctrl-Shift-P for commands, Ctrl-` for terminals."""
    window = await editor(whole=True)
    await window.load_connected()
    page = window.page
    await page.keyboard.press("Control+Shift+f")
    await expect(page.get_by_label("Search all files")).to_be_focused()
    await page.keyboard.type("useState(")
    found = page.get_by_role("region", name="Search")
    await expect(found.get_by_text(re.compile(r"\d+ lines? in \d+ files?"))).to_be_visible()
    await found.locator(".found-line").first.click()
    await expect(page.locator(".cm-activeLine")).to_contain_text("useState(")
    await page.keyboard.press("Control+p")
    await expect(page.locator("[aria-controls=choices]")).to_be_focused()
    await page.keyboard.type("vitecon")
    await expect(page.get_by_role("option").first).to_contain_text("vite.config.ts")
    await page.keyboard.press("Enter")
    await expect(window.tab("vite.config.ts")).to_have_attribute("aria-selected", "true")
    await expect(page.locator(".status-bar")).to_contain_text("Ln 1,")
    await page.keyboard.press("Control+g")
    await expect(page.locator("[aria-controls=choices]")).to_be_focused()
    await page.keyboard.type("3")
    await page.keyboard.press("Enter")
    await expect(page.locator(".status-bar")).to_contain_text("Ln 3,")
    await expect(page.get_by_role("region", name="Preview of the site")).to_be_visible()
    await page.keyboard.press("Control+Shift+p")
    await expect(page.locator("[aria-controls=choices]")).to_be_focused()
    await page.keyboard.type("hide the preview")
    await expect(page.get_by_role("option").first).to_contain_text("Show or hide the preview")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("region", name="Preview of the site")).to_have_count(0)
    terminals = page.get_by_role("region", name="Terminals")
    await expect(terminals).to_be_visible()
    await page.keyboard.press("Control+`")
    await expect(page.locator(".xterm-helper-textarea")).to_be_focused()
    await page.keyboard.press("Control+`")
    await expect(terminals).to_have_count(0)


_DROP = """([row, name, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name));
  for (const kind of ["dragenter", "dragover", "drop"])
    row.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: data}));
}"""


async def test_files_are_dropped_moved_found_and_replaced_in(editor: OpenEditor, site: str) -> None:
    """And the page stays, whatever is dropped beside the tree."""
    run(site, "mkdir -p public/in")
    window = await editor()
    await window.load_connected(f"{site}/src/app.tsx")
    page = window.page
    await expect(window.text).to_contain_text("export function App")
    await page.keyboard.press("Control+p")
    await page.keyboard.type("uibutt")
    await expect(page.get_by_role("option").first).to_contain_text("button.tsx")
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_have_count(0)
    assert not await window.row("app.tsx").get_by_title("Unsaved changes").count(), "no key went past"

    await page.locator(".editor").evaluate(f"(row) => ({_DROP})([row, 'beside.txt', 'no'])")
    await window.row("public").evaluate(f"(row) => ({_DROP})([row, 'dropped.txt', 'first words'])")
    await expect(page.get_by_text("Uploaded dropped.txt to public")).to_be_visible()
    await window.row("public").evaluate(f"(row) => ({_DROP})([row, 'dropped.txt', 'two words, more words'])")
    asked = page.get_by_role("dialog", name="Replace files")
    await expect(asked).to_be_visible()
    assert not await violations(page)
    await asked.get_by_role("button", name="Replace").click()
    await window.row("public").click()
    await until(lambda: run(site, "cat public/dropped.txt") == "two words, more words")
    await window.row_menu("dropped.txt")
    async with page.expect_download() as downloaded:
        await page.get_by_role("menuitem", name="Download").press("Enter")
    assert (await (await downloaded.value).path()).read_text() == "two words, more words"
    await window.row_menu("in")
    async with page.expect_file_chooser() as chosen:
        await page.get_by_role("menuitem", name="Upload files").press("Enter")
    files = [{"name": f"{name}.txt", "mimeType": "", "buffer": name.encode()} for name in ("a", "b")]
    await (await chosen.value).set_files(cast(Any, files))
    await expect(page.get_by_text("Uploaded 2 files to public/in.")).to_be_visible()
    assert run(site, "cd public/in && cat a.txt b.txt && rm a.txt b.txt") == "ab"
    await window.row("dropped.txt").drag_to(window.row("in"))
    await until(lambda: run(site, "ls public/in") == "dropped.txt\n")

    await window.open_file("public/in/dropped.txt")
    await window.text.click()
    await page.keyboard.press("Control+f")
    await page.keyboard.type("words")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("search").locator(".count")).to_have_text("1 of 2")
    await page.keyboard.press("Escape")
    side = await window.view("Search")
    await side.get_by_label("Search all files").fill("more words")
    await side.get_by_role("button", name="Replace in files").click()
    await side.get_by_label("Replace with").fill("fewer words")
    await expect(side.locator(".found-line")).to_have_count(1)
    await side.get_by_role("button", name="Replace all matches").click()
    await page.get_by_role("dialog").get_by_role("button", name="Replace", exact=True).click()
    await expect(window.text).to_have_text("two words, fewer words")
    assert run(site, "cat public/in/dropped.txt; rm -r public/in") == "two words, fewer words"


# --- conflicts ------------------------------------------------------------------------------------------


async def test_who_was_written_over_meanwhile_compares_and_chooses(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    """An agent writes first: the save is held back, both texts are shown, and either one can win."""
    run(site, "printf 'one\\ntwo\\nthree\\n' >public/notes.txt")
    window = await editor()
    await window.load_connected(f"{site}/public/notes.txt")
    page = window.page
    await expect(window.text).to_contain_text("three")
    await window.replace_all("one\ntwo, as I say\nthree\n")
    told = page.get_by_text("changed lines you are editing.")
    await tool(
        host,
        site,
        "Write",
        file_path="/srv/site/public/notes.txt",
        content="one\ntwo, as the agent says\nthree\n",
    )
    await expect(told).to_be_visible()
    await window.save()
    dialog = page.get_by_role("dialog", name="Conflict in notes.txt")
    await expect(dialog.get_by_label("Theirs, as the file is now")).to_contain_text("as the agent says")
    await expect(dialog.get_by_label("Mine, to be saved")).to_contain_text("as I say")
    assert "as the agent says" in run(site, "cat public/notes.txt"), "nothing was overwritten unasked"
    await dialog.get_by_role("button", name="Decide later").click()
    await expect(told).to_be_visible()
    await page.get_by_role("button", name="Compare and choose").click()
    await dialog.get_by_role("button", name="Save mine").click()
    await expect(dialog).to_have_count(0)
    await expect(told).to_have_count(0)
    await expect(page.get_by_label("Close notes.txt", exact=True)).to_be_attached()  # saved
    assert run(site, "cat public/notes.txt") == "one\ntwo, as I say\nthree\n"

    await window.replace_all("mine again\n")
    await tool(host, site, "Write", file_path="/srv/site/public/notes.txt", content="theirs again\n")
    await expect(told).to_be_visible()
    await window.save()
    await dialog.get_by_role("button", name="Take theirs").click()
    await expect(window.text).to_have_text("theirs again")
    await expect(page.get_by_label("Close notes.txt", exact=True)).to_be_attached()
    assert run(site, "cat public/notes.txt; rm public/notes.txt") == "theirs again\n"


# --- terminals ------------------------------------------------------------------------------------------


async def test_a_full_screen_program_follows_the_window_and_survives_a_reload(
    editor: OpenEditor, site: str
) -> None:
    window = await editor()
    await window.load_connected()
    page = window.page
    await window.prompt()
    await window.command("nano src/app.tsx")
    await expect(window.screen).to_contain_text("GNU nano")
    await expect(window.screen).to_contain_text("lucide-react")
    small = len(await drawn(window, site))
    await page.set_viewport_size({"width": 1200, "height": 1000})
    assert len(await drawn(window, site)) == small  # what it gains is the text's
    edge = await page.get_by_role("separator", name="Height of the terminals").bounding_box()
    assert edge is not None
    await page.mouse.move(edge["x"] + 200, edge["y"])
    await page.mouse.down()
    await page.mouse.move(edge["x"] + 200, edge["y"] - 130)
    await page.mouse.up()
    before = await drawn(window, site, more_than=small)
    await page.reload()
    await window.connected()

    async def same_as_before() -> None:
        assert await window.screen_rows() == before

    await window.until(same_as_before)
    await page.locator(".screen-host:not([hidden])").click()
    await page.keyboard.press("Control+x")
    await window.prompt()
    await window.command("stty size | tr ' ' x")
    await expect(window.screen).to_contain_text(re.compile(rf"{len(before)}x\d+"))


async def drawn(window: Editor, site: str, more_than: int = 0) -> list[str]:
    """Return nano's screen once it has over so many rows, all of them drawn, and nano knows of them."""
    found: list[str] = []

    async def whole() -> None:
        rows = await window.screen_rows()
        assert len(rows) > more_than and re.search(r"\^X\s*Exit", rows[-1] + rows[-2])
        size = ("sh", "-c", "stty size -F /dev/$(ps -o tty= -C nano)")  # as root: it is the command's alone
        told = await asyncio.to_thread(environment.incus, "exec", site, "--", *size)
        assert int(told.stdout.split()[0]) == len(rows)
        assert await window.screen_rows() == rows, "more of it came meanwhile"
        found[:] = rows

    await window.until(whole)
    return found


async def test_two_windows_share_one_terminal(editor: OpenEditor) -> None:
    """What is typed in either shows in both, and it is one shell."""
    first, second = await editor(), await editor()
    await first.load_connected()
    await first.prompt()
    await first.command("mine=value-of-$((40 + 2)); echo pid-$$")
    await expect(first.screen).to_contain_text(re.compile(r"pid-\d+"))
    (pid,) = re.findall(r"pid-(\d+)", "\n".join(await first.screen_rows()))
    await second.load_connected()
    await second.prompt()
    await second.page.get_by_role("button", name="Show a terminal that runs elsewhere").click()
    # by its number: what another test's window has just left may still count as viewed
    await second.page.get_by_role("menuitem").filter(has_text=f"pid {pid}, 1 viewer").click()
    await expect(second.screen).to_contain_text("value-of-")  # attached: what is typed before goes nowhere
    await second.command("echo this is $mine")
    await expect(second.screen).to_contain_text("this is value-of-42")
    await expect(first.screen).to_contain_text("this is value-of-42")
    await first.command("echo and $mine back")
    await expect(second.screen).to_contain_text("and value-of-42 back")


async def test_cancel_ends_everything_that_a_terminal_started(editor: OpenEditor, site: str) -> None:
    window = await editor()
    await window.load_connected()
    await window.prompt()
    await window.command("(setsid sleep 4711 &) ; sleep 4711 & trap '' TERM; echo started; sleep 4711")
    await expect(window.screen).to_contain_text("\nstarted".strip())
    await expect_count(site, 3)
    await window.page.get_by_role("button", name="New terminal").click()
    await expect(window.page.get_by_role("tab", name="bash 2")).to_be_visible()
    await window.page.get_by_role("tab", name="bash 1").click()
    await window.page.get_by_role("button", name="Cancel: end the command").click()
    await expect(window.screen).to_contain_text("The command was cancelled.")
    assert run(site, "pgrep -fc '^sleep 4711' || true") == "0\n"
    await window.page.get_by_role("tab", name="bash 2").click()
    await window.prompt()


async def expect_count(site: str, number: int) -> None:
    await until(lambda: run(site, "pgrep -fc '^sleep 4711' || true") == f"{number}\n", DEADLINE / 1000)


# --- what others do -------------------------------------------------------------------------------------


async def test_what_an_agent_does_shows_as_it_happens(editor: OpenEditor, host: Hosting, site: str) -> None:
    window = await editor()
    await window.load_connected()
    activity = await window.view("Activity")
    await tool(host, site, "Grep", pattern="agent-was-here")
    await expect(activity.get_by_text("agent-was-here")).to_be_visible()
    await activity.get_by_role("button", name="Follow").click()
    await tool(host, site, "Write", file_path="/srv/site/public/agent.txt", content="by an agent\n")
    await expect(window.text).to_have_text("by an agent")
    bash = asyncio.create_task(
        tool(host, site, "Bash", command="echo begun; until [ -e go ]; do sleep 0.1; done")
    )
    running = activity.get_by_role("button").filter(has_text="echo begun")
    await expect(running.get_by_label("Running")).to_be_visible()
    await running.click()
    await expect(window.screen).to_contain_text("begun")
    run(site, "touch go")
    await bash
    await expect(running.get_by_label("Running")).to_have_count(0)
    # what has ended can be looked at, too
    await window.page.reload()
    await window.connected()
    activity = await window.view("Activity")
    await activity.get_by_role("button").filter(has_text="echo begun").click()
    await expect(window.screen).to_contain_text("begun")
    run(site, "rm go public/agent.txt")


async def test_a_turn_of_an_agent_is_looked_at_and_taken_back_by_keys(
    editor: OpenEditor, host: Hosting, site: str
) -> None:
    async with host.gateway.wire(site) as wire:
        for text in ("one\n", "two\n"):
            await wire.call("turn/begin", title=f"Write {text}", agent="Claude")
            given = {"file_path": "public/turn.txt", "content": text}
            await wire.call("tools/call", name="Write", arguments=given)
        window = await editor()
        await window.load_connected()
        history = await window.view("History")
        await wire.call("turn/end")
        turn = history.get_by_role("listitem").filter(has_text="Write two")
        await turn.get_by_role("button").first.focus()
        await window.page.keyboard.press("Enter")
        await expect(turn.get_by_label("What changed")).to_contain_text("+two")
        await turn.get_by_role("button", name="Undo this turn").focus()
        await window.page.keyboard.press("Enter")
        await expect(history.get_by_text("Undo: Write two")).to_be_visible()
        assert run(site, "cat public/turn.txt") == "one\n"
    run(site, "rm public/turn.txt")


async def test_a_deployment_is_watched_to_its_end_and_its_site_opened(
    editor: OpenEditor, host: Hosting
) -> None:
    window = await editor(whole=True)
    await window.load_connected()
    deploy = await window.view("Deploy")
    await deploy.get_by_placeholder("shop.example.com").fill("news.localhost")
    await deploy.get_by_role("radio", name="talkative").check()
    await deploy.get_by_role("button", name="Deploy", exact=True).click()
    card = deploy.get_by_role("article", name="Deployment of news.localhost")
    log = card.get_by_role("log")
    await expect(log).to_contain_text("step 1 is done")
    await expect(card.locator("[data-phase=install]")).to_have_class(re.compile("running"))
    await expect(card.get_by_role("button", name="Cancel")).to_be_visible()
    run("news-localhost", "touch go-on")
    await expect(log).to_contain_text("step 2 is done")
    await expect(card.get_by_text("Live")).to_be_visible(timeout=2 * DEADLINE)
    await expect(card.locator(".phase.done")).to_have_count(8)
    await card.get_by_role("button", name="Open news-localhost").click()
    await expect(window.page.locator(".tenant-switch", has_text="news-localhost")).to_be_visible()
    await expect(window.site.get_by_text("News of today")).to_be_visible()
    await expect(window.page.get_by_text("There was a failure")).to_have_count(0)

    await deploy.locator("summary", has_text="Environment").click()
    await deploy.get_by_label("Name of the variable").fill("GREETING")
    await deploy.get_by_label("Value of the variable").fill("hello")
    await deploy.get_by_role("button", name="Set", exact=True).click()
    back = deploy.get_by_role("button", name="Go back")
    await expect(back).to_be_enabled(timeout=2 * DEADLINE)
    await expect(deploy.get_by_label("This site").get_by_role("listitem").first).to_contain_text(
        re.compile("Live.*Environment: GREETING")
    )
    await back.click()
    await window.page.get_by_role("dialog").get_by_role("button", name="Go back").click()
    await expect(deploy.get_by_label("This site").get_by_role("listitem").first).to_contain_text(
        re.compile("Live.*Rollback"), timeout=2 * DEADLINE
    )
    await deploy.locator("summary", has_text="Clone or destroy").click()
    await deploy.get_by_label("Clone to a new tenant").fill("news-copy")
    await deploy.get_by_role("button", name="Clone", exact=True).click()
    await expect(window.page.get_by_text("news-copy was created.")).to_be_visible(timeout=2 * DEADLINE)
    await window.page.locator(".tenant-switch").click()
    await expect(window.page.get_by_role("option").filter(has_text="news-copy")).to_be_visible()
    assert not await violations(window.page)
    await window.page.keyboard.press("Escape")
    assert run("news-copy", "ls go-on") == "go-on\n"
    assert (await host.call("DELETE", "/v1/tenants/news-copy"))[0] == 204
    await deploy.get_by_role("button", name="Destroy news-localhost").click()
    asked = window.page.get_by_role("dialog", name="Destroy news-localhost?")
    await expect(asked.get_by_role("button", name="Destroy")).to_be_disabled()
    assert not await violations(window.page)
    await asked.get_by_role("textbox").fill("news-localhost")
    await asked.get_by_role("button", name="Destroy").click()
    await expect(window.page.locator(".tenant-switch", has_text="shop")).to_be_visible()
    await window.page.locator(".tenant-switch").click()
    await window.page.get_by_role("option").filter(has_text="shop").click()
    await window.site_shows(HEADING)


async def test_a_deployment_that_fails_says_why_and_what_was_undone(editor: OpenEditor) -> None:
    window = await editor()
    await window.load_connected()
    deploy = await window.view("Deploy")
    await deploy.get_by_placeholder("shop.example.com").fill("broken.localhost")
    await deploy.get_by_role("radio", name="broken").check()
    await deploy.get_by_role("button", name="Deploy", exact=True).click()
    card = deploy.get_by_role("article", name="Deployment of broken.localhost")
    await expect(card.get_by_role("log")).to_contain_text("no such thing")
    await expect(card.get_by_role("alert")).to_contain_text(
        "Everything it did was undone.", timeout=2 * DEADLINE
    )
    await expect(card.locator("[data-phase=install]")).to_have_class(re.compile("failed"))


async def test_metrics_are_drawn_and_the_log_of_the_site_is_followed(editor: OpenEditor, site: str) -> None:
    window = await editor()
    await window.load_connected()
    view = await window.view("Metrics and logs")
    await expect(view.get_by_label(re.compile(r"Memory: \d+(\.\d)? [KMG]B"))).to_be_visible()
    await expect(view.get_by_label(re.compile(r"Processor: [\d.]+ %"))).to_be_visible()
    log = view.get_by_role("log", name="Log of the site")
    await expect(log).to_contain_text("5173")
    run(site, "touch src/app.tsx")
    await expect(log).to_contain_text("hmr update /src/app.tsx")
    await view.get_by_label("Filter the log").fill("no line has this")
    await expect(view.get_by_text("No line contains this")).to_be_visible()
