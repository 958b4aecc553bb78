"""What the layer that passes requests on does where it cannot tell whose a tenant is."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.api.services import Subject
from gateway.auth.tokens import Token
from gateway.cluster.cluster import Cluster
from gateway.cluster.listener import FROM
from gateway.cluster.topology import ClusterTopology, _Relayed
from gateway.errors import NotFound, Unavailable
from gateway.lifecycle.doors import Doors
from gateway.settings import Settings
from tests.shared_memory import MemoryKeys
from tests.waits import turn, until

TOKEN = Token("who", frozenset({"shop"}), frozenset({"exec"}), int(time.time()) + 86_400, "id")


class Silent:
    """The tenants of an Incus that does not answer."""

    async def get(self, tenant: str) -> Any:
        raise Unavailable("Incus does not answer")


class Running:
    """Every tenant."""

    async def get(self, tenant: str) -> Any:
        return SimpleNamespace(name=tenant)


class Nothing:
    """No tenant."""

    async def get(self, tenant: str) -> Any:
        raise NotFound("no such tenant")


def topology() -> ClusterTopology:
    """Return that of a gateway that has the tenant `shop`, as a peer reports of itself, too."""
    peer = SimpleNamespace(name="m2", alive=True)
    homes, peers = SimpleNamespace(home=lambda name: peer), SimpleNamespace(out=asyncio.Event())
    there: Any = SimpleNamespace(own="m1", homes=homes, peers=peers)
    found, services = (
        ClusterTopology(there, MemoryKeys(), Settings()),
        SimpleNamespace(
            names=SimpleNamespace(holder=lambda name: "an instance"),
            runtime=SimpleNamespace(tenants=Silent()),
            settings=SimpleNamespace(origins=(), domain=None),
            verify=lambda raw: TOKEN,
            draining=False,
            doors=Doors(),
        ),
    )
    found.services = services  # type: ignore[assignment]
    return found


def cluster(said: dict[str, Any], silent: list[str]) -> Cluster:
    """Return the cluster of m1, whose peers say that when they are asked all at once."""

    async def ask_all(path: str, body: Any) -> tuple[dict[str, Any], list[str]]:
        return said, silent

    peers: Any = SimpleNamespace(ask_all=ask_all, all={name: SimpleNamespace(name=name) for name in said})
    return Cluster("m1", peers, Settings())


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("peers", [True, False], ids=["of a peer", "of a client"])
async def test_the_route_tells_that_incus_does_not_answer(kind: str, peers: bool) -> None:
    """It asks Incus too, and has the error for it; here it would be a 500."""
    answered: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answered.append(scope["path"])

    scope: dict[str, Any] = {
        "type": kind,
        "scheme": "http" if kind == "http" else "ws",
        "method": "GET",
        "path": "/v1/tenants/shop",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer t"), (b"host", b"gateway.test")],
        "client": ("192.0.2.1", 1),
        "server": ("192.0.2.2", 80),
        "extensions": {},
        **({FROM: "m2"} if peers else {}),
    }
    there = topology()
    app.state = SimpleNamespace(services=there.services)  # type: ignore[attr-defined] # as Starlette's
    scope["app"] = app
    await there.answer(app, scope, None, None)  # type: ignore[arg-type] # nothing is read or sent
    assert answered == ["/v1/tenants/shop"]


@pytest.mark.parametrize(("said", "silent", "who"), [({"m3": {}}, ["m2"], "m3"), ({"m2": None}, [], None)])
async def test_what_has_just_moved_is_looked_for_at_all_peers(said: Any, silent: Any, who: Any) -> None:
    assert getattr(await cluster(said, silent).find_moved(tenant="shop"), "name", None) == who


async def test_what_has_just_moved_is_not_gone_while_a_peer_does_not_say() -> None:
    """It may be the one that has it by now."""
    with pytest.raises(Unavailable) as refused:
        await cluster({"m2": None}, ["m3"]).find_moved(tenant="shop")
    assert refused.value.facts["reason"] == "moved"
    assert await cluster({"m2": None}, ["m3"]).find(tenant="shop") is None


async def test_all_that_look_for_one_tenant_at_once_ask_each_peer_once() -> None:
    """Those that come while it is asked share the next question, since this one may be answered already."""
    asked, answers = list[Any](), [asyncio.Event(), asyncio.Event()]
    there = cluster({}, [])

    async def ask_all(path: str, body: Any) -> tuple[dict[str, Any], list[str]]:
        asked.append(body)
        number = len(asked) - 1
        await answers[number].wait()
        return {"m2": {} if number else None}, []

    there.peers.ask_all = ask_all  # type: ignore[method-assign, assignment]
    there.peers.all = {"m2": SimpleNamespace(name="m2")}  # type: ignore[dict-item]
    first = [asyncio.create_task(there.find(tenant="shop")) for _ in range(100)]
    await until(lambda: asked)
    later = list[asyncio.Task[Any]]()
    for _ in range(10):  # they come one after another, and none asks while an answer is waited for
        later += [asyncio.create_task(there.find(tenant="shop")) for _ in range(10)]
        await turn()
    assert len(asked) == 1
    later.pop().cancel()  # its client has gone
    answers[0].set()
    assert await asyncio.gather(*first) == [None] * 100
    answers[1].set()
    assert [peer and peer.name for peer in await asyncio.gather(*later)] == ["m2"] * 99
    assert asked == [{"tenant": "shop"}] * 2


async def test_what_has_moved_here_meanwhile_is_to_be_asked_for_again() -> None:
    """Its former home, which was asked, says that it is elsewhere, and no peer has it."""

    async def nobody(**what: str) -> None:
        return None

    async def app(*asgi: Any) -> None:
        raise AssertionError("it may have no body any more")

    found: Any = topology()
    found.cluster.find_moved = nobody
    scope = {"type": "http", "scheme": "http", "headers": [], "client": ("192.0.2.1", 1)}
    relayed = _Relayed(app, found, scope, None, None)  # type: ignore[arg-type] # nothing is read or sent
    for tenants, refused in ((Running(), Unavailable), (Nothing(), NotFound)):
        found.services.runtime.tenants = tenants
        with pytest.raises(refused):
            await relayed._moved(Subject("tenant", "shop"), 1)
