"""Load a site's page as a browser does: its document, and the scripts and styles in it.

All of it is a tenant's, so it may be endless or slow to parse. Everything is bounded, HTML and scripts are
parsed in a thread, and only the site itself is ever asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from types import TracebackType
from typing import Final, TypeVar
from urllib.parse import urldefrag, urljoin, urlsplit

import aiohttp
from yarl import URL

from gateway.bounds import run_in_thread
from gateway.runtime.probe import DOCUMENT

T = TypeVar("T")

_AT_ONCE: Final = 6  # connections, as in browsers
_CONNECT: Final = 5.0  # seconds
_REDIRECTS: Final = 5
_NAMED: Final = 64  # scripts and styles of a document that are requested
_FOLLOWED: Final = 256  # modules that these import, directly or not
_KEPT: Final = 512 << 10  # bytes of one answer that are searched
_READ: Final = 4 << 20  # bytes of one answer that are read at all
_READING: Final = 5.0  # seconds for reading; it has answered by then
_ALL: Final = 64 << 20  # bytes of all answers
_INLINE: Final = 64 << 10  # characters of a document's own scripts
_PIECE: Final = 16 << 10  # characters that are parsed at once
_UNFINISHED: Final = 256 << 10  # characters of one tag, comment or script; scanned again with each piece
_PARSING: Final = 5.0  # seconds
_TARGET: Final = re.compile(r"/[!-~]{0,2047}")
# bounded, so that no script makes the search slow
_IMPORT: Final = re.compile(r"""\b(?:from|import)\s{0,9}\(?\s{0,9}(["'])((?:\.{0,2}/)[^"'\\\s]{1,500})\1""")
_SCRIPTS: Final = frozenset({"", "module", "text/javascript", "application/javascript"})
_INERT: Final = frozenset({"noscript", "template"})


@dataclass(frozen=True, slots=True)
class LoadedPage:
    """The result of loading a page. `missing` has each reference that failed, with the reason."""

    status: int
    missing: Mapping[str, str] = field(default_factory=dict)
    scripts: tuple[str, ...] = ()
    """What its scripts import, if that was asked for."""


@dataclass(frozen=True, slots=True)
class _Response:
    status: int
    kind: str = ""
    body: bytes = b""
    location: str = ""


class Browser:
    """Loads pages of one site, at an address of this host or of a tenant. Use as an async context manager.

    It has no cookies and no cache, and never asks other hosts.
    """

    def __init__(self, address: str, port: int, domain: str) -> None:
        self._at = f"http://{address}:{port}"
        self._domain = domain
        self._left = _ALL
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Browser:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_AT_ONCE),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Host": self._domain, "Accept-Encoding": "identity"},
            auto_decompress=False,
            requote_redirect_url=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def look(self, path: str, seconds: float) -> LoadedPage:
        """Load a document, and the scripts and styles in it; each answer must begin within `seconds`.

        Redirects to another host are not followed. Raises `OSError` and `ValueError` if there is no HTTP
        answer to the document.
        """
        answer = await self._ask(path, seconds, DOCUMENT)
        for _ in range(_REDIRECTS):
            onward = self._site_path(answer.location, path) if 300 <= answer.status < 400 else None
            if onward is None or onward == path:  # such as to HTTPS
                break
            path = onward
            answer = await self._ask(path, seconds, DOCUMENT)
        if answer.status >= 400 or not answer.kind.startswith("text/html"):
            return LoadedPage(answer.status)
        base, named, inline = await self._parsed(_named, answer.body) or ("", [], "")
        with contextlib.suppress(ValueError):
            base = self._url(base, path)
        wanted = list(dict.fromkeys(own for name in named if (own := self._site_path(name, base))))[:_NAMED]
        found = await asyncio.gather(*(self._part(name, seconds) for name in wanted))
        missing = {name: why for name, (why, _) in zip(wanted, found, strict=True) if why}
        scripts = await self._imports(base, inline.encode())
        for name, (_, part) in zip(wanted, found, strict=True):
            if "javascript" in part.kind:
                scripts += await self._imports(name, part.body)
        return LoadedPage(answer.status, missing, tuple(dict.fromkeys(scripts)))

    async def follow(self, scripts: Iterable[str], seconds: float) -> int:
        """Request what scripts import, directly or not, for `seconds`; return how many answered.

        A dev server builds each of these on the first request. A missing one is not an error, since what
        looks like an import may not be one.
        """
        seen, next_, answered = set[str](), list(scripts), 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while wanted := [name for name in dict.fromkeys(next_) if name not in seen]:
                    wanted = wanted[: _FOLLOWED - len(seen)]
                    seen.update(wanted)
                    next_ = []
                    for name, (why, part) in zip(
                        wanted,
                        await asyncio.gather(*(self._part(name, seconds) for name in wanted)),
                        strict=True,
                    ):
                        answered += not why
                        next_ += await self._imports(name, part.body) if "javascript" in part.kind else []
                    if len(seen) >= _FOLLOWED:
                        break
        return answered

    async def _part(self, path: str, seconds: float) -> tuple[str, _Response]:
        """Request something that a document refers to; return what is wrong with its answer, if anything."""
        try:
            answer = await self._ask(path, seconds)
            return (f"status {answer.status}" if answer.status >= 400 else ""), answer
        except TimeoutError:
            return f"no answer in {seconds:g} s", _Response(0)
        except (OSError, ValueError):
            return "no answer", _Response(0)

    async def _ask(self, path: str, seconds: float, accept: str = "*/*") -> _Response:
        """Raises `OSError` (and so `TimeoutError`), and `ValueError` for an answer that is not HTTP."""
        limits = aiohttp.ClientTimeout(sock_connect=_CONNECT)
        try:
            async with asyncio.timeout(seconds):
                answer = await self._session.get(
                    URL(self._at + path, encoded=True),
                    allow_redirects=False,
                    timeout=limits,
                    headers={"Accept": accept},
                )
        except aiohttp.ClientConnectionError as error:
            raise ConnectionError("no answer") from error
        except aiohttp.ClientError as error:
            raise ValueError("no HTTP") from error
        body = bytearray()
        async with answer:
            # it has answered, which is all that counts here
            with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                async with asyncio.timeout(_READING):
                    await self._read(answer.content, body)
        headers = answer.headers
        return _Response(
            answer.status,
            headers.get("Content-Type", "").lower(),
            bytes(body),
            headers.get("Location", ""),
        )

    async def _read(self, content: aiohttp.StreamReader, kept: bytearray) -> None:
        left = _READ
        while left > 0 and self._left > 0 and (piece := await content.readany()):
            left -= len(piece)
            self._left -= len(piece)
            kept += piece[: _KEPT - len(kept)]

    async def _imports(self, path: str, script: bytes) -> list[str]:
        names = await self._parsed(_imported, script) if script else []
        return [own for name in names or () if (own := self._site_path(name, path))]

    async def _parsed(self, read: Callable[[bytes], T], body: bytes) -> T | None:
        """Return the beginning of an answer's body, None if that takes too long."""
        try:
            return await run_in_thread(self._domain, _PARSING, read, body)
        except TimeoutError:
            return None

    def _url(self, name: str, path: str) -> str:
        """Return the URL of a reference on that page, or below that base. Raises `ValueError`."""
        return urljoin(
            urljoin(f"http://{self._domain}/", path), urldefrag(name.strip().replace("\\", "/"))[0]
        )

    def _site_path(self, name: str, path: str) -> str | None:
        """Return a reference as a path of this site; None if it leads elsewhere or is invalid."""
        try:
            parts = urlsplit(self._url(name, path))
        except ValueError:
            return None
        if parts.scheme not in ("http", "https") or parts.hostname != self._domain:
            return None
        own = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return own if _TARGET.fullmatch(own) else None


class _Enough(Exception):
    """Ends the search of a document that has enough."""


class _PageParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.base = ""
        self.named: list[str] = []
        self.inline = ""
        self._inert = 0
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in reversed(attrs)}  # the first of a name counts
        if tag in _INERT:
            self._inert += 1
        if self._inert:
            return
        if tag == "base" and not self.base:
            self.base = said.get("href", "")
        elif tag == "script" and said.get("type", "").strip().lower() in _SCRIPTS and "nomodule" not in said:
            self._in_script = not said.get("src")
            if said.get("src"):
                self._add(said["src"])
        elif tag == "link" and said.get("href"):
            relations = said.get("rel", "").lower().split()
            if "modulepreload" in relations or ("stylesheet" in relations and "alternate" not in relations):
                self._add(said["href"])

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._in_script = False
        if tag in _INERT:
            self._inert = max(0, self._inert - 1)

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.inline += data[: _INLINE - len(self.inline)]

    def _add(self, name: str) -> None:
        self.named.append(name)
        if len(self.named) >= _NAMED:
            raise _Enough


def _named(body: bytes) -> tuple[str, list[str], str]:
    """Return a document's base, the scripts and styles it refers to, and its inline scripts."""
    text, document = body.decode("utf-8", "replace"), _PageParser()
    with contextlib.suppress(_Enough, AssertionError, ValueError):
        for at in range(0, len(text), _PIECE):
            document.feed(text[at : at + _PIECE])
            if len(document.rawdata) > _UNFINISHED:
                break
        else:
            document.close()  # some versions of the parser hold pieces back until there are enough
    return document.base, document.named, document.inline


def _imported(script: bytes) -> Collection[str]:
    found = _IMPORT.finditer(script.decode("utf-8", "replace"))
    names = {match[2] for match, _ in zip(found, range(_FOLLOWED), strict=False)}
    # React's development build has `import('./MyComponent')` in a message, and Vite would complain of that
    # in the site's log; what a server has built is named with its ending
    return {name for name in names if not name.startswith(".") or "." in name.rpartition("/")[2]}
