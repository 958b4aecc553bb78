"""What a hostile tenant tries from inside its container."""

from __future__ import annotations

import asyncio
import http.server
import json
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import pytest

from gateway.host.setup import pin
from gateway.rootfs import bridge_port
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.conftest import Container, MakeTenant, make_containers, settle

# Bash's own sockets: 0 connected, 1 refused or rejected, 124 dropped without an answer.
CONNECT = "timeout 2 bash -c 'exec 3<>/dev/tcp/{host}/{port}' 2>&1"


def connect(tenant: Container, host: str, port: int) -> int:
    return tenant.run("sh", "-c", CONNECT.format(host=host, port=port), check=False).returncode


async def connect_all(tenant: Container, hosts: Sequence[str], port: int) -> dict[str, int]:
    tries = (asyncio.to_thread(connect, tenant, host, port) for host in hosts)
    return dict(zip(hosts, await asyncio.gather(*tries), strict=True))


def reaches(tenant: Container, host: str, port: int) -> bool:
    return connect(tenant, host, port) == 0


def host_addresses() -> list[str]:
    listed = json.loads(subprocess.run(["ip", "-json", "-4", "addr"], capture_output=True, check=True).stdout)
    return [
        info["local"]
        for link in listed
        for info in link["addr_info"]
        if not IPv4Address(info["local"]).is_loopback
    ]


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def host_service() -> Iterator[int]:
    """A service of the host on all its addresses; its port."""
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
async def neighbours(incus_settings: Settings) -> AsyncIterator[tuple[Container, Container]]:
    """Two tenants; only the last tests here change the network of the first for good."""
    async with make_containers("near", incus_settings, 2) as (one, other):
        await asyncio.gather(settle(one), settle(other))
        yield one, other


def serve(tenant: Container, port: int = 8000) -> None:
    """Make a tenant answer on a port of all its addresses, and check that it does."""
    tenant.sh(
        f"systemctl is-active --quiet probe-{port} || systemd-run --quiet --unit=probe-{port} bun -e "
        f'\'Bun.serve({{port: {port}, hostname: "0.0.0.0", fetch: () => new Response("hi")}})\''
        "; for i in $(seq 50); do "
        f"curl -s -o /dev/null http://127.0.0.1:{port} && exit 0; sleep 0.1; done; exit 1"
    )


def test_a_tenant_cannot_reach_its_neighbour(neighbours: tuple[Container, Container]) -> None:
    """Port isolation: no TCP, no ping, no ARP to another tenant on the same bridge."""
    one, other = neighbours
    serve(other)
    address = other.address()
    with socket.create_connection((address, 8000), timeout=5):
        pass  # the host reaches it, so that a failure below is the isolation's doing
    assert not reaches(one, address, 8000)
    assert one.run("ping", "-c1", "-W1", address, check=False).returncode != 0
    assert "lladdr" not in one.sh(f"ip neigh show {address}")


async def test_a_tenant_cannot_reach_the_host(
    neighbours: tuple[Container, Container], host_service: int, incus_settings: Settings
) -> None:
    """No service of the host answers, neither on the bridge nor on any other address."""
    one, _ = neighbours
    bridge = str(IPv4Interface(incus_settings.network_ipv4).ip)
    addresses = host_addresses()
    assert bridge in addresses
    for address in addresses:
        with socket.create_connection((address, host_service), timeout=5):
            pass
    assert 0 not in (await connect_all(one, addresses, host_service)).values()


async def test_private_networks_are_dropped(shared_tenant: Container) -> None:
    """A connection into a private range gets no answer: it is dropped at the bridge."""
    networks = ["10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "169.254.169.254"]
    assert await connect_all(shared_tenant, networks, 80) == dict.fromkeys(networks, 124)


def test_private_packets_never_leave_the_host(shared_tenant: Container, incus_settings: Settings) -> None:
    """A packet to a private address that the host itself would answer is dropped by the ACL's rule."""
    with_alias = ["ip", "address", "add", "172.31.255.1/32", "dev", "lo"]
    subprocess.run(with_alias, check=True)
    try:
        with socket.create_server(("172.31.255.1", 0)) as server:
            assert not reaches(shared_tenant, "172.31.255.1", server.getsockname()[1])
    finally:
        subprocess.run(["ip", "address", "del", "172.31.255.1/32", "dev", "lo"], check=True)


def test_names_resolve_but_not_those_of_neighbours(neighbours: tuple[Container, Container]) -> None:
    """DNS works for the outside; the bridge's server reveals no tenant's name."""
    one, other = neighbours
    # Whatever the outside answers, the bridge's resolver does: an answer or "no such name", no timeout.
    asks = ("timeout", "10", "getent", "ahostsv4", "example.org")
    assert one.run(*asks, check=False).returncode != 124
    for name in (other.name, f"{other.name}.incus"):
        assert one.run("getent", "ahostsv4", name, check=False).returncode != 0


def test_a_stolen_address_leads_nowhere(neighbours: tuple[Container, Container]) -> None:
    """With its neighbour's address a tenant gets no packet out, and the neighbour keeps its traffic."""
    one, other = neighbours
    serve(other)
    address = other.address()
    one.sh(f"ip address add {address}/24 dev eth0")
    said = one.sh(f"curl -sS --interface {address} --max-time 3 http://1.1.1.1 2>&1", check=False)
    assert "timed out" in said or "Timeout" in said, said
    with socket.create_connection((address, 8000), timeout=5):
        pass  # still the neighbour: `one` does not listen there
    one.sh(f"ip address del {address}/24 dev eth0")


def test_no_ipv6_passes(neighbours: tuple[Container, Container]) -> None:
    """A tenant that gives itself IPv6 link-local addresses still reaches nobody with them."""
    one, other = neighbours
    for tenant, number in ((one, 1), (other, 2)):
        tenant.sh(
            "sysctl -q -w net.ipv6.conf.eth0.disable_ipv6=0; "
            f"ip -6 address add fe80::{number}/64 dev eth0 nodad; ip link set eth0 up"
        )
    assert one.run("ping", "-6", "-c1", "-W1", "fe80::2%eth0", check=False).returncode != 0
    for tenant in (one, other):
        tenant.sh("sysctl -q -w net.ipv6.conf.eth0.disable_ipv6=1")


async def test_tenants_have_uids_of_their_own(neighbours: tuple[Container, Container]) -> None:
    """Two tenants' root users are two different, powerless users of the host."""
    maps = [c.sh("cat /proc/self/uid_map").split()[1] for c in neighbours]
    assert len(set(maps)) == 2
    assert "0" not in maps


def test_a_foreign_mac_gets_no_packet_out(neighbours: tuple[Container, Container]) -> None:
    """With another hardware address than Incus gave it, a tenant resolves no name and gets no lease."""
    one, _ = neighbours
    resolves = ("timeout", "5", "bash", "-c", f"exec 3<>/dev/tcp/{_gateway(one)}/53")
    assert one.run(*resolves, check=False).returncode == 0
    one.sh("ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up; sleep 1")
    assert one.run(*resolves, check=False).returncode != 0


def test_a_stolen_mac_draws_no_traffic(
    neighbours: tuple[Container, Container], incus_settings: Settings
) -> None:
    """With its neighbour's hardware address a tenant does not get the neighbour's traffic either."""
    one, other = neighbours
    serve(other)
    address = other.address()
    learning = [
        Path(f"/sys/class/net/{port.name}/brport/learning")
        for tenant in neighbours
        for port in bridge_port.ports(_config(tenant), incus_settings.network)
    ]
    for switch in learning:
        switch.write_text("1")  # as after a start, also where a gateway was quicker
    assert pin(incus_settings) is not None
    assert [switch.read_text().strip() for switch in learning] == ["0", "0"]
    assert pin(incus_settings) is None  # done once, it holds until the next start
    mac = other.sh("cat /sys/class/net/eth0/address").strip()
    one.sh(f"ip link set eth0 down; ip link set eth0 address {mac}; ip link set eth0 up; sleep 1")
    one.sh(
        f"ip address add {environment.NETWORK.rpartition('.')[0]}.99.9/16 dev eth0; "
        f"for i in 1 2 3; do ping -c1 -W1 {_gateway(other)}; done; true",
        check=False,
    )
    with socket.create_connection((address, 8000), timeout=5):
        pass


def _config(tenant: Container) -> dict[str, str]:
    config: dict[str, str] = json.loads(environment.incus("query", f"/1.0/instances/{tenant.name}").stdout)[
        "config"
    ]
    return config


def _gateway(tenant: Container) -> str:
    # the lease of a link that a test took down comes again
    return tenant.sh(
        "for i in $(seq 200); do ip -4 route show default | grep . && exit; sleep 0.1; done"
    ).split()[2]


def test_memory_is_a_hard_limit(tenant: Container) -> None:
    """A process that takes more than the limit is killed; the container lives on."""
    # at once: in small parts the kernel may look for seconds for what it could reclaim
    take = 'my $taken = "x" x (1 << 31); print "took 2 GB"'
    done = tenant.run("perl", "-e", take, user=1000, check=False, timeout=100)
    assert done.returncode == 137, done
    assert tenant.sh("echo alive").strip() == "alive"


async def test_processes_are_limited(make_tenant: MakeTenant, incus_settings: Settings) -> None:
    """A fork bomb stops at the limit: forks fail, and no more processes than allowed exist."""
    tenant = await make_tenant()
    fork = 'for (1..1000) { my $child = fork // die "no more: $!"; $child || exec "sleep", "60" }'
    bomb = tenant.run("perl", "-e", fork, user=1000, check=False, timeout=100)
    assert b"no more: Resource temporarily unavailable" in bomb.stderr, bomb
    state = json.loads(environment.incus("query", f"/1.0/instances/{tenant.name}/state").stdout)
    limit = incus_settings.tenant_processes
    assert limit - 50 < state["processes"] <= limit


def test_disk_is_limited(tenant: Container) -> None:
    """Writing past the quota fails with the quota's error, and the tenant can make room again."""
    tenant.sh("fallocate -l 1270M /srv/site/most", user=1000)
    fill = "dd if=/dev/zero of=/srv/site/big bs=1M count=1000 conv=fsync 2>&1"
    # with input, so that nothing of it is recorded: that would be on the same full disk
    said = tenant.run("sh", "-c", fill, user=1000, check=False, stdin=b"\n").stdout.decode()
    assert "quota exceeded" in said.lower() or "no space" in said.lower(), said
    tenant.run("sh", "-c", "cd /srv/site; rm big most; sync; echo ok > small", user=1000, stdin=b"\n")


def test_cpu_is_limited(shared_tenant: Container) -> None:
    """With limits.cpu = 1 a tenant is pinned to one CPU."""
    assert shared_tenant.sh("nproc").strip() == "1"


async def test_no_host_socket_inside(shared_tenant: Container) -> None:
    """The guest API socket of Incus is not handed to tenants."""
    assert shared_tenant.run("test", "-e", "/dev/incus/sock", check=False).returncode != 0
