"""The client without asyncio, against a whole gateway with the local runtime."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

import gateway_client
from gateway_client import Disconnected, errors, sync
from gateway_client.sync import Client, Tenant
from tests.contracts.processes import Tree
from tests.live import LiveGateway, local_gateway
from tests.waits import until_true

PAIRS = [
    (getattr(gateway_client, name), getattr(sync, name))
    for name in ("Client", "Deployment", "EventStream", "Exec", "Files", "Output", "Tenant", "Watch")
]
# a `with` closes here; bare requests and what a connection calls are for who awaits
NOT_HERE = {"close", "http", "stream", "session", "request", "frame", "notified", "broken", "room"}


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path_factory.mktemp("sync"), "shop")
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0


@pytest.fixture
def client(gateway: LiveGateway) -> Iterator[Client]:
    with Client(gateway.url, token=gateway.token("shop")) as client:
        yield client


@pytest.fixture
def shop(client: Client) -> Tenant:
    return client.tenant("shop")


def gone(tree: Tree, deadline: float = 20) -> bool:
    until_true(lambda: tree.alive() == 0, deadline)
    return True


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=lambda one: one.__module__)
def test_whatever_the_other_can_do_can_be_done_here(theirs: type, ours: type) -> None:
    names = {name for name in dir(theirs) if not name.startswith("_")} - NOT_HERE
    assert names <= {name for name in dir(ours) if not name.startswith("_")}


def test_tools_wait_and_fail_with_their_types(client: Client, shop: Tenant) -> None:
    assert [info.name for info in client.tenants()] == ["shop"]
    shop.write("s/a.txt", "one\ntwo\n")
    shop.edit("s/a.txt", "two", "three")
    assert "three" in shop.read("s/a.txt").text
    assert shop.grep("thr", "s", output_mode="content").text == "s/a.txt:2:three"
    assert shop.state == "connected"
    failed = shop.bash("cd s && echo out; exit 3")
    assert (failed.exit_code, failed.status, failed.text) == (3, "failed", "Exit code 3\nout")
    with pytest.raises(errors.NotFound):
        shop.read("none")
    with pytest.raises(errors.NotFound, match="No shell found"):
        shop.bash_output("none")
    assert shop.files.read("s/a.txt").text == "one\nthree\n"
    assert shop.run(["cat"], stdin="in").stdout == "in"


def test_a_command_in_the_background_is_followed_and_killed(shop: Tenant) -> None:
    tree = Tree()
    begun = shop.bash(tree.script, background=True)
    assert (begun.status, begun.exit_code) == ("running", None)
    assert begun.shell_id is not None
    shell = begun.shell_id

    def ready() -> bool:
        seen = shop.bash_output(shell)
        assert seen.status == "running"
        return "ready" in seen.text

    until_true(ready)
    shop.kill_shell(begun.shell_id)
    assert tree.alive() == 0
    assert shop.bash_output(begun.shell_id).status == "killed"


def test_commands_files_and_events_are_plain_iterators(client: Client, shop: Tenant) -> None:
    with client.events(tenant="shop", types="file.*") as events, shop.files.watch() as watch:
        with shop.exec(["cat"], stdin=True) as cat:
            cat.write(b"one")
            assert next(iter(cat.stdout)) == b"one"
            cat.close_stdin()
            assert list(cat.output()) == []
            assert cat.wait().code == 0
        shop.write("plain.txt", "x")
        assert next(iter(events)).data["path"] == "plain.txt"
        changes = [path for path, _ in next(iter(watch)).changes]
        assert "plain.txt" in changes
    shop.files.upload("large", b"x" * 3_000_000)
    assert sum(map(len, shop.files.download("large"))) == 3_000_000
    for chunk in shop.files.download("large"):
        assert chunk
        break


def test_leaving_a_command_ends_it(shop: Tenant) -> None:
    tree = Tree()
    with pytest.raises(ZeroDivisionError), shop.exec(tree.script) as command:
        while b"ready" not in next(iter(command.stdout)):
            pass
        raise ZeroDivisionError
    assert gone(tree)


def test_an_interrupt_ends_what_is_waited_for(shop: Tenant) -> None:
    """Ctrl-C in the middle of a tool call: its whole tree goes, and the client goes on."""
    tree = Tree()

    def interrupt() -> None:
        until_true(lambda: tree.alive() == Tree.SIZE)
        os.kill(os.getpid(), signal.SIGINT)

    waiting = threading.Thread(target=interrupt, daemon=True)
    waiting.start()
    with pytest.raises(KeyboardInterrupt):
        shop.bash(tree.script)
    waiting.join()
    assert gone(tree)
    assert shop.bash("echo on").text == "on"


def test_several_threads_share_a_client(shop: Tenant) -> None:
    said: list[str] = []
    threads = [
        threading.Thread(target=lambda n=number: said.append(shop.bash(f"echo {n}").text))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(said) == [str(number) for number in range(6)]


def test_outside_its_with_a_client_says_so(gateway: LiveGateway) -> None:
    client = Client(gateway.url, token=gateway.token("shop"))
    with pytest.raises(Disconnected, match="inside its `with`"):
        client.tenants()
    with client:
        assert len(client.tenants()) == 1
    with pytest.raises(Disconnected, match="inside its `with`"):
        client.tenant("shop").ping()
    assert not [thread for thread in threading.enumerate() if thread.name == "gateway_client"]
