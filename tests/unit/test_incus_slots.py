"""What is asked about an instance by its name is asked of the project where it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.incus import Elsewhere, Incus, IncusError
from gateway.incus.slots import Slots, named

SECOND = "recovered"


class Cluster(Incus):
    """The incusd of member m1; `there` has the member of each instance by project and name."""

    def __init__(self, there: Mapping[tuple[str, str], str], *, is_made: bool = True) -> None:
        super().__init__(Path("/nowhere"), "default", 1.0)
        self.there, self.is_made = dict(there), is_made
        self.asked: list[str] = []

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        alone: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        project = (query or {}).get("project") or await self.project_of(path)
        self.asked.append(f"{method} {project} {path}")
        metadata: Any = {}
        match method, path.split("/")[2:]:
            case "GET", []:
                metadata = {"environment": {"server_clustered": True, "server_name": "m1"}}
            case "GET", ["instances"]:
                if project == SECOND and not self.is_made:
                    raise IncusError("Project not found", 404)
                found = [name for (of, name), at in self.there.items() if of == project]
                own = [name for name in found if self.there[project, name] == "m1"]
                metadata = [self.entry(project, name) for name in own] if alone else found
            case "GET", ["instances", name]:
                metadata = self.entry(project, name)
            case "POST", ["instances"]:
                assert body is not None
                self.there[project, body["name"]] = "m1"
            case "DELETE", ["instances", name]:
                del self.there[project, name]
        return {"type": "sync", "metadata": metadata, "etag": ""}

    def entry(self, project: str, name: str) -> dict[str, Any]:
        if (project, name) not in self.there:
            raise IncusError("Instance not found", 404)
        return {
            "name": name,
            "project": project,
            "location": self.there[project, name],
            "status": "Stopped",
            "config": {},
        }


def cluster(there: Mapping[tuple[str, str], str], **more: Any) -> Cluster:
    incus = Cluster(there, **more)
    incus.slots.second = SECOND
    return incus


async def test_one_that_was_brought_back_here_is_found_where_it_is() -> None:
    """Its old instance has the name in the other project, on a member that may be away: nobody asks it."""
    incus = cluster({("default", "shop"): "m2", (SECOND, "shop"): "m1", ("default", "cafe"): "m1"})
    assert (await incus.instance("shop"))["project"] == SECOND
    assert (await incus.started("shop"))[0]["project"] == SECOND
    assert (await incus.instance("cafe"))["project"] == "default"
    assert "GET default /1.0/instances/shop" not in incus.asked
    assert sorted(one["name"] for one in await incus.instances()) == ["cafe", "shop"]
    assert await incus.names() == {"cafe", "shop"} and await incus.names("default") == {"cafe", "shop"}
    assert await incus.names(SECOND) == {"shop"}
    assert incus._on_host("shop") == f"{SECOND}_shop" and incus._on_host("cafe") == "cafe"


async def test_one_that_was_brought_back_elsewhere_is_elsewhere_and_not_gone() -> None:
    incus = cluster({(SECOND, "shop"): "m2"})
    with pytest.raises(Elsewhere) as found:
        await incus.instance("shop")
    assert found.value.location == "m2"
    with pytest.raises(IncusError) as missing:
        await incus.instance("none")
    assert missing.value.status == 404 and not isinstance(missing.value, Elsewhere)
    assert await incus._find("shop") is None


async def test_there_may_be_no_second_project_yet() -> None:
    incus = cluster({("default", "shop"): "m1"}, is_made=False)
    assert (await incus.instance("shop"))["project"] == "default"
    assert await incus.names() == {"shop"} and await incus.names(SECOND) == set()
    assert [one["name"] for one in await incus.instances()] == ["shop"]


async def test_what_this_process_does_counts_before_incus_tells_it() -> None:
    incus = cluster({("default", "shop"): "m2"})
    with pytest.raises(Elsewhere):
        await incus.instance("shop")
    body = {"name": "shop"}
    await incus.operate("POST", "/1.0/instances", body, timeout=1, project=SECOND)
    assert (await incus.instance("shop"))["project"] == SECOND
    await incus.operate("DELETE", "/1.0/instances/shop", timeout=1)
    assert (SECOND, "shop") not in incus.there
    with pytest.raises(Elsewhere):
        await incus.instance("shop")


async def test_what_others_do_counts_when_incus_tells_it() -> None:
    slots = Slots("default")
    slots.second, slots.names = SECOND, set()

    def told(action: str, name: str, project: str = SECOND, **context: str) -> str:
        slots.noted({"project": project, "metadata": {"action": action, "name": name, "context": context}})
        return slots.of(name)

    assert told("instance-created", "shop") == SECOND
    assert told("instance-created", "cafe", "default") == "default"
    assert told("instance-renamed", "store", old_name="shop") == SECOND and slots.of("shop") == "default"
    assert told("instance-deleted", "store", "default") == SECOND
    assert told("instance-deleted", "store") == "default"
    assert slots.holds({"project": SECOND}) and slots.holds({"project": "default"}) and slots.holds({})
    assert not slots.holds({"project": "gateway-standby"})


async def test_without_a_cluster_nobody_asks_for_a_second_project() -> None:
    incus = Cluster({("default", "shop"): "m1"})
    await incus.instance("shop")
    await incus.instances()
    assert not [one for one in incus.asked if SECOND in one]


def test_only_paths_about_instances_name_one() -> None:
    assert named("/1.0/instances/shop/state") == named("/1.0/instances/shop") == "shop"
    assert not named("/1.0/instances") and not named("/1.0/operations/x") and not named("/1.0")
