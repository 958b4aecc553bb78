"""Run tenants as folders and plain processes of this machine, without isolation.

For laptops without Incus and for fast tests: a tenant is a folder in the state dir, and its commands are
processes of the gateway's user, started by the same scripts as in a container and killed through the same
kind of cgroups if this machine has them. Other packages use `LocalRuntime` and `LocalSites`.
"""

from gateway.runtime.local.runtime import LocalRuntime
from gateway.runtime.local.sites import LocalSites

__all__ = ["LocalRuntime", "LocalSites"]
