"""Workers end in every possible way, each costing one call a clear error."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.errors import InvalidParams, NotFound, RateLimited, Timeout, TooLarge, Unavailable
from gateway.rootfs import FilesystemRoot, IdMap
from gateway.rootfs.locations import Folders
from gateway.rootfs.messages import REPLY_MAX
from gateway.rootfs.worker import NAMED_MAX
from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import FileTools
from tests.unit import test_rootfs_probes as probes
from tests.waits import Gate, turn, until

PROBES = "tests.unit.test_rootfs_probes"
# what picks a worker of its own
LANES: list[dict[str, Any]] = [
    {},
    {"search": True},
    {"search": True, "share": 1},
    {"search": True, "changes": True},
]
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="confinement needs root; the local runtime has none")


MAPPED = os.getuid() == 0  # then tenants have ids of their own, as in a container
USER = 1000 if MAPPED else os.getuid()


@dataclass(frozen=True, slots=True)
class LaidRoot(FilesystemRoot):
    """A tenant created by a test, with the host path of its `/`, which the gateway does not know."""

    path: Path = Path("/")


def folders(home: Path, below: str = "") -> Mapping[str, Any]:
    """Return a description of the tenants that `make_root` created in `home`."""
    idmap = (IdMap(True, True, 0, 1_000_000, 65_536),)
    return Folders(str(home), below, 1000, idmap).to_dict() if MAPPED else Folders(str(home), below).to_dict()


def make_root(folder: Path, tenant: str = "one") -> LaidRoot:
    """Return a tenant's root in `folder`, with mapped ids where this process is root."""
    site = folder / tenant / "srv" / "site"
    site.mkdir(parents=True)
    (site / "a.txt").write_text("alpha\n")
    if MAPPED:
        for path in (site, site / "a.txt"):
            os.chown(path, USER, USER)
    return LaidRoot(tenant, "/srv/site", path=folder / tenant)


@pytest.fixture
def root(tmp_path: Path) -> LaidRoot:
    return make_root(tmp_path)


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Workers]:
    async with Workers(Settings(tool_timeout=30), folders(tmp_path), PROBES) as running:
        yield running


@pytest.fixture
async def hasty(tmp_path: Path) -> AsyncIterator[Workers]:
    """Workers with a short timeout, for operations that hang."""
    async with Workers(Settings(tool_timeout=0.5), folders(tmp_path), PROBES) as running:
        yield running


async def echo(workers: Workers, root: FilesystemRoot, text: str = "hi", **options: Any) -> str:
    return (await workers.call(root, "echo", {"text": text}, **options)).decode()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def children_of(pid: int) -> list[int]:
    """Return a process's children, none if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def workers_below(broker: int) -> list[int]:
    """Return a broker's workers, except those forked in advance, which are root's until they get a tenant."""
    found = []
    for child in children_of(broker):
        with suppress(FileNotFoundError, ProcessLookupError):
            if "\nUid:\t0\t" not in Path(f"/proc/{child}/status").read_text():
                found.append(child)
    return found


async def gone(pid: int) -> None:
    """Wait until the process has ended, which takes only a moment."""
    await until(lambda: not alive(pid), 20, every=0.005)


async def pid_of(workers: Workers, root: FilesystemRoot, **options: Any) -> int:
    """Return the worker's pid. It has no pid namespace of its own."""
    return int(await workers.call(root, "pid", {}, **options))


async def test_answers(workers: Workers, root: FilesystemRoot) -> None:
    """A worker answers call after call, also with megabytes in both directions."""
    assert await echo(workers, root) == "hi"
    large = "é" * 4_000_000
    assert await echo(workers, root, large) == large
    assert await pid_of(workers, root) == await pid_of(workers, root)


@pytest.mark.parametrize("operation", ["crash", "segfault", "bug", "eat"])
async def test_crash_costs_one_call(workers: Workers, root: FilesystemRoot, operation: str) -> None:
    """Whatever breaks a worker, its caller gets `unavailable`, and the next call is answered."""
    await echo(workers, root)
    with pytest.raises(Unavailable) as caught:
        await workers.call(root, operation, {})
    assert "secret" not in caught.value.message
    assert await echo(workers, root) == "hi"


async def test_crash_spares_those_who_wait(workers: Workers, root: FilesystemRoot) -> None:
    """Of concurrent calls, only the one that crashed its worker fails."""
    results = await asyncio.gather(
        echo(workers, root, "1"),
        workers.call(root, "crash", {}),
        echo(workers, root, "2"),
        echo(workers, root, "3"),
        return_exceptions=True,
    )
    assert [results[0], *results[2:]] == ["1", "2", "3"]
    assert isinstance(results[1], Unavailable)


async def test_alone(hasty: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant is alone while no other's worker is in use, and again soon after that."""
    one, two = make_root(tmp_path, "alone"), make_root(tmp_path, "beside")
    await echo(hasty, one)
    assert hasty.alone("alone")
    asking = asyncio.ensure_future(hasty.call(two, "hang", {}))
    await turn()
    assert not hasty.alone("alone")
    with pytest.raises(Timeout):
        await asking
    await echo(hasty, two)
    assert not hasty.alone("alone")
    monkeypatch.setattr("gateway.rootfs.workers._ALONE", -1.0)
    assert hasty.alone("alone")


async def test_hang_is_killed(hasty: Workers, root: FilesystemRoot) -> None:
    """A worker that passes its deadline is killed: `timeout`, and the next call is answered."""
    pid = await pid_of(hasty, root)
    with pytest.raises(Timeout):
        await hasty.call(root, "hang", {})
    assert await echo(hasty, root) == "hi"
    await gone(pid)


async def test_hang_holds_up_no_other(workers: Workers, tmp_path: Path) -> None:
    """While a search hangs, the same tenant's file calls and other tenants' calls are answered."""
    one, two = make_root(tmp_path, "busy"), make_root(tmp_path, "other")
    gate = Gate(one.path / "srv/site")
    hanging = asyncio.ensure_future(workers.call(one, "hold", {}, search=True))
    await gate.reached()
    assert await echo(workers, one) == "hi"
    assert await echo(workers, two) == "hi"
    assert await echo(workers, two, search=True) == "hi"
    assert not hanging.done()
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_cancelled_call_leaves_no_reply_behind(workers: Workers, root: LaidRoot) -> None:
    """After a cancelled call, the next one gets its own answer, not that of the cancelled one."""
    gate = Gate(root.path / "srv/site")
    for _ in range(3):
        slow = asyncio.ensure_future(workers.call(root, "hold", {"text": "old"}))
        await gate.reached()
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        asked = asyncio.ensure_future(echo(workers, root, "new"))
        await turn()
        gate.open()
        assert await asked == "new"


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_cancelled_start_leaves_no_worker_behind(workers: Workers, tmp_path: Path, times: int) -> None:
    """A worker whose caller was cancelled, however often, does not go to the next tenant."""
    one, two = make_root(tmp_path, "first"), make_root(tmp_path, "second")
    (two.path / "srv/site/b.txt").touch()
    call = asyncio.ensure_future(workers.call(one, "names", {}))
    await until(lambda: workers.broker._readable is not None, every=0)
    for _ in range(times):
        call.cancel()
        await turn()
    assert orjson.loads(await workers.call(two, "names", {})) == ["a.txt", "b.txt"]
    with pytest.raises(asyncio.CancelledError):
        await call
    assert orjson.loads(await workers.call(one, "names", {})) == ["a.txt"]


async def test_cancelled_scan_leaves_no_worker_behind(workers: Workers, tmp_path: Path) -> None:
    """A search cancelled while its workers start leaves none of them to another tenant."""
    one, two = make_root(tmp_path, "first"), make_root(tmp_path, "second")
    (two.path / "srv/site/b.txt").touch()
    for turns in range(0, 60, 6):
        scan = asyncio.ensure_future(workers.scan(one, {}, 3))
        for _ in range(turns):
            await turn()
        scan.cancel()
        with suppress(asyncio.CancelledError):
            await scan
        assert orjson.loads(await workers.call(two, "names", {})) == ["a.txt", "b.txt"]
        await workers.forget(two.tenant)


async def test_cancelled_search_is_killed(workers: Workers, root: LaidRoot) -> None:
    """A search that nobody waits for does not continue."""
    pid = await pid_of(workers, root, search=True)
    gate = Gate(root.path / "srv/site")
    search = asyncio.ensure_future(workers.call(root, "hold", {}, search=True))
    await gate.reached()
    search.cancel()
    with pytest.raises(asyncio.CancelledError):
        await search
    await gone(pid)
    assert await echo(workers, root, search=True) == "hi"


async def test_refusal_keeps_its_kind(workers: Workers, root: FilesystemRoot) -> None:
    """An operation's refusal arrives as the same error with its facts."""
    with pytest.raises(TooLarge) as caught:
        await workers.call(root, "refuse", {})
    assert caught.value.facts == {"size": 7}


async def test_input_that_is_no_json(workers: Workers, root: FilesystemRoot) -> None:
    """A lone surrogate cannot be sent; it is refused, and the worker stays alive."""
    with pytest.raises(InvalidParams):
        await echo(workers, root, "\ud800")
    assert await echo(workers, root) == "hi"


async def test_forget(workers: Workers, root: FilesystemRoot) -> None:
    """When `forget` returns the tenant's workers are gone; a new call starts new ones."""
    pids = [await pid_of(workers, root), await pid_of(workers, root, search=True)]
    assert len(set(pids)) == 2
    await workers.forget(root.tenant)
    assert not any(map(alive, pids))
    assert await echo(workers, root) == "hi"


async def test_forget_during_a_call(workers: Workers, root: LaidRoot) -> None:
    """A call in flight gets `unavailable` at once."""
    gate = Gate(root.path / "srv/site")
    call = asyncio.ensure_future(workers.call(root, "hold", {}))
    await gate.reached()
    await workers.forget(root.tenant)
    with pytest.raises(Unavailable):
        await call


async def test_forget_with_many_waiting(workers: Workers, root: FilesystemRoot) -> None:
    """Waiting and later calls still share one worker, and none is left behind."""
    calls = [asyncio.ensure_future(pid_of(workers, root)) for _ in range(5)]
    await turn()
    for turns in (0, 1, 30):  # before the broker is asked for one, while it is, and in between
        await workers.forget(root.tenant)
        calls += [asyncio.ensure_future(pid_of(workers, root)) for _ in range(5)]
        for _ in range(turns):
            await turn()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    pids = {answer for answer in answers if isinstance(answer, int)}
    last = await pid_of(workers, root)
    for pid in pids - {last}:
        await gone(pid)


async def test_workspace_replaced(workers: Workers, root: LaidRoot) -> None:
    """If the workspace was replaced, the next call after a second sees the new folder."""
    assert orjson.loads(await workers.call(root, "names", {})) == ["a.txt"]
    site = root.path / "srv" / "site"
    site.rename(root.path / "srv" / "old")
    site.mkdir()
    (site / "new.txt").touch()
    site.chmod(0o755)
    worker = workers._slots[root.tenant, 0].worker
    assert worker is not None
    worker.checked -= 1.0  # as if it were a second later
    assert orjson.loads(await workers.call(root, "names", {})) == ["new.txt"]


async def test_a_workspace_that_is_exchanged_is_the_next_calls(workers: Workers, root: LaidRoot) -> None:
    """During an announced exchange no call uses the old folder, which continues to exist."""
    srv = root.path / "srv"
    for number in range(3):
        assert orjson.loads(await workers.call(root, "names", {})) != [f"{number}.txt"]
        with workers.exchanges.of(root.tenant):
            (srv / "site").rename(srv / f"old{number}")
            (srv / "site").mkdir()
            (srv / "site" / f"{number}.txt").touch()
            (srv / "site").chmod(0o755)
            within = orjson.loads(await workers.call(root, "names", {})) if number else None
        assert within in (None, [f"{number}.txt"])
        assert orjson.loads(await workers.call(root, "names", {})) == [f"{number}.txt"]
    assert not workers.exchanges._running and len(workers.exchanges._ended) == 1


async def test_workspace_is_no_link(workers: Workers, root: LaidRoot, tmp_path: Path) -> None:
    """A workspace, or a folder above it, that became a link is not followed."""
    secret = tmp_path / "secret"
    secret.mkdir()
    srv = root.path / "srv"
    (srv / "site").rename(srv / "old")
    (srv / "site").symlink_to(secret)
    with pytest.raises(Unavailable):
        await workers.call(root, "names", {})
    (srv / "site").unlink()
    srv.rename(root.path / "gone")
    srv.symlink_to(secret)
    (secret / "site").mkdir()
    with pytest.raises(Unavailable) as caught:
        await workers.call(root, "names", {})
    assert str(tmp_path) not in caught.value.message


async def test_only_where_tenants_live(tmp_path: Path) -> None:
    """The broker opens nothing outside the tenants' folder, whatever name is requested."""
    inside = make_root(tmp_path / "pool")
    make_root(tmp_path / "pool-evil")
    (tmp_path / "pool" / "link").symlink_to(tmp_path / "pool-evil" / "one")
    async with Workers(Settings(), folders(tmp_path / "pool"), PROBES) as workers:
        assert await echo(workers, inside) == "hi"
        for name in ("", ".", "..", "../pool-evil/one", "one/", str(tmp_path / "pool-evil/one"), "two", "\0"):
            with pytest.raises(NotFound):
                await echo(workers, FilesystemRoot(name, "/srv/site"))
        for workspace in ("srv/site", "/srv/../srv/site", "/srv/site/", "/srv\0"):
            with pytest.raises(Unavailable):
                await workers.call(FilesystemRoot("one", workspace, "new"), "names", {})
        with pytest.raises(Unavailable):
            await echo(workers, FilesystemRoot("link", "/srv/site"))


async def test_idle_worker_ends(root: LaidRoot) -> None:
    """A worker ends after its idle time, whatever its purpose; the next call starts another."""
    async with Workers(Settings(worker_idle=0.2), folders(root.path.parent), PROBES) as workers:
        for pid in [await pid_of(workers, root, **lane) for lane in LANES]:
            await gone(pid)
        assert await echo(workers, root) == "hi"


async def test_maximum(tmp_path: Path) -> None:
    """The longest idle worker makes room; if all are busy, a new one is refused."""
    roots = [make_root(tmp_path, f"t{i}") for i in range(3)]
    async with Workers(Settings(max_workers=2), folders(tmp_path), PROBES) as workers:
        first = await pid_of(workers, roots[0])
        second = await pid_of(workers, roots[1])
        await echo(workers, roots[2])
        await gone(first)
        assert alive(second)
        gates = [Gate(root.path / "srv/site") for root in roots[1:]]
        busy = [asyncio.ensure_future(workers.call(root, "hold", {})) for root in roots[1:]]
        await asyncio.gather(*(gate.reached() for gate in gates))
        with pytest.raises(RateLimited):
            await echo(workers, roots[0])
        for gate in gates:
            gate.open()
        await asyncio.gather(*busy)
        assert await echo(workers, roots[0]) == "hi"


async def test_maximum_of_a_burst(tmp_path: Path) -> None:
    """The maximum also holds for calls arriving at the same time."""
    roots = [make_root(tmp_path, f"t{i}") for i in range(4)]
    async with Workers(Settings(max_workers=2), folders(tmp_path), PROBES) as workers:
        gates = [Gate(root.path / "srv/site") for root in roots[:2]]
        calls = [asyncio.ensure_future(workers.call(root, "hold", {"text": "hi"})) for root in roots]
        await asyncio.gather(*(gate.reached() for gate in gates))
        refused = await asyncio.gather(*calls[2:], return_exceptions=True)
        assert all(isinstance(answer, RateLimited) for answer in refused)
        for gate in gates:
            gate.open()
        assert await asyncio.gather(*calls[:2]) == [b"hi"] * 2


async def test_shares_leave_room(tmp_path: Path) -> None:
    """Workers that only speed up a search are not started if half of all are already busy."""
    roots = [make_root(tmp_path, f"t{i}") for i in range(3)]
    async with Workers(Settings(max_workers=4), folders(tmp_path), PROBES) as workers:
        assert await workers.scan(roots[0], {}, 2) == b""
        await workers.forget(roots[0].tenant)
        gates = [Gate(root.path / "srv/site") for root in roots[1:]]
        busy = [asyncio.ensure_future(workers.call(root, "hold", {})) for root in roots[1:]]
        await asyncio.gather(*(gate.reached() for gate in gates))
        assert await workers.scan(roots[0], {}, 2) is None
        assert await echo(workers, roots[0]) == "hi"
        assert not any(call.done() for call in busy)
        for gate in gates:
            gate.open()
        await asyncio.gather(*busy)
        assert await workers.scan(roots[0], {}, 2) == b""


async def test_broker_dies(workers: Workers, root: FilesystemRoot) -> None:
    """A killed broker is restarted; at most one call notices."""
    pid = await pid_of(workers, root)
    process = workers.broker._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    if os.getuid() == 0:
        await gone(pid)  # the workers go with it
    await asyncio.gather(echo(workers, root), return_exceptions=True)
    assert await echo(workers, root) == "hi"


async def test_broker_ends_in_the_middle(workers: Workers, root: LaidRoot, tmp_path: Path) -> None:
    """A broker whose gateway vanishes before its answer removes everything: processes and cgroups."""
    pid = await pid_of(workers, root)
    process, connection = workers.broker._process, workers.broker._socket
    assert process is not None and connection is not None
    waiting = await forked_ahead(workers, [pid])
    os.kill(process.pid, signal.SIGSTOP)
    connection.send(orjson.dumps({"do": "same", "worker": 1}))
    mine = [  # by `os.walk`, which passes over the folders of others that end meanwhile
        Path(top, name)
        for top, names, _ in os.walk("/sys/fs/cgroup")
        if Path(top).name.startswith("incus-gateway")
        for name in names
        if name.startswith(f"{process.pid}-")
    ]
    assert bool(mine) == ("memory group" in (workers.layers(root.tenant) or ()))
    workers.broker._hang_up()
    os.kill(process.pid, signal.SIGCONT)
    assert await process.wait() == 0
    assert not alive(pid) and not alive(waiting)
    assert not any(folder.exists() for folder in mine)


async def test_everything_ends_with_the_gateway(root: LaidRoot) -> None:
    """Leaving the context ends broker and workers."""
    async with Workers(Settings(), folders(root.path.parent), PROBES) as workers:
        pid = await pid_of(workers, root)
        process = workers.broker._process
        assert process is not None
    assert process.returncode is not None
    assert not alive(pid)


async def test_edits_are_not_lost(root: LaidRoot) -> None:
    """Of many concurrent edits of one file, none is lost."""
    async with Workers(Settings(), folders(root.path.parent)) as workers:
        tools, session = FileTools(workers, Settings()), ToolSession()
        lines = "".join(f"[{i}]\n" for i in range(60))
        await tools.call(root, session, "Write", {"file_path": "count.txt", "content": lines})
        edits = [
            {"file_path": "count.txt", "old_string": f"[{i}]", "new_string": f"<{i}>"} for i in range(60)
        ]
        results = await asyncio.gather(*(tools.call(root, ToolSession(), "Edit", edit) for edit in edits))
        assert not any(result.is_error for result in results)
    text = (root.path / "srv" / "site" / "count.txt").read_text()
    assert text == "".join(f"<{i}>\n" for i in range(60))


async def test_small_search_needs_no_worker_of_its_own(root: LaidRoot) -> None:
    """A short search is run by the worker for other calls."""
    site = root.path / "srv" / "site"
    (site / "a.ts").write_text("form\n")
    for _ in range(20):  # one that is kept from the CPU for 20 ms is not short
        async with Workers(Settings(), folders(root.path.parent)) as workers:
            tools = FileTools(workers, Settings())
            for tool, given in (("Glob", {"pattern": "*.ts"}), ("Grep", {"pattern": "form"})):
                result = await tools.call(root, ToolSession(), tool, given)
                assert "a.ts" in result.data()["content"][0]["text"]
            assert workers.layers(root.tenant) is not None
            if workers.layers(root.tenant, search=True) is None:
                return
    pytest.fail("each search had a worker of its own")


@pytest.mark.parametrize("much", ["files", "bytes"])
async def test_large_search_is_whole_and_apart(root: LaidRoot, much: str) -> None:
    """A search over many files or bytes misses none, and runs in the worker for long calls."""
    site = root.path / "srv" / "site"
    names = [f"{number:04}.ts" for number in range(1500 if much == "files" else 5)]
    for name in names:
        (site / name).write_text("form\n" if much == "files" else "." * (400 << 10) + "\nform\n")
    async with Workers(Settings(), folders(root.path.parent)) as workers:
        tools = FileTools(workers, Settings())
        given = {"pattern": "form", "output_mode": "count"}
        result = await tools.call(root, ToolSession(), "Grep", given)
        assert result.data()["structuredContent"] == {
            "mode": "count",
            "total": len(names),
            "files": len(names),
        }
        assert workers.layers(root.tenant, search=True) is not None
        result = await tools.call(root, ToolSession(), "Glob", {"pattern": "*.ts"})
        assert result.data()["structuredContent"]["total"] == len(names)


@needs_root
@pytest.mark.parametrize("search", [False, True])
async def test_confined(workers: Workers, root: FilesystemRoot, search: bool) -> None:
    """From inside a worker, nothing of the host is reachable, and only file operations are possible."""
    assert orjson.loads(await workers.call(root, "attempt", {}, search=search)) == []
    layers = workers.layers("one", search=search)
    assert layers is not None
    assert {"mount", "namespaces", "limits", "uid", "seccomp"} <= set(layers)


@needs_root
async def test_a_search_changes_nothing(workers: Workers, root: LaidRoot) -> None:
    """A worker for searches cannot change files; those for short calls and for long changes can."""
    before = (root.path / "srv/site/a.txt").stat()
    for share in (0, 1):
        assert orjson.loads(await workers.call(root, "change", {}, search=True, share=share)) == []
    assert (root.path / "srv/site/a.txt").stat() == before
    everything = list(probes._CHANGES)
    assert orjson.loads(await workers.call(root, "change", {})) == everything
    assert orjson.loads(await workers.call(root, "change", {}, search=True, changes=True)) == everything
    pids = [await pid_of(workers, root, **lane) for lane in LANES]
    assert len(set(pids)) == len(LANES)


@needs_root
@pytest.mark.parametrize(
    ("probes", "left"),
    [
        ("tests.unit.probes_without_landlock", set()),
        # Landlock knows no rule for modes and times
        ("tests.unit.probes_on_writable", {"change a mode", "change an open one's mode", "touch"}),
    ],
)
async def test_one_layer_of_a_search_fails(root: LaidRoot, probes: str, left: set[str]) -> None:
    """The mount alone keeps a search from every change, and Landlock alone from changes of content."""
    path = root.path / "srv/site/a.txt"
    async with Workers(Settings(), folders(root.path.parent), probes) as workers:
        assert orjson.loads(await workers.call(root, "attempt", {}, search=True)) == []
        assert set(orjson.loads(await workers.call(root, "change", {}, search=True))) == left
        assert orjson.loads(await workers.call(root, "change_by_reading", {}, search=True)) == []
        assert ("landlock" in (workers.layers("one", search=True) or ())) == bool(left)
    assert path.read_text() == "alpha\n" and os.listdir(path.parent) == ["a.txt"]


@needs_root
@pytest.mark.parametrize("lane", LANES, ids=["files", "search", "share", "changes"])
async def test_reading_changes_nothing(workers: Workers, root: LaidRoot, lane: dict[str, Any]) -> None:
    """A file opened for reading cannot be written by any detour, in any worker."""
    path = root.path / "srv/site/a.txt"
    before = path.stat()
    changed = set(orjson.loads(await workers.call(root, "change_by_reading", {}, **lane)))
    if lane.get("search") and not lane.get("changes"):
        assert not changed and path.stat() == before
    else:
        assert changed <= {"link"}  # another name, from Linux 6.10 on
        assert (path.read_text(), path.stat().st_mtime_ns) == ("alpha\n", before.st_mtime_ns)


@needs_root
async def test_reading_records_no_access_time(root: LaidRoot) -> None:
    """A busy file system would have to be waited for, to write that."""
    path = root.path / "srv/site/a.txt"
    os.utime(path, (1, path.stat().st_mtime))
    async with Workers(Settings(), folders(root.path.parent)) as workers:
        tools = FileTools(workers, Settings())
        for tool, given in (("Read", {"file_path": "a.txt"}), ("Grep", {"pattern": "alpha"})):
            assert not (await tools.call(root, ToolSession(), tool, given)).is_error
    assert path.stat().st_atime == 1


@needs_root
@pytest.mark.parametrize("lane", LANES, ids=["files", "search", "share", "changes"])
async def test_a_moved_folder_leads_nowhere(root: LaidRoot, lane: dict[str, Any]) -> None:
    """An open folder that was moved out of the workspace gives no access to its parents."""
    site = root.path / "srv" / "site"
    (site / "leaving").mkdir()
    os.chown(site / "leaving", USER, USER)
    (site.parent / "secret.txt").write_text("outside")
    async with Workers(Settings(), folders(root.path.parent), PROBES) as workers:
        await pid_of(workers, root, **lane)
        gate = Gate(root.path / "srv/site")
        looking = asyncio.ensure_future(workers.call(root, "leave_by_moved", {}, **lane))
        await gate.reached()
        (site / "leaving").rename(site.parent / "left")
        gate.open()
        assert orjson.loads(await looking) == []


async def test_answers_too_much(root: LaidRoot) -> None:
    """The gateway limits a worker's reply: a longer one ends worker and call."""
    much = REPLY_MAX - 1  # and the status
    async with Workers(Settings(), folders(root.path.parent), PROBES) as workers:
        assert len(await workers.call(root, "much", {"length": much})) == much
        pid = await pid_of(workers, root)
        with pytest.raises(Timeout):
            await workers.call(root, "much", {"length": much + 1})
        await gone(pid)
        assert await echo(workers, root) == "hi"


async def test_a_crashed_brokers_numbers_are_nobodys(workers: Workers, root: LaidRoot) -> None:
    """Ending a worker of a dead broker is requested from the next one, and ends none of its workers."""
    await echo(workers, root)
    old = workers._slots[root.tenant, 0].worker
    assert old is not None and workers.broker._process is not None
    workers.broker._process.kill()
    await workers.broker._process.wait()
    pid = None
    async with asyncio.timeout(30):
        while pid is None:
            with suppress(Unavailable):  # a call or two, whose worker or broker is gone
                pid = await pid_of(workers, root)
    workers._processes.end(old)
    await workers._processes.ended()
    assert await pid_of(workers, root) == pid


async def test_shares_end_with_their_tenant(workers: Workers, root: FilesystemRoot) -> None:
    """No worker of a forgotten tenant survives, whatever its purpose."""
    pids = [await pid_of(workers, root, **lane) for lane in LANES]
    await workers.forget(root.tenant)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("lane", LANES)
async def test_forget_while_it_starts(workers: Workers, root: FilesystemRoot, lane: dict[str, Any]) -> None:
    """A worker being started is gone too when `forget` returns, and its call fails."""
    call = asyncio.ensure_future(echo(workers, root, **lane))
    await until(lambda: workers.broker._readable is not None, every=0)
    await workers.forget(root.tenant)
    process = workers.broker._process
    assert process is not None and not workers_below(process.pid)
    with pytest.raises(Unavailable):
        await call
    assert await echo(workers, root, **lane) == "hi"


async def test_forget_during_a_scan(workers: Workers, root: LaidRoot) -> None:
    """A search in shares then ends, and does not continue in another way on files that are going away."""
    assert await workers.scan(root, {}, 2) == b""
    gates = [Gate(root.path / "srv/site", f"gate{share}") for share in (0, 1)]
    scan = asyncio.ensure_future(workers.scan(root, {"held": True}, 2))
    await asyncio.gather(*(gate.reached() for gate in gates))
    await workers.forget(root.tenant)
    with pytest.raises(Unavailable):
        await scan


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
async def test_scan_with_a_broken_share(hasty: Workers, root: LaidRoot, ending: signal.Signals) -> None:
    """If one ends, the search is done in another way; if one hangs, it is a `timeout`; none continues."""
    pids = [await pid_of(hasty, root, search=True, share=share) for share in (0, 1)]
    gates = [Gate(root.path / "srv/site", f"gate{share}") for share in (0, 1)]
    scan = asyncio.ensure_future(hasty.scan(root, {"held": True}, 2))
    await asyncio.gather(*(gate.reached() for gate in gates))
    os.kill(pids[1], ending)
    if ending is signal.SIGKILL:
        assert await scan is None
        await gone(pids[0])
    else:
        with pytest.raises(Timeout):
            await scan
    await gone(pids[1])
    assert await hasty.scan(root, {}, 2) == b""


async def test_scan_of_too_many_names(workers: Workers, root: FilesystemRoot) -> None:
    """Names within the limit of each share, but not in total, are not passed on."""
    found = await workers.scan(root, {"bytes": NAMED_MAX // 2 - 1}, 2)
    assert found is not None and len(found) == NAMED_MAX - 2
    assert await workers.scan(root, {"bytes": NAMED_MAX // 2 + 1}, 2) is None


async def forked_ahead(workers: Workers, busy: list[int]) -> int:
    """Return the process waiting to become a worker, which the broker forks when it is idle."""
    process = workers.broker._process
    assert process is not None
    broker = process.pid
    await until(lambda: len(set(children_of(broker)) - set(busy)) > 0, every=0.01)
    (pid,) = set(children_of(broker)) - set(busy)
    return pid


async def test_is_forked_ahead(workers: Workers, root: LaidRoot) -> None:
    """The next worker of a kind waits, with the broker's rights until it gets a tenant, and ends with it."""
    first = await pid_of(workers, root)
    waiting = await forked_ahead(workers, [first])
    other = make_root(root.path.parent, "other")
    second = await pid_of(workers, other)
    assert second == waiting
    third = await forked_ahead(workers, [first, second])
    await workers.broker.aclose()
    assert not any(alive(pid) for pid in (first, second, third))


@needs_root
async def test_what_one_forked_ahead_holds(workers: Workers, root: LaidRoot) -> None:
    """It has only the broker's state and one socket to it; with a tenant it is a worker like any other."""

    def held(pid: int) -> set[str]:
        found = set()
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.add(os.readlink(path))
        return found

    first = await pid_of(workers, root)
    waiting = await forked_ahead(workers, [first])
    assert workers.broker._process is not None
    broker = workers.broker._process.pid
    found = set[str]()

    def only_its_own() -> bool:
        # just forked: the broker holds that end too, and its group is still being entered
        found.clear()
        found.update(held(waiting) - held(broker))
        return len(found) == 1

    await until(only_its_own, every=0.01)
    (control,) = found
    assert control.startswith("socket:")
    assert Path(f"/proc/{waiting}/status").read_text().count("\nUid:\t0\t0\t0\t0\n") == 1
    other = make_root(root.path.parent, "other")
    assert await pid_of(workers, other) == waiting
    (own,) = {name for name in held(waiting) if not name.startswith("/")}
    assert own not in held(broker) | {control} and {*held(waiting)} == {own, "/"}
    assert orjson.loads(await workers.call(other, "attempt", {})) == []


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
async def test_one_forked_ahead_ends(workers: Workers, root: LaidRoot, ending: signal.Signals) -> None:
    """One that was killed while waiting is replaced; one that hangs costs only one call."""
    first = await pid_of(workers, root)
    waiting = await forked_ahead(workers, [first])
    os.kill(waiting, ending)
    other = make_root(root.path.parent, "other")
    if ending is signal.SIGSTOP:
        workers_timeout = "gateway.rootfs.worker_processes.SPAWN_TIMEOUT"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Unavailable):
            patch.setattr(workers_timeout, 0.3)
            await pid_of(workers, other)
    await gone(waiting)
    assert await pid_of(workers, other) != waiting


async def test_what_cannot_be_told_costs_no_process(workers: Workers, root: LaidRoot) -> None:
    """A limit that is not an integer is refused before a process is used for it."""
    waiting = await forked_ahead(workers, [await pid_of(workers, root)])
    for memory in (1e30, 0.5, "1"):
        with pytest.raises(Unavailable):
            await workers.broker.request(workers.spawn(root).wire() | {"memory": memory})
    assert await pid_of(workers, make_root(root.path.parent, "other")) == waiting


@pytest.mark.parametrize("ahead", [False, True])
async def test_ends_with_its_socket(root: LaidRoot, ahead: bool) -> None:
    """An unconfined worker also ends when the gateway closes its socket."""
    told = Folders(str(root.path.parent), "", 0).to_dict() if MAPPED else folders(root.path.parent)
    async with Workers(Settings(), told, PROBES) as workers:
        first = await pid_of(workers, root)
        assert workers.layers(root.tenant) == ()
        pid = first
        other = make_root(root.path.parent, "other")
        if ahead:
            await forked_ahead(workers, [first])
            pid = await pid_of(workers, other)
        slot = workers._slots[other.tenant if ahead else root.tenant, 0]
        assert slot.worker is not None
        slot.worker.close()

        def ended() -> bool:
            try:
                return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except (FileNotFoundError, ProcessLookupError):  # and its parent has noticed
                return True

        await until(ended, every=0.005)


@needs_root
async def test_status_of_the_process(workers: Workers, root: FilesystemRoot) -> None:
    """As seen from the host: the mapped user, no groups, no capabilities, no new privileges, a filter."""
    pid = await pid_of(workers, root)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert status["Uid"].split() == ["1001000"] * 4
    assert status["Gid"].split() == ["1001000"] * 4
    assert status["Groups"].split() == []
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    assert len(mounts) == 1
    assert {"nosuid", "nodev", "noexec"} <= set(mounts[0].split()[5].split(","))


@needs_root
async def test_descriptors(workers: Workers, root: FilesystemRoot) -> None:
    """A worker holds only its socket and the workspace, no descriptor of the broker or another tenant.

    The standard descriptors are the workspace's folder too, so a library's output goes nowhere.
    """
    found, tree, written = orjson.loads(await workers.call(root, "descriptors", {}))
    assert tree in found
    assert len(found) == 5 and {0, 1, 2} < set(found)
    assert written == [-errno.EBADF] * 3
