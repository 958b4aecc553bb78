"""The table of starters, of which one makes pinned versions and the other the newest."""

from __future__ import annotations

import re

import pytest

from tests.starters.making import OURS
from tests.starters.table import STARTERS


@pytest.mark.parametrize("name", STARTERS)
def test_the_newest_of_a_starter_pins_nothing(name: str) -> None:
    starter = STARTERS[name]
    assert starter.make or starter.ours
    assert not re.search(r"[\w-](?:@|==)\d", starter.newest), starter.newest
    assert not starter.make or starter.newest != starter.make
    assert not starter.ours or (OURS / starter.ours / "package.json").is_file()


def test_what_is_no_version_stays() -> None:
    assert STARTERS["django"].newest == "uv tool run --from django django-admin startproject app"
    assert STARTERS["tanstack-start"].newest.startswith("npm create -y @tanstack/start@latest app -- ")
    assert "yarn@$(npm view @yarnpkg/cli-dist@latest version)" in STARTERS["yarn-berry"].newest
