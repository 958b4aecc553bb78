"""An instance's bridge ports, and binding them to its address."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.rootfs import bridge_port
from gateway.rootfs.bridge_port import Port, ports

ADDRESS = "10:66:6a:29:c2:d3"
Plug = Callable[[str, str], Path]


@pytest.fixture
def plug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plug:
    """Create a port with that name at a bridge."""
    monkeypatch.setattr(bridge_port, "_INTERFACES", tmp_path)

    def plugged(name: str, bridge: str) -> Path:
        (folder := tmp_path / name / "brport").mkdir(parents=True)
        (folder / "bridge").symlink_to(f"../../{bridge}")
        (folder / "learning").write_text("1\n")
        return folder / "learning"

    return plugged


def config(port: str, address: str = ADDRESS, device: str = "eth0") -> dict[str, str]:
    return {f"volatile.{device}.host_name": port, f"volatile.{device}.hwaddr": address}


def test_found(plug: Plug) -> None:
    """A port recorded by Incus is found at the requested bridge, and at no other."""
    plug("veth1", "br0")
    plug("veth2", "br1")
    two = config("veth1") | config("veth2", "10:66:6a:29:c2:d4", "eth1") | {"volatile.uuid": "x"}
    assert [*ports(two, "br0")] == [Port("veth1", ADDRESS)]
    assert [*ports(two, "br1")] == [Port("veth2", "10:66:6a:29:c2:d4")]


@pytest.mark.parametrize(
    "noted",
    [
        config("veth9"),  # of one that does not run
        config("veth1", "10:66:6a:29:c2"),
        config("../veth1"),
        config(".."),
        config(""),
        {"volatile.eth0.host_name": "veth1"},
        {},
    ],
)
def test_none(plug: Plug, noted: dict[str, str]) -> None:
    """Anything that is not a port of the bridge or has no address is ignored."""
    plug("veth1", "br0")
    assert [*ports(noted, "br0")] == []


def test_once(plug: Plug) -> None:
    """A bound port stays bound until the container's next start: nothing is repeated."""
    plug("veth1", "br0").write_text("0\n")
    assert not Port("veth1", ADDRESS).bind()


def test_gone(plug: Plug) -> None:
    """A port whose container has just stopped is no error."""
    assert not Port("veth1", ADDRESS).bind()


def test_refused(plug: Plug) -> None:
    """A failed binding is reported, so no port wrongly counts as bound."""
    learning = plug("veth-nowhere", "br0")
    with pytest.raises(OSError, match="no interface"):
        Port("veth-nowhere", ADDRESS).bind()
    assert learning.read_text() == "1\n"
