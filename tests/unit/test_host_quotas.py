"""Which tenants' disks no limit counts for, by the folders that their pool has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gateway.host import setup
from gateway.settings import Settings


@pytest.mark.parametrize(
    ("project", "folders", "found"),
    [
        ("default", ["shop", "blog", "other"], ["shop", "blog"]),
        ("sites", ["blog", "sites_shop"], ["shop"]),
        ("default", ["sites_shop"], []),
    ],
)
def test_tenants_without_a_limit_are_found_by_their_folders(
    project: str, folders: list[str], found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = SimpleNamespace(lacking=lambda: folders)
    monkeypatch.setattr(setup, "_quotas", lambda settings: SimpleNamespace(groups=lambda: groups))
    assert setup.unlimited_tenants(Settings(incus_project=project), ["shop", "blog"]) == found
