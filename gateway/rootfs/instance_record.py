"""Read incusd's record of an instance: whether it is a tenant, and where its files are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.rootfs import IdMap

MANAGED = "user.gateway.managed"  # the key that marks an instance as a tenant, see `is_tenant`
IDENTITY = "volatile.uuid"  # the key of an instance's unique id
COPY = "user.gateway.standby.copy"  # the key of a standby copy, and of a tenant that is just made of one


def is_tenant(instance: Mapping[str, Any]) -> bool:
    """Return whether an instance, as reported by Incus, is a tenant: a container with our mark."""
    # an instance being created has no expanded configuration yet
    expanded = instance.get("expanded_config") or {}
    return instance.get("type") == "container" and expanded.get(MANAGED) == "true"


def is_marked(instance: Mapping[str, Any]) -> bool:
    """Return whether an instance is a container with our mark, be it a tenant or not."""
    return instance.get("type") == "container" and MANAGED in (instance.get("expanded_config") or {})


def identity_of(instance: Mapping[str, Any]) -> str:
    """Return an instance's unique id; earlier instances with its name had other ones."""
    return str(instance["config"].get(IDENTITY, ""))


def folder_of(instance: Mapping[str, Any]) -> str:
    """Return an instance's name in host paths."""
    name, project = str(instance["name"]), instance["project"]
    return name if project == "default" else f"{project}_{name}"


def idmap_of(text: str | None) -> tuple[IdMap, ...]:
    """Return an id map from one of an instance's or a volume's `volatile.…` keys."""
    return tuple(
        IdMap(line["Isuid"], line["Isgid"], line["Nsid"], line["Hostid"], line["Maprange"])
        for line in orjson.loads(text or "[]") or ()
    )


def mounts_of(devices: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, Mapping[str, str]]]:
    """Return the names and devices of a container's disks by their paths inside."""
    return {
        "/" + relative(os.path.normpath(device["path"])): (name, device)
        for name, device in devices.items()
        if device.get("type") == "disk" and device.get("path")
    }


def relative(path: str) -> str:
    """Return an absolute path as one below `/`."""
    return path.strip("/")
