"""incusd's errors are reported with our code, reason and message."""

from __future__ import annotations

import pytest

from gateway.errors import GatewayError
from gateway.incus import IncusError
from gateway.runtime.incus.errors import translated

DOWN = 'Failed start validation for device "eth0": Network "gwbr-secret" unavailable on this server'
GONE = """Failed to start device "eth0": Parent device "gwbr-secret" doesn't exist"""


@pytest.mark.parametrize(
    ("said", "code", "reason"),
    [
        (DOWN, "unavailable", "no_network"),
        (GONE, "unavailable", "no_network"),
        ('Storage pool "gateway-secret" unavailable on this server', "unavailable", "no_pool"),
        ("Storage pool is unavailable on this server", "unavailable", "no_pool"),
        ("Failed loading: Storage pool not found", "unavailable", "no_pool"),
        ("Failed to create mount directory /var/lib/secret: file exists", "unavailable", "no_pool"),
        ("Requested profile 'secret' doesn't exist", "unavailable", "no_pool"),
        ("Image not found", "unavailable", "no_image"),
        ("Failed copying: write /secret: no space left on device", "unavailable", "disk_full"),
        (
            'Reached maximum number of instances of type "container" in project "secret"',
            "rate_limited",
            "quota",
        ),
        ('IP address "10.0.0.2" already defined on another NIC', "conflict", "address_shared"),
        ("Failed: listen tcp 0.0.0.0:8080: bind: address already in use", "unavailable", "port_taken"),
    ],
)
def test_a_known_cause_has_its_reason(said: str, code: str, reason: str) -> None:
    with pytest.raises(GatewayError) as raised, translated("shop"):
        raise IncusError(said, 503)
    error = raised.value
    assert (error.code, error.facts["reason"]) == (code, reason)
    assert "secret" not in error.message and "shop" not in error.message
