"""The Python client as others install it: its wheel alone and with each extra, with nothing else there.

For the night, since it needs PyPI. Every public method is called against a live gateway: what a method needs
and the package does not ask for is an `ImportError` of that method.
"""

from __future__ import annotations

import sys
import tomllib
import venv
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.test_claude_newest import run
from tests.live import LiveGateway, local_gateway

CLIENT = Path(__file__).parents[2] / "clients" / "python"
EXTRAS = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

# Arguments by the name of a parameter. They need not make sense: a refusal is an answer, too.
PROGRAM = '''
import asyncio, inspect, sys, tempfile
from pathlib import Path
import gateway_client
from gateway_client import Client, GatewayError, sync

url, token, extra = sys.argv[1:]
GIVEN = {
    "name": "Read", "arguments": {"file_path": "a"}, "path": "a.txt", "content": "x", "old": "x", "new": "y",
    "pattern": "x", "command": "echo one", "shell_id": "none", "exec_id": "none", "domain": "x.localhost",
    "template": Path(tempfile.mkdtemp()), "source": "a.txt", "target": "b.txt", "body": b"x", "size": "small",
    "turn": "0" * 40, "snapshot": "s1", "tenant": "other", "data": b"x", "cols": 80, "rows": 24,
    "signal": "INT", "method": "GET", "changes": {"A": "b"}, "deployment_id": "none", "token_id": "none",
}
LAST = ("close", "delete", "stop", "sleep", "restart", "rename", "resize")


def arguments(method):
    for name, one in inspect.signature(method).parameters.items():
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD:
            if name == "path" and method.__qualname__ == "Client.http":
                yield "/v1/tenants"
            else:
                yield GIVEN[name]


async def used(made, first=()):
    """Use what a method returned as its reader would, for a moment."""
    if inspect.isawaitable(made):
        made = await made
    if hasattr(made, "__aenter__"):
        async with made as entered:
            if hasattr(entered, "__aiter__"):
                await asyncio.wait_for(anext(aiter(entered)), 0.2)
            return entered
    if hasattr(made, "__anext__"):
        await asyncio.wait_for(anext(made), 0.2)
        await made.aclose()
    return made


def methods(thing):
    names = [name for name in dir(thing) if not name.startswith("_") and callable(getattr(thing, name))]
    return sorted(names, key=lambda name: (name in LAST, name))


async def every(thing, label):
    for name in methods(thing):
        if name == "close":
            continue
        method = getattr(thing, name)
        try:
            async with asyncio.timeout(20):
                await used(method(*arguments(method)))
        except (GatewayError, TimeoutError, StopAsyncIteration, ValueError) as refused:
            print(label, name, "refused", type(refused).__name__)
        else:
            print(label, name, "done")


async def main():
    async with Client(url, token=token) as client:
        shop = client.tenant("shop")
        await every(shop.files, "files")
        async with shop.exec("cat; echo over", stdin=True) as command:
            await every(command, "exec")
        async with client.events(tenant="shop"):
            pass
        if extra == "claude":
            from gateway_client import claude

            claude.options(shop, on_output=print), claude.server(shop)
        if extra == "anthropic":
            from gateway_client import anthropic

            async with anthropic.bash(client.tenant("shop")):
                anthropic.text_editor(shop), await anthropic.tools(shop)
        await every(client.deployment("none"), "deployment")
        await every(client, "client")
        await every(shop, "tenant")


def blocking():
    with sync.Client(url, token=token) as client:
        shop = client.tenant("shop")
        for thing, label in ((shop.files, "sync files"), (client, "sync client"), (shop, "sync tenant")):
            for name in methods(thing):
                if name in LAST or name in ("watch", "events"):
                    continue
                method = getattr(thing, name)
                try:
                    made = method(*arguments(method))
                    if hasattr(made, "__enter__"):
                        with made:
                            pass
                except (GatewayError, ValueError) as refused:
                    print(label, name, "refused", type(refused).__name__)


for name in gateway_client.__all__:
    getattr(gateway_client, name)
blocking()
asyncio.run(main())
'''


@pytest.fixture(scope="module")
async def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    await run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=CLIENT)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path / "state", "shop")
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("extra", ["", *EXTRAS])
async def test_every_method_has_what_it_needs(
    extra: str, wheel: Path, gateway: LiveGateway, tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    asked = f"{wheel}[{extra}]" if extra else str(wheel)
    await run(python, "-m", "pip", "install", "--quiet", asked)
    (tmp_path / "program.py").write_text(PROGRAM)
    token = gateway.token("shop", "other")
    printed = await run(python, "-I", "program.py", gateway.url, token, extra, cwd=tmp_path)
    assert printed.count(" done") > 25, printed
