"""Each framework's dev server is updated, changed and rolled back, and no visitor gets an error meanwhile.

GATEWAY_TEST_UPDATES says how many times each is done (1).
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from typing import Any, Final

import pytest

from gateway.settings import Settings
from tests.integration import environment
from tests.integration.sites import Hosting, Visitors
from tests.starters.making import Made, made
from tests.starters.table import STARTERS, Starter
from tests.starters.trial import SIZE

TIMES: Final = int(os.environ.get("GATEWAY_TEST_UPDATES", "1"))

_EXPRESS: Final = (
    "import express from 'express'; const app = express(); "
    "app.get('/', (request, answer) => answer.send('Hello World!')); app.listen(3000)"
)
MORE: Final[Mapping[str, Starter]] = {
    # the first page of its documentation, which has the port in its code
    "express-hello": Starter(
        f'mkdir app && cd app && echo "{_EXPRESS}" >app.js && npm init -y >/dev/null && npm pkg set '
        "type=module main=app.js scripts.start='node app.js' dependencies.express=5.2.1",
        "Express",
        ("app.js", "Hello World!", "Seen"),
        "Hello World!",
        "Seen",
    ),
    "tanstack-start": Starter(
        "npx -y @tanstack/create-start@0.63.6 app --package-manager npm --no-install --no-git || true",
        "TanStack Start",
        ("src/routes/index.tsx", "", ""),
        "",
        "",
    ),
}
NAMES: Final = (
    *("vite-react", "vite-svelte", "sveltekit", "astro", "next", "nuxt", "hono", "react-router"),
    *MORE,
)


def touched(made: Made, number: int) -> Made:
    """Return a starter with one more file, so that each deployment is another one."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(made.archive)) as old, tarfile.open(fileobj=packed, mode="w") as new:
        for member in old:
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
        text = str(number).encode()
        more = tarfile.TarInfo("touched.txt")
        more.size = len(text)
        new.addfile(more, io.BytesIO(text))
    return Made(packed.getvalue())


@pytest.mark.timeout(600 + 300 * TIMES)
@pytest.mark.parametrize("name", NAMES)
async def test_a_dev_server_is_replaced_by_its_next(
    name: str, host: Hosting, incus_settings: Settings
) -> None:
    """Newer ones refuse to run twice for one project, each by its own lock, and some know one port only."""
    files = await made(name, {**STARTERS, **MORE}[name], incus_settings)
    domain, tenant = f"updates-{name}.example.com", f"updates-{name}-example-com"

    async def ended(method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        status, begun, _ = await host.call(method, path, body)
        assert status == 202, begun
        record = await host.ended(begun["id"], 300)
        assert record["state"] == "succeeded", (path, record["error"])
        print(name, path, record["ms"], {phase["name"]: phase["ms"] for phase in record["phases"]})
        return record

    body = {"domain": domain, "template": files.template, "size": SIZE}
    await ended("POST", "/v1/deployments", body)
    visitors = Visitors(host, domain)
    try:
        for number in range(TIMES):
            async with visitors.watching("update"):
                await ended("POST", "/v1/deployments", body | {"template": touched(files, number).template})
            async with visitors.watching("env"):
                path = f"/v1/tenants/{tenant}/env"
                await ended("PATCH", path, {"env": {"GREETING": str(number)}})
            async with visitors.watching("rollback"):
                await ended("POST", f"/v1/tenants/{tenant}/rollback", {})
    except AssertionError:
        words = ("journalctl", "--unit=site.service", "--unit=site-next.service", "--lines=80", "--no-pager")
        print(environment.incus("exec", tenant, "--", *words, check=False).stdout.decode())
        raise
    await host.call("DELETE", f"/v1/tenants/{tenant}")
