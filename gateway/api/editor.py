"""Serves the browser editor's built files, with their caching and content security policy.

`deploy/build-web` builds them from `clients/web` into `static/` beside this module; wheels contain them.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
import secrets
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from gateway.api.services import services
from gateway.errors import NotFound

STATIC: Final = Path(__file__).parents[1] / "static"

_ENCODINGS: Final = (("br", ".br"), ("gzip", ".gz"))  # in order of preference
_TYPES: Final = {
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
_NONCE: Final = '<meta name="csp-nonce" content="'
_AGENT: Final = '<meta name="agent-url" content="'
_INLINE: Final = re.compile(r"<script>(.*?)</script>", re.DOTALL)

# Nothing from other origins, no eval, and no inline script but the page's own, which loads the page again
# where a file did not come, and has to come with the page for that: its digest lets in no other. CodeMirror
# and xterm.js add styles by script: the nonce allows theirs, and nothing injected into the page. Besides the
# gateway, the page may only contact the operator's agents server, if there is one. Only the preview shows
# foreign content: the tenant's site, whose address is not known in advance, in a sandboxed frame of another
# origin.
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'{inline}",
        "style-src 'self' 'nonce-{nonce}'",
        "img-src 'self' blob: data:",
        "font-src 'self'",
        "connect-src 'self'{agent}",
        "frame-src http: https:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    # With "same-origin" alone, `window.open` returns null to a site in the preview. A page that opens the
    # editor gets no reference to it either way.
    "Cross-Origin-Opener-Policy": "same-origin-allow-popups",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}

_ABSENT: Final = """\
<!doctype html>
<html lang="en">
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width">
  <title>incus-gateway</title>
  <h1>The editor is not built</h1>
  <p>The gateway works; its API is under <code>/v1</code>. Only the browser editor is missing here.</p>
  <p>In a checkout run <code>deploy/build-web</code>, then load this page again.</p>
</html>
"""


async def page(request: Request) -> Response:
    """Return the editor's page, each time with a policy of its own."""
    nonce, agent = secrets.token_urlsafe(16), services(request).settings.agent_url or ""
    parts = urlsplit(agent)
    try:
        text, status = (STATIC / "index.html").read_text("utf-8"), 200
    except FileNotFoundError:
        text, status = _ABSENT, 503
    policy = _POLICY.format(
        nonce=nonce,
        agent=f" {parts.scheme}://{parts.netloc}" if agent else "",
        inline="".join(f" 'sha256-{_digest(script)}'" for script in _INLINE.findall(text)),
    )
    headers = {**_HEADERS, "Cache-Control": "no-cache", "Content-Security-Policy": policy}
    text = text.replace(_NONCE, _NONCE + nonce, 1).replace(_AGENT, _AGENT + html.escape(agent), 1)
    return HTMLResponse(text, status, headers=headers)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


async def asset(request: Request) -> Response:
    """Return one built file, from its compressed copy if the browser accepts that. Raises `NotFound`."""
    # names contain a digest of the content, so a browser need never ask again
    name = request.path_params["name"]
    return _file(request, STATIC / "assets" / name, name, "public, max-age=31536000, immutable")


async def icon(request: Request) -> Response:
    return _file(request, STATIC / "favicon.svg", "favicon.svg", "public, max-age=86400")


def _file(request: Request, path: Path, name: str, kept: str) -> Response:
    kind = _TYPES.get(path.suffix)
    # a route's `{name}` has no slash, so it stays in the folder; dots alone are no known suffix
    if kind is None or not path.is_file():
        raise NotFound(f"no file {name[:100]}")
    headers = {**_HEADERS, "Cache-Control": kept, "Vary": "Accept-Encoding"}
    taken = {
        part.partition(";")[0].strip().lower()
        for part in request.headers.get("accept-encoding", "").split(",")
        if part.replace(" ", "").lower().rpartition(";q=")[2] not in ("0", "0.0")
    }
    for encoding, suffix in _ENCODINGS:
        if encoding in taken and (smaller := path.with_name(path.name + suffix)).is_file():
            return FileResponse(smaller, headers={**headers, "Content-Encoding": encoding}, media_type=kind)
    return FileResponse(path, headers=headers, media_type=kind)


ROUTES: Final = (
    Route("/", page),
    Route("/assets/{name}", asset),
    Route("/favicon.svg", icon),
)
