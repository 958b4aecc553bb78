"""What the layer that passes requests on does where it cannot tell whose a tenant is."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.api.clustered import relaying
from gateway.auth.tokens import Token
from gateway.cluster.listener import FROM
from gateway.errors import Unavailable
from gateway.lifecycle.doors import Doors
from gateway.settings import Settings

TOKEN = Token("who", frozenset({"shop"}), frozenset({"exec"}), int(time.time()) + 60, "id")


class Silent:
    """A runtime whose Incus does not answer."""

    async def get(self, tenant: str) -> Any:
        raise Unavailable("Incus does not answer")


def services() -> Any:
    """Return those of a gateway that has the tenant `shop`, as a peer says of itself, too."""
    peer = SimpleNamespace(name="m2", alive=True)
    return SimpleNamespace(
        cluster=SimpleNamespace(homes=SimpleNamespace(home=lambda name: peer)),
        names=SimpleNamespace(holder=lambda name: "an instance"),
        runtime=Silent(),
        settings=SimpleNamespace(origins=(), domain=None),
        verify=lambda raw: TOKEN,
        draining=False,
        doors=Doors(Settings()),
    )


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
        "app": SimpleNamespace(state=SimpleNamespace(services=services())),
        "extensions": {},
        **({FROM: "m2"} if peers else {}),
    }
    app.state = scope["app"].state  # type: ignore[attr-defined] # as Starlette's
    await relaying(app, services)(scope, None, None)  # type: ignore[arg-type] # nothing is read or sent
    assert answered == ["/v1/tenants/shop"]
