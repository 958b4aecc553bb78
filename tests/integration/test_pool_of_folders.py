"""The attacks and the tools on a storage pool of plain folders, where files may have other ids on disk.

One tenant for all of them: Incus takes ten times as long to make one there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.conftest import Container
from tests.integration.test_attacks import arena, emptied, gateway, test_races, victim
from tests.integration.test_attacks_search import tenant, workers
from tests.integration.test_attacks_search import test_races as test_races_of_large_searches
from tests.integration.test_attacks_worker import test_confined
from tests.integration.test_files import files_of

# the fixtures, and the tests that are run here too
__all__ = [
    "arena",
    "gateway",
    "tenant",
    "test_confined",
    "test_races",
    "test_races_of_large_searches",
    "victim",
    "workers",
]


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    name = f"t-folders-{os.getpid()}"
    environment.incus("storage", "create", name, "dir")
    yield name
    environment.incus("storage", "delete", name)


async def test_files_are_the_users(victim: Container, workers: Workers, incus_settings: Settings) -> None:
    emptied(victim)
    files = await files_of(victim, workers, incus_settings)
    await files.text("Write", file_path="x/a.txt", content="a\n")
    assert victim.sh("stat -c %U:%G /srv/site/x /srv/site/x/a.txt").split() == ["site:site"] * 2
    victim.sh("echo b >> /srv/site/x/a.txt", user=1000)
    assert await files.text("Read", file_path="x/a.txt") == "1\ta\n2\tb\n3\t"
