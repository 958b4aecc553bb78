"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, Final

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from gateway.storage import database, memory_log

E2E: Final = "tests/e2e/"

# how long an example takes, and how long it is to be made, is the machine's affair
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("tests")


def pytest_configure() -> None:
    # a shell has its background jobs ignore interrupts, and they pass that on to what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)


class WholeFiles(LoadFileScheduling):  # type: ignore[misc] # it ships no types
    """Give a worker whole files, so that what a file's tests share is made once; and all of e2e to one.

    Those share a gateway, a deployed site and a browser. Their folder is named first where everything runs,
    so that the other worker has enough left to do meanwhile.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return E2E if file.startswith(E2E) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> WholeFiles:
    return WholeFiles(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_notes_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove from memory what the gateways left there that tests killed."""
    yield
    for depth in range(1, 5):
        for records in tmp_path_factory.getbasetemp().glob("*/" * depth + database.FILE):
            memory_log.place(records.parent).unlink(missing_ok=True)
