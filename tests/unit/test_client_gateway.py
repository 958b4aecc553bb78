"""The client against a whole gateway with the local runtime, over a unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.auth import tokens
from gateway_client import Client, Disconnected, Exit, GatewayError, Retry, Tenant, errors
from tests.waits import until

ROOT = Path(__file__).parents[2]
SECRET = "s" * 32
RETRY = Retry()
SCOPES = ("files:read", "files:write", "exec", "events", "deploy")


def environment(folder: Path) -> dict[str, str]:
    """Return what a gateway of this folder is started with."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")},
        "GATEWAY_CONFIG": "/nonexistent",
        "GATEWAY_RUNTIME": "local",
        "GATEWAY_LISTEN": str(folder / "socket"),
        "GATEWAY_STATE_DIR": str(folder / "state"),
        "GATEWAY_SECRET": SECRET,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "clients/python"))),
    }


@contextlib.asynccontextmanager
async def serving(
    folder: Path, retry: Retry | None = RETRY
) -> AsyncIterator[tuple[Client, asyncio.subprocess.Process]]:
    """Run `incus-gateway serve` with one tenant; end it by SIGTERM, which must be orderly."""

    async def run(*arguments: str) -> asyncio.subprocess.Process:
        with (folder / "log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gateway", *arguments),
                stdout=log,
                stderr=log,
                env=environment(folder),
            )

    async with asyncio.timeout(90):
        assert await (await run("create", "shop")).wait() == 0, (folder / "log").read_text()
        if os.geteuid() == 0:  # file workers refuse to be root, and they are who owns the files
            for path in (folder / "state" / "tenants").rglob("*"):
                os.chown(path, 1000, 1000)
        server = await run("serve")
        try:
            token = tokens.issue(SECRET, "test", ["shop"], SCOPES, 600)
            async with Client(f"unix:{folder}/socket", token=token, retry=retry) as client:

                async def up() -> bool:  # nobody tells when a socket begins to answer
                    assert server.returncode is None, (folder / "log").read_text()
                    with contextlib.suppress(GatewayError):
                        await client.http("GET", "/readyz")
                        return True
                    return False

                await until(up, 60, every=0.05)
                yield client, server
        finally:
            if server.returncode is None:
                server.send_signal(signal.SIGTERM)
            assert await server.wait() == 0, (folder / "log").read_text()


@pytest.fixture(scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Client]:
    async with serving(tmp_path_factory.mktemp("client")) as (client, _):
        yield client


@pytest.fixture
def shop(client: Client) -> Tenant:
    return client.tenant("shop")


async def test_what_is_too_large_for_the_wire_is_refused_and_harms_nothing_else(shop: Tenant) -> None:
    """The gateway closes the socket of who sends too large a frame; all that shares it would end with it."""
    await shop.ping()
    other = asyncio.create_task(shop.bash("sleep 1; echo still here"))
    for work in (
        shop.files.write("big.bin", bytes(13 << 20)),  # base64 makes it larger than 16 MiB
        shop.write("big.txt", "ä" * (9 << 20)),
    ):
        with pytest.raises(errors.TooLarge, match="at once") as refused:
            await work
        assert refused.value.facts["limit"] == 16 << 20
    assert (await other).text == "still here"
    await shop.files.upload("big.bin", bytes(13 << 20))
    assert (await shop.files.stat("big.bin")).size == 13 << 20


async def test_files_commands_and_events(client: Client, shop: Tenant) -> None:
    """One session as the README shows it: write, read, run, watch."""
    assert [info.name for info in await client.tenants()] == ["shop"]
    async with client.events(tenant="shop", types=["exec.*", "file.*"]) as stream:
        await shop.write("notes/a.txt", "one\ntwo\n")
        assert "two" in (await shop.read("notes/a.txt")).text
        await shop.edit("notes/a.txt", "two", "three")
        async with shop.exec("cat notes/a.txt; echo oops >&2; exit 3") as run:
            assert await run.stdout.read() == b"one\nthree\n"
            assert await run.stderr.read() == b"oops\n"
            ended = await run.wait()
        assert (ended.code, ended.reason) == (3, "exited")
        seen = [(await anext(stream)).type for _ in range(4)]
    assert seen == ["file.written", "file.written", "exec.started", "exec.exited"]
    with pytest.raises(errors.NoMatch):
        await shop.edit("notes/a.txt", "two", "four")
    ran = await shop.run("cat", stdin="hello")
    assert (ran.stdout, ran.exit_code) == ("hello", 0)


async def test_files_as_an_editor_has_them(shop: Tenant) -> None:
    """Etags, bytes of any size and kind, and a watch that tells what others do."""
    files = shop.files
    etag = await files.write("a b%25/ü.bin", b"\xff\0", create_dirs=True, new=True)
    assert (await files.read("a b%25/ü.bin")).data == b"\xff\0"
    with pytest.raises(errors.Conflict) as caught:
        await files.write("a b%25/ü.bin", "x", new=True)
    assert caught.value.facts["etag"] == etag
    large = os.urandom(1 << 20) * 9
    async with files.watch() as changes:
        now = await files.upload("a b%25/ü.bin", large, if_match=etag)
        told = await anext(changes)
        assert list(told.changes) == [("a b%25/ü.bin", "changed")] and not told.overflow
        assert b"".join([chunk async for chunk in files.download("a b%25/ü.bin")]) == large
        tail = b"".join([chunk async for chunk in files.download("a b%25/ü.bin", start=len(large) - 5)])
        assert tail == large[-5:]
    with pytest.raises(errors.Conflict):
        await files.upload("a b%25/ü.bin", b"", if_match=etag)
    with pytest.raises(errors.TooLarge):
        await files.read("a b%25/ü.bin")
    assert (await files.move("a b%25", "b")).type == "directory"
    assert (await files.stat("b/ü.bin")).etag == now
    entries, cut = await files.list(depth=2)
    assert {entry.path for entry in entries} >= {"b", "b/ü.bin"} and not cut
    await files.mkdir("b/c/d")
    await files.remove("b", recursive=True)
    with pytest.raises(errors.NotFound):
        await files.read("b/ü.bin")


async def test_pressure_detaching_and_the_end(shop: Tenant) -> None:
    async with shop.exec(["head", "-c", "30000000", "/dev/zero"]) as slow:
        await anext(slow.stdout)
        async with shop.exec("echo other") as other:  # is not held up
            assert await other.stdout.read() == b"other\n"
        rest = sum([len(chunk) async for chunk in slow.stdout])
        assert 0 < rest < slow.stdout.offset == 30_000_000
        assert (await slow.wait()).code == 0
    async with shop.exec(["cat"], stdin=True) as echo:
        await echo.write(b"before ")
        assert await anext(echo.stdout) == b"before "
        await echo.detach()
    async with shop.attach(echo.id, stdout=echo.stdout.offset) as again:
        await again.write(b"after")
        await again.close_stdin()
        assert await again.stdout.read() == b"after"
        assert (await again.wait()).code == 0
    async with shop.exec("sleep 600 & echo ready; sleep 600") as left:
        assert await anext(left.stdout) == b"ready\n"
    (told,) = [entry for entry in await shop.execs() if entry["exec"] == left.id]
    assert (told["state"], told["exit"]["reason"]) == ("ended", "cancelled")


async def test_text_comes_in_whole_characters(shop: Tenant) -> None:
    async with shop.exec(["cat"], stdin=True, encoding="utf-8") as echo:
        text, seen = "aé€😀" * 10, ""
        for byte in text.encode():
            await echo.write(bytes([byte]))
        await echo.close_stdin()
        async for chunk in echo.stdout:
            seen += chunk.decode()
        assert seen == text
        async with shop.attach(echo.id, encoding="utf-8") as again:
            assert [chunk.decode() async for chunk in again.stdout] == [text]


async def test_refusals_have_their_types(client: Client, shop: Tenant) -> None:
    with pytest.raises(errors.ExecFailed):
        async with shop.exec(["/no/such/program"]):
            pytest.fail("never entered")
    with pytest.raises(errors.NotFound):
        await client.tenant("blog").ping()
    with pytest.raises(errors.NotFound):
        await client.tenant("blog").info()
    with pytest.raises(errors.OutsideWorkspace):
        await shop.read("../../../etc/passwd")
    async with Client(f"unix:{client.address.unix}", token="wrong") as stranger:
        with pytest.raises(errors.Unauthorized):
            await stranger.tenants()
        with pytest.raises(errors.Unauthorized):
            await stranger.tenant("shop").ping()
        with pytest.raises(errors.Unauthorized):
            async for _ in stranger.events():
                pytest.fail("there was none")


async def test_a_gateway_that_ends_says_so_to_everybody(tmp_path: Path) -> None:
    async with serving(tmp_path, retry=None) as (client, server):
        shop = client.tenant("shop")
        async with client.events(types="gateway.draining") as stream:
            async with shop.exec("echo up; sleep 600") as run:
                assert await anext(run.stdout) == b"up\n"
                server.send_signal(signal.SIGTERM)
                ended: Exit | None = None
                with contextlib.suppress(Disconnected, errors.Unavailable):
                    ended = await run.wait()
                assert ended is None or ended.reason == "cancelled"
            assert [event.type async for event in stream] == ["gateway.draining"]


async def test_the_command_line_finds_a_gateway_on_a_unix_socket(tmp_path: Path) -> None:
    async with serving(tmp_path):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "list", "--json"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment(tmp_path),
        )
        said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, said.decode()
    assert b'"shop"' in said
