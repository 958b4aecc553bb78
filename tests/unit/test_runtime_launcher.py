"""The output of the shells in a tenant, which the tenant may have replaced."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given, strategies

from gateway.errors import ExecFailed, Unavailable
from gateway.runtime import KillResult
from gateway.runtime.launcher import KILLED_MAX, PID_MAX, Preamble, killed

SAID = b"\x01R 7 cgroup \n\x01K\n"


def fed(*pieces: bytes) -> Preamble:
    preamble = Preamble()
    for piece in pieces:
        preamble.feed(piece)
    return preamble


@given(strategies.binary(max_size=50), strategies.data())
def test_the_preamble_is_taken_off_however_it_is_cut(rest: bytes, data: strategies.DataObject) -> None:
    whole = b"noise\r\n" + SAID + rest
    at = data.draw(strategies.integers(0, len(whole) - len(rest) - 1))
    preamble = fed(whole[:at], whole[at:])
    assert (preamble.started, preamble.pid, preamble.method, preamble.rest) == (True, 7, "cgroup", rest)


@given(
    strategies.lists(strategies.text("\x01RKE 0123456789cgroupscan\n\r/devptsé").map(str.encode), max_size=20)
)
def test_nothing_that_a_shell_says_makes_a_process_that_cannot_be(pieces: list[bytes]) -> None:
    preamble = Preamble()
    with contextlib.suppress(ExecFailed):
        for piece in pieces:
            preamble.feed(piece)
    assert not preamble.started or 0 < preamble.pid <= PID_MAX
    assert len(str(preamble.ended())) < 1000


@pytest.mark.parametrize(
    "said",
    [b"R 0 cgroup ", b"R 4194305 cgroup ", b"R 9223372036854775808 scan ", b"R 99999999999999999999 scan "],
)
def test_a_number_that_no_process_has_ends_the_start(said: bytes) -> None:
    with pytest.raises(ExecFailed, match="reported an impossible pid"):
        fed(b"\x01" + said + b"\n\x01K\n")


@pytest.mark.parametrize(
    "said", [b"\x01K\n", b"\x01R -1 cgroup \n\x01K\n", b"\x01R " + b"9" * 60 + b" scan \n\x01K\n"]
)
def test_without_a_process_nothing_has_started(said: bytes) -> None:
    assert not fed(said).started


@pytest.mark.parametrize("piece", [b"\n" * 256, b"x" * 1000, b"\x01\n", b"\x01R 7 scan \n"])
def test_a_shell_that_does_not_stop_to_speak_is_heard_for_a_while(piece: bytes) -> None:
    preamble, began = Preamble(), time.process_time()
    with pytest.raises(ExecFailed, match="misbehaves"):
        for _ in range(100_000):
            preamble.feed(piece)
    assert time.process_time() - began < 2


def test_a_large_piece_of_line_ends_costs_no_more_than_its_limit() -> None:
    began = time.process_time()
    with pytest.raises(ExecFailed, match="misbehaves"):
        fed(b"\n" * 8_000_000)
    assert time.process_time() - began < 1


def test_the_commands_own_first_output_may_be_as_large_as_it_comes() -> None:
    assert fed(SAID + b"\n" * 1_000_000).rest == b"\n" * 1_000_000


def test_what_others_said_is_told_where_nothing_starts() -> None:
    assert "sh: out of memory" in fed(b"sh: out of memory\n").ended().message


def test_the_answer_of_the_script_that_kills() -> None:
    assert killed(b"5 1 2 cgroup\n") == KillResult(3, True, 2, "cgroup")
    assert killed(b"0 0 0 scan") == KillResult(0, False, 0, "scan")
    assert killed(b"2 1 5 scan\n").killed == 0, "those that survived were born meanwhile"


@given(
    strategies.one_of(
        strategies.binary(max_size=KILLED_MAX), strategies.text("0123456789 cgroupscan-\n").map(str.encode)
    )
)
def test_an_answer_that_is_not_the_scripts_own_is_no_success(said: bytes) -> None:
    if re.fullmatch(rb"\s*\d{1,7} [01] \d{1,7} (cgroup|scan)\s*", said):
        return
    with pytest.raises(Unavailable, match="restart the tenant"):
        killed(said)
