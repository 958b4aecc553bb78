"""The certificate by which a cluster's Caddys know one another, and the routes to other members' sites."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.caddy import Caddy, asleep, elsewhere
from gateway.caddy.routes import certified, peer_endpoint
from gateway.settings import Settings

SECRET, ADDRESS = "s" * 40, "10.90.0.2:8445"


def test_all_gateways_of_a_secret_make_the_same_certificate() -> None:
    assert certified(SECRET) == certified(SECRET)
    assert certified(SECRET) != certified("t" * 40)
    assert SECRET.encode() not in b"".join(certified(SECRET))


def test_the_key_is_for_caddy_and_the_gateway_alone(tmp_path: Path) -> None:
    caddy = Caddy(Settings(state_dir=tmp_path))
    caddy.join(ADDRESS, SECRET)
    found = peer_endpoint(caddy.folder)
    assert found is not None
    assert (found.host, found.port) == ("10.90.0.2", 8445)
    assert found.key.stat().st_mode & 0o777 == 0o640
    before = found.key.stat().st_ino
    caddy.join(ADDRESS, SECRET)
    assert found.key.stat().st_ino == before, "what is there already is not written anew"
    caddy.join(ADDRESS, "t" * 40)
    assert found.key.read_bytes() == certified("t" * 40)[1]
    caddy.leave()
    assert peer_endpoint(caddy.folder) is None and not found.key.exists()


@pytest.mark.parametrize("address", ["10.90.0.2:8445", "[fd00::1]:8445", "m2.example.com:443"])
async def test_a_route_may_lead_to_another_member(tmp_path: Path, address: str) -> None:
    async with Caddy(Settings(state_dir=tmp_path)) as caddy:
        caddy.set("shop.example.com", elsewhere(address))
        caddy.set("own.example.com", "10.0.0.9:3000")
        assert caddy.remote_domains() == frozenset({"shop.example.com"})
        assert not caddy.sleeps("shop.example.com")
        assert not caddy.reconcile(caddy.listed(), ())


@pytest.mark.parametrize(
    "address", ["../../x:1", "10.90.0.2", "a b:1", "10.90.0.2:1/x", "asleep_10.0.0.1:1", ""]
)
async def test_what_is_no_address_makes_no_route(tmp_path: Path, address: str) -> None:
    async with Caddy(Settings(state_dir=tmp_path)) as caddy:
        for target in (elsewhere(address), asleep(elsewhere("10.90.0.2:8445"))):
            with pytest.raises(ValueError, match="not a target"):
                caddy.set("shop.example.com", target)
        with pytest.raises(ValueError, match="HOST:PORT"):
            caddy.join(address, SECRET)
