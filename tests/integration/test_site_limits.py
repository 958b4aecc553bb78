"""What a site may take of its tenant, and what is left to whoever comes to mend it."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from gateway.settings import Settings
from tests.archives import SERVE, folder
from tests.integration import environment
from tests.integration.sites import hosting
from tests.waits import until

pytestmark = pytest.mark.timeout(200)
DOMAIN = "greedy.test"
TENANT = "greedy-test"

# forks until it may not, and again whenever there is room; the server answers all the while
GREEDY = b"""\
while :; do
  sleep 1000 &
  [ $? = 0 ] || sleep 0.05
done
"""

ENDING = b"""\
import { appendFileSync } from "node:fs";
const end = () => (appendFileSync("/home/site/ended", "in order\\n"), process.exit());
process.on("SIGTERM", () => setTimeout(end, 2000));
await import("./x");
"""


async def test_a_site_has_time_to_end(incus_settings: Settings, tmp_path: Path) -> None:
    """Also a database that runs with it: where the site is restarted, and where its tenant stops."""
    manifest = 'start = ["bun", "end.ts"]\n'
    template = {"archive": base64.b64encode(folder(manifest, ("end.ts", ENDING), ("x", SERVE))).decode()}
    async with hosting(incus_settings, tmp_path / "state") as host:
        assert (await host.deploy(DOMAIN, template))["state"] == "succeeded"
        answers = "systemctl restart site.service; until curl -sf localhost:3000; do sleep 0.1; done"
        environment.incus("exec", TENANT, "--", "sh", "-c", answers)
        await host.call("POST", f"/v1/tenants/{TENANT}/restart", {})
        ended = environment.incus("exec", TENANT, "--", "cat", "/home/site/ended").stdout
        assert ended == b"in order\n" * 2


async def test_a_site_cannot_take_the_last_process_of_its_tenant(
    incus_settings: Settings, tmp_path: Path
) -> None:
    """A site may have more than the 15 % that systemd gives it, and an agent's command still starts."""
    manifest = 'start = ["sh", "-c", "sh greedy.sh 2>/dev/null & exec bun serve.ts"]\n'
    template = {"archive": base64.b64encode(folder(manifest, ("greedy.sh", GREEDY), ("x", SERVE))).decode()}
    async with hosting(incus_settings, tmp_path / "state") as host:
        record = await host.deploy(DOMAIN, template)
        assert record["state"] == "succeeded", record["error"]
        show = ("systemctl", "show", "--value", "--property=TasksMax", "site.service")
        allowed = int(environment.incus("exec", TENANT, "--", *show).stdout)
        assert allowed == incus_settings.tenant_processes * 85 // 100
        current = (*show[:3], "--property=TasksCurrent", "site.service")
        await until(
            lambda: int(environment.incus("exec", TENANT, "--", *current).stdout) >= allowed, 60, every=0.2
        )
        for number in range(10):
            path = f"/v1/tenants/{TENANT}/exec"
            status, answer, _ = await host.call("POST", path, {"command": f"echo {number} | cat"})
            assert (status, answer["stdout"]) == (200, f"{number}\n"), answer
        assert (await host.visit(DOMAIN))[0] == 200
