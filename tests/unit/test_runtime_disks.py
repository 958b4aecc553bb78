"""What a clone is told that it shares, and when it may not."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.errors import TooLarge
from gateway.runtime.incus.disks import INHERITED, inherited


def source(size: str = "1000B", before: str | None = None) -> dict[str, Any]:
    config = {} if before is None else {INHERITED: before}
    return {"name": "shop", "config": config, "expanded_devices": {"root": {"size": size}}}


def test_a_clone_notes_what_counts_for_its_source() -> None:
    assert inherited(source(), 1000) == {INHERITED: "1000"}
    assert inherited(source(before="300"), 700) == {INHERITED: "1000"}
    assert inherited(source(before="what"), 1) == {INHERITED: "1"}


def test_clones_of_clones_share_no_more_than_a_disk() -> None:
    """Or a row of them, each destroyed once it was cloned, would leave one that holds any amount."""
    with pytest.raises(TooLarge, match="a clone itself") as refused:
        inherited(source(before="301"), 700)
    assert (refused.value.facts["reason"], refused.value.facts["limit"]) == ("quota", 1000)
    assert inherited(source(size="", before="301"), 700) == {INHERITED: "1001"}  # without a limit


def test_where_incus_counts_nothing_is_noted() -> None:
    assert inherited(source(before="301"), None) == {}
