"""A folder that is shown to an instance is unmounted once that is gone, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.rootfs import shown_folders

INCUS = Path("/var/lib/incus")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shown_folders, "PLACES", tmp_path)
    for name in ("var-lib-incus/here", "var-lib-incus/gone", "var-lib-other/gone"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def _left(places: Path) -> list[str]:
    return sorted(str(path.relative_to(places)) for path in places.glob("*/*"))


def test_what_is_shown_to_an_instance_that_is_gone_ends(places: Path) -> None:
    """That of another incusd on this host stays."""
    shown_folders.release(INCUS, lambda: {"here"})
    assert _left(places) == ["var-lib-incus/here", "var-lib-other/gone"]


def test_nothing_ends_while_the_instances_are_unknown(places: Path) -> None:
    shown_folders.release(INCUS, lambda: None)
    assert len(_left(places)) == 3


def test_incus_is_not_asked_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown_folders, "PLACES", tmp_path)
    shown_folders.release(INCUS, lambda: pytest.fail("asked"))
    shown_folders.place(INCUS).mkdir()
    shown_folders.release(INCUS, lambda: pytest.fail("asked"))
