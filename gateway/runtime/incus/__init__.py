"""Run tenants as Incus system containers. Other packages use `IncusRuntime` and `IncusSites`."""

from gateway.runtime.incus.runtime import IncusRuntime
from gateway.runtime.incus.sites import IncusSites

__all__ = ["IncusRuntime", "IncusSites"]
