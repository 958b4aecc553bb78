"""The state dir is its owner's alone, and what has to pass still passes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gateway.settings import Settings
from gateway.storage import state_dir

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's files")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("before", [0o755, 0o711, 0o750, 0o777])
def test_a_wide_one_is_closed(tmp_path: Path, before: int) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(before)
    settings = Settings(state_dir=folder)
    assert state_dir.close(settings) == "mode 700"
    assert mode(folder) == 0o700
    assert state_dir.close(settings) is None


def test_one_that_is_not_there_is_made_closed(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "state"
    assert state_dir.close(Settings(state_dir=folder)) is None
    assert mode(folder) == 0o700


def test_a_folder_of_everybody_stays(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    assert state_dir.close(Settings(state_dir=tmp_path)) is None
    assert mode(tmp_path) == 0o1777


@ROOT
def test_another_users_stays(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    os.chown(folder, 65534, 65534)
    assert state_dir.close(Settings(state_dir=folder)) is None
    assert mode(folder) == 0o755


@ROOT
def test_a_caddy_of_another_user_may_pass_until_it_has_moved(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    (folder / "caddy" / "data").mkdir(parents=True)
    os.chown(folder / "caddy" / "data", 65534, 65534)
    folder.chmod(0o755)
    settings = Settings(state_dir=folder)
    assert state_dir.has_foreign_caddy(settings)
    assert state_dir.close(settings) == "mode 711"
    (folder / "caddy").rename(tmp_path / "state-caddy")
    (folder / "caddy").symlink_to(tmp_path / "state-caddy")
    assert state_dir.close(settings) == "mode 700"


@ROOT
def test_the_group_of_a_gateway_with_a_user_of_its_own_may_pass(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    split = Settings(state_dir=folder, broker_socket=tmp_path / "broker.sock", broker_user="nobody")
    assert state_dir.close(split) == "mode 710"
    assert folder.stat().st_gid == 65534
    # who does not know of the split leaves it as it is
    assert state_dir.close(Settings(state_dir=folder, broker_user="nobody")) is None
    assert mode(folder) == 0o710


def test_a_log_is_private_whatever_it_was(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    log.write_text("old\n")
    log.chmod(0o644)
    with open(log, "ab", opener=state_dir.private) as file:
        file.write(b"new\n")
    assert (mode(log), log.read_text()) == (0o600, "old\nnew\n")
    with open(tmp_path / "other.log", "ab", opener=state_dir.private):
        assert mode(tmp_path / "other.log") == 0o600
