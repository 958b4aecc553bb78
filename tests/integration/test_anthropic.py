"""The Messages API's own client with tools of a real tenant: `tool_runner`, a scripted model."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anthropic
import pytest
from PIL import Image

from gateway.settings import Settings
from gateway_client import Client, Tenant
from gateway_client.anthropic import bash, text_editor, tools
from tests.contracts.processes import Tree, mark
from tests.integration.conftest import Container
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway
from tests.messages import Block, Model, Result, model, use
from tests.waits import until

EDITOR = "str_replace_based_edit_tool"


@pytest.fixture(scope="module")
async def gateway(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("anthropic")
    async with live(incus_settings, folder / "gateway.log", GATEWAY_CANCEL_GRACE="0.5") as gateway:
        yield gateway


@pytest.fixture
async def shop(gateway: LiveGateway, shared_tenant: Container) -> AsyncIterator[Tenant]:
    async with Client(gateway.url, token=gateway.token(shared_tenant.name)) as client:
        yield client.tenant(shared_tenant.name)


async def run(given: Sequence[Any], *turns: Sequence[Block], scripted: Model | None = None) -> Model:
    """Let the scripted model say its turns to the real runner."""
    async with asyncio.timeout(60), model(*turns) as scripted:
        async with anthropic.AsyncAnthropic(
            base_url=scripted.url, api_key="scripted", max_retries=0
        ) as client:
            runner = client.beta.messages.tool_runner(
                model="claude-opus-5",
                max_tokens=1000,
                tools=list(given),
                messages=[{"role": "user", "content": "go"}],
                thread=False,
            )
            said = await runner.until_done()
        assert said.content[0].type == "text" and said.content[0].text == "done"
        return scripted


async def answers(given: Sequence[Any], *calls: Block) -> list[Result]:
    scripted = await run(given, *([call] for call in calls))
    return [scripted.result(call) for call in calls]


async def test_the_eight_tools_are_the_gateways(shop: Tenant) -> None:
    """Schemas, texts, errors and images; a text is a text block, and what fails is marked so."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(data, "PNG")
    await shop.files.write("api/p.png", data.getvalue(), create_dirs=True)
    calls = [
        use("Write", file_path="api/a.txt", content="one\ntwo\n"),
        use("Edit", file_path="api/a.txt", old_string="two", new_string="three"),
        use("Read", file_path="api/a.txt"),
        use("Bash", command="cd api; cat a.txt; exit 3"),
        use("Read", file_path="api/p.png"),
        use("Read", file_path="api/none"),
    ]
    scripted = await run(await tools(shop), *([call] for call in calls))
    said = [scripted.result(call) for call in calls]
    listed = {tool["name"]: tool for tool in scripted.requests[0]["tools"]}
    assert {name: tool["input_schema"] for name, tool in listed.items()} == {
        tool["name"]: tool["inputSchema"] for tool in await shop.tools()
    }
    assert "created successfully" in said[0].text and "updated successfully" in said[1].text
    assert said[2].text == "1\tone\n2\tthree\n3\t"
    assert (said[3].is_error, said[3].text) == (True, "Exit code 3\none\nthree")
    (image,) = said[4].others
    assert image["source"]["media_type"] == "image/png"
    assert said[5].is_error and "File does not exist" in said[5].text


async def test_the_apis_text_editor_is_exact(shop: Tenant) -> None:
    name = f"edit-{mark()}"
    path = f"/srv/site/{name}/a.txt"
    said = await answers(
        [text_editor(shop, max_characters=10_000)],
        use(EDITOR, command="create", path=path, file_text="one\ntwo\ntwo\nfour\n"),
        use(EDITOR, command="view", path=path),
        use(EDITOR, command="view", path=path, view_range=[2, -1]),
        use(EDITOR, command="str_replace", path=path, old_str="two", new_str="x"),
        use(EDITOR, command="str_replace", path=path, old_str="two\nf", new_str="three  \nF"),
        use(EDITOR, command="insert", path=path, insert_line=0, insert_text="zero"),
        use(EDITOR, command="insert", path=path, insert_line=9, insert_text="x"),
        use(EDITOR, command="str_replace", path=path, old_str="none", new_str="x"),
        use(EDITOR, command="view", path=f"/srv/site/{name}"),
        use(EDITOR, command="view", path=f"{name}/none"),
        use(EDITOR, command="view", path="/etc/passwd"),
        use(EDITOR, command="undo_edit", path=path),
    )
    assert said[0].text == f"File created successfully at: {path}"
    assert "     1\tone\n     2\ttwo\n     3\ttwo\n     4\tfour\n     5\t\n" in said[1].text
    assert "\n     2\ttwo" in said[2].text and "\tone" not in said[2].text
    assert said[3].is_error and "Multiple occurrences of old_str `two` in lines [2, 3]" in said[3].text
    assert "     3\tthree  \n     4\tFour" in said[4].text
    assert "     1\tzero\n     2\tone" in said[5].text
    assert said[6].is_error and "[0, 5]" in said[6].text
    assert said[7].is_error and "did not appear verbatim" in said[7].text
    assert f"/srv/site/{name}/a.txt\n" in said[8].text
    assert said[9].is_error and "does not exist" in said[9].text
    assert said[10].is_error and "root" not in said[10].text
    assert said[11].is_error and "Unrecognized command" in said[11].text
    assert (await shop.files.read(path)).text == "zero\none\ntwo\nthree  \nFour\n"


async def test_the_apis_bash_is_one_shell(shop: Tenant) -> None:
    """Variables, folders and functions last; what a command prints or reads cannot end or feed it."""
    async with bash(shop) as shell:
        said = await answers(
            [shell],
            use("bash", command="cd /tmp && X='a b' && f() { echo f-$X; }"),
            use("bash", command="pwd; f; echo err >&2; false"),
            use("bash", command='read line; echo "got <$line>"; cat'),
            use("bash", command="cat <<'END'\nit's\nEND"),
            use("bash", command="if"),
            use("bash", command="printf %s no-newline"),
            use("bash", command="seq 1 500000"),
            use("bash", command="exit 4"),
            use("bash", command="echo ${X:-gone}"),
            use("bash", restart=True),
            use("bash"),
        )
    texts = [one.text for one in said]
    assert texts[0] == "" and texts[1] == "/tmp\nf-a b\nerr\n(exit code 1)"
    assert texts[2] == "got <>" and texts[3] == "it's"
    assert "syntax error" in texts[4] and "(exit code" in texts[4]
    assert texts[5] == "no-newline"
    assert len(texts[6]) < 31_000 and texts[6].startswith("1\n2\n") and texts[6].endswith("499999\n500000")
    assert "3358894 characters truncated" in texts[6]
    assert "(the shell ended with exit code 4" in texts[7] and texts[8] == "gone"
    assert texts[9] == "tool has been restarted."
    assert said[10].is_error and texts[10] == "no command provided."


async def test_a_command_of_bash_that_takes_too_long_or_is_given_up_leaves_nothing(shop: Tenant) -> None:
    late, cancelled, left = Tree(), Tree(), Tree()
    async with bash(shop, timeout=2) as shell:
        said = await answers([shell], use("bash", command=late.script), use("bash", command="echo on"))
        assert said[0].is_error and "timed out" in said[0].text
        assert late.alive() == 0
        assert said[1].text == "on"
    async with bash(shop) as shell:
        running = asyncio.create_task(run([shell], [use("bash", command=cancelled.script)]))
        await cancelled.grown()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert cancelled.alive() == 0
        script = f"sleep {left._mark} >/dev/null 2>&1 & setsid sleep {left._mark} >/dev/null 2>&1 &"
        await shell.call({"command": script})
        await until(lambda: left.alive() == 2)
    assert left.alive() == 0


async def test_a_change_by_others_is_not_overwritten(shop: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    await shop.files.write("shared.txt", "mine\n")
    real = shop.files.read

    async def read(path: str) -> Any:
        content = await real(path)
        await shop.files.write("shared.txt", "mine\ntheirs\n")
        return content

    monkeypatch.setattr(shop.files, "read", read)
    edit = use(EDITOR, command="str_replace", path="shared.txt", old_str="mine", new_str="ours")
    (said,) = await answers([text_editor(shop)], edit)
    assert said.is_error and "changed by others" in said.text
    assert (await real("shared.txt")).text == "mine\ntheirs\n"
