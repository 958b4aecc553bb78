"""`doctor` finds what is missing or was altered on a real Incus, and leaves it so."""

from __future__ import annotations

from gateway.host.doctor import doctor
from gateway.settings import Settings
from tests.integration import environment


def test_a_prepared_host_is_well(incus_settings: Settings) -> None:
    wrong = [str(f) for f in doctor(incus_settings) if not f.ok and f.what not in ("ripgrep",)]
    assert [line for line in wrong if "inotify" not in line] == []


def test_what_is_missing_is_told_with_what_to_do_and_stays_missing(incus_settings: Settings) -> None:
    names = {"pool": "t-no-pool", "profile": "t-no-profile", "image": "t-no-image"}
    found = {f.what.split()[0]: f for f in doctor(incus_settings.model_copy(update=names))}
    for what, fix in (("storage", "setup"), ("profile", "setup"), ("image", "image build")):
        assert not found[what].ok and fix in found[what].detail
    assert b"t-no-profile" not in environment.incus("profile", "list").stdout
