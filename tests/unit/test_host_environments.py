"""Versions side by side: which environment is in use, which one is kept, and what a kill leaves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gateway.host.gateway_process import Environments

PREPARE = Path(__file__).parents[2] / "deploy" / "prepare.sh"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in (1, 2, 3):
        (tmp_path / "venvs" / str(number) / "bin").mkdir(parents=True)
        (tmp_path / "venvs" / str(number) / "bin" / "python").symlink_to("/usr/bin/python3")
    return tmp_path


def bash(script: str) -> str:
    words = ["bash", "-c", f'. "{PREPARE}"; {script}']
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def test_the_one_before_is_kept_to_go_back_and_the_rest_goes(root: Path) -> None:
    one, two, three = (root / "venvs" / str(number) for number in (1, 2, 3))
    environments = Environments(root)
    assert (environments.current, environments.previous) == (None, None)
    environments.switch(one)
    assert (environments.current, environments.previous) == (one, None)
    environments.switch(two)
    environments.switch(two)  # again: the one before is not itself
    assert (environments.current, environments.previous) == (two, one)
    assert not (root / "venv").readlink().is_absolute()  # the state dir may be moved
    environments.tidy()
    assert one.exists() and two.exists() and not three.exists()
    environments.switch(one)
    assert (environments.current, environments.previous) == (one, two)


def test_a_switch_is_undone_as_if_it_had_not_been(root: Path) -> None:
    one, two, three = (root / "venvs" / str(number) for number in (1, 2, 3))
    environments = Environments(root)
    environments.switch(one)
    environments.switch(two)
    environments.reset(one, None)
    assert (environments.current, environments.previous) == (one, None)
    environments.switch(two)
    environments.switch(three)
    environments.reset(two, one)
    assert (environments.current, environments.previous) == (two, one)


def test_only_environments_of_this_state_dir_are_switched_to(root: Path) -> None:
    environments = Environments(root)
    assert environments.holds(root / "venvs" / "1")
    assert not environments.holds(root) and not environments.holds(Path("/usr"))


def test_quickstart_installs_into_none_that_is_in_use_or_kept(root: Path) -> None:
    """It takes what a run that failed has left, or a new one."""
    environments = Environments(root)
    environments.switch(root / "venvs" / "1")
    environments.switch(root / "venvs" / "2")
    assert bash(f"next_environment {root}") == str(root / "venvs" / "3")
    assert bash(f"environment_in_use {root}") == str(root / "venvs" / "2")
    environments.tidy()
    assert bash(f"next_environment {root}") == str(root / "venvs" / "3")
    (root / "venvs" / "1" / ".stamp").write_text("old\n")
    assert bash(f"installed_environment {root} old") == str(root / "venvs" / "1")
    assert bash(f"installed_environment {root} new") == ""


def test_quickstart_installs_into_none_from_which_a_gateway_runs(root: Path) -> None:
    environments = Environments(root)
    environments.switch(root / "venvs" / "1")
    with subprocess.Popen(
        [root / "venvs" / "2" / "bin" / "python", "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        assert bash(f"next_environment {root}") == str(root / "venvs" / "3")
        running.kill()
