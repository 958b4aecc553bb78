"""Run tenants as Incus system containers. From outside `IncusRuntime` and `IncusSites` are used."""

from gateway.runtime.incus.sites import IncusSites
from gateway.runtime.incus.tenants import IncusRuntime

__all__ = ["IncusRuntime", "IncusSites"]
