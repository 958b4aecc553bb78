"""Runs tenants as Incus system containers. From outside only `IncusRuntime` is used."""

from gateway.runtime.incus.tenants import IncusRuntime

__all__ = ["IncusRuntime"]
