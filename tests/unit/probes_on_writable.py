"""As `test_rootfs_probes`, for workers whose mount can be written whatever they are for."""

from gateway.rootfs import confine
from tests.unit.test_rootfs_probes import SERVICE

__all__ = ["SERVICE"]

_clone = confine._clone
confine._clone = lambda folder, namespace, *, read_only: _clone(folder, namespace, read_only=False)
