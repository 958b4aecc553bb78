"""The units of systemd: what they may do, and that docs/operations.md has their scores."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = {unit.name: unit for unit in sorted(DEPLOY.glob("*.service"))}
SPLIT = "incus-gateway-unprivileged.conf"


def settings(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / name).read_text().splitlines():
        if re.match(r"\w+=", line):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def size(value: str) -> int:
    return int(value[:-1]) << {"M": 20, "G": 30}[value[-1]]


@pytest.mark.parametrize("name", UNITS)
def test_each_has_an_end_of_its_memory_and_gains_nothing(name: str) -> None:
    found = settings(name)
    assert size(found["MemoryMax"][0]) <= 3 << 30
    assert found["NoNewPrivileges"] == ["yes"]
    assert found["CapabilityBoundingSet"] and found["SystemCallFilter"]
    assert found["SystemCallArchitectures"] == ["native"]
    # not the last to be killed where the host's memory is short; tenants' processes (300) are first
    assert 0 <= int(found["OOMScoreAdjust"][0]) < 300


def test_a_gateway_with_a_user_of_its_own_has_no_capability_left() -> None:
    found = settings(SPLIT)
    assert found["User"] == ["incus-gateway"] and found["CapabilityBoundingSet"] == [""]
    assert found["ProtectSystem"] == ["strict"]
    assert "OOMScoreAdjust" not in found and "MemoryMax" not in found  # the unit's hold


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="this machine has no systemd-analyze")
@pytest.mark.parametrize("name", [*UNITS, SPLIT])
def test_the_score_is_what_the_docs_say(name: str, tmp_path: Path) -> None:
    """Lower is better; another version of systemd weighs a little differently."""
    unit = UNITS.get(name, UNITS["incus-gateway.service"])
    shutil.copy(unit, tmp_path)
    if name == SPLIT:
        folder = tmp_path / f"{unit.name}.d"
        folder.mkdir()
        shutil.copy(DEPLOY / SPLIT, folder)
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(tmp_path / unit.name)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    scored = re.search(r"exposure level for \S+: ([0-9.]+)", said.stdout)
    assert scored is not None, said
    told = re.search(
        rf"\| `{re.escape(name)}`[^|]*\| ([0-9.]+) ", (ROOT / "docs" / "operations.md").read_text()
    )
    assert told is not None, "docs/operations.md lacks it"
    assert float(scored[1]) <= float(told[1]) + 0.3
