"""Bytes and sockets are counted per owner, and each owner has a share."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway import protocol
from gateway.admission import Full, Reservation
from gateway.api.connection.connection import Requests
from gateway.errors import RateLimited
from gateway.limits.budget import SMALL, Budget, ClientLimits, Share
from gateway.protocol.server_wire import Request
from gateway.settings import Settings
from gateway.transport.websocket import LARGE, Lengths
from tests.waits import turn

MiB = 1 << 20


@pytest.fixture
def budget() -> Budget:
    return Budget(64 * MiB, 16 * MiB)


def test_what_is_held_counts_for_socket_tenant_and_all(budget: Budget) -> None:
    tenant = budget.tenant("a")
    socket = tenant.within(4 * MiB)
    with socket.reserve(MiB):
        assert (socket.held, tenant.held, budget.held) == (MiB, MiB, MiB)
    assert (socket.held, tenant.held, budget.held) == (0, 0, 0)


def test_full_share_is_named_and_nothing_is_held_then(budget: Budget) -> None:
    tenant = budget.tenant("a")
    lease = tenant.reserve(13 * MiB)
    with pytest.raises(RateLimited, match="this tenant has no room") as caught:
        tenant.reserve(3 * MiB)
    assert caught.value.facts["retry_after"] > 0
    assert tenant.held == 13 * MiB
    lease.release()
    lease.release()
    assert budget.held == 0


def test_an_eighth_is_left_to_what_is_small(budget: Budget) -> None:
    """When large messages have taken all they may, small calls are still served."""
    socket = budget.tenant("a").within(4 * MiB)
    held = [socket.reserve(size) for size in (3 * MiB, MiB // 2)]
    assert socket.full(MiB // 4) == Full("this connection", 4 * MiB, "part")
    assert socket.full(SMALL) is None
    for lease in held:
        lease.release()


async def test_a_request_that_ends_before_it_begins_holds_nothing(budget: Budget) -> None:
    """As before Python 3.12, where a task begins later than it is made."""
    client = SimpleNamespace(hub=SimpleNamespace(), spawn=asyncio.create_task)
    requests = Requests(cast(Any, client), cast(Any, None), cast(Any, None), {})
    asked = Request(1, "tools/list", protocol.NoParams())
    await requests.start(asked, 100, budget.tenant("a").reserve())
    assert budget.held > 100
    (running,) = requests._running.values()
    assert running.task is not None and running.task.cancel()
    await asyncio.gather(running.task, return_exceptions=True)
    assert budget.held == 0


def test_one_message_of_any_size_fits_an_idle_share(budget: Budget) -> None:
    """Long waiting calls, such as exec/wait, do not count as activity."""
    socket = budget.tenant("a").within(MiB)
    with socket.reserve(20 << 10), socket.reserve(16 * MiB):
        assert socket.full(SMALL + 1) == Full("this connection", MiB, "part")


def test_small_requests_end_at_the_tenants_limit(budget: Budget) -> None:
    sockets = [budget.tenant("a").within(MiB) for _ in range(4)]
    leases: list[Reservation[Share]] = []
    with pytest.raises(RateLimited):
        while True:
            leases += [socket.reserve(SMALL) for socket in sockets]
    assert 15 * MiB < budget.held <= 16 * MiB


def test_nobody_takes_more_than_is_left_to_the_others(budget: Budget) -> None:
    """The fifth tenant that takes as much as allowed still finds room."""
    tenants = [budget.tenant(f"t{number}") for number in range(5)]
    for tenant in tenants:
        while tenant.full(MiB) is None:
            tenant.hold(MiB)
        assert MiB <= tenant.held <= budget.limit - budget.held


def test_share_of_a_tenant_is_one_and_goes_with_its_last_holder(budget: Budget) -> None:
    first = budget.tenant("a")
    assert budget.tenant("a") is first
    first.hold(5)
    assert budget.most == 5
    first.hold(-5)
    del first
    assert budget.most == 0 and not budget._tenants


async def test_who_waits_gets_room_once_it_is_given_back(budget: Budget) -> None:
    socket = budget.tenant("a").within(4 * MiB)
    first = await socket.wait(3 * MiB)
    waiting = asyncio.create_task(socket.wait(3 * MiB))
    await turn()
    assert not waiting.done() and budget.waiting == 1
    first.release()
    async with asyncio.timeout(30):
        second = await waiting
    assert socket.held == 3 * MiB
    second.release()


async def test_hundreds_who_wait_all_get_their_turn(budget: Budget) -> None:
    """One that cannot be admitted does not block those behind it, and none is forgotten."""
    tenants = [budget.tenant(f"t{number}") for number in range(300)]
    blocked = tenants[0].within(MiB)
    blocked.hold(MiB)
    never = asyncio.create_task(blocked.wait(MiB))
    all_ = budget.tenant("x").reserve()
    all_.hold(60 * MiB)

    async def once(share: Share) -> None:
        (await share.wait(2 * MiB)).release()

    others = [asyncio.create_task(once(tenant)) for tenant in tenants[1:]]
    tenants[1].hold(1)  # so that its limit applies
    await turn()
    assert budget.waiting == 300
    all_.release()
    tenants[1].hold(-1)
    async with asyncio.timeout(10):
        await asyncio.gather(*others)
    assert not never.done()
    never.cancel()
    await asyncio.gather(never, return_exceptions=True)
    assert budget.waiting == 0 and budget.held == MiB


async def test_cancelled_waiter_leaves_nothing(budget: Budget) -> None:
    socket = budget.tenant("a").within(2 * MiB)
    held = await socket.wait(2 * MiB)
    waiting = asyncio.create_task(socket.wait(MiB))
    await turn()
    held.release()
    await turn()  # it has been let in, and has not run since
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert (budget.held, budget.waiting) == (0, 0)


# --- sockets ---------------------------------------------------------------------------------------------


def limits(**settings: int) -> ClientLimits:
    return ClientLimits(Settings(**settings))  # type: ignore[arg-type]


def nobody() -> None:
    raise AssertionError("nobody has to make room")


def test_strangers_of_one_address_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.limits.budget.ANONYMOUS_PER_ADDRESS", 3)
    found = limits().strangers
    held = [found.reserve("10.0.0.1", displaced=nobody) for _ in range(3)]
    with pytest.raises(RateLimited, match="this address has too many connections without a token"):
        found.reserve("10.0.0.1", displaced=nobody)
    found.reserve("10.0.0.2", displaced=nobody)
    held[0].release()
    found.reserve("10.0.0.1", displaced=nobody)


def test_strangers_take_no_place_of_those_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.limits.budget.ANONYMOUS", 1)
    found = limits(max_connections=2)
    for _ in range(10):
        found.strangers.reserve("a", displaced=lambda: None)
    for tenant in ("t", "u"):
        found.sockets.reserve(tenant)
    with pytest.raises(RateLimited, match="this gateway"):
        found.sockets.reserve("v")


# --- large messages are seen before they are there -------------------------------------------------------


def frame(size: int, *, kind: int = 1, last: bool = True, mask: bytes = b"mask") -> bytes:
    head = bytes([kind | (128 if last else 0)])
    if size < 126:
        head += bytes([128 | size])
    elif size < 1 << 16:
        head += bytes([128 | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([128 | 127]) + size.to_bytes(8, "big")
    return head + mask + b"x" * size


@pytest.mark.parametrize("step", [1, 2, 7, 13, 4096, 1 << 20])
def test_large_messages_are_announced_at_their_frame_however_they_are_cut(step: int) -> None:
    """Small messages, and control frames in between, are not."""
    parts = [
        frame(3),
        frame(LARGE),
        frame(LARGE + 1),
        frame(0, kind=9),
        frame(LARGE // 2, kind=2, last=False),
        frame(5, kind=9),
        frame(LARGE // 2, kind=0, last=False),
        frame(1, kind=0, last=False),
        frame(LARGE, kind=0),
        frame(200_000),
    ]
    starts = [sum(map(len, parts[:index])) for index in range(len(parts))]
    lengths, data, found = Lengths(1 << 24), b"".join(parts), list[tuple[int, int]]()
    for start in range(0, len(data), step):
        found += [(start + at, size) for at, size in lengths.feed(data[start : start + step])]
    wanted = [(2, LARGE + 1), (7, 1 << 24), (9, 200_000)]
    assert [size for _, size in found] == [size for _, size in wanted]
    for (at, _), (index, _) in zip(found, wanted, strict=True):
        assert starts[index] <= at < starts[index] + 14
        if step == 1 << 20:
            assert at == starts[index]


def test_message_over_the_limit_is_left_to_the_parser_to_refuse() -> None:
    assert list(Lengths(1 << 20).feed(frame(2 << 20))) == []
