"""What the keys do that the gateways of a cluster share: the same in memory and in Incus."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import pytest

from gateway.cluster.keys import VALUE_MAX
from gateway.ownership.reservations import Keys, SharedKeys


class KeysContract:
    """Each test gets the fixture `keys`: two views of the same keys, with none that begins with `t.`."""

    async def test_a_key_is_set_once_by_whoever_is_first(self, keys: tuple[Keys, Keys]) -> None:
        one, other = keys
        assert await one.get("t.a") is None
        assert await one.swap("t.a", None, "one")
        assert not await other.swap("t.a", None, "other")
        assert await other.get("t.a") == "one"
        assert not await other.swap("t.a", "another", None)
        assert await other.swap("t.a", "one", "other")
        assert not await one.swap("t.a", "one", None)
        assert await one.swap("t.a", "other", None)
        assert await other.get("t.a") is None

    async def test_what_is_as_it_was_is_no_change(self, keys: tuple[Keys, Keys]) -> None:
        one, other = keys
        assert await one.swap("t.same", None, None)
        assert await one.swap("t.same", None, "x")
        assert await other.swap("t.same", "x", "x")
        assert not await other.swap("t.same", None, None)

    async def test_keys_are_listed_by_what_they_begin_with(self, keys: tuple[Keys, Keys]) -> None:
        one, other = keys
        for key in ("t.a.1", "t.a.2", "t.b.1"):
            assert await one.swap(key, None, f"of {key}")
        assert await other.listed("t.a.") == {"t.a.1": "of t.a.1", "t.a.2": "of t.a.2"}
        assert await other.listed("t.c.") == {}

    async def test_of_many_at_once_one_wins_each_key(self, keys: tuple[Keys, Keys]) -> None:
        """And none is lost that had no rival."""
        rivals = [
            view.swap(f"t.race.{key}", None, f"{number}")
            for key in range(5)
            for number in range(4)
            for view in keys
        ]
        alone = [view.swap(f"t.own.{n}.{m}", None, "x") for n in range(5) for m, view in enumerate(keys)]
        won = await asyncio.gather(*rivals, *alone)
        of_keys = Counter(place // (4 * len(keys)) for place, one in enumerate(won[: len(rivals)]) if one)
        assert of_keys == dict.fromkeys(range(5), 1)
        assert all(won[len(rivals) :])
        assert len(await keys[0].listed("t.own.")) == 10

    async def test_a_counter_loses_no_count(self, keys: tuple[Keys, Keys]) -> None:
        async def count(view: Keys) -> None:
            while True:
                before = await view.get("t.count")
                if await view.swap("t.count", before, str(int(before or 0) + 1)):
                    return

        await asyncio.gather(*(count(view) for view in keys for _ in range(5)))
        assert await keys[0].get("t.count") == "10"

    @pytest.mark.parametrize("key", ["", "T.upper", "t/x", "t x", "t." + "x" * 300])
    async def test_a_key_that_incus_would_not_take_is_refused(
        self, keys: tuple[Keys, Keys], key: str
    ) -> None:
        with pytest.raises(ValueError, match="not a key"):
            await keys[0].swap(key, None, "x")
        with pytest.raises(ValueError, match="not a key"):
            await keys[0].get(key)

    async def test_a_value_is_short_and_may_have_any_letters(self, keys: tuple[Keys, Keys]) -> None:
        one, other = keys
        text = """{"grün": "\n %s $X '"}""".ljust(VALUE_MAX, "ü")
        assert await one.swap("t.text", None, text)
        assert await other.get("t.text") == text
        for wrong in ("", text + "x"):
            with pytest.raises(ValueError, match="shared value"):
                await one.swap("t.text", text, wrong)


class SharedKeysContract(KeysContract):
    """The same for keys that tell of their changes."""

    async def test_changes_are_told_to_all(self, keys: tuple[SharedKeys, SharedKeys]) -> None:
        one, other = keys
        async with asyncio.timeout(20), contextlib.aclosing(other.changes()) as changes:  # type: ignore[type-var]
            await anext(changes)  # it listens from here on
            assert await one.swap("t.told", None, "x")
            while await other.get("t.told") is None:
                await anext(changes)
