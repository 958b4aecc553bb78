"""What a folder holds that needs an answer, what is read of an old service, which way visitors come."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.host import HostError
from gateway.migration import source
from gateway.migration.destination import mapped
from gateway.migration.plan import FolderContents, MigrationPlan, Moving, Wanted, decided, keys, scan
from gateway.migration.source import Old, Owner, Unit, bus_label, in_tenant, own_block
from gateway.runtime.incus.records import FOLDER, MIGRATION_STATE, OLD, old_service
from gateway.runtime.sizes import size_of
from gateway.settings import Settings

FOLDER_ = Path("/srv/sites/shop")
OLD_SERVICE = Old(("/usr/bin/node", "x.js"), FOLDER_, 1000, (7,), "127.0.0.1", 3333, {"TOKEN": "hush"})


def test_a_folder_is_looked_through_and_nothing_is_followed(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "node_modules/x").mkdir(parents=True)
    for name in ("a.txt", ".env", ".env.example", "deploy.pem", "node_modules/x/bind.node", "left/inner"):
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text("x")
    (site / "out").symlink_to("/etc/passwd")
    (site / "up").symlink_to("../elsewhere")
    (site / "in").symlink_to("a.txt")
    (site / "full").symlink_to(site / "a.txt")
    (site / "loop").symlink_to("loop")
    os.mkfifo(site / "pipe")
    (site / "a.txt").chmod(0o4000)
    (site / "bad\x1bname").symlink_to("/x")
    os.mknod(site / "sock", stat.S_IFSOCK | 0o666)
    found = scan(site, frozenset({"left"}))
    assert sorted(found.out.first) == ["bad\x1bname", "out", "up"]
    assert "\x1b" not in str(found.out)
    assert sorted(found.special.first) == ["pipe", "sock"]
    assert sorted(found.secret.first) == [".env", "deploy.pem"]
    assert found.native.first == ["node_modules/x/bind.node"]
    assert found.setuid.first == found.unreadable.first == ["a.txt"]
    assert found.foreign.count == found.mounts.count == 0
    assert "left/inner" not in str(found.to_dict())


@pytest.mark.parametrize(
    ("words", "started", "wanted"),
    [
        (("/root/.bun/bin/bun", "run", "dev"), FOLDER_, ("bun", "run", "dev")),
        (("/srv/sites/shop/bin/run", "x"), FOLDER_, ("/srv/sites/shop/bin/run", "x")),
        (("vite", "--host", "127.0.0.1"), FOLDER_, ("vite", "--host", "0.0.0.0")),
        (("vite", "--host=localhost"), FOLDER_, ("vite", "--host=0.0.0.0")),
        (("x", "http://localhost/a", "--api=http://127.0.0.1:1"), FOLDER_, None),
        (("node", "x.js"), Path("/"), ("node", "x.js")),
        (
            ("node", "x.js"),
            FOLDER_ / "user",
            ("/usr/bin/env", "--chdir=/srv/site/user", "node", "x.js"),
        ),
    ],
)
def test_a_command_of_the_host_becomes_one_of_the_tenant(
    words: tuple[str, ...], started: Path, wanted: tuple[str, ...] | None
) -> None:
    assert in_tenant(words, started, FOLDER_, "/srv/site") == (wanted or words)


def plan(
    old: Old = OLD_SERVICE, found: FolderContents | None = None, owner: int = 1000, size: str = "small"
) -> MigrationPlan:
    asked = Wanted(FOLDER_, "shop.service", size=size)
    owner_, settings = Owner(owner, owner), Settings(tenant_disk="4GiB")
    parts = ("shop", "shop.example.com", asked, old, found or FolderContents(), owner_, settings)
    return decided(*parts, own_block=False)


@pytest.mark.parametrize(
    ("user", "owner", "read_only"), [(1000, 1000, False), (0, 0, True), (0, 1000, True), (33, 1000, True)]
)
def test_the_tenant_writes_where_the_old_service_did_alone(user: int, owner: int, read_only: bool) -> None:
    """Who is root on the host, or another than the folder's owner, runs nothing that the tenant wrote."""
    old = Old(OLD_SERVICE.words, FOLDER_, user, (7,), "127.0.0.1", 3333, {})
    assert plan(old, owner=owner).read_only is read_only


def test_what_stands_in_the_way_is_said_with_what_to_do() -> None:
    found = FolderContents(size=5 << 30)
    found.unreadable.add("private")
    found.mounts.add("data")
    made = plan(found=found)
    told = "\n".join(made.stops)
    for words in ("--size medium", "private", "--leave", "mounted at data"):
        assert words in told
    assert not plan(found=FolderContents(size=5 << 30), size="medium").stops
    low = Old(("x",), FOLDER_, 1000, (7,), "127.0.0.1", 80, {})
    assert "port 80" in plan(low).stops[0]


def test_no_value_of_a_variable_is_told() -> None:
    made = plan()
    said = "\n".join([*made.lines(), str(made.to_dict())])
    assert "TOKEN" in said and "hush" not in said


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2 << 30), ("512MB", 512_000_000), ("7", 7), ("", 0)])
def test_sizes_are_read_as_incus_writes_them(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize(
    ("config", "target"),
    [
        ({MIGRATION_STATE: "attached", OLD: "127.0.0.1:3333"}, "127.0.0.1:3333"),
        ({MIGRATION_STATE: "returning", OLD: "127.0.0.1:3333", FOLDER: "/x"}, "127.0.0.1:3333"),
        ({MIGRATION_STATE: "switching", OLD: "127.0.0.1:3333"}, None),
        ({MIGRATION_STATE: "switched", OLD: "127.0.0.1:3333"}, None),
        ({OLD: "127.0.0.1:3333"}, None),
        *(
            ({MIGRATION_STATE: "copied", OLD: odd}, None)
            for odd in ("", "x:1", "1.2.3:4", "127.0.0.1:70000", "999.0.0.1:1")
        ),
    ],
)
def test_a_domain_leads_to_the_old_service_until_the_switch(
    config: dict[str, str], target: str | None
) -> None:
    found = old_service(config)
    assert (None if found is None else found.target) == target


@pytest.mark.parametrize(
    ("host", "handler", "own"),
    [
        ("shop.example.com", {"dial": "localhost:3333"}, True),
        ("*.example.com", {"dial": "localhost:3333"}, True),
        ("other.example.com", {"dial": "localhost:3333"}, False),
        ("*.example.com", {"root": "/routes"}, False),
    ],
)
def test_a_block_that_goes_before_the_routes_is_seen(host: str, handler: dict[str, str], own: bool) -> None:
    routes = [{"match": [{"host": [host]}], "handle": [handler]}, {}]
    running = {"apps": {"http": {"servers": {"a": {"routes": routes}}}}}
    assert own_block(running, "shop.example.com", "/routes") is own
    assert own_block(None, "shop.example.com", "/routes") is False


def test_a_unit_that_does_not_run_is_refused() -> None:
    with pytest.raises(HostError, match="is not running"):
        source.of_unit(Unit(0, (), True), "shop.service", None)


def test_a_process_is_found_by_where_it_was_started_and_listens(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no listening service"):
        source.of_folder(tmp_path, None)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        found = source.of_unit(Unit(os.getpid(), ("a", "b c"), True), "shop.service", port)
    assert (found.words, found.address, found.port) == (("a", "b c"), "127.0.0.1", port)
    assert "PATH" not in found.environment and found.uid == os.geteuid()
    with pytest.raises(HostError, match="with --port"):
        source.of_unit(Unit(os.getpid(), (), True), "shop.service", 1)


# says that it listens, and ends with its input
LISTENS = """
import socket, sys
listening = socket.create_server(("127.0.0.1", 0))
print(flush=True)
sys.stdin.read()
"""
# starts a command as a shell at a terminal does, in a process group of its own
STARTS = "import subprocess, sys; subprocess.run(sys.argv[1:], process_group=0)"


@contextlib.contextmanager
def running(folder: Path, *words: str) -> Iterator[int]:
    """Run something in a folder that comes to listen."""
    with subprocess.Popen(words, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid


@pytest.mark.parametrize("wrapped", ["{}", "{}; echo ended", "cd . && {} && echo ended"])
def test_a_shell_around_a_server_is_paused_with_it_and_not_started_in_the_tenant(
    tmp_path: Path, wrapped: str
) -> None:
    server = (sys.executable, "-c", LISTENS)
    with running(tmp_path, "sh", "-c", wrapped.format(shlex.join(server))) as shell:
        found = source.of_folder(tmp_path, None)
    assert found.words == server
    assert shell in found.pids


def test_a_shell_that_does_more_than_start_a_server_is_the_service(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(f"{shlex.join((sys.executable, '-c', LISTENS))}; echo ended")
    with running(tmp_path, "sh", "run.sh") as shell:
        found = source.of_folder(tmp_path, None)
    assert found.words == ("sh", "run.sh")
    assert found.pids[0] == shell
    two = f"sleep 60 & {shlex.join((sys.executable, '-c', LISTENS))}; kill $!"
    with running(tmp_path, "sh", "-c", two):
        found = source.of_folder(tmp_path, None)
    assert found.words == ("sh", "-c", two)


def test_the_terminal_that_a_server_was_started_at_is_no_part_of_it(tmp_path: Path) -> None:
    server = (sys.executable, "-c", LISTENS)
    with running(tmp_path, sys.executable, "-c", STARTS, *server) as terminal:
        found = source.of_folder(tmp_path, None)
    assert found.words == server
    assert terminal not in found.pids


def test_who_migrates_is_no_part_of_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be paused with the service, for good."""
    monkeypatch.chdir(tmp_path)
    server = (sys.executable, "-c", LISTENS)
    with running(tmp_path, *server) as pid:
        found = source.of_folder(tmp_path, None)
    assert (found.words, found.pids) == (server, (pid,))


def test_bus_paths_are_spelled_as_systemd_does() -> None:
    assert bus_label("site@shop-1.service") == "site_40shop_2d1_2eservice"
    assert bus_label("1a") == "_31a"


def test_the_ids_of_the_workspaces_user_come_from_the_instance() -> None:
    line = '{"Isuid":%s,"Isgid":%s,"Hostid":1065536,"Nsid":0,"Maprange":65536}'
    config = {"volatile.idmap.next": f"[{line % ('true', 'false')},{line % ('false', 'true')}]"}
    assert mapped(config, 1000) == Owner(1066536, 1066536)
    with pytest.raises(HostError):
        mapped({"volatile.idmap.next": "[]"}, 1000)


def test_the_next_run_knows_all_of_the_one_before() -> None:
    asked = Wanted(FOLDER_, None, install=("bun", "install"), leave=("data",), env=("A",), size="medium")
    owner = Owner(1000, 1001)
    made = decided(
        "shop", "shop.example.com", asked, OLD_SERVICE, FolderContents(), owner, Settings(), own_block=False
    )
    config = keys(made)
    assert config["limits.memory"] and "hush" not in str(config)
    moving = Moving.of("shop", config)
    assert (moving.recipe, moving.owner, moving.folder) == (made.recipe, owner, FOLDER_)
    assert (moving.unit, moving.leave, moving.env, moving.read_only) == (None, ("data",), ("A",), False)
    assert (moving.state, moving.listens) == ("attaching", ("127.0.0.1", 3333))
