"""The runtime contract over `local`: plain processes of this machine."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from tests.contracts.runtime import RuntimeContract

_fresh = itertools.count()


@pytest.fixture(scope="module")
async def runtime(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalRuntime]:
    settings = Settings(runtime="local", state_dir=tmp_path_factory.mktemp("state"))
    async with LocalRuntime(settings) as runtime:
        await runtime.create("demo")
        yield runtime


@pytest.fixture
def name() -> str:
    return "demo"


@pytest.fixture
def fresh() -> str:
    return f"fresh-{next(_fresh)}"


class TestLocal(RuntimeContract):
    whole_trees = os.geteuid() == 0

    async def test_the_gateways_own_environment_stays_with_it(
        self, runtime: LocalRuntime, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from gateway.runtime import ExecSpec
        from tests.contracts.runtime import finish

        monkeypatch.setenv("GATEWAY_SECRET", "told to nobody")
        _, outputs = await finish(await runtime.exec(name, ExecSpec(("env",))))
        assert b"told to nobody" not in outputs[0]
