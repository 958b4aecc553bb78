"""What an update removes of a workspace: what the new folder lacks, but for what it says to keep."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.deployments.archive import folders_above
from gateway.deployments.template import uploaded
from gateway.errors import InvalidParams, Timeout, TooLarge
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.root import Root
from gateway.rootfs.worker import Workspace
from gateway.settings import Settings
from gateway.tools import mirroring
from gateway.tools.mirroring import KEPT, LOST, OPERATIONS, listed
from tests.archives import Member, archive, link

SETTINGS = Settings(runtime="local", state_dir=Path("/nowhere"))


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "live"
    folder.mkdir()
    yield folder


def put(live: Path, *paths: str) -> None:
    for path in paths:
        place = live / path.rstrip("/")
        if path.endswith("/"):
            place.mkdir(parents=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(path)


def told(live: Path, operation: str, given: dict[str, Any], **limits: Any) -> list[str]:
    descriptor = os.open(live, os.O_RDONLY | os.O_DIRECTORY)
    tree = Root(descriptor, "/srv/site")
    try:
        reply = OPERATIONS[operation](Workspace(tree, CallLimits(**limits)), given)
    finally:
        tree.close()
    assert isinstance(reply, bytes)
    return [os.fsdecode(name) for name in reply.split(b"\0")[:-1]]


def lost(live: Path, given: dict[str, Any], **limits: Any) -> list[str]:
    found = told(live, LOST, given, **limits)
    assert all(name.startswith("-") for name in found)
    return [name[1:] for name in found]


def new(*members: Member, keep: str = "", clean: bool = True) -> dict[str, Any]:
    manifest = f'start = ["x"]\nkeep = [{keep}]\n'.encode()
    return uploaded(archive(*members, manifest=manifest)).stays(clean=clean)


def deployed(live: Path, *paths: str, at: float = 0) -> None:
    """Deploy a folder with these paths."""
    put(live, *paths)
    path, content = listed([*paths, *folders_above(paths)])
    (live / path).parent.mkdir(parents=True, exist_ok=True)
    (live / path).write_bytes(content)
    os.utime(live / path, (at, at))


def test_what_the_folder_lacks_is_lost(live: Path) -> None:
    """A folder of which nothing stays goes as one; what is left out of every folder stays at any depth."""
    put(live, "a", "b", "old/deep/x", "old/y", "src/kept", "src/gone", "empty/", "site.toml")
    put(live, "node_modules/m/x", "src/node_modules/m", ".git/HEAD", ".gateway/output/1", "src/.gateway/x")
    found = lost(live, new(("a", b""), ("src/kept", b"")))
    assert found == ["b", "empty", "old", "src/.gateway", "src/gone"]


def test_what_is_of_another_kind_gives_way(live: Path) -> None:
    put(live, "was-folder/x", "was-file", "was-link-target")
    (live / "was-link").symlink_to("was-link-target")
    members = (("was-folder", b""), ("was-file/x", b""), ("was-link/x", b""), link("a-link", "was-folder"))
    put(live, "a-link")  # tar itself replaces a file by a link
    assert lost(live, new(*members)) == ["was-file", "was-folder", "was-link", "was-link-target"]


def test_ignore_files_of_the_new_folder_say_what_stays(live: Path) -> None:
    """As git takes them: the last rule, the innermost file; nothing comes back from a folder that is out."""
    put(
        live,
        "x.log",
        "keep.log",
        "deep/y.log",
        "deep/z.txt",
        "build/a",
        "sub/own",
        "sub/x.log",
        "sub/build/b",
    )
    put(live, "data/db", ".env", "rooted/cache/x", "cache/x")
    ignore = b"*.log\n!keep.log\n/build/\n.env\n/cache\n# data\n"
    inner = b"own\n!x.log\n"
    given = new((".gitignore", ignore), ("sub/.gitignore", inner), ("a", b""))
    found = lost(live, given)
    assert found == ["data", "deep/z.txt", "keep.log", "rooted", "sub/build", "sub/x.log"]


def test_the_manifest_says_what_stays(live: Path) -> None:
    put(live, "data/a/b", "uploads/1.jpg", "uploads/2.txt", "x/data/y", "other")
    given = new(keep='"data/", "uploads/*.jpg"')
    assert lost(live, given) == ["other", "uploads/2.txt"]
    assert told(live, KEPT, given) == ["data", "uploads/1.jpg", "x/data"]


def test_what_the_folder_brings_along_is_not_carried_over(live: Path) -> None:
    put(live, "data/seed", "data/mine", "data/more/x")
    given = new(("data/seed", b"new"), keep='"data/"')
    assert lost(live, given) == []
    assert told(live, KEPT, given) == ["data/mine", "data/more"]


def test_links_are_not_followed(live: Path, tmp_path: Path) -> None:
    put(tmp_path, "outside/x")
    (live / "away").symlink_to("../outside")
    (live / "self").symlink_to(".")
    assert lost(live, new()) == ["away", "self"]


def test_what_no_deployed_folder_had_stays(live: Path) -> None:
    """A database that the site wrote, and a folder of uploads; what was deployed goes."""
    deployed(live, "app.py", "old.py", "src/a.py", "src/b.py", "gone/c.py", "seed.db")
    put(live, "data.db", "uploads/deep/1.jpg", "src/notes.db", "gone/log.txt", ".next/cache/x", "dist/x.js")
    given = new(("app.py", b""), ("src/a.py", b""), clean=False)
    assert told(live, LOST, given) == [
        *("-.next", "-dist", "-gone/c.py", "-old.py", "-seed.db", "-src/b.py"),
        *("+data.db", "+gone/log.txt", "+src/notes.db", "+uploads/"),
    ]
    assert told(live, KEPT, given) == ["./data.db", "./gone/log.txt", "./src/notes.db", "./uploads"]
    cleaned = {".next", "data.db", "dist", "gone", "old.py", "seed.db", "src/b.py", "src/notes.db", "uploads"}
    assert set(lost(live, {**given, "clean": True})) == cleaned


def test_each_folder_that_was_deployed_counts(live: Path) -> None:
    """After a rollback, too: the lists stay with the live site."""
    deployed(live, "first.py", at=1)
    deployed(live, "second.py", at=2)
    put(live, "written")
    assert told(live, LOST, new(clean=False)) == ["-first.py", "-second.py", "+written"]


def test_a_site_of_which_nothing_is_known_loses_nothing(live: Path) -> None:
    put(live, "a", "b/c", "both/d")
    assert told(live, LOST, new(("both/e", b""), clean=False)) == ["+a", "+b/", "+both/d"]


def test_what_was_written_gives_way_to_another_kind(live: Path) -> None:
    deployed(live, "a")
    put(live, "folder/written", "file")
    given = new(("folder", b""), ("file/x", b""), clean=False)
    assert told(live, LOST, given) == ["-a", "-file", "-folder"]


def test_ignored_files_stay_and_are_not_carried_over(live: Path) -> None:
    deployed(live, "a")
    put(live, "x.log", "logs/y.log", "written")
    given = new((".gitignore", b"*.log\n"), clean=False)
    assert told(live, LOST, given) == ["-a", "+logs/", "+written"]
    assert told(live, KEPT, given) == ["./logs", "./written"]


def test_hostile_lists_are_bounded(live: Path) -> None:
    """Links, pipes, folders and large files in their place; too many are removed, oldest first."""
    for number in range(40):
        deployed(live, f"f{number}", at=number)
    lists = live / ".gateway/deployed"
    os.mkfifo(lists / "pipe")
    (lists / "link").symlink_to("/etc/passwd")
    (lists / "folder").mkdir()
    (lists / "large").write_bytes(os.urandom(16 << 20))
    os.utime(lists / "large", (0, 0))
    began = time.monotonic()
    found = told(live, LOST, new(clean=False))
    assert time.monotonic() - began < 10
    surplus = [name for name in found if name.startswith("-.gateway/deployed/")]
    assert len(surplus) == 41 - 32 and "-.gateway/deployed/large" in surplus
    assert {name for name in found if name.startswith("-f")} == {f"-f{number}" for number in range(8, 40)}
    for path in lists.iterdir():
        if path.is_file():
            path.unlink()
    assert {name[0] for name in told(live, LOST, new(clean=False))} == {"+"}


def test_a_list_that_changes_while_it_is_read_is_bounded(live: Path) -> None:
    os.mkfifo(live / "pipe")
    (live / "large").write_bytes(bytes(100))
    tree = Root(os.open(live, os.O_RDONLY | os.O_DIRECTORY), "/srv/site")
    try:
        assert mirroring._content(tree, "pipe", 8) == b""
        assert mirroring._content(tree, "large", 8) == bytes(8)
    finally:
        tree.close()


@pytest.mark.parametrize("keep", ['"["', '""', '"a\\nb"', f'"{"x" * 257}"', ", ".join(['"x"'] * 65), "1"])
def test_what_cannot_be_kept_is_refused(keep: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        new(keep=keep)
    assert caught.value.facts["reason"] == "template_invalid"
    assert "keep" in caught.value.message


def test_it_is_bounded(live: Path) -> None:
    """In what it looks at, in time, in what it returns, and whatever the patterns are."""
    for number in range(300):
        put(live, f"{'a' * 200}-{number}")
    given = new()
    with pytest.raises(TooLarge):
        lost(live, given, visit_max=100)
    with pytest.raises(Timeout):
        lost(live, given, tool_timeout=0.0)
    hostile = new((".gitignore", b"*a*a*a*a*a*a*a*a*b\n" * 3000), keep='"*a*a*a*a*a*a*a*a*a*a*c"')
    began = time.monotonic()
    assert len(lost(live, hostile)) == 300
    assert time.monotonic() - began < 10
