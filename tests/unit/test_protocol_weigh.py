"""Messages of more values than anybody needs are refused before they are made."""

from __future__ import annotations

import json
import time
from typing import Any

import orjson
import pytest
from hypothesis import given, settings, strategies

from gateway import protocol
from gateway.errors import TooLarge
from gateway.protocol import maxima

VALUES = strategies.recursive(
    strategies.none() | strategies.integers() | strategies.text(',:[]{}"\\ aé\n', max_size=30),
    lambda inner: (
        strategies.lists(inner, max_size=8)
        | strategies.dictionaries(strategies.text('a"\\:{', max_size=5), inner, max_size=5)
    ),
    max_leaves=60,
)


def structure(value: Any) -> int:
    """Count what `weigh` counts, by the value itself."""
    match value:
        case list():
            return 1 + max(0, len(value) - 1) + sum(map(structure, value))
        case dict():
            return 1 + max(0, len(value) - 1) + len(value) + sum(map(structure, value.values()))
        case _:
            return 0


@settings(deadline=None)
@given(VALUES, strategies.integers(1, 40), strategies.booleans())
def test_what_is_counted_is_the_values_and_names_wherever_it_is_cut(
    value: Any, cut: int, escaped: bool
) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    count = structure(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maxima, "_SLICE", cut)
        patch.setattr(maxima, "VALUES_MAX", count)
        protocol.weigh(text)
        protocol.weigh(text.encode())
        if count:
            patch.setattr(maxima, "VALUES_MAX", count - 1)
            with pytest.raises(TooLarge):
                protocol.weigh(text)


@pytest.mark.parametrize("row", ["{},", "[],", "0,", '"",', '{"a":0},', "[" * 1000 + "]" * 1000 + ","])
def test_a_message_of_millions_of_values_is_refused_at_once(row: str) -> None:
    text = "[" + row * ((16 << 20) // len(row)) + "0]"
    began = time.process_time()
    with pytest.raises(TooLarge, match="200000 values"):
        protocol.weigh(text)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("row", ["{},", '\\"', "\\\\", "a,b:[c]{d}\\n", "é"])
def test_a_large_text_that_looks_like_values_passes(row: str) -> None:
    message = orjson.dumps({"text": row * ((8 << 20) // len(row))})
    began = time.process_time()
    protocol.weigh(message)
    protocol.weigh(message.decode())
    assert time.process_time() - began < 5


def test_who_asked_is_answered_where_the_id_comes_first() -> None:
    wire = protocol.ServerWire(max_requests=1)
    error = TooLarge("too many")
    assert isinstance(wire.refuse_heavy('{"jsonrpc":"2.0","id":7,"method":"x"', error), protocol.Close)
    wire.initialize()
    for text, said in (
        ('{"jsonrpc":"2.0","id":7,"method":"x"', 7),
        ('{ "jsonrpc": "2.0", "id": "a-b", "method"', "a-b"),
        ('{"id":7,"jsonrpc":"2.0"', 7),
        ('{"method":"x","params":{"id":7},', None),
        ('{"jsonrpc":"2.0","id":99999999999999999999999999,', None),
        ('{"jsonrpc":"2.0","id":"' + "x" * 1000 + '",', None),
    ):
        event = wire.refuse_heavy(text, error)
        assert isinstance(event, protocol.Refused)
        reply = protocol.decode_server_text(event.reply)
        assert isinstance(reply, protocol.Reply) and reply.id == said
        assert reply.error is not None and reply.error.code == "too_large"
