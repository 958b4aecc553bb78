"""The disk quotas of the tenants' pool, for setup and doctor; see `gateway.rootfs.quotas`."""

from __future__ import annotations

from gateway.host import HostError
from gateway.rootfs.quotas import Quotas
from gateway.settings import Settings


def in_force(settings: Settings) -> bool:
    """Return whether the kernel enforces the pool's quotas; a pool of folders has none."""
    return _of(settings).in_force()


def enforce(settings: Settings) -> str | None:
    """Enforce the quotas, wait until they are in force, and return what was changed. Raises `HostError`."""
    try:
        return "; ".join(_of(settings).enforce(wait=True)) or None
    except OSError as error:
        raise HostError(
            f"cannot enforce the disk quotas: {error.strerror}; see `btrfs quota rescan -s` and the "
            "kernel log"
        ) from None


def _of(settings: Settings) -> Quotas:
    return Quotas(settings.incus_socket.parent / "storage-pools" / settings.pool)
