"""The pool of warm shells, with a maker of shells that only counts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import pytest

from gateway.errors import Unavailable
from gateway.runtime.warm_shells import WarmShells
from tests.waits import settled, turn


class Shell:
    def __init__(self, tenant: str, terminal: bool) -> None:
        self.key = tenant, terminal
        self.abandoned = asyncio.Event()

    async def abandon(self) -> None:
        self.abandoned.set()


class Maker:
    """Starts shells while `may` is set; `made` has all in order, `most` the maximum started at a time."""

    def __init__(self) -> None:
        self.made: list[Shell] = []
        self.fails = False
        self.may = asyncio.Event()
        self.may.set()
        self.most = 0
        self._at_work = 0
        self._more = asyncio.Condition()

    async def start(self, tenant: str, terminal: bool) -> Shell:
        self._at_work += 1
        self.most = max(self.most, self._at_work)
        try:
            await self.may.wait()
        finally:
            self._at_work -= 1
        async with self._more:
            if self.fails:
                raise Unavailable("no")
            self.made.append(Shell(tenant, terminal))
            self._more.notify_all()
            return self.made[-1]

    async def until(self, count: int) -> list[Shell]:
        async with asyncio.timeout(30), self._more:
            await self._more.wait_for(lambda: len(self.made) >= count)
        await turn()  # the last one is put in its place
        await turn()
        return self.made

    @property
    def left(self) -> list[Shell]:
        return [shell for shell in self.made if not shell.abandoned.is_set()]


@pytest.fixture
def maker() -> Maker:
    return Maker()


def keeping(
    maker: Maker,
    *,
    pipes: int = 1,
    terminals: int = 1,
    maximum: int = 4,
    starts: int = 4,
    delay: float = 0.0,
    age: float = 60,
    idle: float = 60,
) -> WarmShells:
    wanted = {False: pipes, True: terminals}
    return WarmShells(
        maker.start, wanted=wanted, maximum=maximum, starts=starts, delay=delay, age=age, idle=idle
    )


@pytest.fixture
async def standbys(maker: Maker) -> AsyncIterator[WarmShells]:
    standbys = keeping(maker)
    yield standbys
    await standbys.aclose()


@pytest.fixture
async def busy(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WarmShells]:
    """WarmShells whose only shell was just taken."""
    monkeypatch.setattr("gateway.runtime.warm_shells._PATIENCE", 60)
    standbys = keeping(maker, terminals=0, delay=60)
    with standbys.expect("a"):
        await maker.until(1)
        assert await standbys.take("a", False) is maker.made[0]
        yield standbys
    await standbys.aclose()


async def test_nothing_is_kept_for_whom_nothing_is_expected(standbys: WarmShells, maker: Maker) -> None:
    assert await standbys.take("a", False) is None
    await turn()
    assert maker.made == []


async def test_one_of_each_kind_is_kept_and_replaced_when_taken(standbys: WarmShells, maker: Maker) -> None:
    with standbys.expect("a"):
        made = await maker.until(2)
        assert [shell.key for shell in made] == [("a", False), ("a", True)]
        assert await standbys.take("a", False) is made[0]
        await maker.until(3)
        assert await standbys.take("a", False) is made[2]  # never the same one twice


async def test_as_many_of_each_kind_are_kept_as_are_wanted(maker: Maker) -> None:
    standbys = keeping(maker, pipes=3, terminals=0)
    with standbys.expect("a"):
        await maker.until(3)
        assert [shell.key for shell in maker.made] == [("a", False)] * 3
        assert [await standbys.take("a", False) for _ in range(3)] == maker.made
        await maker.until(6)
        assert await standbys.take("a", True) is None
        await settled()
        assert len(maker.made) == 6  # and no more than that
    await standbys.aclose()


async def test_what_took_a_shell_has_a_moment_for_itself(maker: Maker) -> None:
    standbys = keeping(maker, terminals=0, delay=0.3)
    loop = asyncio.get_running_loop()
    with standbys.expect("a"):
        await maker.until(1)
        taken = loop.time()
        assert await standbys.take("a", False) is maker.made[0]
        await maker.until(2)
        assert loop.time() - taken > 0.29
    await standbys.aclose()


async def test_who_comes_soon_after_the_last_waits_for_the_next(busy: WarmShells, maker: Maker) -> None:
    maker.may.clear()
    second, third = (asyncio.ensure_future(busy.take("a", False)) for _ in range(2))
    assert await third is None  # one is started at a time, and the second has it
    assert not second.done()
    maker.may.set()
    assert await second is maker.made[1]
    # and while they go on to come, each has the next
    assert [await busy.take("a", False) for _ in range(3)] == maker.made[2:5]


async def test_who_waits_for_one_that_does_not_start_gets_none(busy: WarmShells, maker: Maker) -> None:
    maker.fails = True
    assert await busy.take("a", False) is None
    maker.fails = False
    assert await busy.take("a", False) is None  # nobody tries again at once


async def test_who_waits_for_one_that_hangs_goes_on_alone(
    busy: WarmShells, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.runtime.warm_shells._PATIENCE", 0.01)
    maker.may.clear()
    assert await busy.take("a", False) is None
    maker.may.set()
    made = await maker.until(2)
    assert busy.waiting("a", False) == [made[1]]


async def test_who_waits_for_one_of_a_tenant_that_changed_gets_none(busy: WarmShells, maker: Maker) -> None:
    maker.may.clear()
    waits = asyncio.ensure_future(busy.take("a", False))
    await settled()
    busy.drop("a")
    assert await waits is None


async def test_in_a_burst_all_that_lack_are_started_beside_each_other(maker: Maker) -> None:
    standbys = keeping(maker, pipes=2, terminals=1, delay=60)
    with contextlib.ExitStack() as stack:
        for number in (1, 2, 3):  # each that expects has one started
            stack.enter_context(standbys.expect("a"))
            await maker.until(number)
        for _ in range(2):
            await standbys.take("a", False)
        maker.may.clear()
        waits = [asyncio.ensure_future(standbys.take("a", False)) for _ in range(3)]
        assert await waits[2] is None
        assert maker.most == 2
        maker.may.set()
        assert await asyncio.gather(*waits[:2]) == maker.made[3:5]
    await standbys.aclose()


async def test_one_that_is_given_up_before_it_begins_is_replaced_later(maker: Maker) -> None:
    standbys = keeping(maker, terminals=0)
    with standbys.expect("a"):
        standbys.drop("a")
        await maker.until(1)
    await standbys.aclose()


@pytest.mark.parametrize("came", [False, True])
async def test_one_that_nobody_waits_for_any_more_is_kept(busy: WarmShells, maker: Maker, came: bool) -> None:
    maker.may.clear()
    waits = asyncio.ensure_future(busy.take("a", False))
    await settled()
    kept = []
    if came:  # in the same breath
        claim = busy._filling[0].claim
        assert claim is not None
        kept = [Shell("a", False)]
        claim.set_result(kept[0])
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    maker.may.set()
    made = await maker.until(2)
    assert busy.waiting("a", False) == [*kept, made[1]]
    await busy.aclose()
    assert all(shell.abandoned.is_set() for shell in [*kept, made[1]])


async def test_of_one_tenant_one_is_started_at_a_time_and_of_all_a_few(maker: Maker) -> None:
    standbys = keeping(maker, pipes=2, maximum=30, starts=3)
    maker.may.clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(standbys.expect("a"))
        stack.enter_context(standbys.expect("a"))
        await settled()
        assert maker.most == 1
        others = [f"b{number}" for number in range(9)]
        for tenant in others:
            stack.enter_context(standbys.expect(tenant))
        await settled()
        assert maker.most == 3
        maker.may.set()
        await maker.until(30)
        assert maker.most == 3
        assert {shell.key for shell in maker.made} == set(itertools.product(["a", *others], [False, True]))
    await standbys.aclose()


async def test_a_limit_below_what_is_wanted_is_kept_to_without_end(maker: Maker) -> None:
    standbys = keeping(maker, pipes=3, maximum=2)
    with standbys.expect("a"):
        await maker.until(3)
        await settled()
        assert len(maker.made) == 3  # the third took the place of the first, and none that of the second
        assert maker.left == maker.made[1:]
    await standbys.aclose()
    assert maker.left == []


async def test_two_that_expect_share_their_shells(standbys: WarmShells, maker: Maker) -> None:
    with standbys.expect("a"), standbys.expect("a"):
        await maker.until(2)
    assert len(maker.made) == 2


async def test_the_shells_of_a_tenant_that_changed_are_replaced(standbys: WarmShells, maker: Maker) -> None:
    """For example by a restart: connected clients find warm shells again."""
    with standbys.expect("a"), standbys.expect("b"):
        before = list(await maker.until(4))
        standbys.drop("a")
        await turn()
        assert {shell.key[0] for shell in maker.left} == {"b"}
        assert not standbys.waiting("a", True)
        made = await maker.until(6)
        assert sorted(shell.key for shell in made[4:]) == [("a", False), ("a", True)]
        assert not set(before) & {await standbys.take("a", False), await standbys.take("a", True)}


async def test_after_the_last_that_expected_them_they_stay_a_while(maker: Maker) -> None:
    standbys = keeping(maker, idle=0.05)
    with standbys.expect("a"):
        made = await maker.until(2)
    assert maker.left == made
    await asyncio.wait_for(asyncio.gather(*(shell.abandoned.wait() for shell in made)), 5)
    await standbys.aclose()


async def test_an_old_one_is_replaced(maker: Maker) -> None:
    standbys = keeping(maker, age=0.05)
    with standbys.expect("a"):
        first = (await maker.until(2))[0]
        await asyncio.wait_for(first.abandoned.wait(), 5)
        await maker.until(3)
    await standbys.aclose()
    assert maker.left == []


async def test_no_more_than_the_limit_wait(standbys: WarmShells, maker: Maker) -> None:
    with standbys.expect("a"), standbys.expect("b"), standbys.expect("c"):
        made = await maker.until(6)
        await asyncio.wait_for(made[0].abandoned.wait(), 5)
        assert len(maker.left) == 4


async def test_a_failed_start_is_tried_again_with_the_next_command(
    standbys: WarmShells, maker: Maker
) -> None:
    maker.fails = True
    with standbys.expect("a"):
        await settled()
        maker.fails = False
        assert await standbys.take("a", False) is None
        await maker.until(1)
        assert await standbys.take("a", False) is maker.made[0]


async def test_closing_gives_up_all_and_starts_no_more(standbys: WarmShells, maker: Maker) -> None:
    with standbys.expect("a"):
        await maker.until(2)
        await standbys.aclose()
        assert maker.left == []
        assert await standbys.take("a", False) is None
        await turn()
        assert len(maker.made) == 2


async def test_closing_waits_for_one_that_has_just_started(maker: Maker) -> None:
    """Its start has succeeded, but has not been processed yet."""
    standbys = keeping(maker, terminals=0)
    with standbys.expect("a"):
        task = standbys._filling[0].task
        await turn()
        assert task is not None and task.done() and standbys._filling
        await standbys.aclose()
    assert len(maker.made) == 1 and maker.left == []
