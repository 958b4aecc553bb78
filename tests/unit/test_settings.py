"""Every setting stands in the docs with its default and its unit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.cli.host import settings_help
from gateway.settings import Settings
from gateway.settings.settings import GROUPS, unknown_settings

DOCS = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_a_setting_is_documented_as_it_is(name: str) -> None:
    field = Settings.model_fields[name]
    row = next((line for line in DOCS.splitlines() if line.startswith(f"| `GATEWAY_{name.upper()}` |")), "")
    assert field.description and field.description in row
    if field.default not in (None, ()):
        assert f"| `{field.default}` |" in row


def test_no_setting_is_documented_that_there_is_not() -> None:
    rows = [line.split("`")[1] for line in DOCS.splitlines() if line.startswith("| `GATEWAY_")]
    assert rows == [f"GATEWAY_{name.upper()}" for name in Settings.model_fields]


def test_what_is_no_setting_is_named_with_the_nearest_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("GATEWAY_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "gateway.toml"
    file.write_text('listen = "127.0.0.1:9000"\nstatedir = "/srv"\n')
    monkeypatch.setenv("GATEWAY_CONFIG", str(file))
    for name in ("GATEWAY_TOKEN", "GATEWAY_LISTEN", "gateway_domain", "GATEWAY_TEST_HOST", "OTHER"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("GATEWAY_TENANT_MEMROY", "2GiB")
    monkeypatch.setenv("GATEWAY_QQQQQQ", "1")
    assert [*unknown_settings()] == [
        "GATEWAY_QQQQQQ is not a setting, and has no effect",
        "GATEWAY_TENANT_MEMROY is not a setting, and has no effect; the nearest setting is "
        "GATEWAY_TENANT_MEMORY",
        f"statedir in {file} is not a setting, and has no effect; the nearest setting is state_dir",
    ]


def test_groups_are_the_same_in_the_help_and_in_the_docs() -> None:
    titles = [group.__name__.removesuffix("Settings") for group in GROUPS]
    assert [line.removeprefix("## ") for line in DOCS.splitlines() if line.startswith("## ")] == titles
    said = settings_help()
    places = [said.index(f"\n{title.upper()}: ") for title in titles]
    assert places == sorted(places)
    assert all(f"\nGATEWAY_{name.upper()}" in said for name in Settings.model_fields)
