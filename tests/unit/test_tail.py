"""The tail of an output stream, compared with the simplest model: one growing byte string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.execs.streams import Tail


@given(st.integers(1, 30), st.lists(st.binary(min_size=1, max_size=20), max_size=30), st.data())
def test_what_is_kept_is_the_end_of_all_bytes(limit: int, chunks: list[bytes], data: st.DataObject) -> None:
    tail, everything, floor = Tail(limit), b"", 0
    for chunk in chunks:
        floor = data.draw(st.integers(floor, len(everything)))
        tail.append(chunk, floor)
        everything += chunk
        assert tail.end == len(everything)
        assert tail.start <= min(floor, max(0, len(everything) - limit))
    offset, read = tail.start, b""
    while parts := tail.read(offset, data.draw(st.integers(1, 100))):
        read += b"".join(parts)
        offset += sum(map(len, parts))
    assert read == everything[tail.start :]


def test_small_pieces_are_merged() -> None:
    tail = Tail(1 << 20)
    for _ in range(1000):
        tail.append(b"x")
    assert tail.read(0) == [b"x" * 1000]


def test_with_nobody_reading_the_oldest_bytes_go() -> None:
    tail = Tail(10_000)
    for _ in range(10):
        tail.append(b"x" * 9_000)
    assert tail.end - tail.start < 10_000 + 9_000
    with pytest.raises(ValueError, match="not in"):
        tail.read(0)
