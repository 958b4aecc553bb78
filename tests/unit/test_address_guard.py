"""The table that lets each tenant use its own address only; whether it does is an integration test's."""

from __future__ import annotations

import subprocess
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

import pytest

from gateway.host import HostError
from gateway.host.setup import guard_addresses, guard_in_force, guard_table, guard_table_name
from gateway.rootfs import bridge_port
from gateway.runtime.incus.creation import Creation
from gateway.settings import Settings

ADDRESS = IPv4Address("10.82.3.254")


def settings(folder: Path, network: str = "10.82.3.1/24") -> Settings:
    return Settings(incus_socket=folder / "unix.socket", network="br-test", network_ipv4=network)


class Nft:
    """Stands for nft(8): takes each table unless `refuses`, and keeps the names of those in force."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses, self.there, self.asked = refuses, set[str](), list[list[str]]()

    def run(self, words: Any, **more: Any) -> subprocess.CompletedProcess[Any]:
        self.asked.append(list(map(str, words[1:])))
        match self.asked[-1]:
            case ["list", "chain", "bridge", name, "ports"]:
                return subprocess.CompletedProcess(words, int(name not in self.there))
            case ["--check", *_]:
                return subprocess.CompletedProcess(words, int(self.refuses == "check"))
            case ["-f", path]:
                if self.refuses == "load":
                    return subprocess.CompletedProcess(words, 1, "", "no")
                lines = Path(path).read_text().splitlines()
                self.there |= {line.split()[2] for line in lines if line.startswith("table bridge")}
                return subprocess.CompletedProcess(words, 0, "", "")
            case other:
                raise AssertionError(other)


@pytest.fixture
def nft(monkeypatch: pytest.MonkeyPatch) -> Nft:
    nft = Nft()
    monkeypatch.setattr("subprocess.run", nft.run)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/sbin/nft")
    return nft


def test_each_address_is_one_ports_own(tmp_path: Path) -> None:
    """And the bridge's own is nobody's."""
    text = guard_table(settings(tmp_path)) or ""
    assert text.count(" . 0a:67:77:") == 253
    assert f'"gw0a5203fe" . 0a:67:77:52:03:fe . {ADDRESS}' in text
    assert " 10.82.3.1," not in text and "0a520301" not in text
    assert not {word for word in ("TABLE", "NAMES", "ADDRESSES") if word in text}
    assert guard_table_name(settings(tmp_path)) == "gateway_br_test"


def test_names_are_found_again() -> None:
    assert bridge_port.hardware_address_of(bridge_port.port_name(ADDRESS)) == "0a:67:77:52:03:fe"
    for other in ("veth5203fe00", "gw0a5203f", "gw0a5203fe0", "gatewaybr0"):
        assert bridge_port.hardware_address_of(other) is None


def test_it_is_put_in_force_once_and_again_where_it_is_lost(tmp_path: Path, nft: Nft) -> None:
    of = settings(tmp_path)
    hook = bridge_port.guard_hook(tmp_path, of.network)
    assert guard_addresses(of) is not None and guard_in_force(of)
    assert hook.stat().st_mode & 0o777 == 0o755
    assert f"/usr/sbin/nft -f {hook}.nft" in hook.read_text()
    assert "NFT" not in hook.read_text() and "TABLE" not in hook.read_text()
    assert guard_addresses(of) is None
    nft.there.clear()
    assert guard_addresses(of) is not None and guard_in_force(of)


def test_without_it_new_tenants_have_the_filter_of_incus(tmp_path: Path, nft: Nft) -> None:
    """Where the kernel refuses it, or the network is too large; but what fails later is told.

    A copy of a guarded tenant gets the filter too.
    """
    of = settings(tmp_path)
    making, address = Creation(of, None), IPv4Interface(f"{ADDRESS}/24")  # type: ignore[arg-type]
    filtered = {"type": "nic", "security.mac_filtering": "true"}
    nic, named = {**filtered, "network": "br-test"}, {"nictype": "bridged", "parent": "br-test"}
    assert making._placed(nic, address)[0] == {**filtered, **named, "ipv4.address": "10.82.3.254"}
    nft.refuses = "check"
    assert guard_addresses(of) is None and making._placed(nic, address)[0]["security.mac_filtering"] == "true"
    nft.refuses = "load"
    with pytest.raises(HostError, match="cannot restrict"):
        guard_addresses(of)
    assert "host_name" not in making._placed(nic, address)[0]
    nft.refuses = ""
    guard_addresses(of)
    own, static = making._placed(nic, address)
    assert own["host_name"] == "gw0a5203fe" and own["security.mac_filtering"] == "false"
    assert static.endswith(f"\nlxc.hook.pre-start = {bridge_port.guard_hook(tmp_path, of.network)}\n")
    nft.refuses = "check"  # the kernel took it before, and tenants need it
    assert guard_addresses(of) is None
    assert making._placed(own, address) == (own, static)
    assert guard_addresses(settings(tmp_path, "10.64.0.1/10")) is None
    copy, static = making._placed(own, address)
    assert "host_name" not in copy and "hook" not in static
    assert {value for key, value in copy.items() if key.endswith("_filtering")} == {"true"}
