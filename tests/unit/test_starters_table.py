"""The table of starters, of which one makes pinned versions and the other the newest."""

from __future__ import annotations

import io
import json
import re
import tarfile

import pytest

from tests.starters.making import OURS, packed
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


def test_of_our_own_pages_a_prerelease_stays_and_all_else_is_the_latest() -> None:
    """What a registry calls the latest Nitro is older than what SolidStart's template names."""
    with tarfile.open(fileobj=io.BytesIO(packed(OURS / "solid-start", newest=True))) as tar:
        manifest = tar.extractfile("./package.json")
        assert manifest is not None
        assert json.load(manifest)["devDependencies"] == {"nitro": "^3.0.260610-beta", "vite": "latest"}
