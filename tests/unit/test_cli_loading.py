"""A command is loaded when it runs, without looking for garbage while it is imported."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from gateway.__main__ import main
from gateway.cli.main import LazyCommand, _Unloaded


@pytest.fixture
def collecting() -> Iterator[None]:
    """Leave the collector of these tests as it was."""
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("collecting")
def test_garbage_is_collected_once_a_command_is_there() -> None:
    gc.disable()
    _Unloaded("list", LazyCommand("gateway.cli.tenants:list_tenants")).loaded()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


@pytest.mark.usefixtures("collecting")
def test_nothing_is_collected_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []
    monkeypatch.setattr("gateway.cli.main.main", lambda: collected.append(gc.isenabled()))
    main()
    assert collected == [False]


def test_what_asks_no_gateway_imports_no_client() -> None:
    """Else `--version`, `--help` and each Tab take half as long again."""
    program = "import sys, gateway.cli.main; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "gateway.cli.invocation" in loaded
    assert not loaded & {"gateway_client.client", "websockets", "aiohttp", "pydantic", "gateway.auth.issuing"}
