"""sd_notify: what is told, and the barrier that says that it was dealt with."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from gateway import notify


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(tmp_path / "notify"))
    listening.settimeout(10)
    monkeypatch.setenv(notify.VARIABLE, str(tmp_path / "notify"))
    return listening


def test_a_status_is_one_line_of_bounded_length(told: socket.socket) -> None:
    with told:
        notify.status("a\nREADY=1\n" + "b" * 5000)
        said = told.recv(65536)
    assert said.startswith(b"STATUS=a READY=1 b") and b"\n" not in said and len(said) < 2100


def test_the_barrier_waits_until_all_before_it_was_dealt_with(told: socket.socket) -> None:
    passed = threading.Event()

    def wait() -> None:
        notify.notify("READY=1")
        notify.settled(10)
        passed.set()

    with told:
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert told.recv(100) == b"READY=1"
        data, descriptors, _, _ = socket.recv_fds(told, 100, 1)
        assert data == b"BARRIER=1" and not passed.is_set()
        os.close(descriptors[0])
        waiting.join(10)
    assert passed.is_set()


def test_where_nobody_listens_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("", str(tmp_path / "gone")):
        monkeypatch.setenv(notify.VARIABLE, address)
        began = time.monotonic()
        notify.notify("READY=1")
        notify.settled(10)
        assert time.monotonic() - began < 5
