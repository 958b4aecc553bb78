"""A site that answers to no foreign host, as Vite's dev server does, and the domains of its tenant."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from pathlib import Path

import pytest

from gateway.settings import Settings
from tests.archives import folder
from tests.integration import environment
from tests.integration.sites import hosting

pytestmark = pytest.mark.timeout(200)
DOMAIN, OTHER, TENANT = "strict.test", "strict.example.com", "strict-test"

# as Vite's: addresses are always fine, other hosts where it was told so
STRICT = b"""\
const allowed = process.env.__VITE_ADDITIONAL_SERVER_ALLOWED_HOSTS
Bun.serve({hostname: "0.0.0.0", port: process.env.PORT, fetch(request) {
  const host = request.headers.get("host").split(":")[0]
  if (%s && (/^[0-9.]+$/.test(host) || host === allowed)) return new Response("fine")
  return new Response(`Blocked request. This host ("${host}") is not allowed; allowedHosts`, {status: 403})
}})
"""


def body(condition: str) -> dict[str, str]:
    manifest = 'start = ["bun", "strict.ts"]\n'
    packed = folder(manifest, ("strict.ts", STRICT % condition.encode()))
    return {"archive": base64.b64encode(packed).decode()}


async def test_a_strict_site_is_told_its_domain_and_its_next_one(
    incus_settings: Settings, tmp_path: Path
) -> None:
    async with asyncio.timeout(150), hosting(incus_settings, tmp_path / "state") as host:
        record = await host.deploy(DOMAIN, body("true"))
        assert record["state"] == "succeeded", record["error"]
        assert (await host.visit(DOMAIN))[0] == 200
        status, answer, _ = await host.call("PATCH", f"/v1/tenants/{TENANT}", {"domain": OTHER})
        assert status == 200, answer
        await host.answers(OTHER)  # it is started again
        status, answer, _ = await host.call("GET", f"/v1/tenants/{TENANT}/site")
        assert answer["answers"], answer

        record = await host.deploy(OTHER, body("host === 'x'"), tenant=TENANT)
        assert record["state"] == "rolledback"
        assert record["error"]["reason"] == "host_refused", record["error"]
        assert f'This host ("{OTHER}") is not allowed; allowedHosts' in record["error"]["message"]
        assert (await host.visit(OTHER))[0] == 200

        # one that stands still is answered for, until it goes on
        environment.incus("pause", TENANT)
        try:
            async with asyncio.timeout(20):
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(1):
                            if (await host.visit(OTHER))[0] == 503:
                                break
        finally:
            environment.incus("resume", TENANT)
        await host.answers(OTHER)
