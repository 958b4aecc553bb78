"""What the gateway reads from Incus's record of an instance."""

from __future__ import annotations

import pytest

from gateway.runtime.incus.records import status_of


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("Running", "running"),
        ("Ready", "running"),
        ("Thawed", "running"),
        ("Freezing", "frozen"),
        ("Frozen", "frozen"),
        ("Starting", "starting"),
        ("Stopping", "stopping"),
        ("Aborting", "stopping"),
        ("Stopped", "stopped"),
        ("Error", "error"),
        ("a word of a later Incus", "error"),
    ],
)
def test_each_state_of_an_instance_is_a_status(said: str, status: str) -> None:
    """Also transient ones: the site has a status while its tenant is being paused."""
    assert status_of({"status": said}) == status
