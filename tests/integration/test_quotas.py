"""Disk quotas that the kernel gave up are enforced again, by setup and by a gateway that runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from gateway.host import quotas
from gateway.host.daemon import Daemon
from gateway.host.doctor import doctor
from gateway.host.findings import Finding
from gateway.host.setup import setup
from gateway.settings import Settings
from tests.integration.conftest import Incusd
from tests.live import LiveGateway
from tests.waits import until


def _btrfs(*words: str | Path) -> str:
    return subprocess.run(["btrfs", *words], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def given_up(settings: Settings) -> Iterator[Path]:
    """Have the kernel give the quotas up, as the deletion of a large tenant does; yields its threshold."""
    pool = settings.incus_socket.parent / "storage-pools" / settings.pool
    # nobody else deletes these meanwhile; what two share cannot be counted without a look at all of it
    own, shared = pool / "quota-test", pool / "quota-test-copy"
    uuid = _btrfs("filesystem", "show", pool).partition("uuid: ")[2].split()[0]
    threshold = Path("/sys/fs/btrfs", uuid, "qgroups", "drop_subtree_threshold")
    threshold.write_text("3")
    _btrfs("subvolume", "create", own)
    (own / "file").write_bytes(os.urandom(1 << 20))
    _btrfs("filesystem", "sync", pool)
    _btrfs("subvolume", "snapshot", own, shared)
    _btrfs("filesystem", "sync", pool)
    below = "0/" + _btrfs("inspect-internal", "rootid", own).strip()
    _btrfs("qgroup", "create", "1/77", pool)
    try:
        _btrfs("qgroup", "assign", "--no-rescan", below, "1/77", pool)
        assert not quotas.in_force(settings)
        yield threshold
    finally:
        _btrfs("qgroup", "remove", below, "1/77", pool)
        _btrfs("qgroup", "destroy", "1/77", pool)
        _btrfs("subvolume", "delete", own, shared)
        quotas.enforce(settings)


def test_setup_enforces_quotas_that_the_kernel_gave_up(incus_settings: Settings) -> None:
    """A tenant that is deleted cannot end the others' disk limits for good; doctor says so meanwhile."""

    def look() -> Finding:
        return next(found for found in doctor(incus_settings) if found.what.startswith("storage pool"))

    def changed() -> set[str]:
        return {one.step for one in setup(incus_settings, lambda line: None) if one.changed}

    changed()
    assert quotas.in_force(incus_settings)
    with given_up(incus_settings) as threshold:
        assert not look().ok and "incus-gateway setup" in look().detail
        assert "disk quotas" in changed()
        assert quotas.in_force(incus_settings) and look().ok
        assert threshold.read_text().strip() == "8"
        assert "disk quotas" not in changed()


async def test_a_gateway_enforces_them_once_incusd_is_back(
    incus_settings: Settings, incusd: Incusd, tmp_path: Path
) -> None:
    """Each start of incusd may mount the pool anew, by the kernel's own rules."""
    state = tmp_path / "state"
    state.mkdir()
    gateway = LiveGateway(
        {
            "GATEWAY_INCUS_SOCKET": str(incus_settings.incus_socket),
            "GATEWAY_POOL": incus_settings.pool,
            "GATEWAY_STATE_DIR": str(state),
            "GATEWAY_RECONCILE_INTERVAL": "3600",
        },
        state.with_suffix(".log"),
    )
    await gateway.start()
    try:
        await incusd.kill()
        with given_up(incus_settings) as threshold:
            await asyncio.to_thread(Daemon.at(incus_settings.incus_socket).ensure, lambda line: None)
            await until(lambda: quotas.in_force(incus_settings))
            assert threshold.read_text().strip() == "8"
        assert "disk quotas: what each tenant uses was counted again" in gateway.log.read_text()
    finally:
        await gateway.stop()
