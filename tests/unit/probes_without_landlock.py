"""As `test_rootfs_probes`, for workers of a kernel without Landlock."""

from gateway.rootfs import confine
from tests.unit.test_rootfs_probes import SERVICE

__all__ = ["SERVICE"]

confine._landlock = lambda handled, allowed: False
