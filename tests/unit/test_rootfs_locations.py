"""How the broker interprets incusd's answers: which disks are opened, with which ids, and which are not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import GatewayError, NotFound, Unavailable
from gateway.rootfs.instance_record import COPY
from gateway.rootfs.locations import Disk, Instances, found_by
from gateway.rootfs.quotas import DiskGroups, Quotas, number_of
from tests.unit.incusd import IDMAP, answering, instance

WORKSPACE = "/srv/site"


class Host:
    """A folder with a fake incusd, its answers, and the broker's client."""

    def __init__(self, folder: Path, table: dict[str, dict[str, Any]], asked: list[str]) -> None:
        self.folder = folder
        self.table = table
        self.asked = asked
        self.tenants = Instances(str(folder / "unix.socket"), "default", WORKSPACE, 1000, "br0", "pool")

    def has(self, name: str, **changes: Any) -> None:
        self.table[f"/1.0/instances/{name}"] = instance(name, **changes)

    def disk_with(self, **device: str) -> Disk:
        """Return the workspace's disk of a tenant with one more device."""
        devices = {"root": {"type": "disk", "path": "/", "pool": "pool"}, "more": {"type": "disk", **device}}
        self.has("shop", expanded_devices=devices)
        return self.tenants.disk("shop", WORKSPACE)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    table: dict[str, dict[str, Any]] = {}
    with answering(tmp_path / "unix.socket", table) as asked:
        yield Host(tmp_path, table, asked)


def test_found(host: Host) -> None:
    """A marked container's workspace is in its pool, with the ids assigned by Incus; one GET suffices."""
    host.has("shop")
    disk = host.tenants.disk("shop", WORKSPACE)
    assert disk.path == f"{host.folder}/storage-pools/pool/containers/shop/rootfs"
    assert (disk.inside, disk.shifted, disk.read_only, disk.covered) == ("srv/site", False, False, ())
    assert disk.outside(1000, 1000) == (1_001_000, 1_001_000)
    with pytest.raises(ValueError, match="not mapped"):
        disk.outside(70_000, 0)
    assert len(host.asked) == 1
    again = found_by(host.tenants.to_dict())
    assert again.disk("shop", WORKSPACE) == disk


def test_other_project(tmp_path: Path) -> None:
    """Names are looked up only in the configured project, whose folders include its name."""
    with answering(tmp_path / "unix.socket", {"/1.0/instances/shop": instance("shop")}) as asked:
        tenants = Instances(str(tmp_path / "unix.socket"), "sites", WORKSPACE, 1000, "br0", "pool")
        disk = tenants.disk("shop", WORKSPACE)
    assert disk.path.endswith("/containers/sites_shop/rootfs")
    assert "project=sites" in asked[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"expanded_config": {}},
        {"expanded_config": None},
        {"expanded_config": {"user.gateway.managed": "false"}},
        {"config": {"user.gateway.managed": "true"}, "expanded_config": {}},
        {"type": "virtual-machine"},
        {"name": "other"},
    ],
)
def test_none_of_ours(host: Host, changes: dict[str, Any]) -> None:
    """An instance that is not a tenant's container is treated like a missing one."""
    host.table["/1.0/instances/shop"] = instance("shop") | changes
    for name in ("shop", "absent"):
        with pytest.raises(NotFound) as caught:
            host.tenants.disk(name, WORKSPACE)
        assert caught.value.message == f"no tenant {name}"
        with pytest.raises(NotFound):
            host.tenants.group(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "shop/",
        "../shop",
        "shop/snapshots/a",
        "shop?project=other",
        "shop%2f..",
        "a\r\nX: y",
        "a" * 64,
    ],
)
def test_no_instance_s_name(host: Host, name: str) -> None:
    """A name that no instance can have is not even looked up."""
    with pytest.raises(NotFound):
        host.tenants.disk(name, WORKSPACE)
    assert host.asked == []


def test_another_folder_than_the_workspace(host: Host) -> None:
    """Only the workspace is served, whatever folder a gateway requests."""
    host.has("shop")
    for folder in ("/", "/root", "/srv", "/srv/site/..", "/srv/site/", "srv/site"):
        with pytest.raises(Unavailable):
            host.tenants.disk("shop", folder)


def test_a_name_of_incus_that_is_no_part_of_a_path(host: Host) -> None:
    """Not even Incus's own answers lead out of its pools."""
    for pool in ("..", "a/../..", ""):
        host.has("shop", expanded_devices={"root": {"type": "disk", "path": "/", "pool": pool}})
        with pytest.raises(GatewayError):
            host.tenants.disk("shop", WORKSPACE)


def test_incus_is_away(host: Host, tmp_path: Path) -> None:
    """Without an answer from incusd nothing is opened, and the client sees no path."""
    for tenants in (
        Instances(str(tmp_path / "no.socket"), "default", WORKSPACE, 1000, "br0", "pool"),
        Instances(str(tmp_path), "default", WORKSPACE, 1000, "br0", "pool"),
    ):
        with pytest.raises(Unavailable) as caught:
            tenants.disk("shop", WORKSPACE)
        assert str(tmp_path) not in caught.value.message


def test_shifted(host: Host) -> None:
    """A rootfs with ids shifted on disk is recognised by its last map."""
    host.has("shop", config={"volatile.idmap.current": IDMAP, "volatile.last_state.idmap": IDMAP})
    assert host.tenants.disk("shop", WORKSPACE).shifted
    host.has("shop", config={"volatile.idmap.next": IDMAP})  # it never ran
    assert host.tenants.disk("shop", WORKSPACE).idmap


@pytest.mark.parametrize(
    ("device", "inside", "shifted", "read_only"),
    [
        ({"path": "/srv/site", "source": "/data/shop"}, "", True, False),
        ({"path": "srv/site/", "source": "/data/shop", "shift": "true"}, "", False, False),
        ({"path": "/srv", "source": "/data/shop", "readonly": "true"}, "site", True, True),
    ],
)
def test_a_folder_of_the_host(
    host: Host, device: dict[str, str], inside: str, shifted: bool, read_only: bool
) -> None:
    """A workspace on a disk device is opened at the device's source, whose path must not contain links."""
    disk = host.disk_with(**device)
    assert (disk.path, disk.inside, disk.real) == ("/data/shop", inside, True)
    assert (disk.shifted, disk.read_only) == (shifted, read_only)


@pytest.mark.parametrize(("last", "shifted"), [(IDMAP, True), ("[]", False)])
def test_a_custom_volume(host: Host, last: str, shifted: bool) -> None:
    """A workspace on a custom volume is opened in the pool, whichever project owns the volume."""
    (host.folder / "storage-pools/slow/custom/default_data").mkdir(parents=True)
    host.table["/1.0/storage-pools/slow/volumes/custom/data"] = {
        "project": "default",
        "content_type": "filesystem",
        "config": {"volatile.idmap.last": last},
    }
    disk = host.disk_with(path=WORKSPACE, pool="slow", source="data")
    assert disk.path == f"{host.folder}/storage-pools/slow/custom/default_data"
    assert (disk.inside, disk.shifted) == ("", shifted)


@pytest.mark.parametrize(
    ("device", "volume"),
    [
        ({"source": "ceph:pool/volume"}, None),
        ({"source": "tmpfs:"}, None),
        ({"source": "relative"}, None),
        ({"pool": "slow", "source": "absent"}, None),
        ({"pool": "slow", "source": "data/below"}, None),
        ({"pool": "slow", "source": "data"}, {"content_type": "block"}),
        ({"pool": "slow", "source": "data"}, {"content_type": "filesystem", "project": "elsewhere"}),
        ({"pool": "slow", "source": "data"}, {"config": {"security.unmapped": "true"}}),
    ],
)
def test_a_disk_that_cannot_be_opened(
    host: Host, device: dict[str, str], volume: dict[str, Any] | None
) -> None:
    """A disk the broker cannot find is an error that names the device; the folder below is never used."""
    if volume is not None:
        told = {"project": "default", "content_type": "filesystem", "config": {}} | volume
        host.table["/1.0/storage-pools/slow/volumes/custom/data"] = told
    with pytest.raises(Unavailable) as caught:
        host.disk_with(path=WORKSPACE, **device)
    assert caught.value.facts["device"] == "more"
    assert "Bash" in caught.value.message and str(host.folder) not in caught.value.message


def test_disks_elsewhere(host: Host) -> None:
    """A disk beside the workspace does not matter; one below it is covered."""
    assert host.disk_with(path="/srv/site-data", source="/data").covered == ()
    assert host.disk_with(path="/srv/site/public/up", source="/data").covered == ("public/up",)


def test_group(host: Host) -> None:
    """A container's cgroup is that of its init process, and only if it has the container's name."""
    host.has("shop", state={"pid": os.getpid()})  # a process that is no container's
    for name in ("shop", "absent"):
        with pytest.raises(NotFound):
            host.tenants.group(name)
    host.has("shop", state=None)
    with pytest.raises(NotFound):
        host.tenants.group("shop")


# --- limits of disks --------------------------------------------------------------------------------------

ID = "0b5c0a4e-9f1c-4f5a-8f0e-0123456789ab"
OTHER = "11111111-9f1c-4f5a-8f0e-0123456789ab"
ROOT = {"type": "disk", "path": "/", "pool": "pool", "size": "2GiB"}


class Groups(DiskGroups):
    """Groups that note what is limited."""

    def __init__(self, *lacking: str) -> None:
        self.limited: list[tuple[str, str, int]] = []
        self.slack: list[bool] = []
        self._lacking = lacking

    def limit(self, folder: str, identity: str, size: int, *, slack: bool = False, former: str = "") -> int:
        if folder == "full":
            raise OSError(28, "No space left on device")
        self.limited.append((folder, identity, size))
        self.slack.append(slack)
        self.former = former
        return 7

    def lacking(self) -> Iterator[str]:
        yield from self._lacking


def with_groups(monkeypatch: pytest.MonkeyPatch, groups: Groups | None) -> None:
    monkeypatch.setattr(Quotas, "groups", lambda self: groups)


@pytest.mark.parametrize("managed", ["true", "false"])
def test_a_disk_is_limited_to_what_incusd_says(
    host: Host, monkeypatch: pytest.MonkeyPatch, managed: str
) -> None:
    """A request only names an instance; which may also be none yet, in the pool or on a move."""
    with_groups(monkeypatch, groups := Groups())
    config = {"user.gateway.managed": managed}
    host.has("shop", config={"volatile.uuid": ID}, expanded_config=config, expanded_devices={"root": ROOT})
    assert host.tenants.limit_disk("shop") == 7
    assert groups.limited == [("shop", ID, 2 << 30)]


def test_a_disk_has_slack_unless_its_tenant_runs(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Incus writes to it as it starts and stops one, which must succeed for a full one, too."""
    with_groups(monkeypatch, groups := Groups())
    for status in ("Stopped", "Running"):
        host.has("shop", status=status, config={"volatile.uuid": ID}, expanded_devices={"root": ROOT})
        host.tenants.limit_disk("shop")
    host.tenants.limit_disk("shop", ending=True)
    assert groups.slack == [True, False, True]


def test_a_standby_copy_is_counted_and_then_counts_for_the_tenant_that_is_made_of_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_groups(monkeypatch, groups := Groups())
    path = str(host.folder / "unix.socket")
    tenants = Instances(path, "default", WORKSPACE, 1000, "br0", "pool", "standby")
    host.table["/1.0"] = {"environment": {"server_name": "m1"}}
    with pytest.raises(NotFound):
        tenants.limit_disk("shop", standby=True)
    copy = instance("shop", config={"volatile.uuid": OTHER}, expanded_devices={"root": ROOT}, location="m1")
    host.table["/1.0/instances/shop?project=standby"] = copy
    assert tenants.limit_disk("shop", standby=True) == 7
    host.has("shop", config={"volatile.uuid": ID, COPY: "[]"}, expanded_devices={"root": ROOT}, location="m1")
    tenants.limit_disk("shop")
    assert groups.limited == [("standby_shop", OTHER, 0), ("shop", ID, 2 << 30)]
    assert groups.former == OTHER
    copy["location"] = "m2"  # another server has a copy of that name
    with pytest.raises(NotFound):
        tenants.limit_disk("shop", standby=True)


def test_no_disk_of_others_is_limited(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with_groups(monkeypatch, groups := Groups())
    host.has("theirs", config={"volatile.uuid": ID}, expanded_config={}, expanded_devices={"root": ROOT})
    other = ROOT | {"pool": "other"}
    host.has("apart", config={"volatile.uuid": ID}, expanded_devices={"root": other})
    for name in ("theirs", "none", "../shop"):
        with pytest.raises(NotFound):
            host.tenants.limit_disk(name)
    assert host.tenants.limit_disk("apart") is None
    assert groups.limited == []


def test_a_disk_that_cannot_be_limited_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its tenant is not started."""
    with_groups(monkeypatch, Groups())
    host.has("full", config={"volatile.uuid": ID}, expanded_devices={"root": ROOT})
    with pytest.raises(Unavailable, match=r"the disk of full cannot be limited: No space left"):
        host.tenants.limit_disk("full")


def test_in_a_pool_with_other_quotas_nothing_is_asked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with_groups(monkeypatch, None)
    assert (host.tenants.limit_disk("shop"), host.tenants.limit_disks()) == (None, 0)
    assert host.asked == []


def test_disks_that_lack_a_limit_get_one(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that an operator has restored; others' in the pool are left alone."""
    with_groups(monkeypatch, groups := Groups("theirs", "full", "shop", "project_one"))
    for name in ("full", "shop"):
        host.has(name, config={"volatile.uuid": ID}, expanded_devices={"root": ROOT})
    assert host.tenants.limit_disks() == 1
    assert groups.limited == [("shop", ID, 2 << 30)]


def test_disks_of_other_projects_take_no_place_of_those_that_lack_a_limit(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of tenants for other servers' loss lie in the same pool, and count for nobody."""
    copies = [f"gateway-standby_shop{number}" for number in range(60)]
    for number in range(60):
        host.has(f"shop{number}", config={"volatile.uuid": ID}, expanded_devices={"root": ROOT})
    with_groups(monkeypatch, groups := Groups(*copies, "shop7"))
    assert host.tenants.limit_disks() == 1
    assert groups.limited == [("shop7", ID, 2 << 30)]


def test_an_instances_id_numbers_its_group() -> None:
    """Apart from the small numbers that an operator chooses; another instance has another one."""
    assert number_of(ID) == number_of(ID.upper()) == 0x8B5C_0A4E_9F1C
    assert number_of("00000000-0000-4000-8000-000000000000") == 1 << 47
    with pytest.raises(ValueError, match="hexadecimal"):
        number_of("shop")
