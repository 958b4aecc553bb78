"""How the browser editor's built files are served, over a folder like that of `deploy/build-web`."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message

from gateway.api import editor
from gateway.errors import NotFound
from gateway.settings import Settings

INDEX = (
    '<!doctype html><meta name="csp-nonce" content="" /><meta name="agent-url" content="" />'
    '<script type="module" src="/assets/a1.js"></script>'
)


@dataclass
class Answer:
    status: int
    headers: Headers
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode()


@dataclass
class Asked:
    """An application that is asked without a server, nor by a client that needs one more library."""

    app: Starlette

    async def get(self, path: str, accepted: str = "", method: str = "GET") -> Answer:
        said: list[Message] = []

        async def receive() -> Message:
            await asyncio.Event().wait()  # whoever asks stays, and has nothing more to say
            raise AssertionError

        async def send(message: Message) -> None:
            said.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": unquote(path),
            "query_string": b"",
            "headers": [(b"host", b"editor.test"), (b"accept-encoding", accepted.encode())],
        }
        await self.app(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in said[1:])
        return Answer(said[0]["status"], Headers(raw=said[0]["headers"]), body)


@pytest.fixture
def static(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assets = tmp_path / "assets"
    assets.mkdir()
    (tmp_path / "index.html").write_text(INDEX)
    (tmp_path / ".stamp").write_text("secret of nobody")
    (assets / "a1.js").write_text("script")
    (assets / "a1.js.gz").write_bytes(gzip.compress(b"script"))
    (assets / "a1.js.br").write_bytes(b"brotli")
    (assets / "f1.woff2").write_bytes(b"font")
    monkeypatch.setattr(editor, "STATIC", tmp_path)
    return tmp_path


@pytest.fixture
def client(static: Path) -> Asked:
    routes = [
        Route("/", editor.page),
        Route("/assets/{name}", editor.asset),
        Route("/favicon.svg", editor.icon),
    ]
    absent = {NotFound: lambda request, error: Response(status_code=404)}
    asked = Asked(Starlette(routes=routes, exception_handlers=absent))
    asked.app.state.services = SimpleNamespace(settings=Settings())
    return asked


async def policy(client: Asked) -> dict[str, str]:
    answer = await client.get("/")
    assert answer.status == 200
    parts = (part.partition(" ") for part in answer.headers["content-security-policy"].split("; "))
    return {name: value for name, _, value in parts}


async def test_the_page_runs_no_inline_script_but_its_own(client: Asked, static: Path) -> None:
    script = "\n  load(again);\n"
    (static / "index.html").write_text(f"<script>{script}</script>{INDEX}")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (await policy(client))["script-src"] == f"'self' 'sha256-{digest}'"


async def test_the_page_lets_nothing_in_from_elsewhere(client: Asked) -> None:
    said = await policy(client)
    assert said["default-src"] == "'none'"
    assert said["script-src"] == "'self'"
    assert said["connect-src"] == said["font-src"] == "'self'"
    assert said["frame-ancestors"] == said["base-uri"] == said["form-action"] == "'none'"
    assert not any("unsafe" in value or "*" in value for value in said.values())


async def test_the_page_may_ask_the_server_of_agents_of_the_operator_and_no_other(client: Asked) -> None:
    assert 'name="agent-url" content=""' in (await client.get("/")).text
    url = "https://agents.example.com:8443/run?a=1&b=2"
    client.app.state.services.settings = Settings(agent_url=url)
    said = await policy(client)
    assert said["connect-src"] == "'self' https://agents.example.com:8443"
    assert said["default-src"] == "'none'" and said["script-src"] == "'self'"
    assert 'content="https://agents.example.com:8443/run?a=1&amp;b=2"' in (await client.get("/")).text


@pytest.mark.parametrize(
    "url",
    [
        "agents.example.com",
        "ftp://agents.example.com/",
        "javascript:alert(1)",
        "https://user:word@agents.example.com/",
        "https://agents.example.com;script-src/x",
        "https://agents.example.com, *",
        "https://*/",
        "https://agents.example.com:99999/",
        "https://agents.example.com/#x",
        "https:///run",
        "https://agents.example.com/\n",
    ],
)
def test_a_url_that_would_change_the_policy_is_no_setting(url: str) -> None:
    with pytest.raises(ValidationError):
        Settings(agent_url=url)


async def test_each_page_has_a_nonce_of_its_own_that_the_policy_names(client: Asked) -> None:
    seen = set()
    for _ in range(3):
        answer = await client.get("/")
        nonce = answer.text.partition('<meta name="csp-nonce" content="')[2].partition('"')[0]
        assert len(nonce) >= 22 and f"'nonce-{nonce}'" in answer.headers["content-security-policy"]
        seen.add(nonce)
    assert len(seen) == 3


async def test_the_page_is_asked_for_anew_and_what_its_digest_names_never(client: Asked) -> None:
    assert (await client.get("/")).headers["cache-control"] == "no-cache"
    asset = await client.get("/assets/a1.js")
    assert asset.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert asset.headers["content-type"].startswith("text/javascript")
    assert asset.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip, deflate, br, zstd", "br"),
        ("gzip", "gzip"),
        ("br;q=0, gzip;q=0.5", "gzip"),
        ("identity", None),
        ("", None),
    ],
)
async def test_files_are_sent_as_the_browser_takes_them(
    client: Asked, accepted: str, encoding: str | None
) -> None:
    answer = await client.get("/assets/a1.js", accepted, "HEAD")
    assert answer.headers.get("content-encoding") == encoding
    assert answer.headers["vary"] == "Accept-Encoding"


async def test_a_file_without_a_compressed_one_comes_as_it_is(client: Asked) -> None:
    answer = await client.get("/assets/f1.woff2", "br")
    assert answer.content == b"font" and "content-encoding" not in answer.headers


@pytest.mark.parametrize(
    "name", ["none.js", "..%2f.stamp", "..%2findex.html", ".stamp", "a1.js.br", "%2e%2e"]
)
async def test_nothing_but_the_built_files_is_served(client: Asked, name: str) -> None:
    assert (await client.get(f"/assets/{name}")).status == 404


async def test_without_a_build_the_page_says_how_to_make_one(client: Asked, static: Path) -> None:
    (static / "index.html").unlink()
    answer = await client.get("/")
    assert answer.status == 503
    assert "deploy/build-web" in answer.text
