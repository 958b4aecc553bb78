"""Pages as a browser's look at them finds them, the hostile ones too; real sockets, no tenants."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import pytest

from gateway.deployments.browser import Browser, LoadedPage, _imported, _named

DEADLINE = 30
DOMAIN = "shop.test"
HTML = b"Content-Type: text/html\r\n"
SCRIPT = b"Content-Type: text/javascript\r\n"


def said(body: bytes, headers: bytes = HTML, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n".encode() + headers + b"\r\n" + body


class Site:
    """Answers each path with its bytes, or with what is made of them for ever; keeps what was asked."""

    def __init__(self, **answers: bytes | Callable[[], bytes]) -> None:
        self.answers = {"/": b"", **{f"/{name.replace('_', '.')}": told for name, told in answers.items()}}
        self.asked: list[str] = []
        self.hosts: set[str] = set()
        self.missing = said(b"", status="404 Not Found")

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                path = head.split(" ", 2)[1]
                self.asked.append(path)
                self.hosts |= {line for line in head.split("\r\n") if line.startswith("Host:")}
                told = self.answers.get(path, self.missing)
                while callable(told):
                    writer.write(told())
                    await writer.drain()
                writer.write(told)
        writer.close()

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Browser]:
        server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        async with server, asyncio.timeout(DEADLINE):
            async with Browser("127.0.0.1", server.sockets[0].getsockname()[1], DOMAIN) as browser:
                yield browser

    async def looked_at(self, seconds: float = 5.0) -> LoadedPage:
        async with self.opened() as browser:
            return await browser.look("/", seconds)


def page(body: str, **answers: bytes | Callable[[], bytes]) -> Site:
    site = Site(**answers)
    site.answers["/"] = said(body.encode())
    return site


async def test_what_a_page_names_is_asked_for_as_its_host() -> None:
    site = page(
        '<base href="/app/"><script src="a.js?v=1&amp;w"></script><SCRIPT SRC=/b.js type=module></SCRIPT>'
        f'<link rel="preload stylesheet" href="https://{DOMAIN}/c.css">'
        '<link rel=modulepreload href="/d.js#x">'
        '<link rel=icon href=/icon.png><link rel="alternate stylesheet" href=/alt.css><img src=/i.png>'
        '<script type="importmap" src="/map.json"></script><script nomodule src="/old.js"></script>'
        '<!-- <script src="/comment.js"></script> --><noscript><link rel=stylesheet href=/no.css></noscript>'
        '<template><script src="/never.js"></script></template>',
        b_js=said(b"", SCRIPT),
    )
    found = await site.looked_at()
    assert site.asked[0] == "/"
    assert sorted(site.asked[1:]) == ["/app/a.js?v=1&w", "/b.js", "/c.css", "/d.js"]
    assert found.missing == dict.fromkeys(("/app/a.js?v=1&w", "/c.css", "/d.js"), "status 404")
    assert site.hosts == {f"Host: {DOMAIN}"}


async def test_no_other_host_is_ever_asked() -> None:
    """By whatever way the page leads there; a redirect elsewhere is an answer."""
    other = Site()
    server = await asyncio.start_server(other.answer, "127.0.0.1", 0)
    elsewhere = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        site = page(
            f'<script src="//{elsewhere}/a.js"></script>'
            f'<script src="http://{DOMAIN}@{elsewhere}/b.js"></script><script src="/moved.js"></script>'
            f'<script src="\\\\{elsewhere}\\c.js"></script><script src="http://[::1/d.js"></script>'
            f'<script src="/@{elsewhere}/e.js"></script><script src="file:///etc/passwd"></script>'
            f'<script src="/\r\nHost: x/f.js"></script><script src="{"/g" * 2000}"></script>',
        )
        site.answers["/moved.js"] = said(b"", f"Location: http://{elsewhere}/\r\n".encode(), "302 Found")
        found = await site.looked_at()
        assert found.missing.keys() == {f"/@{elsewhere}/e.js"}
        site.answers["/"] = said(f'<base href="http://{elsewhere}/"><script src="a.js"></script>'.encode())
        assert await site.looked_at() == LoadedPage(200)
        site.answers["/"] = said(b"", f"Location: http://{elsewhere}/\r\n".encode(), "302 Found")
        assert await site.looked_at() == LoadedPage(302)
    assert other.asked == []


async def test_redirects_within_the_site_are_followed_and_end() -> None:
    site = Site(home=said(b"<script src=x.js></script>"))
    site.answers["/"] = said(b"", b"Location: /home\r\n", "302 Found")
    assert (await site.looked_at()).missing == {"/x.js": "status 404"}
    site.answers["/home"] = said(b"", b"Location: /\r\n", "302 Found")
    assert await site.looked_at() == LoadedPage(302)
    site.answers["/"] = said(b"", f"Location: https://{DOMAIN}/\r\n".encode(), "301 Moved")
    site.asked.clear()
    assert await site.looked_at() == LoadedPage(301)  # to HTTPS, which is not for us to see
    assert site.asked == ["/"]


async def test_what_scripts_import_is_followed() -> None:
    """Those of the document itself, in folders, in circles, and 256 at most."""
    site = page(
        '<script type=module>import a from "/a.js"; import("./b.js").then(x)</script>'
        "<script src=c.js></script>",
        a_js=said(b'import{x}from"./a.js";export * from \'/d.js\';import "react";//import "/e.js"', SCRIPT),
        b_js=said(b"", SCRIPT),
        c_js=said(b'import "http://elsewhere.test/x.js"; import "./n0.js"', SCRIPT),
    )
    for number in range(400):
        site.answers[f"/n{number}.js"] = said(f'import "./n{number + 1}.js"'.encode(), SCRIPT)
    async with site.opened() as browser:
        found = await browser.look("/", 5.0)
        assert found.missing == {}
        assert sorted(found.scripts) == ["/a.js", "/b.js", "/n0.js"]
        assert await browser.follow(found.scripts, 20.0) >= 250
    assert len(site.asked) <= 2 + 256
    assert {"/a.js", "/b.js", "/d.js", "/e.js"} < {*site.asked}
    assert len({*site.asked}) == len(site.asked)


async def test_an_endless_answer_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are bounded, and so is the time that they are waited for."""
    monkeypatch.setattr("gateway.deployments.browser._READING", 0.3)
    flood = page("<script src=flood.js></script><script src=drip.js></script><script src=a.js></script>")
    sent = 0

    def more() -> bytes:
        nonlocal sent
        sent += 1 << 16
        return b"HTTP/1.1 200 OK\r\n\r\n" if sent == 1 << 16 else bytes(1 << 16)

    flood.answers["/flood.js"] = more
    flood.answers["/drip.js"] = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
    flood.answers["/a.js"] = said(b"", SCRIPT)
    began = time.monotonic()
    assert (await flood.looked_at()).missing == {}
    assert time.monotonic() - began < 10
    assert sent < 64 << 20


async def test_one_that_never_answers_or_speaks_no_http_is_missing() -> None:
    site = page("<script src=mute.js></script><script src=odd.js></script><script src=huge.js></script>")
    site.answers["/mute.js"] = b""
    site.answers["/odd.js"] = b"HTTP/1.1 -200 OK\r\n\r\n"
    site.answers["/huge.js"] = b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n"
    found = await site.looked_at(0.5)
    assert found.missing == {
        "/mute.js": "no answer in 0.5 s",
        "/odd.js": "no answer",
        "/huge.js": "no answer",
    }


@pytest.mark.parametrize(
    "body",
    [
        b"x" * (10 << 20),
        b"<script src=a.js></script>" * 100_000,
        b"<script>" * 100_000,
        b"<script src=" + b"a" * (1 << 20),
        b"<a " + b"a=b " * 200_000,
        b"<a " + b"a='" * 200_000,
        b'<a a="' + b"<a a=" * 200_000,
        b"<!" * 500_000,
        b"<!--" * 200_000,
        b"<!--" + b"-" * (1 << 20),
        b"<![CDATA[" * 100_000,
        b"<?" * 500_000,
        b"</" * 500_000,
        b"&" * (1 << 20),
        b"&#" * 500_000,
        b"<template>" * 100_000,
        b"<" * (1 << 20),
        b"\xff<\x00" * 300_000,
        b"<a" + b" " * (1 << 20),
        b"<a " + b"=" * (1 << 20),
        b"<a" + b"/" * (1 << 20),
    ],
)
async def test_a_hostile_document_is_read_in_a_moment(body: bytes) -> None:
    site = page("")
    site.answers["/"] = said(body)
    began = time.monotonic()
    found = await site.looked_at()
    assert time.monotonic() - began < 10
    assert len(site.asked) <= 1 + 64
    assert found.status == 200


@pytest.mark.parametrize(
    "piece",
    [
        b"import ",
        b"import(",
        b"from ",
        b"import" + b" " * 9,
        b"import '/",
        b"from'./a'",
        b'import "/' + b"a" * 500,
    ],
)
def test_a_hostile_script_is_read_in_a_moment(piece: bytes) -> None:
    began = time.monotonic()
    assert len(_imported(piece * ((1 << 19) // len(piece)))) <= 256
    assert time.monotonic() - began < 5


def test_what_a_message_of_react_shows_as_an_example_is_no_import() -> None:
    script = b"""import a from "./chunk-A.js?v=1"; import("/@vite/client"); import('../b.mjs')
        console.error("Your code should look like: MyComponent = lazy(() => import('./MyComponent'))")"""
    assert {*_imported(script)} == {"./chunk-A.js?v=1", "/@vite/client", "../b.mjs"}


def test_the_rest_of_a_page_with_a_long_script_is_not_lost() -> None:
    body = b"<script>" + b"a<b;" * 20_000 + b"</script><script src=late.js></script>"
    _, named, inline = _named(body)
    assert named == ["late.js"]
    assert len(inline) <= 64 << 10
