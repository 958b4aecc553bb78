"""Every setting stands in the docs with its default and its unit."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.settings import Settings

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
