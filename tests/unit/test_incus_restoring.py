"""What the restore of a snapshot leaves as it was; tests/cluster/test_standby.py restores real ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from gateway.incus import Incus
from gateway.runtime.incus.disks import Disks
from gateway.settings import Settings


class Instance:
    """An instance at incusd, which has the configuration of its snapshot when that is restored."""

    def __init__(self, config: Mapping[str, str], kept: Mapping[str, str]) -> None:
        self.found: dict[str, Any] = {"config": {**config}, "devices": {}, "profiles": ["tenant"]}
        self._kept = kept

    async def get(self, path: str) -> Mapping[str, Any]:
        return {**self.found, "config": {**self.found["config"]}}

    async def operate(self, method: str, path: str, body: Mapping[str, Any], *, timeout: float) -> None:
        assert method == "PUT"
        if "restore" in body:
            self.found = {"config": {**self._kept}, "devices": {"old": {}}, "profiles": ["old"]}
        else:
            self.found = {key: body[key] for key in self.found}


async def test_a_restore_leaves_an_instances_host_uids_and_settings() -> None:
    """The snapshot may be of another server, or of a copy: those uids are others' here."""
    now = {"user.gateway.domain": "new", "volatile.idmap.base": "1065536", "volatile.idmap.next": "here"}
    then = {"user.gateway.domain": "old", "volatile.idmap.base": "0", "volatile.idmap.next": "there"}
    as_on_disk = {"volatile.last_state.idmap": "as it was shifted then"}
    instance = Instance(now | {"volatile.last_state.idmap": "now"}, then | as_on_disk)
    await Disks(Settings(), cast(Incus, instance)).restore("shop", "kept")
    assert instance.found == {"config": now | as_on_disk, "devices": {}, "profiles": ["tenant"]}
