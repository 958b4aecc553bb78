"""The wire core: every frame is an event or an answer, never an exception."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import protocol
from gateway.errors import WIRE_CODES, Conflict, InvalidParams, NotFound
from gateway.protocol import CloseCode, ServerWire


def message(method: str, params: Any = None, id: Any = 1) -> str:
    return orjson.dumps(
        {"jsonrpc": "2.0", "id": id, "method": method, "params": {} if params is None else params}
    ).decode()


@pytest.fixture
def wire() -> ServerWire:
    wire = ServerWire(max_requests=3)
    wire.initialize()
    return wire


def refusal(event: protocol.ServerEvent) -> dict[str, Any]:
    assert isinstance(event, protocol.Refused)
    error: dict[str, Any] = orjson.loads(event.reply)["error"]
    return error


def test_initialize_is_taken_with_its_parameters() -> None:
    event = ServerWire(max_requests=1).receive_text(
        message(
            "initialize", {"client": {"name": "x", "version": "1"}, "token": "t", "readBeforeWrite": True}
        )
    )
    assert isinstance(event, protocol.Request)
    assert isinstance(event.params, protocol.Initialize)
    assert (event.id, event.params.token, event.params.read_before_write) == (1, "t", True)


def test_nothing_is_served_before_initialize() -> None:
    for frame in (message("ping"), "not json", "[]"):
        event = ServerWire(max_requests=1).receive_text(frame)
        assert isinstance(event, protocol.Close) and event.code is CloseCode.PROTOCOL_ERROR
        assert event.reply is not None
    binary = ServerWire(max_requests=1).receive_binary(protocol.pack_frame(0, 1, b""))
    assert isinstance(binary, protocol.Close)


def test_a_second_initialize_is_refused(wire: ServerWire) -> None:
    assert refusal(wire.receive_text(message("initialize")))["code"] == -32600


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("{", -32700),
        ("", -32700),
        ('"x"', -32600),
        ("[]", -32600),
        ('{"id":1,"method":"ping"}', -32600),
        ('{"jsonrpc":"2.0","id":true,"method":"ping"}', -32600),
        ('{"jsonrpc":"2.0","id":null,"method":"ping"}', -32600),
        ('{"jsonrpc":"2.0","id":[1],"method":"ping"}', -32600),
        ('{"jsonrpc":"2.0","id":1,"method":7}', -32600),
        ('{"jsonrpc":"2.0","id":1,"method":"nope"}', -32601),
        ('{"jsonrpc":"2.0","id":1,"method":"ping","params":[1]}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"ping","params":0}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":1}}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"exec/start","params":{}}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"exec/start","params":{"argv":["a"],"command":"b"}}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"exec/start","params":{"argv":[]}}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"exec/start","params":{"argv":["a"],"timeoutMs":"5"}}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"exec/resize","params":{"exec":"x","cols":0,"rows":1}}', -32602),
    ],
)
def test_malformed_messages_are_answered_with_json_rpcs_own_codes(
    wire: ServerWire, text: str, number: int
) -> None:
    error = refusal(wire.receive_text(text))
    assert error["code"] == number
    assert error["data"]["code"] in WIRE_CODES


def test_half_of_a_surrogate_pair_is_answered_with_the_calls_id(wire: ServerWire) -> None:
    """Else its caller would wait for ever: JavaScript and Python both write it where a text has it."""
    text = '{"jsonrpc":"2.0","id":%s,"method":"files/stat","params":{"path":"\\udcff"}}'
    for request_id in ("7", '"seven"', '"\\udcff"', "true", "1" * 5000, "[" * 9000):
        event = wire.receive_text(text % request_id)
        assert isinstance(event, protocol.Refused)
        reply = orjson.loads(event.reply)
        assert reply["id"] == {"7": 7, '"seven"': "seven"}.get(request_id)
        assert reply["error"]["code"] == -32700


def test_a_refusal_names_the_wrong_field(wire: ServerWire) -> None:
    error = refusal(wire.receive_text(message("exec/start", {"argv": ["a"], "pty": {"cols": "x"}})))
    assert error["data"]["field"] == "pty.cols"
    for params, said in (
        ([], "params must be an object"),
        ({"argv": ["a"], "pty": 1}, "pty: this must be an object"),
    ):
        error = refusal(wire.receive_text(message("exec/start", params)))
        assert error["message"].startswith(said)


def test_params_that_are_null_are_none(wire: ServerWire) -> None:
    event = wire.receive_text('{"jsonrpc":"2.0","id":1,"method":"exec/list","params":null}')
    assert event == protocol.Request(1, "exec/list", protocol.NoParams())


def test_notifications_are_never_answered(wire: ServerWire) -> None:
    for text in ('{"jsonrpc":"2.0","method":"nope"}', '{"jsonrpc":"2.0","method":"exec/wait"}'):
        assert isinstance(wire.receive_text(text), protocol.Ignored)


def test_a_cancel_is_told_once_and_of_a_pending_request_alone(wire: ServerWire) -> None:
    cancel = protocol.cancel_request
    assert wire.receive_text(cancel("seven")) == protocol.Ignored()
    wire.receive_text(message("ping", id="seven"))
    assert wire.receive_text(cancel(7)) == protocol.Ignored()
    assert not wire.cancelled("seven")
    assert wire.receive_text(cancel("seven")) == protocol.CancelPending("seven")
    assert wire.cancelled("seven")
    assert wire.receive_text(cancel("seven")) == protocol.Ignored()
    wire.settle("seven")
    assert not wire.cancelled("seven")
    assert wire.receive_text(cancel("seven")) == protocol.Ignored()


def test_an_id_is_taken_until_its_request_has_an_answer(wire: ServerWire) -> None:
    wire.receive_text(message("ping"))
    error = refusal(wire.receive_text(message("exec/list")))
    assert (error["data"]["code"], error["message"]) == ("invalid_params", "request 1 is still pending")
    assert isinstance(wire.receive_text(message("ping", id="1")), protocol.Request)  # another id
    wire.settle(1)
    assert isinstance(wire.receive_text(message("ping")), protocol.Request)


def test_a_request_is_in_flight_until_its_answer_is_sent(wire: ServerWire) -> None:
    """One that wants no answer until it is done; one that is refused never is."""
    for number in (1, 2):
        assert isinstance(wire.receive_text(message("ping", id=number)), protocol.Request)
    wire.receive_text(message("nope", id=3))
    notified = '{"jsonrpc":"2.0","method":"ping"}'
    assert wire.receive_text(notified) == protocol.Request(None, "ping", protocol.NoParams())
    error = refusal(wire.receive_text(message("ping", id=3)))["data"]
    assert (error["code"], error["limit"], error["retry_after"]) == ("rate_limited", 3, 1)
    assert wire.receive_text(notified) == protocol.Ignored()
    wire.settle(1)
    assert isinstance(wire.receive_text(message("ping", id=1)), protocol.Refused)
    wire.sent(1)
    assert isinstance(wire.receive_text(message("ping", id=1)), protocol.Request)
    wire.settle(None)
    wire.sent(None)
    assert isinstance(wire.receive_text(message("ping", id=4)), protocol.Request)
    assert isinstance(wire.receive_text(message("ping", id=5)), protocol.Refused)


def test_input_goes_to_an_open_channel_only(wire: ServerWire) -> None:
    channel = wire.open_channel()
    frame = protocol.pack_frame(0, channel, b"abc")
    assert wire.receive_binary(frame) == protocol.Input(channel, b"abc")
    wire.close_channel(channel)
    assert isinstance(wire.receive_binary(frame), protocol.Ignored)
    unknown = wire.receive_binary(protocol.pack_frame(0, channel + 1, b""))
    assert isinstance(unknown, protocol.Close) and unknown.code is CloseCode.PROTOCOL_ERROR


def test_a_client_may_not_send_output(wire: ServerWire) -> None:
    frame = protocol.pack_frame(1, wire.open_channel(), b"")
    assert isinstance(wire.receive_binary(frame), protocol.Close)


def test_errors_carry_code_and_facts() -> None:
    reply = orjson.loads(protocol.failure(3, Conflict("stale", etag="e")))
    assert reply["id"] == 3
    assert reply["error"]["data"] == {"code": "conflict", "etag": "e"}
    assert reply["error"]["code"] == -32000 - 4  # conflict is the fourth of the contract's list
    assert NotFound("x").rpc_code == -32003
    assert InvalidParams("x").rpc_code == -32602


def test_encoded_results_go_in_as_they_are() -> None:
    value = '{"x":["é"]}'.encode()
    whole, parts = protocol.result("a", orjson.loads(value)), protocol.encoded_result("a", value)
    assert b"".join(parts) == whole.encode() and any(part is value for part in parts)  # type: ignore[arg-type]
    assert protocol.size(parts) == len(whole.encode()) and protocol.size(whole) == len(whole)
    with pytest.raises(UnicodeDecodeError):  # a text message must be UTF-8, or its client ends the connection
        protocol.encoded_result("a", b'{"x":"\xff"}')


@given(st.integers(0, 2), st.integers(0, 0xFFFFFFFF), st.binary())
def test_frames_survive_the_round_trip(stream: int, channel: int, data: bytes) -> None:
    frame = protocol.unpack_frame(protocol.pack_frame(stream, channel, data))
    assert (frame.stream, frame.channel, frame.data) == (stream, channel, data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
methods = st.sampled_from([*protocol.METHODS, protocol.CANCEL_REQUEST]) | st.text()
requests = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0") | json_values, "method": methods | json_values},
    optional={"id": json_values, "params": json_values},
)


def check(wire: ServerWire, event: protocol.ServerEvent) -> None:
    match event:
        case protocol.Refused(reply):
            assert "error" in orjson.loads(reply)
        case protocol.Close(code, reason, _):
            assert code == CloseCode.PROTOCOL_ERROR and reason
        case protocol.Request(_, method, params):
            assert isinstance(params, protocol.METHODS[method])
        case protocol.Input(channel, _):
            assert channel == 1
        case protocol.CancelPending() | protocol.Ignored():
            pass


@given(st.booleans(), st.text() | requests.map(lambda value: orjson_or_text(value)))
def test_any_text_is_an_event(initialized: bool, text: str) -> None:
    wire = ServerWire(max_requests=1)
    if initialized:
        wire.initialize()
    check(wire, wire.receive_text(text))


def orjson_or_text(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # an integer beyond 64 bits
        return repr(value)


@given(st.booleans(), st.binary(max_size=64))
def test_any_bytes_are_an_event(initialized: bool, data: bytes) -> None:
    wire = ServerWire(max_requests=1)
    if initialized:
        wire.initialize()
    wire.open_channel()
    check(wire, wire.receive_binary(data))


@given(st.text() | requests.map(orjson_or_text))
def test_a_client_takes_any_text_or_refuses_it(text: str) -> None:
    try:
        said = protocol.decode_server_text(text)
    except InvalidParams:
        return
    assert isinstance(said, protocol.Reply | protocol.Notification)
