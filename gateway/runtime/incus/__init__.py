"""Run tenants as Incus system containers. Other packages use `IncusRuntime` and `IncusSites`."""

from gateway.runtime.incus.sites import IncusSites
from gateway.runtime.incus.tenants import IncusRuntime

__all__ = ["IncusRuntime", "IncusSites"]
