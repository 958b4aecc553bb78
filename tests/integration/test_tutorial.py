"""docs/tutorial.md, followed literally: each command and program, in one shell, with a real Caddy."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

from gateway.settings import Settings
from tests.integration import environment
from tests.integration.sites import RealCaddy, hosting
from tests.live import LiveGateway, free_ports, local_gateway

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
ADDRESS = "http://127.0.0.1:8080"
BLOCK = re.compile(r'^```(sh|python)(?: title="(\S+)")?\n(.*?)^```$', re.M | re.S)


SEEN = (  # what the page says will be seen, in this order
    "demo",
    "note.txt",
    "-made in the tenant",
    "+changed from outside",
    "3\\n'",  # as a chunk of bytes, alone or with those before it
    "Undo: Say hello",
    "made in the tenant",
    "hello.localhost",
    "<h1>Hello again</h1>",
    "<h1>Hello</h1>",
)


async def follow(gateway: LiveGateway, folder: Path) -> None:
    """Do what the page says, in one shell, with this gateway as the one that quickstart has started."""
    work, programs = folder / "work", folder / "bin"
    for made in (work, programs):
        made.mkdir()
    command = programs / "incus-gateway"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m gateway "$@"\n')
    command.chmod(0o755)

    lines = ["set -eu -o pipefail"]
    text = PAGE.read_text()
    assert ADDRESS in text
    for language, title, code in BLOCK.findall(text):
        if language == "python":
            (work / title).write_text(code)
        else:
            lines.append(code.replace(ADDRESS, gateway.url))
    assert len(lines) >= 8

    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", "\n".join(lines)),
        cwd=work,
        env={**gateway.environment, "PATH": path},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(100):
        printed = (await process.communicate())[0].decode()
    assert process.returncode == 0, printed
    for seen in SEEN:
        before, found, printed = printed.partition(seen)
        assert found, f"{seen!r} does not come after {before[-300:]!r}"


async def test_the_first_hour_is_as_it_says(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    http, https, ask, admin, port = free_ports(5)
    settings = Settings(
        runtime="local",
        state_dir=state,
        listen=f"127.0.0.1:{port}",
        caddy_admin=f"http://127.0.0.1:{admin}",
        caddy_issuer="internal",
        caddy_http=http,
        caddy_https=https,
        caddy_ask=ask,
    )
    caddy = RealCaddy(settings)
    gateway = await local_gateway(
        state,
        "demo",
        GATEWAY_LISTEN=settings.listen,
        GATEWAY_CADDY_ADMIN=settings.caddy_admin,
        GATEWAY_CADDY_ISSUER=settings.caddy_issuer,
        GATEWAY_CADDY_HTTP=str(http),
        GATEWAY_CADDY_HTTPS=str(https),
        GATEWAY_CADDY_ASK=str(ask),
    )
    gateway.at(port)
    await caddy.start()
    try:
        await gateway.start()
        await follow(gateway, tmp_path)
        await gateway.stop()
    finally:
        await caddy.stop()


async def test_the_first_hour_is_so_in_containers(incus_settings: Settings, tmp_path: Path) -> None:
    async with hosting(incus_settings, tmp_path / "state") as host:
        record = await host.deploy("demo.localhost", tenant="demo")
        assert record["state"] == "succeeded", record["error"]
        await follow(host.gateway, tmp_path)
        left = {entry["name"] for entry in environment.instances()}
        assert "hello-localhost" not in left
