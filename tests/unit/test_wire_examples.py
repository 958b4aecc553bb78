"""The Python end of the wire against the examples that the TypeScript client is tested with too."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway import protocol
from gateway.errors import WIRE_CODES, GatewayError, InvalidParams, rpc_code
from gateway_client.events import Parser

FILE = Path(__file__).parents[1] / "wire" / "examples.json"
EXAMPLES: dict[str, Any] = json.loads(FILE.read_text("utf-8"))


@pytest.mark.parametrize("example", EXAMPLES["frames"], ids=lambda example: example["frame"])
def test_frames_are_these_bytes(example: dict[str, Any]) -> None:
    frame, data = bytes.fromhex(example["frame"]), bytes.fromhex(example["data"])
    assert protocol.pack_frame(example["stream"], example["channel"], data) == frame
    assert protocol.unpack_frame(frame) == protocol.Frame(
        protocol.StreamId(example["stream"]), example["channel"], data
    )


@pytest.mark.parametrize("text", EXAMPLES["notFrames"])
def test_what_is_no_frame_is_refused(text: str) -> None:
    with pytest.raises(InvalidParams):
        protocol.unpack_frame(bytes.fromhex(text))


@pytest.mark.parametrize("example", EXAMPLES["requests"], ids=lambda example: example["method"])
def test_a_server_takes_the_requests(example: dict[str, Any]) -> None:
    made = protocol.request(example["id"], example["method"], example["params"])
    assert orjson.loads(made) == example["message"]
    wire = protocol.ServerWire(max_requests=1)
    wire.initialize()
    event = wire.receive_text(made)
    assert isinstance(event, protocol.Request), event
    assert (event.id, event.method) == (example["id"], example["method"])


def test_a_call_is_cancelled_by_this_notification() -> None:
    example = EXAMPLES["cancel"]
    assert orjson.loads(protocol.cancel_request(example["id"])) == example["message"]


@pytest.mark.parametrize("example", EXAMPLES["replies"], ids=lambda example: str(example["id"]))
def test_replies_are_understood(example: dict[str, Any]) -> None:
    said = protocol.decode_server_text(example["text"])
    assert isinstance(said, protocol.Reply)
    assert said.id == example["id"]
    if "error" in example:
        assert said.error is not None and asdict(said.error) == example["error"]
    else:
        assert said.error is None and said.result == example["result"]


@pytest.mark.parametrize("example", EXAMPLES["notifications"], ids=lambda example: example["method"])
def test_notifications_are_understood(example: dict[str, Any]) -> None:
    assert protocol.decode_server_text(example["text"]) == protocol.Notification(
        example["method"], example["params"]
    )


@pytest.mark.parametrize("text", EXAMPLES["notGateway"])
def test_what_is_not_gateway_v1_is_refused(text: str) -> None:
    with pytest.raises(InvalidParams):
        protocol.decode_server_text(text)


def test_every_error_has_its_number_and_status() -> None:
    ours = [kind for kind in GatewayError.__subclasses__() if kind.__module__ == GatewayError.__module__]
    status = {kind.code: kind.http_status for kind in ours}
    said = [(code, rpc_code(code), status[code]) for code in WIRE_CODES]
    assert said == [(entry["code"], entry["number"], entry["status"]) for entry in EXAMPLES["errors"]]


@pytest.mark.parametrize("example", EXAMPLES["eventStreams"], ids=lambda example: str(example["chunks"])[:40])
def test_event_streams_are_understood(example: dict[str, Any]) -> None:
    parser = Parser()
    found = [event for chunk in example["chunks"] for event in parser.feed(chunk.encode())]
    assert [asdict(event) for event in found] == example["events"]
