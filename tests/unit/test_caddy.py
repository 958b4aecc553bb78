"""The routes that Caddy looks up, while two set them right."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from gateway.caddy import Caddy
from gateway.settings import Settings


async def test_a_route_that_is_set_while_others_are_put_right_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever puts routes right removes targets that no route has, and may not take a new one's for such."""
    async with Caddy(Settings(state_dir=tmp_path)) as caddy:
        setting = threading.Thread(target=caddy.set, args=("a.test", "127.0.0.1:9"))
        listed = caddy.listed

        def looked() -> dict[str, str]:
            found = listed()
            setting.start()
            setting.join(0.2)  # it has to wait
            return found

        monkeypatch.setattr(caddy, "listed", looked)
        await asyncio.to_thread(caddy.reconcile, {}, {"a.test"}, ())
        setting.join()
        assert (caddy.routes / "a.test" / "127.0.0.1:9").exists()


async def test_only_the_sockets_that_are_needed_stay(tmp_path: Path) -> None:
    async with Caddy(Settings(state_dir=tmp_path)) as caddy:
        for name in ("gone.sock", "there.sock"):
            (caddy.sockets / name).touch()
        caddy.reconcile({}, (), {"there.sock", "coming.sock"})
        assert [path.name for path in caddy.sockets.iterdir()] == ["there.sock"]
