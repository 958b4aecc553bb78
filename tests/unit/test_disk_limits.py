"""Who limits a disk for the gateway: the broker, also one of an earlier version, or the gateway as root."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from gateway.errors import NotFound, TooLarge, Unavailable
from gateway.limits.capacity import DiskSpace
from gateway.rootfs.broker_client import DiskLimits
from gateway.rootfs.locations import Folders
from gateway.runtime import DiskSnapshot
from gateway.settings import Settings
from gateway.storage.store import Store


class Counting(Folders):
    """Tenants whose disks count."""

    def limit_disk(self, instance: str, *, ending: bool = False, standby: bool = False) -> int | None:
        return len(instance)

    def free_disks(self) -> None:
        raise OSError(5, "Input/output error")


@contextlib.contextmanager
def broker(path: Path, *answers: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Answer at a socket one connection's requests by these, one after the other; yield what was asked."""
    asked: list[dict[str, Any]] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            for answer in answers:
                asked.append(orjson.loads(connection.recv(4096)))
                connection.send(orjson.dumps(answer))

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield asked
        thread.join()


async def test_the_broker_limits_and_tells_what_counts(tmp_path: Path) -> None:
    gone = {"refused": "not_found", "message": "no tenant shop", "facts": {}}
    limits = DiskLimits(tmp_path / "sock", Counting(""))
    with broker(tmp_path / "sock", {"counted": 7}, {"counted": None}, gone, {"error": "x"}) as asked:
        assert await limits.limit("shop") == 7
        assert await limits.limit("shop") is None
        with pytest.raises(NotFound):
            await limits.limit("shop")
        with pytest.raises(Unavailable):
            await limits.limit("shop")
    await limits.aclose()
    assert asked == [{"do": "limit_disk", "instance": "shop", "ending": False, "standby": False}] * 4


@pytest.mark.parametrize(("uid", "counted"), [(0, 4), (1000, None)])
async def test_without_a_broker_root_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, uid: int, counted: int | None
) -> None:
    """A failure to free what was deleted is only told: the kernel does so by itself."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    limits = DiskLimits(None, Counting(""))
    assert await limits.limit("shop") == counted
    await limits.free()
    assert ("half a minute" in caplog.text) == (uid == 0)
    await limits.aclose()


class Held:
    """A runtime with a tenant of whose disk and snapshots so many MiB count together."""

    def __init__(self, mib: int) -> None:
        self.mib = mib
        self.usage = self.snapshots = self

    async def space(self) -> None:
        return None

    async def filesystem(self, tenant: str) -> None:
        raise NotFound("it is stopped")

    async def list(self, tenant: str) -> Sequence[DiskSnapshot]:
        return ()

    async def held(self, tenant: str) -> int:
        return self.mib << 20


@pytest.mark.parametrize(("mib", "refused"), [(5, False), (6, True)])
async def test_a_snapshot_fits_if_disk_and_snapshots_do_together(
    tmp_path: Path, mib: int, refused: bool
) -> None:
    nothing = cast(Any, None)
    async with Store(tmp_path) as store:
        space = DiskSpace(cast(Any, Held(mib)), nothing, store, Settings(snapshot_bytes=5 << 20))
        with pytest.raises(TooLarge) if refused else contextlib.nullcontext():
            async with space.snapshot("shop", "one"):
                pass
