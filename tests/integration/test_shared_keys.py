"""The keys that gateways share, in a real incusd. ETags are the same without a cluster."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator

import pytest

from gateway.cluster.keys import IncusKeys
from gateway.errors import Unavailable
from gateway.incus import Incus
from gateway.incus.members import NO_QUORUM
from gateway.ownership.reservations import SharedKeys
from gateway.settings import Settings
from tests.contracts.shared_keys import SharedKeysContract
from tests.integration import environment
from tests.integration.conftest import Incusd


@contextlib.asynccontextmanager
async def gateway_keys(settings: Settings, project: str) -> AsyncIterator[IncusKeys]:
    async with Incus(settings.incus_socket, project) as incus, IncusKeys(incus, 20) as keys:
        yield keys


class TestInIncus(SharedKeysContract):
    @pytest.fixture
    async def keys(self, incus_settings: Settings) -> AsyncIterator[tuple[SharedKeys, SharedKeys]]:
        project = f"t-keys-{os.getpid()}"
        async with (
            gateway_keys(incus_settings, project) as one,
            gateway_keys(incus_settings, project) as other,
        ):
            yield one, other
        environment.incus("project", "delete", project, check=False)


async def test_without_incusd_the_refusal_comes_in_time(incus_settings: Settings, incusd: Incusd) -> None:
    async with (
        Incus(incus_settings.incus_socket, "t-keys-none") as incus,
        IncusKeys(incus, 2) as keys,
    ):
        await incusd.kill()
        began = time.monotonic()
        with pytest.raises(Unavailable) as refused:
            await keys.swap("t.a", None, "1")
        assert refused.value.facts["reason"] == NO_QUORUM
        assert time.monotonic() - began < 10  # 2 s, and who asks may wait for its turn on the CPU
