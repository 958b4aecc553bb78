"""Who has a domain, by values alone; tests/integration/test_domains.py has the same with real sites."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.auth.tokens import Token
from gateway.errors import Conflict, Forbidden, GatewayError, NotFound, Unavailable
from gateway.events import Bus
from gateway.ownership.domains import Domains
from gateway.ownership.reservations import Holder, Reservations
from gateway.runtime import TenantInstance
from gateway.runtime.sites import TenantSite
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed
from tests.shared_memory import MemoryKeys
from tests.waits import turn

SHOP = "shop.example.com"


class Incus:
    """What Incus says of tenants."""

    def __init__(self) -> None:
        self.tenants: dict[str, TenantInstance] = {}
        self.down = False

    def has(self, name: str, domain: str | None = None, instance: str = "", created: str = "") -> None:
        self.tenants[name] = TenantInstance(
            name, "running", domain=domain, instance=instance or f"id-{name}", created=created
        )

    async def list(self, *, addresses: bool = True) -> list[TenantInstance]:
        await turn()
        if self.down:
            raise Unavailable("it is away")
        return [*self.tenants.values()]

    async def get(self, name: str) -> TenantInstance:
        await turn()
        if self.down:
            raise Unavailable("it is away")
        if name not in self.tenants:
            raise NotFound("none")
        return self.tenants[name]

    async def rename(self, name: str, domain: str | None) -> None:
        await turn()
        self.tenants[name] = replace(self.tenants[name], domain=domain)

    def sites(self) -> Sequence[TenantSite]:
        return [
            TenantSite(one.name, one.domain, True, None, instance=one.instance, created=one.created)
            for one in self.tenants.values()
            if one.domain is not None
        ]


class Desk:
    """An authority over that Incus, as its callers use it."""

    def __init__(self, folder: Path, store: Store, shared: Reservations | None = None) -> None:
        self.incus, self.told = Incus(), list[tuple[str, str | None, Any]]()
        self.shared = shared
        self.settings = Settings(state_dir=folder, domain="gw.example.com")
        self._store = store
        self.domains: Domains

    def publish(self, type: str, tenant: str | None, data: Any) -> None:
        self.told.append((type, tenant, data))

    async def open(self) -> None:
        """Begin a life of the gateway."""
        self.domains = await Domains.opened(
            cast(Any, self.incus), self._store, cast(Bus, self), self.settings, self.shared
        )

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Have no room in the state dir."""

        async def refuse(work: Any) -> None:
            raise StoreFailed("it is full", reason="disk_full")

        write, self._store.write = self._store.write, refuse  # type: ignore[assignment, method-assign]
        yield
        self._store.write = write  # type: ignore[method-assign]

    async def look(self, *alive: str) -> None:
        await self.domains.agree()
        async with self.domains.deciding():
            await self.domains.look(self.incus.sites(), (), alive)

    async def move(self, name: str, domain: str | None) -> None:
        async with self.domains.moving(name, domain):
            await self.incus.rename(name, domain)

    async def confirm(self, domain: str, name: str, deployment: str) -> None:
        async with self.domains.deciding():
            await self.domains.confirm(domain, name, deployment, await self.incus.list())


def reservations(keys: MemoryKeys, member: str) -> Reservations:
    async def members() -> Sequence[str]:
        return ("m1", "m2")

    return Reservations(keys, "domain", member, members)


@pytest.fixture(params=["alone", "member"])
async def desk(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Desk]:
    """One gateway alone, and one that is a member of a cluster: what it decides is the same."""
    async with Store(tmp_path) as store:
        shared = reservations(MemoryKeys(), "m1") if request.param == "member" else None
        desk = Desk(tmp_path, store, shared)
        await desk.open()
        yield desk


def token(*tenants: str, scopes: tuple[str, ...] = ("deploy",), domains: Any = None) -> Token:
    given = None if domains is None else frozenset(domains)
    return Token("me", frozenset(tenants), frozenset(scopes), 0, "id", domains=given)


async def owned(work: Any) -> None:
    with pytest.raises(Conflict) as refused:
        await work
    assert refused.value.facts["reason"] == "domain_owned"


# --- deployments ---------------------------------------------------------------------------------------


async def test_a_deployment_holds_its_domain_from_its_begin_to_its_end(desk: Desk) -> None:
    desk.incus.has("other")
    assert await desk.domains.hold(SHOP, "shop", "d-1")
    await owned(desk.move("other", SHOP))
    await owned(desk.domains.hold(SHOP, "other", "d-2"))
    await desk.look("d-1")
    await owned(desk.move("other", SHOP))
    await desk.domains.over("d-1")
    await desk.move("other", SHOP)
    assert desk.domains.serves(SHOP, "other")


async def test_a_hold_survives_a_restart_and_ends_where_its_deployment_is_over(desk: Desk) -> None:
    desk.incus.has("other")
    await desk.domains.hold(SHOP, "shop", "d-1")
    await desk.open()
    await owned(desk.move("other", SHOP))
    await desk.look("d-1")
    await owned(desk.move("other", SHOP))
    await desk.look()
    await desk.move("other", SHOP)


async def test_what_could_not_be_written_down_is_written_later(desk: Desk) -> None:
    """A state dir that is full keeps no domain for a deployment that is over, in the next life neither."""
    await desk.domains.hold(SHOP, "shop", "d-1")
    desk.incus.has("other", "b.example.com")
    with desk.full():
        await desk.domains.over("d-1")
        await desk.look()
    await desk.open()
    await desk.domains.retain(())
    assert await desk.domains.hold(SHOP, "other", "d-2")
    with desk.full():
        await desk.domains.over("d-2")
    await desk.look()
    await desk.open()
    assert desk.domains.held() == set()
    assert desk.domains.serves("b.example.com", "other")


async def test_a_tenant_keeps_what_its_deployment_brought(desk: Desk) -> None:
    await desk.domains.hold(SHOP, "shop", "d-1")
    await desk.confirm(SHOP, "shop", "d-1")
    desk.incus.has("shop", SHOP)
    await desk.domains.over("d-1")
    desk.incus.has("other")
    await owned(desk.move("other", SHOP))
    assert not await desk.domains.hold(SHOP, "other", "d-2")


async def test_a_deployment_onto_anothers_domain_holds_up_nobody(desk: Desk) -> None:
    """It is told when its turn comes; the owner updates meanwhile."""
    desk.incus.has("shop", SHOP)
    await desk.look()
    assert not await desk.domains.hold(SHOP, "thief", "d-1")
    assert await desk.domains.hold(SHOP, "shop", "d-2")
    await owned(desk.confirm(SHOP, "thief", "d-1"))
    await desk.confirm(SHOP, "shop", "d-2")
    await desk.domains.over("d-1")
    await desk.domains.over("d-2")
    assert desk.domains.serves(SHOP, "shop")


async def test_a_hold_that_was_given_in_ignorance_takes_nothing(desk: Desk) -> None:
    """Nobody had looked yet: a gateway that is just upgraded has no claims on record."""
    desk.incus.has("shop", SHOP)
    assert await desk.domains.hold(SHOP, "thief", "d-1")
    await owned(desk.confirm(SHOP, "thief", "d-1"))
    assert desk.domains.serves(SHOP, "shop")
    await desk.domains.over("d-1")
    assert desk.domains.serves(SHOP, "shop")


async def test_a_confirmed_deployment_is_not_robbed_by_a_key_written_by_hand(desk: Desk) -> None:
    await desk.domains.hold(SHOP, "shop", "d-1")
    await desk.confirm(SHOP, "shop", "d-1")
    desk.incus.has("thief", SHOP, created="1")
    await desk.look("d-1")
    assert not desk.domains.serves(SHOP, "thief")
    desk.incus.has("shop", SHOP, created="2")
    await desk.domains.over("d-1")
    await desk.look()
    assert desk.domains.serves(SHOP, "shop")


async def test_a_destroyed_tenants_domain_is_free_at_once(desk: Desk) -> None:
    desk.incus.has("shop", SHOP)
    await desk.look()
    del desk.incus.tenants["shop"]
    assert await desk.domains.hold(SHOP, "new", "d-1")


async def test_what_a_destroyed_tenant_left_is_nobodys_unless_somebody_holds_it(desk: Desk) -> None:
    desk.incus.has("shop", SHOP)
    await desk.look()
    async with desk.domains.deciding():
        assert await desk.domains.left("shop") == []  # it is there
        del desk.incus.tenants["shop"]
        assert await desk.domains.left("shop") == [SHOP]
    await desk.domains.hold(SHOP, "shop", "d-1")
    async with desk.domains.deciding():
        assert await desk.domains.left("shop") == []


# --- a tenant gets another domain ----------------------------------------------------------------------


async def test_of_two_moves_and_a_deployment_at_once_one_wins(desk: Desk) -> None:
    for name in ("a", "b"):
        desk.incus.has(name)
    for order in range(6):
        works = [desk.move("a", SHOP), desk.move("b", SHOP), desk.domains.hold(SHOP, "c", "d-1")]
        results = await asyncio.gather(*works[order % 3 :], *works[: order % 3], return_exceptions=True)
        won = [one for one in results if one is None or one is True]
        assert len(won) == 1, results
        assert [one.domain for one in await desk.incus.list()].count(SHOP) == (won == [None])
        await desk.domains.over("d-1")
        for name in ("a", "b"):
            await desk.move(name, None)


async def test_a_move_that_fails_changes_nothing(desk: Desk) -> None:
    desk.incus.has("shop", SHOP)
    await desk.look()
    with pytest.raises(RuntimeError):
        async with desk.domains.moving("shop", "new.example.com"):
            raise RuntimeError
    assert desk.domains.serves(SHOP, "shop")
    desk.incus.has("other")
    await desk.move("other", "new.example.com")
    with pytest.raises(GatewayError):
        async with desk.domains.moving("nobody", "free.example.com"):
            pass


async def test_the_old_domain_is_free_after_a_move(desk: Desk) -> None:
    desk.incus.has("shop", SHOP)
    desk.incus.has("other")
    await desk.look()
    await desk.move("shop", "new.example.com")
    await desk.move("other", SHOP)
    assert desk.domains.serves(SHOP, "other")
    assert desk.domains.serves("new.example.com", "shop")


async def test_a_tenant_that_is_being_deployed_is_not_moved(desk: Desk) -> None:
    desk.incus.has("shop", SHOP)
    await desk.domains.hold(SHOP, "shop", "d-1")
    with pytest.raises(Conflict) as refused:
        await desk.move("shop", "new.example.com")
    assert refused.value.facts["deployment"] == "d-1"


async def test_nothing_is_given_while_incus_is_away(desk: Desk) -> None:
    desk.incus.has("shop", SHOP)
    desk.incus.has("other")
    await desk.look()
    desk.incus.down = True
    assert not await desk.domains.hold(SHOP, "other", "d-1")
    with pytest.raises(Unavailable):
        await desk.move("other", SHOP)
    assert desk.domains.serves(SHOP, "shop")


# --- what is contested ---------------------------------------------------------------------------------


async def test_a_contested_domain_stays_and_each_side_hears_of_its_own(desk: Desk) -> None:
    desk.incus.has("shop", SHOP, created="2")
    await desk.look()
    desk.incus.has("copy", SHOP, created="1")
    for _ in range(2):  # told once
        await desk.look()
    assert desk.domains.serves(SHOP, "shop")
    assert desk.domains.contested == 1
    facts = {"domain": SHOP, "reason": "owned"}
    assert sorted(desk.told, key=str) == [
        ("tenant.domain.contested", "copy", {**facts, "keeps": False}),
        ("tenant.domain.contested", "shop", {**facts, "keeps": True}),
    ]
    await owned(desk.move("copy", SHOP))
    await desk.open()  # in another life too
    await desk.look()
    assert desk.domains.serves(SHOP, "shop")
    await desk.move("shop", None)
    await desk.look()
    assert desk.domains.serves(SHOP, "copy")
    assert desk.domains.contested == 0


async def test_of_two_that_nobody_knows_who_serves_wins_and_then_the_elder(desk: Desk) -> None:
    desk.incus.has("copy", SHOP, created="2")
    desk.incus.has("shop", SHOP, created="1")
    async with desk.domains.deciding():
        await desk.domains.look(desk.incus.sites(), {"copy"}, ())
    assert desk.domains.serves(SHOP, "copy")
    desk.incus.has("b", "b.example.com", created="2")
    desk.incus.has("c", "b.example.com", created="1")
    await desk.look()
    assert desk.domains.serves("b.example.com", "c")


async def test_an_instance_that_is_renamed_keeps_its_domain_and_another_of_its_name_has_none(
    desk: Desk,
) -> None:
    desk.incus.has("shop", SHOP, instance="first")
    await desk.look()
    del desk.incus.tenants["shop"]
    desk.incus.has("moved", SHOP, instance="first", created="2")
    desk.incus.has("shop", SHOP, instance="second", created="1")
    assert await desk.domains.owner(SHOP) == "moved"
    await desk.look()
    assert desk.domains.serves(SHOP, "moved")
    assert not desk.domains.serves(SHOP, "shop")


async def test_a_list_that_leaves_out_who_has_it_gives_it_to_nobody(desk: Desk) -> None:
    """Incus leaves out an instance that is just being changed."""
    desk.incus.has("shop", SHOP)
    await desk.look()
    desk.incus.has("copy", SHOP)
    async with desk.domains.deciding():
        await desk.domains.look([site for site in desk.incus.sites() if site.tenant == "copy"], (), ())
    assert desk.domains.serves(SHOP, "shop")
    assert not desk.domains.serves(SHOP, "copy")


async def test_a_spelling_makes_no_other_domain(desk: Desk) -> None:
    desk.incus.has("shop", SHOP)
    await desk.look()
    desk.incus.has("copy", "SHOP.Example.com.")
    await desk.look()
    assert desk.domains.serves(SHOP, "shop")
    assert desk.domains.contested == 1
    assert await desk.domains.owner("Shop.EXAMPLE.com") == "shop"


async def test_the_gateways_own_names_are_nobodys_whatever_incus_says(desk: Desk) -> None:
    for name in ("gw.example.com", "probe.invalid"):
        desk.incus.has("shop", name)
        await desk.look()
        assert not desk.domains.serves(name, "shop")
        assert await desk.domains.owner(name) is None
        assert desk.told[-1][2] == {"domain": name, "keeps": False, "reason": "reserved"}
        await owned(desk.move("shop", name))
        await owned(desk.domains.hold(name, "new", "d-1"))
        await owned(desk.domains.permit(token("*", scopes=("admin",)), name))


async def test_who_shares_an_address_is_told_once(desk: Desk) -> None:
    site = TenantSite("copy", SHOP, False, None, instance="id-copy", shares_address=True)
    for _ in range(2):
        async with desk.domains.deciding():
            await desk.domains.look([site], (), ())
    assert desk.told == [("tenant.address.contested", "copy", {})]
    assert desk.domains.shared == 1


# --- in a cluster --------------------------------------------------------------------------------------


class Two:
    """The gateways of two members."""

    def __init__(self, keys: MemoryKeys, m1: Desk, m2: Desk) -> None:
        self.keys, self.m1, self.m2 = keys, m1, m2

    async def shared(self) -> Mapping[str, Holder]:
        return await reservations(self.keys, "m1").held()


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Two]:
    keys = MemoryKeys()
    async with contextlib.AsyncExitStack() as stack:
        desks = []
        for member in ("m1", "m2"):
            folder = tmp_path / member
            folder.mkdir()
            store = await stack.enter_async_context(Store(folder))
            desks.append(Desk(folder, store, reservations(keys, member)))
            await desks[-1].open()
        yield Two(keys, *desks)


async def test_a_domain_is_one_tenants_in_the_whole_cluster(two: Two) -> None:
    """Whoever asks where at once: deployments, moves, and keys written by hand."""
    two.m1.incus.has("a")
    two.m2.incus.has("b")
    for number in range(8):
        domain = f"s{number}.example.com"
        by_hand = number % 2 == 1
        works: list[Any] = [two.m1.move("a", domain)]
        works += [two.m2.move("b", domain)] if number % 4 < 2 else [two.m2.domains.hold(domain, "c", "d-1")]
        if by_hand:
            two.m2.incus.has("d", domain)
            works.append(two.m2.look("d-1"))
        await asyncio.gather(*works[number % 2 :], *works[: number % 2], return_exceptions=True)
        served = [
            (name, tenant)
            for name, desk in (("m1", two.m1), ("m2", two.m2))
            for tenant in ("a", "b", "c", "d")
            if desk.domains.serves(domain, tenant)
        ]
        assert len(served) == 1, (number, served)
        holder = (await two.shared())[domain]
        assert (holder.member, holder.tenant) == served[0]
        await two.m2.domains.over("d-1")
        two.m2.incus.tenants.pop("d", None)


async def test_a_deployment_onto_another_members_domain_is_told_when_its_turn_comes(two: Two) -> None:
    two.m1.incus.has("shop", SHOP)
    await two.m1.look()
    assert not await two.m2.domains.hold(SHOP, "thief", "d-1")
    await owned(two.m2.confirm(SHOP, "thief", "d-1"))
    two.m2.incus.has("other")
    await owned(two.m2.move("other", SHOP))
    assert two.m1.domains.serves(SHOP, "shop")
    assert not two.m2.domains.held()


async def test_a_deployment_that_is_over_leaves_the_domain_to_all(two: Two) -> None:
    assert await two.m1.domains.hold(SHOP, "shop", "d-1")
    assert not await two.m2.domains.hold(SHOP, "other", "d-2")
    await two.m1.domains.over("d-1")
    assert await two.m2.domains.hold(SHOP, "other", "d-2")


async def test_a_hold_of_a_killed_gateway_ends_with_its_next_life(two: Two) -> None:
    assert await two.m1.domains.hold(SHOP, "shop", "d-1")
    await two.m1.open()
    assert not await two.m2.domains.hold(SHOP, "other", "d-2")
    await two.m1.domains.retain(())
    assert await two.m2.domains.hold(SHOP, "other", "d-2")


async def test_a_key_written_by_hand_on_another_member_is_contested_there(two: Two) -> None:
    two.m1.incus.has("shop", SHOP)
    await two.m1.look()
    two.m2.incus.has("copy", SHOP, created="0")
    for _ in range(2):
        await two.m2.look()
    assert two.m1.domains.serves(SHOP, "shop")
    assert not two.m2.domains.serves(SHOP, "copy")
    assert [told[:2] for told in two.m2.told] == [("tenant.domain.contested", "copy")]
    assert two.m2.told[0][2] == {"domain": SHOP, "keeps": False, "reason": "owned"}
    del two.m1.incus.tenants["shop"]
    await two.m1.look()
    await two.m2.look()
    assert two.m2.domains.serves(SHOP, "copy")


async def test_a_tenant_that_moves_takes_its_domain_along(two: Two) -> None:
    two.m1.incus.has("shop", SHOP)
    await two.m1.look()
    two.m2.incus.tenants["shop"] = two.m1.incus.tenants.pop("shop")
    await two.m2.look()
    assert two.m2.domains.serves(SHOP, "shop")
    await two.m1.look()
    assert not two.m1.domains.serves(SHOP, "shop")
    assert await two.shared() == {SHOP: Holder("m2", "shop")}


async def test_a_server_that_joins_brings_its_domains(tmp_path: Path) -> None:
    """Those that another member has already it gives up, and its tenants hear of that."""
    keys = MemoryKeys()
    async with Store(tmp_path) as store:
        desk = Desk(tmp_path, store)
        await desk.open()
        for number in range(3):
            desk.incus.has(f"t{number}", f"s{number}.example.com")
        await desk.look()
        assert await reservations(keys, "m2").take("s0.example.com", "elder")
        desk.shared = reservations(keys, "m1")
        await desk.open()
        await desk.look()
        assert [desk.domains.serves(f"s{number}.example.com", f"t{number}") for number in range(3)] == [
            False,
            True,
            True,
        ]
        assert [told[:2] for told in desk.told] == [("tenant.domain.contested", "t0")]
        assert (await desk.shared.held())["s0.example.com"] == Holder("m2", "elder")


async def test_without_a_quorum_what_is_given_stays_and_nothing_new_is_given(two: Two) -> None:
    two.m1.incus.has("shop", SHOP)
    two.m1.incus.has("other", "b.example.com")
    await two.m1.look()
    two.keys.quorum = False
    two.m1.incus.has("new", "c.example.com")
    async with two.m1.domains.deciding():
        await two.m1.domains.look(two.m1.incus.sites(), (), ())
    with pytest.raises(Unavailable):
        await two.m1.domains.agree()
    assert two.m1.domains.serves(SHOP, "shop") and two.m1.domains.serves("b.example.com", "other")
    assert not two.m1.domains.serves("c.example.com", "new")
    with pytest.raises(Unavailable):
        await two.m1.domains.hold("d.example.com", "new", "d-1")
    assert not two.m1.domains.held()
    assert await two.m1.domains.hold(SHOP, "shop", "d-2"), "an update of what it has needs no decision"
    await two.m1.domains.over("d-2")
    await two.m1.move("other", None)
    two.keys.quorum = True
    await two.m1.look()
    assert two.m1.domains.serves("c.example.com", "new")
    assert set(await two.shared()) == {SHOP, "c.example.com"}, "what was left meanwhile is left to all"


# --- whose domains -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "domain", "allowed"),
    [
        (token("*", scopes=("admin",)), "google.com", True),
        (token("*"), "google.com", False),
        (token("mine", scopes=("admin",)), "google.com", False),
        (token("mine"), "google.com", False),
        (token("mine"), "new.localhost", True),
        (token("mine"), "a.new.localhost", False),
        (token("mine"), "mine.com", True),
        (token("mine"), "theirs.com", False),
        (token("*"), "theirs.com", True),
        (token("new", domains=["*.sites.example.com"]), "a.b.sites.example.com", True),
        (token("new", domains=["*.sites.example.com"]), "sites.example.com", False),
        (token("new", domains=["*.sites.example.com"]), "new.localhost", False),
        (token("new", domains=["new.com"]), "new.com", True),
        (token("mine", domains=["new.com"]), "mine.com", True),
        (token("new", domains=[]), "new.localhost", False),
    ],
)
async def test_whose_domains(desk: Desk, asked: Token, domain: str, allowed: bool) -> None:
    desk.incus.has("mine", "mine.com")
    desk.incus.has("theirs", "theirs.com")
    if allowed:
        await desk.domains.permit(asked, domain)
        return
    with pytest.raises(Forbidden) as refused:
        await desk.domains.permit(asked, domain)
    assert refused.value.facts == {"reason": "domain_not_allowed", "domain": domain}
    assert "theirs" not in refused.value.message.replace(domain, "")
