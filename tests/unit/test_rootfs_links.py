"""Workers that pass descriptors: each reaches its caller or is closed, and every end is reported."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.errors import IsADirectory, NotAFile, RateLimited, Timeout, Unavailable
from gateway.rootfs.links import Links
from gateway.rootfs.messages import REPLY_MAX
from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from tests.unit.test_rootfs_workers import PROBES, LaidRoot, folders, make_root
from tests.waits import turn


@pytest.fixture
def root(tmp_path: Path) -> LaidRoot:
    return make_root(tmp_path)


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Workers]:
    async with Workers(Settings(), folders(tmp_path)) as running:
        yield running


@pytest.fixture
async def links(workers: Workers) -> AsyncIterator[Links]:
    async with Links(workers, "", maximum=2, idle=60) as running:
        yield running


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


async def test_a_descriptor_comes_with_its_reply(links: Links, root: LaidRoot) -> None:
    """Concurrent calls each get their own; a refusal has none."""
    site = root.path / "srv" / "site"
    for number in range(8):
        (site / f"{number}").write_text(f"content {number}")
    link = await links.get(root)
    before = descriptors()

    async def read(name: str) -> bytes:
        _, descriptor = await link.call("files/open", {"path": name}, 5)
        assert descriptor is not None
        try:
            assert not os.get_inheritable(descriptor)
            return os.read(descriptor, 100)
        finally:
            os.close(descriptor)

    async def refused() -> None:
        with pytest.raises(IsADirectory):
            await link.call("files/open", {"path": "."}, 5)

    names = [f"{number}" for number in range(8)]
    results = await asyncio.gather(*(read(name) for name in names), refused())
    assert results[:8] == [f"content {name}".encode() for name in names]
    assert descriptors() == before


async def test_a_descriptor_for_nobody_is_closed(links: Links, root: LaidRoot) -> None:
    link = await links.get(root)
    before = descriptors()
    for _ in range(20):
        opening = asyncio.ensure_future(link.call("files/open", {"path": "a.txt"}, 5))
        await turn()
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
    _, descriptor = await link.call("files/open", {"path": "a.txt"}, 5)
    assert descriptor is not None
    assert os.read(descriptor, 100) == b"alpha\n"
    os.close(descriptor)
    assert descriptors() == before


async def test_only_what_is_regular_is_passed(links: Links, root: LaidRoot) -> None:
    """The gateway can only read what it was given, which is never a FIFO or device."""
    site = root.path / "srv" / "site"
    os.mkfifo(site / "pipe")
    link = await links.get(root)
    with pytest.raises(NotAFile):
        await link.call("files/open", {"path": "pipe"}, 30)
    _, descriptor = await link.call("files/open", {"path": "a.txt"}, 5)
    assert descriptor is not None
    with pytest.raises(OSError):
        os.write(descriptor, b"x")
    os.close(descriptor)
    _, descriptor = await link.call("files/create", {"path": "new"}, 5)
    assert descriptor is not None
    with pytest.raises(OSError):
        os.read(descriptor, 1)
    os.close(descriptor)
    await link.call("files/releaseAll", {}, 5)
    assert sorted(path.name for path in site.iterdir()) == ["a.txt", "pipe"]


async def test_every_end_is_told(tmp_path: Path) -> None:
    """A crash or hang gives its callers a clear error and is reported once; then there is a new worker."""
    root = make_root(tmp_path)
    lost: list[str] = []
    async with (
        Workers(Settings(), folders(tmp_path), PROBES) as workers,
        Links(workers, "", maximum=2, idle=60, lost=lost.append) as links,
    ):
        for operation, error, timeout in (("crash", Unavailable, 5.0), ("hang", Timeout, 0.2)):
            link = await links.get(root)
            calls = [link.call(operation, {}, timeout), link.call("echo", {"text": "x"}, 5)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(results[0], error) and isinstance(results[1], Unavailable)
            assert links.current("one") is None
            assert lost.pop() == "one" and not lost
            with pytest.raises(Unavailable):
                await link.call("echo", {"text": "x"}, 5)
        assert (await (await links.get(root)).call("echo", {"text": "hi"}, 5))[0] == b"hi"


async def test_unfinished_uploads_go_with_their_worker(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    site = root.path / "srv" / "site"
    async with (
        Workers(Settings(), folders(tmp_path)) as workers,
        Links(workers, "", maximum=2, idle=60, farewell="files/releaseAll") as links,
    ):
        link = await links.get(root)
        _, descriptor = await link.call("files/create", {"path": "deep/new"}, 5)
        assert descriptor is not None
        os.write(descriptor, b"half")
        os.close(descriptor)
        # Linux 6.10 and later keep it without a name, which goes by itself
        assert len(list(site.iterdir())) <= 2
        links.end("one")
        await links.ended()
        assert [path.name for path in site.iterdir()] == ["a.txt"]


async def test_one_that_is_held_makes_no_room(links: Links, tmp_path: Path) -> None:
    roots = [make_root(tmp_path, f"t{number}") for number in range(3)]
    for root in roots[:2]:
        (await links.get(root)).holds += 1
    with pytest.raises(RateLimited):
        await links.get(roots[2])
    first = await links.get(roots[0])
    first.holds -= 1
    await links.get(roots[2])
    assert first.closed and links.current("t1") is not None


@pytest.mark.parametrize("given", [("much", {"length": REPLY_MAX}), ("litter", {"count": 500})])
async def test_takes_no_more_than_it_asked_for(
    tmp_path: Path, root: LaidRoot, given: tuple[str, dict[str, int]]
) -> None:
    """A compromised worker can fill neither this process's memory nor its descriptor table."""
    async with (
        Workers(Settings(), folders(tmp_path), PROBES) as workers,
        Links(workers, "", maximum=2, idle=60) as links,
    ):
        link = await links.get(root)
        before = descriptors()
        with pytest.raises(Unavailable):
            await link.call(*given, 10)
        assert link.closed and descriptors() <= before
        assert (await (await links.get(root)).call("echo", {"text": "hi"}, 5))[0] == b"hi"


async def test_an_end_wakes_who_is_still_sending(tmp_path: Path) -> None:
    """A request that a worker does not read ends with it, and the loop forgets the socket's number."""
    root = make_root(tmp_path)
    async with (
        Workers(Settings(), folders(tmp_path), PROBES) as workers,
        Links(workers, "", maximum=2, idle=60) as links,
    ):
        link = await links.get(root)
        hung = asyncio.ensure_future(link.call("hang", {}, 60))
        sending = asyncio.ensure_future(link.call("echo", {"text": "x" * (16 << 20)}, 60))
        done, _ = await asyncio.wait([hung, sending], timeout=0.3)
        assert not done and link._sending.locked()
        links.end("one")
        async with asyncio.timeout(30):
            results = await asyncio.gather(hung, sending, return_exceptions=True)
        assert all(isinstance(result, Unavailable) for result in results)
        assert (await (await links.get(root)).call("echo", {"text": "hi"}, 5))[0] == b"hi"


async def test_a_request_that_is_not_taken_in_time_is_a_timeout(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    async with (
        Workers(Settings(), folders(tmp_path), PROBES) as workers,
        Links(workers, "", maximum=2, idle=60) as links,
    ):
        link = await links.get(root)
        hung = asyncio.ensure_future(link.call("hang", {}, 60))
        sending = asyncio.ensure_future(link.call("echo", {"text": "x" * (16 << 20)}, 0.3))
        with pytest.raises(Timeout):
            await sending
        with pytest.raises(Unavailable):
            await hung
