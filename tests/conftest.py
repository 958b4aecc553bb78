"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import hypothesis
import pytest

from gateway.storage import database, ledger

# how long an example takes, and how long it is to be made, is the machine's affair
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("tests")


def pytest_configure() -> None:
    # a shell has its background jobs ignore interrupts, and they pass that on to what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_notes_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove from memory what the gateways left there that tests killed."""
    yield
    for depth in range(1, 5):
        for records in tmp_path_factory.getbasetemp().glob("*/" * depth + database.FILE):
            ledger.place(records.parent).unlink(missing_ok=True)
