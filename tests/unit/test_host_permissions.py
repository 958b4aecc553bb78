"""`doctor` reports bad limits, and files that other users of the host can access."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gateway.host import checks
from gateway.host.requirements import doctor
from gateway.settings import Settings


def told(tmp_path: Path, **given: Any) -> str:
    settings = Settings(state_dir=tmp_path, caddy_admin=str(tmp_path / "caddy.sock"), **given)
    return "\n".join(checks.loose_settings(settings))


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with enough of everything."""
    monkeypatch.setattr(checks, "_host_memory", lambda: 64 << 30)
    monkeypatch.setattr(checks, "_memory_max", lambda: 3 << 30)
    monkeypatch.delenv("GATEWAY_SECRET", raising=False)
    monkeypatch.setenv("GATEWAY_CONFIG", "/nonexistent")


def test_nothing_is_said_of_the_defaults(tmp_path: Path) -> None:
    assert told(tmp_path) == ""


@pytest.mark.parametrize(("share", "whole"), checks.SHARES)
def test_a_share_that_is_the_whole_is_told(tmp_path: Path, share: str, whole: str) -> None:
    settings = Settings()
    said = told(tmp_path, **{share: getattr(settings, whole)})
    assert f"GATEWAY_{share.upper()} is not below GATEWAY_{whole.upper()}" in said


def test_every_share_of_one_tenant_is_looked_at() -> None:
    """Each setting documented as a share of the previous one is in the list of shares."""
    fields = list(Settings.model_fields.items())
    worded = {
        name
        for name, field in fields
        if re.match(
            r"(those|named tool sessions|bytes of those) of one (tenant|address|websocket)",
            field.description or "",
        )
    }
    assert worded <= {share for share, _ in checks.SHARES}


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"bytes_in_flight": 8 << 30}, "more than the unit's MemoryMax of 3072"),
        ({"bytes_in_flight": 40 << 30}, "more than half of this host's"),
        ({"domain_suffixes": ("com",)}, "GATEWAY_DOMAIN_SUFFIXES has com"),
        ({"pool_reserve": 0.0}, "GATEWAY_POOL_RESERVE"),
        ({"secret": "x" * 40}, "the secret comes from"),
        ({"runtime": "local"}, "nothing isolates"),
    ],
)
def test_what_else_is_off_is_told(tmp_path: Path, given: dict[str, Any], word: str) -> None:
    assert word in told(tmp_path, **given)


def test_an_admin_api_for_everybody_is_told(tmp_path: Path) -> None:
    assert "http://127.0.0.1:2019" in "\n".join(checks.loose_settings(Settings(state_dir=tmp_path)))


def test_memory_without_an_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_memory_max", lambda: None)
    assert "MemoryMax" in told(tmp_path)


@pytest.mark.parametrize(
    "name", ["secret", "gateway.db", "gateway.db-wal", "quickstart.token", "gateway.log"]
)
def test_a_file_that_others_can_read_is_a_problem(tmp_path: Path, name: str) -> None:
    settings = Settings(state_dir=tmp_path, runtime="local")
    tmp_path.chmod(0o700)
    assert list(checks.exposed_files(settings)) == []
    path = tmp_path / name
    path.touch()
    path.chmod(0o640)
    (found,) = checks.exposed_files(settings)
    assert f"chmod 600 {path}" in found
    problem = next(finding for finding in doctor(settings) if finding.what == "state dir")
    assert not problem.ok and found in problem.detail


@pytest.mark.parametrize(("mode", "open_"), [(0o755, True), (0o711, True), (0o701, True), (0o700, False)])
def test_an_open_state_dir_is_a_problem(tmp_path: Path, mode: int, open_: bool) -> None:
    tmp_path.chmod(mode)
    assert bool(list(checks.exposed_files(Settings(state_dir=tmp_path)))) is open_


def test_a_secret_in_an_open_configuration_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gateway.toml"
    monkeypatch.setenv("GATEWAY_CONFIG", str(config))
    tmp_path.chmod(0o700)
    for text, mode, problems in (
        ("# secret\n", 0o644, 0), ("secret = 'x'\n", 0o600, 0), ("secret = 'x'\n", 0o644, 1)
    ):  # fmt: skip
        config.write_text(text)
        config.chmod(mode)
        assert len(list(checks.exposed_files(Settings(state_dir=tmp_path, secret="x" * 40)))) == problems


def test_doctor_hints_and_does_not_fail(tmp_path: Path) -> None:
    findings = doctor(Settings(state_dir=tmp_path, runtime="local"))
    found = next(one for one in findings if one.what == "limits")
    assert found.ok and found.hint and "nothing isolates" in found.detail
