"""A gateway with its own Caddy, and deployments from a client's view."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from gateway.auth.tokens import Token
from gateway.caddy import Caddy
from gateway.settings import Settings
from tests.constants import constants as constants_of
from tests.integration import environment
from tests.live import LiveGateway, free_ports
from tests.waits import pause, until

ENDED = ("succeeded", "rolledback")
OPERATOR = Token("test", frozenset({"*"}), frozenset({"admin"}), 0, "id")
_ADMIN = "gw-caddy-"


@contextlib.contextmanager
def filled(folder: Path, room: int = 0) -> Iterator[None]:
    """Fill a file system, leaving so many bytes. The file has no name, so that a killed test frees it."""
    size, at = 1 << 34, 0
    with tempfile.TemporaryFile(dir=folder) as file:
        # freeing some takes a little room, too
        while size >= (1 << 16 if room else 4096):
            try:
                os.posix_fallocate(file.fileno(), at, size)
                at += size
            except OSError:
                size >>= 1
        file.truncate(at - room)
        yield


@dataclass
class RealCaddy:
    """A Caddy process with the configuration of one gateway."""

    settings: Settings
    process: asyncio.subprocess.Process | None = None

    @property
    def folder(self) -> Path:
        return self.settings.state_dir / "caddy"

    async def start(self, instead: str | None = None, head: int | None = None) -> None:
        """Start it; return once it answers.

        `instead` is another configuration. `head` is how many seconds a request's head may take, if the
        shipped 10 are too long for a test.
        """
        async with Caddy(self.settings) as caddy:
            main = caddy.write()
        if head is not None:
            shipped = main.read_text()
            assert shipped.count("read_header 10s") == 1
            main.write_text(shipped.replace("read_header 10s", f"read_header {head}s"))
        if instead is not None:
            main = self.folder / "Caddyfile.other"
            main.write_text(f"{{\n\tadmin unix/{self.settings.caddy_admin}\n}}\n{instead}")
        with (self.folder / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *("caddy", "run", "--config", str(main), "--adapter", "caddyfile"), stdout=log, stderr=log
            )

        async def up() -> bool:  # there is nothing to wait for but the socket
            assert self.process is not None and self.process.returncode is None, self.log
            return await self._answers(serves=instead is None)

        await until(up)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    async def _answers(self, *, serves: bool) -> bool:
        with contextlib.suppress(OSError):
            if serves:
                _, writer = await asyncio.open_connection("127.0.0.1", self.settings.caddy_ask)
            else:
                _, writer = await asyncio.open_unix_connection(self.settings.caddy_admin)
            writer.close()
            return True
        return False

    async def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)
            await self.process.wait()


class Hosting:
    """One gateway with its Caddy, and a client's requests to them."""

    def __init__(self, settings: Settings, log: Path, values: Mapping[str, Any] | None = None) -> None:
        variables = environment.variables(settings)
        del variables["GATEWAY_LISTEN"]
        self.gateway = LiveGateway(variables | constants_of(values or {}), log)
        # the gateway's, so that both write the same configuration
        self.settings = settings.model_copy(update={"listen": f"127.0.0.1:{self.gateway.port}"})
        self.caddy = RealCaddy(self.settings)

    @property
    def url(self) -> str:
        return self.gateway.url

    async def call(
        self, method: str, path: str, body: Any = None, *, tenants: tuple[str, ...] = ("*",), **headers: str
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Send a request to the gateway; return status, JSON and headers."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        async with (
            self.gateway.http(*tenants) as session,
            session.request(method, path, json=body, headers=headers) as answer,
        ):
            text = await answer.read()
            return answer.status, json.loads(text) if text else None, dict(answer.headers)

    async def deploy(self, domain: str, template: Any = "static", **more: Any) -> dict[str, Any]:
        """Deploy; return the record once the deployment has ended."""
        status, begun, _ = await self.call(
            "POST", "/v1/deployments", {"domain": domain, "template": template, **more}
        )
        assert status == 202, begun
        return await self.ended(begun["id"])

    @contextlib.asynccontextmanager
    async def following(self, deployment: str) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
        """Yield a function to poll a deployment. Only its last answer is checked against the schema."""
        headers = {"Authorization": f"Bearer {self.gateway.token('*')}"}
        async with aiohttp.ClientSession(self.url, headers=headers) as session:

            async def look() -> Any:
                async with session.get(f"/v1/deployments/{deployment}") as answer:
                    return await answer.json()

            yield look
        await self.call("GET", f"/v1/deployments/{deployment}")

    async def ended(self, deployment: str, deadline: float = 100) -> dict[str, Any]:
        record: dict[str, Any] = {}
        async with self.following(deployment) as look:

            async def over() -> bool:
                record.update(await look())
                return record["state"] in ENDED

            await until(over, deadline, every=0.1)
        return record

    async def reached(self, deployment: str, phase: str, state: str = "running") -> None:
        """Wait until a phase of a deployment has reached or passed a state, or never will."""
        order = ("waiting", "running", "done")
        async with self.following(deployment) as look:

            async def there() -> bool:
                phases = (await look())["phases"]
                found = next(entry for entry in phases if entry["name"] == phase)["state"]
                return found not in order or order.index(found) >= order.index(state)

            await until(there, 60)

    async def answers(self, domain: str, *answer: object, deadline: float = 60) -> None:
        """Wait until a site answers with a status, 200 by default; its route is set a little later."""
        wanted = answer or (200,)

        async def so() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                return (await self.visit(domain))[: len(wanted)] == wanted
            return False

        await until(so, deadline, every=0.05)

    async def visit(self, domain: str, path: str = "/", *, https: bool = False) -> tuple[int, str]:
        """Request a site through Caddy, as a browser would."""
        port = self.settings.caddy_https if https else self.settings.caddy_ask
        scheme = "https" if https else "http"
        async with (
            aiohttp.ClientSession() as session,
            session.get(
                f"{scheme}://127.0.0.1:{port}{path}",
                headers={"Host": domain},
                server_hostname=domain if https else None,
                ssl=not https,
            ) as answer,
        ):
            return answer.status, await answer.text()

    def leavings(self) -> dict[str, Any]:
        """Return everything that a deployment may have left, except what is kept ready for the next."""
        listed = environment.instances()
        caddy = self.settings.state_dir / "caddy"
        return {
            "instances": {
                entry["name"]: [entry["status"], entry["config"], sorted(entry["devices"])]
                for entry in (_without_volatile(entry) for entry in listed)
                if entry["config"].get("user.gateway.role") not in ("pool", "golden")
            },
            "routes": sorted((e.name, e.readlink().name) for e in (caddy / "routes").iterdir()),
            "files": sorted(e.name for e in caddy.iterdir() if e.name.startswith(".")),
        }


def _without_volatile(entry: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in entry["config"].items() if not key.startswith("volatile.")}
    return {**entry, "config": config}


@dataclass
class Visitors:
    """Ask a site each 50 ms; each tenth visitor sends a body.

    An `exact` one says how many bytes it got, and is quick: nobody waits for the last one's answer. A
    framework's is asked by two visitors, who do: it may refuse a body.
    """

    host: Hosting
    domain: str
    exact: bool = False
    path: str = "/"
    said: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    count: int = 0
    longest: float = 0.0

    async def _one(self, session: aiohttp.ClientSession, number: int) -> None:
        began = time.monotonic()
        url, headers = (
            f"http://127.0.0.1:{self.host.settings.caddy_ask}{self.path}",
            {"Host": self.domain, "Accept": "text/html"},
        )
        body = b"x" * 100_000 if number % 10 == 0 else None
        try:
            async with session.request("POST" if body else "GET", url, headers=headers, data=body) as answer:
                text = await answer.text()
                self.said.add(" ".join(text.split()[:2]))
                refused = body and not self.exact and answer.status < 502
                if answer.status != 200 and not refused:
                    took, at = time.monotonic() - began, time.strftime("%X")
                    self.wrong.append(
                        f"{answer.method} {answer.status} after {took:.1f} s at {at}: {text[:40]}"
                    )
                elif body and self.exact and not text.endswith(f" {len(body)}"):
                    self.wrong.append(f"the body was cut: {text[:80]}")
        except (aiohttp.ClientError, TimeoutError) as error:
            took, at = time.monotonic() - began, time.strftime("%X")
            self.wrong.append(f"{'POST' if body else 'GET'} {error!r} after {took:.1f} s at {at}")
        self.longest = max(self.longest, time.monotonic() - began)
        self.count += 1

    @contextlib.asynccontextmanager
    async def watching(self, what: str) -> AsyncIterator[None]:
        """Visit while the context is open; then every visit must have been answered well."""
        over = asyncio.Event()

        async def go(session: aiohttp.ClientSession) -> None:
            async with asyncio.TaskGroup() as visits:
                number = 0
                while not over.is_set():
                    visit = visits.create_task(self._one(session, number))
                    number += 1
                    await pause(0.05)
                    if not self.exact:
                        await visit

        timeout, connector = aiohttp.ClientTimeout(total=150), aiohttp.TCPConnector(limit=0)
        self.count, self.longest = 0, 0.0
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            going = [asyncio.create_task(go(session)) for _ in range(1 if self.exact else 2)]
            try:
                yield
            finally:
                over.set()
                await asyncio.gather(*going)
        found = f"{self.count} visits, {len(self.wrong)} wrong, {self.longest:.2f} s at most"
        print(f"{self.domain} {what}: {found}")
        assert self.count > 10 and not self.wrong, (what, self.wrong[:5])


def settings_for(base: Settings, state: Path, **changes: Any) -> Settings:
    """Return settings for a gateway with a Caddy on free ports."""
    http, https, ask = free_ports(3)
    # a unix socket's path may have 107 bytes
    admin = Path(tempfile.mkdtemp(prefix=_ADMIN)) / "admin.sock"
    fields: dict[str, Any] = {
        "state_dir": state,
        "caddy_admin": str(admin),
        "caddy_http": http,
        "caddy_https": https,
        "caddy_ask": ask,
        "caddy_issuer": "internal",
        "warm_pool": 0,
        "golden": False,
        "verify_timeout": 30.0,
        "settle_time": 0.2,
    }
    given = {name: getattr(base, name) for name in base.model_fields_set}
    return environment.settings(**(given | fields | changes))


@contextlib.asynccontextmanager
async def hosting(
    base: Settings,
    state: Path,
    *,
    caddy: bool = True,
    start: bool = True,
    constants: Mapping[str, Any] | None = None,
    **changes: Any,
) -> AsyncIterator[Hosting]:
    """Yield a running gateway with its Caddy; destroy the tenants that it leaves at the end.

    `constants` are other ones than the product's, by full name; `changes` are settings.
    """
    host = Hosting(settings_for(base, state, **changes), state.with_suffix(".log"), constants)
    state.mkdir(exist_ok=True)
    before = {entry["name"] for entry in environment.instances()}
    if caddy:
        await host.caddy.start()
    try:
        if start:
            await host.gateway.start()
        yield host
    finally:
        if host.gateway.process is not None:
            await host.gateway.stop()
        await host.caddy.stop()
        admin = Path(host.settings.caddy_admin).parent
        if admin.name.startswith(_ADMIN):
            shutil.rmtree(admin, ignore_errors=True)
        left = [
            entry["name"]
            for entry in environment.instances()
            if entry["name"] not in before and entry["config"].get(environment.OWNER) is None
        ]
        words = ("delete", "--force")
        await asyncio.gather(
            *(asyncio.to_thread(environment.incus, *words, name, check=False) for name in left)
        )
