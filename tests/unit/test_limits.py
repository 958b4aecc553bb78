"""Limits that are in force are read from control groups of either version, and never lifted by a change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.incus import Incus, IncusError
from gateway.rootfs import memory
from gateway.runtime.incus.commands import IncusCommands
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.resizing import UPDATING, Resizing, not_in_force, words
from gateway.settings import Settings

MiB = 1 << 20
NOWHERE = Path("/nowhere")
INSTANCE: Mapping[str, Any] = {
    "name": "shop",
    "project": "default",
    "config": {"volatile.uuid": "0" * 32},
    "devices": {},
    "expanded_config": {"limits.memory": "512MiB", "limits.cpu": "1", "limits.processes": "400"},
    "expanded_devices": {"root": {"size": "2GiB"}},
}


@pytest.fixture
def trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The control groups of a container: `v1/CONTROLLER` of version 1, `v2` of version 2."""
    said = "".join(
        f"{number}:{name}:/lxc.payload.shop\n" for number, name in enumerate(("memory", "pids", ""))
    )
    for folder in ("v1/memory", "v1/pids", "v1/cpuset", "v2"):
        (tmp_path / folder / "lxc.payload.shop").mkdir(parents=True)
    cgroup = (said + "3:cpu,cpuset:/lxc.payload.shop/init.scope\n").encode()
    text = memory.text
    monkeypatch.setattr(memory, "text", lambda path: cgroup if path == "/proc/7/cgroup" else text(path))
    monkeypatch.setattr(memory, "mount_point", lambda: tmp_path / "v2")
    return tmp_path


def _filled(folder: Path, files: Mapping[str, str]) -> None:
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def test_limits_of_version_1(trees: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_mount", lambda controller: str(trees / "v1" / controller))
    group = "lxc.payload.shop"
    limits = {"memory.limit_in_bytes": str(512 * MiB), "memory.memsw.limit_in_bytes": str(600 * MiB)}
    _filled(trees / "v1/memory" / group, limits)
    _filled(trees / "v1/pids" / group, {"pids.max": "400"})
    _filled(trees / "v1/cpuset" / group, {"cpuset.cpus": "0-2,5"})
    found = memory.limits_in_force(7, NOWHERE, "shop", "")
    assert found == {"memory": 512 * MiB, "swap": 88 * MiB, "processes": 400, "cpu": 4}
    lifted = {
        "memory.limit_in_bytes": "9223372036854771712",
        "memory.memsw.limit_in_bytes": "9223372036854771712",
    }
    _filled(trees / "v1/memory" / group, lifted)
    _filled(trees / "v1/pids" / group, {"pids.max": "max"})
    found = memory.limits_in_force(7, NOWHERE, "shop", "")
    assert found == {"memory": None, "swap": None, "processes": None, "cpu": 4}


def test_limits_of_version_2(trees: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without a count of swap has no file for it."""
    monkeypatch.setattr(memory, "_mount", lambda controller: None)
    files = {"memory.max": "max", "pids.max": "400", "cpuset.cpus.effective": "3"}
    _filled(trees / "v2/lxc.payload.shop", files)
    assert memory.limits_in_force(7, NOWHERE, "shop", "") == {"memory": None, "processes": 400, "cpu": 1}


@pytest.mark.parametrize(
    ("has", "wrong"),
    [
        ({"memory": 512 * MiB, "swap": 0, "processes": 400, "cpu": 1, "disk": 2048 * MiB}, set()),
        ({"memory": None, "swap": None}, {"memory", "swap"}),
        (
            {"memory": 1024 * MiB, "processes": None, "disk": None, "cpu": 2},
            {"memory", "processes", "disk", "cpu"},
        ),
        ({"disk": (2048 + 16) * MiB}, set()),  # what Incus may need while it stops
        ({}, set()),  # unknown
    ],
)
def test_limits_are_compared(
    has: dict[str, int | None], wrong: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.runtime.incus.resizing.limits_in_force", lambda *_: has)
    found = not_in_force(INSTANCE, 7, NOWHERE)
    assert found.keys() == wrong
    assert all(key in words(found) for key in wrong)


@pytest.mark.parametrize(
    ("config", "has"),
    [
        ({"limits.cpu": "4096"}, {"cpu": os.cpu_count()}),  # more than the machine has
        ({"limits.memory.enforce": "soft"}, {"memory": None, "swap": None}),
    ],
)
def test_a_limit_that_cannot_be_in_force_does_not_differ(
    config: dict[str, str], has: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.runtime.incus.resizing.limits_in_force", lambda *_: has)
    instance = {**INSTANCE, "expanded_config": {**INSTANCE["expanded_config"], **config}}
    assert not_in_force(instance, 7, NOWHERE) == {}


class Kept(Incus):
    """An Incus with one instance, which another one changes before the first PUT."""

    def __init__(self, config: dict[str, str]) -> None:
        super().__init__(NOWHERE, "default", 1.0)
        rest = dict.fromkeys(("architecture", "description", "ephemeral", "profiles"), "")
        self.found: dict[str, Any] = {**INSTANCE, **rest, "config": config, "status": "Running"}
        self.version, self.bodies = 0, list[Mapping[str, Any]]()

    async def get_tagged(self, path: str) -> tuple[dict[str, Any], str]:
        return self.found, str(self.version)

    async def instance(self, name: str, **_: Any) -> dict[str, Any]:
        return self.found

    async def operate(
        self, method: str, path: str, body: Any = None, *, if_match: Any = None, **_: Any
    ) -> Any:
        assert (method, if_match is None) == ("PUT", False)
        if not self.version or if_match != str(self.version):
            self.version += 1
            raise IncusError("changed", 412)
        self.found = {**self.found, "config": body["config"]}
        self.bodies.append(body)


@pytest.mark.parametrize("own", [{}, {"limits.memory": "256MiB"}])
async def test_the_memory_of_an_update_is_taken_back_by_a_put(
    own: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PATCH to "" would lift the limit; a PUT without it makes it the profile's."""
    settings, incus = Settings(state_dir=tmp_path), Kept(dict(own))
    making = Creation(settings, incus)

    async def nowhere(name: str) -> int:
        return 0

    resizing = Resizing(settings, incus, making, IncusCommands(settings, incus, nowhere))
    shared: list[str] = []

    async def applied(name: str) -> None:
        shared.append(name)

    monkeypatch.setattr(resizing, "_applied", applied)
    await resizing.grow("shop")
    assert incus.found["config"]["limits.memory"] == "1024MiB" and UPDATING in incus.found["config"]
    await resizing.shrink("shop")
    assert (incus.found["config"], shared) == (own, ["shop"])
    assert all(value for body in incus.bodies for value in body["config"].values())
    await resizing.grow("shop")
    incus.found["config"]["limits.memory"] = "2048MiB"  # by somebody else
    await resizing.shrink("shop")
    assert incus.found["config"] == {"limits.memory": "2048MiB"}


@pytest.mark.parametrize("method", ["PATCH", "PUT", "POST"])
async def test_no_change_of_an_instance_may_lift_a_limit(method: str) -> None:
    incus = Incus(NOWHERE, "default", 1.0)
    with pytest.raises(ValueError, match="would be lifted"):
        await incus.operate(method, "/1.0/instances/shop", {"config": {"limits.memory": ""}}, timeout=1)


async def test_a_copy_may_be_made_without_the_limits_of_its_source() -> None:
    body = {"name": "copy", "source": {"type": "copy"}, "config": {"limits.cpu": ""}}
    async with Incus(NOWHERE, "default", 1.0) as incus:
        with pytest.raises(IncusError):  # nobody answers there
            await incus.operate("POST", "/1.0/instances", body, timeout=1, target="m2")
