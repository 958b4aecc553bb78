"""The end of uploads and downloads: whatever ends them, nothing continues and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import RateLimited, Unavailable
from gateway.files.transfers import Transfers
from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from tests.unit.test_rootfs_workers import folders, make_root


@pytest.mark.parametrize("upload", [True, False])
async def test_one_that_is_being_opened_when_all_are_ended_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upload: bool
) -> None:
    """Otherwise it would continue until the gateway is killed."""
    root = make_root(tmp_path)
    async with Workers(Settings(), folders(tmp_path)) as workers:
        async with Transfers(workers, Settings()) as transfers:
            open_ = transfers._open

            async def opened(*given: object) -> object:
                try:
                    return await open_(*given)  # type: ignore[arg-type]
                finally:
                    transfers.end()

            monkeypatch.setattr(transfers, "_open", opened)
            with pytest.raises(Unavailable, match="was aborted"):
                async with transfers.write(root, "b.txt", {}) if upload else transfers.read(root, "a.txt"):
                    raise AssertionError("it was begun")
        assert [path.name for path in (root.path / "srv" / "site").iterdir()] == ["a.txt"]


async def test_all_tenants_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts before anything is opened, until the client leaves."""
    monkeypatch.setattr("gateway.files.transfers.descriptors", lambda: 16)
    root = make_root(tmp_path)
    async with Workers(Settings(), folders(tmp_path)) as workers:
        async with Transfers(workers, Settings()) as transfers:
            async with transfers.read(root, "a.txt"), transfers.read(root, "a.txt"):
                with pytest.raises(RateLimited, match="this gateway has too many uploads and downloads"):
                    async with transfers.write(root, "b.txt", {}):
                        raise AssertionError("it was begun")
            async with transfers.read(root, "a.txt"):
                pass
