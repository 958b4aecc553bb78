"""Which member a new tenant goes to, by the room that each has."""

from __future__ import annotations

import pytest

from gateway.cluster.cluster import Room
from gateway.cluster.peers import Known


@pytest.mark.parametrize(
    ("rooms", "chosen"),
    [
        ({"a": Room(3, 40), "b": Room(2, 41), "c": Room(2, 39)}, "b"),
        ({"small": Room(2, 10), "large": Room(6, 90)}, "large"),
        ({"full": Room(0, 0), "busy": Room(9, 1)}, "busy"),
        ({"older": Room(5), "known": Room(1, 20)}, "known"),
        ({"a": Room(1, 400), "b": Room(1, 399)}, "a"),  # as good as the same: by name
    ],
    ids=["least in use", "a larger one", "one without memory", "one that does not tell", "noise"],
)
def test_the_member_with_most_room_is_chosen(rooms: dict[str, Room], chosen: str) -> None:
    usual = max(room.takes or 0 for room in rooms.values())
    assert min(rooms, key=lambda name: (*rooms[name].used(usual), name)) == chosen


def test_what_a_peer_tells_is_taken_as_far_as_it_is_understood() -> None:
    assert Room.parse(Room(2, 7).to_dict() | {"colour": "red"}, ()) == Room(2, 7)
    tenants = [Known("a", status="running"), Known("b"), Known("c", status="running")]
    odd: tuple[object, ...] = (None, {}, {"running": "many", "takes": 1}, [])
    for told in odd:
        assert Room.parse(told, tenants) == Room(2)
