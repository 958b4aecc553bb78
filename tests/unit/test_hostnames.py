"""How domains are spelled, which are the gateway's own, and what a pattern takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.errors import InvalidParams
from gateway.hostnames import (
    gateway_hosts,
    gateway_names,
    host_allowed,
    matches,
    normalized,
    pattern,
    plain,
    reserved,
)
from gateway.settings import Settings


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("Shop.Example.COM", "shop.example.com"),
        ("shop.example.com.", "shop.example.com"),
        (" shop.example.com ", "shop.example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example.", "xn--bcher-kva.example"),
        ("shop。example", "shop.example"),
    ],
)
def test_every_spelling_of_a_name_is_one_name(text: str, domain: str) -> None:
    assert normalized(text) == domain


@pytest.mark.parametrize(
    "text",
    [
        "",
        "shop",
        "shop..com",
        "a/b.com",
        "../x.com",
        "-a.com",
        "1.2.3.4",
        "a_b.com",
        "x." * 130 + "com",
        "*.a.b",
    ],
)
def test_what_is_no_domain(text: str) -> None:
    assert plain(text) is None
    with pytest.raises(InvalidParams):
        normalized(text)


@pytest.mark.parametrize(
    ("entry", "domain", "taken"),
    [
        ("shop.example.com", "shop.example.com", True),
        ("shop.example.com", "a.shop.example.com", False),
        ("*.Sites.example.com.", "a.sites.example.com", True),
        ("*.sites.example.com", "b.a.sites.example.com", True),
        ("*.sites.example.com", "sites.example.com", False),
        ("*.sites.example.com", "evilsites.example.com", False),
        ("*.localhost", "shop.localhost", True),
    ],
)
def test_what_a_pattern_takes(entry: str, domain: str, taken: bool) -> None:
    assert matches(domain, [pattern(entry)]) is taken


@pytest.mark.parametrize(
    "entry", ["", "*", "*.", "*.*.com", "a.*.com", "shop", "*shop.com", "*.a b", "*.1.2"]
)
def test_what_is_no_pattern(entry: str) -> None:
    with pytest.raises(InvalidParams):
        pattern(entry)


def test_the_names_by_which_the_gateway_is_reached_are_its_own(tmp_path: Path) -> None:
    settings = Settings(
        state_dir=tmp_path,
        listen="Inside.example.com:8080",
        domain="GW.example.com",
        origins=("https://edit.example.com:8443",),
        hosts=("Proxy.example.com.", "*"),
    )
    own = gateway_names(settings)
    for name in ("inside", "gw", "edit", "proxy"):
        assert reserved(f"{name}.example.com", own)
        assert reserved(f"{name.upper()}.Example.com.", own)
        assert not reserved(f"a.{name}.example.com", own)
    assert all(reserved(name, own) for name in ("localhost", "probe.invalid", "PROBE.invalid."))
    assert not reserved("shop.localhost", own)


def test_suffixes_are_read_however_they_are_written() -> None:
    given = Settings.model_validate({"domain_suffixes": " *.Sites.example.com, localhost., ,"})
    assert given.domain_suffixes == ("sites.example.com", "localhost")
    listed = Settings.model_validate({"domain_suffixes": ["*.Sites.example.com."]})
    assert listed.domain_suffixes == ("sites.example.com",)
    assert Settings.model_validate({"domain_suffixes": ""}).domain_suffixes == ()


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        *((host, True) for host in ("gw.example", "GW.example:443", "gw.example.", "gw.example.:8080")),
        *((host, True) for host in ("listed.example:1", "lan", "LAN:8080", "own.example", "plain.example")),
        *((host, True) for host in ("127.0.0.1", "10.0.0.5:8080", "[::1]:8080", "[2001:DB8::1]", None, "")),
        *((host, False) for host in ("evil.example", "gw.example.evil.example", "xgw.example", "example")),
        *((host, False) for host in ("127.0.0.1.evil.example", "127.0.0.1.nip.io:8080", "2130706433")),
        *(
            (host, False)
            for host in ("gw.example:x", "gw.example:80:80", "gw.example evil", "[gw.example", "*")
        ),
        *(
            (host, False)
            for host in ("gw.example..", ".", "localhost.evil.example", "xlocalhost", "\xe4.example")
        ),
    ],
)
def test_which_hosts_are_ours(tmp_path: Path, host: str | None, allowed: bool) -> None:
    given = Settings(
        state_dir=tmp_path,
        listen="lan:8080",
        domain="gw.example",
        origins="https://listed.example,http://plain.example:81",
        hosts="Own.example, ",
    )
    for near in (False, True):
        assert host_allowed(host, gateway_hosts(given), near=near) is allowed


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "gateway.localhost", "LOCALHOST.", "a.b.localhost:1"]
)
def test_localhost_is_this_machine_alone(tmp_path: Path, host: str) -> None:
    own = gateway_hosts(Settings(state_dir=tmp_path))
    assert [host_allowed(host, own, near=near) for near in (True, False)] == [True, False]


@pytest.mark.parametrize("given", [{"hosts": "a.example,*"}, {"listen": "/run/gateway.sock"}])
def test_any_host_is_served_where_that_is_meant(tmp_path: Path, given: dict[str, Any]) -> None:
    assert host_allowed("evil.example", gateway_hosts(Settings(state_dir=tmp_path, **given)), near=False)
