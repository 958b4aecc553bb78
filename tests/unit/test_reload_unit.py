"""The units as far as a reload is concerned, by their text: systemd itself runs them in no test."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def keys(*files: Path) -> dict[str, list[str]]:
    """Return the values of each key of a unit and its drop-ins; an empty one clears those before."""
    found: dict[str, list[str]] = {}
    for file in files:
        for line in file.read_text().replace("\\\n", " ").splitlines():
            key, is_key, value = line.partition("=")
            if is_key and not line.startswith("#"):
                found[key] = [*found.get(key, []), value] if value else []
    return found


def test_a_reload_starts_a_successor_which_the_command_may_name() -> None:
    """`NotifyAccess=exec` lets it; a reload may wait for deployments."""
    unit = keys(DEPLOY / "incus-gateway.service")
    assert unit["Type"] == ["notify"] and unit["NotifyAccess"] == ["exec"]
    assert unit["ExecReload"] == ["/var/lib/incus-gateway/venv/bin/incus-gateway upgrade --reload"]
    assert int(unit["TimeoutStartSec"][0]) > 300 + 120  # GATEWAY_UPGRADE_PATIENCE, and what a start takes


def test_a_gateway_as_its_own_user_is_reloaded_with_the_settings_that_it_is_started_with() -> None:
    unit = keys(DEPLOY / "incus-gateway.service", DEPLOY / "incus-gateway-unprivileged.conf")
    (start,), (reload,) = unit["ExecStart"], unit["ExecReload"]
    assert reload.split() == [*start.split()[:-1], "upgrade", "--reload"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    """Every key is one that it knows, and has a value that it takes."""
    text = unit.read_text().replace("/var/lib/incus-gateway/venv/bin/incus-gateway", "/bin/true")
    (tmp_path / unit.name).write_text(text.replace("/usr/bin/caddy", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / unit.name],
        capture_output=True,
        text=True,
        check=False,
    )
    about = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert not about, done.stderr
