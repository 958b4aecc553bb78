"""Decisions about tenants that are short of memory, from given measurements."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from gateway.limits import pressure
from gateway.limits.pressure import Course, Step, Window, advice, larger, window
from gateway.rootfs.memory import Sample
from gateway.runtime import TenantEvent
from tests.waits import turn

SHORT = Window(2.0, 0.6, 100_000)
CALM = Window(2.0, 0.0, 0)
WRITES = Window(2.0, 0.6, 10)  # as one that writes a large file: it waits, and reads nothing again


def went(course: Course, *windows: tuple[Window | None, Window | None]) -> list[tuple[Step, ...]]:
    """Return the steps after measurements two seconds apart, each of the tenant and its site."""
    begin = 100.0 if course.told is None else course.told + 2
    return [course.step(begin + 2 * i, tenant, site) for i, (tenant, site) in enumerate(windows)]


def test_pressure_is_told_at_the_second_look_and_when_it_is_over() -> None:
    both = [(SHORT, SHORT)] * 3 + [(CALM, CALM)] * 4
    assert went(Course(60), *both) == [(), ("tell",), (), (), (), ("over",), ()]


def test_what_only_writes_is_not_short_of_memory() -> None:
    assert went(Course(60), *[(WRITES, WRITES)] * 40) == [()] * 40


def test_one_odd_look_is_no_pressure() -> None:
    assert went(Course(60), (SHORT, SHORT), (CALM, CALM), (SHORT, SHORT), (None, None)) == [()] * 4


def test_it_is_told_once_a_minute_at_most() -> None:
    steps = went(Course(0), *[(SHORT, SHORT)] * 100)
    told = [number for number, step in enumerate(steps) if "tell" in step]
    assert told == [1, 31, 61, 91]


def test_what_comes_and_goes_is_told_no_more_often() -> None:
    steps = went(Course(0), *([(SHORT, SHORT)] * 3 + [(CALM, CALM)] * 3) * 5)
    assert [step for step in steps if step] == [("tell",), ("over",)]


def test_a_site_is_ended_after_its_patience_and_has_as_long_again() -> None:
    steps = went(Course(10), *[(SHORT, SHORT)] * 12)
    assert [number for number, step in enumerate(steps) if "relieve" in step] == [4, 9]


def test_a_moment_without_does_not_begin_the_patience_anew() -> None:
    steps = went(Course(10), *[(SHORT, SHORT), (SHORT, CALM), (SHORT, CALM), (SHORT, SHORT), (SHORT, SHORT)])
    assert "relieve" in steps[-1]


def test_a_command_that_thrashes_ends_no_site() -> None:
    steps = went(Course(10), *[(SHORT, CALM)] * 50, *[(SHORT, None)] * 50)
    assert not any("relieve" in step for step in steps) and "tell" in steps[1]


def test_without_patience_nothing_is_ended() -> None:
    assert not any("relieve" in step for step in went(Course(0), *[(SHORT, SHORT)] * 500))


def test_without_stall_times_much_must_be_read_again() -> None:
    assert Window(2.0, None, 10_000).pressed
    assert not Window(2.0, None, 2_000).pressed


def test_a_window_is_what_the_counters_grew_by() -> None:
    before, now = Sample(10.0, 1.0, 500), Sample(12.0, 1.5, 2500)
    assert window(before, now) == Window(2.0, 0.25, 1000)
    assert window(None, now) is window(before, None) is window(now, now) is None
    assert window(now, Sample(14.0, 0.0, 3)) is None  # the group was made anew
    counted = window(Sample(10.0, None, 0), Sample(12.0, None, 200))
    assert counted == Window(2.0, None, 100)


def test_advice_names_the_next_larger_size() -> None:
    assert larger(512 << 20) == "medium" and larger(1 << 30) == "large"
    assert larger(64 << 30) is None and larger(None) is None
    said = advice("shop", 512 << 20, "medium")
    assert "512 MiB" in said and "incus-gateway resize shop medium" in said and "PATCH" in said
    assert "no larger size" in advice("shop", 64 << 30, None)


async def test_a_kill_for_lack_of_memory_is_known_once_the_kernel_has_reported_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes after the process has ended; one before that, or of another tenant, is none."""
    monkeypatch.setattr(pressure, "_REPORT", 0.05)
    watch: Any = pressure.Pressure(*(cast(Any, None),) * 3)
    oom = TenantEvent("tenant.oom", "shop", {})
    watch.noticed(oom)
    began = time.monotonic()
    assert not await watch.has_killed("shop", began)
    monkeypatch.setattr(pressure, "_REPORT", 30)
    asking = asyncio.create_task(watch.has_killed("shop", began))
    await turn()
    watch.noticed(TenantEvent("tenant.oom", "other", {}))
    await turn()
    assert not asking.done()
    watch.noticed(oom)
    assert await asking and await watch.has_killed("shop", began)
    watch.noticed(TenantEvent("tenant.destroyed", "shop", {}))
    monkeypatch.setattr(pressure, "_REPORT", 0.05)
    assert not await watch.has_killed("shop", began), "the next tenant of this name is another"
