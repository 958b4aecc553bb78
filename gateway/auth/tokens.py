"""Authentication: tokens and where requests carry them, browser sessions, allowed origins.

A token is a JWT signed with HS256, made by `issuing`. Everything here is functions over values; only
`load_secret` reads the disk, once at the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

import jwt

from gateway.auth import issuing
from gateway.auth.issuing import EVERY_TENANT
from gateway.auth.issuing import SCOPES as SCOPES
from gateway.auth.issuing import issue as issue
from gateway.auth.issuing import parse_ttl as parse_ttl
from gateway.errors import Forbidden, Unauthorized
from gateway.protocol.maxima import TOKEN_MAX
from gateway.settings import Settings

COOKIE: Final = "gateway_session"
# a session slot's name, not a secret: with slots, one browser can have several tokens
SLOT: Final = r"[a-z0-9]{1,32}"
# slots' cookies in one browser; an ever-growing header would be refused one day
MOST_SLOTS: Final = 8

_AGENT: Final = " (agent)"
_OF_AGENTS: Final = ("files:read", "files:write", "exec", "events")  # not `deploy`, `manage` or `admin`
_HOST_ONLY: Final = "__Host-"
_ALGORITHM: Final = "HS256"
# valid tokens whose signature is not computed again, which takes a seventh of the CPU of a small request
_REMEMBERED: Final = 512
_EXPIRED: Final = "this token has expired; ask for a new one"

_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Token:
    """A verified token's contents: the caller, and what it allows.

    `tenants` are names, or `*` for all. `expires` and `issued` are in seconds since the epoch; `issued` is 0
    if the token has none. `id` is the `jti` by which the token is revoked. `domains` are those that its
    tenants may be given, with `*.suffix` as a pattern; None if the token does not limit them.
    """

    subject: str
    tenants: frozenset[str]
    scopes: frozenset[str]
    expires: int
    id: str
    domains: frozenset[str] | None = None
    issued: float = 0.0

    @property
    def coverage(self) -> frozenset[str] | None:
        """The names this token covers, None for every tenant; as an event filter takes it."""
        return None if EVERY_TENANT in self.tenants else self.tenants

    @property
    def operates(self) -> bool:
        """Whether this is an operator's token: for every tenant, with the scope `admin`."""
        return self.coverage is None and "admin" in self.scopes

    def covers(self, tenant: str) -> bool:
        """Return whether the token covers `tenant`. Compares whole names, never prefixes."""
        return EVERY_TENANT in self.tenants or tenant in self.tenants

    def allows(self, scope: str) -> bool:
        """Return whether the token has `scope`; `admin` implies every scope."""
        return scope in self.scopes or "admin" in self.scopes

    def require(self, scope: str) -> None:
        """Raise `Forbidden` unless the token has `scope`."""
        if not self.allows(scope):
            raise Forbidden(f"this token lacks the scope {scope}", scope=scope)


def verify(secret: str, raw: str | None, revoked: Callable[[str], bool] | None = None) -> Token:
    """Return what the token `raw` grants. Raises `Unauthorized`.

    `revoked` is called with the `jti` of an otherwise valid token. The message only says whether a token is
    missing, expired or invalid, since the reason would help to forge one. Unknown scopes grant nothing.
    """
    if not raw:
        raise Unauthorized("a token is required: send Authorization: Bearer TOKEN")
    if len(raw) > TOKEN_MAX:
        raise Unauthorized("this token is not valid")
    token = _verified(secret, raw)
    if token.expires <= time.time():
        raise Unauthorized(_EXPIRED)
    if revoked is not None and revoked(token.id):
        raise Unauthorized("this token is not valid")
    return token


@lru_cache(_REMEMBERED)
def _verified(secret: str, raw: str) -> Token:
    """Return what a token grants for as long as it lasts. Raises `Unauthorized`, which is not remembered."""
    try:
        claims = jwt.decode(
            raw,
            secret,
            # this list prevents alg=none, and a public key used as HMAC secret
            algorithms=[_ALGORITHM],
            options={"require": ["sub", "exp", "jti", "tenants", "scope"]},
        )
    except jwt.ExpiredSignatureError:
        # only reported for a valid signature
        raise Unauthorized(_EXPIRED) from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError):
        raise Unauthorized("this token is not valid") from None
    subject, tenants, scope, identifier = (claims[key] for key in ("sub", "tenants", "scope", "jti"))
    domains = claims.get("domains")
    if not (
        isinstance(subject, str)
        and isinstance(identifier, str)
        and identifier
        and isinstance(scope, str)
        and isinstance(tenants, list)
        and all(isinstance(name, str) for name in tenants)
        and (domains is None or (isinstance(domains, list) and all(isinstance(one, str) for one in domains)))
    ):
        raise Unauthorized("this token is not valid")
    scopes = SCOPES.intersection(scope.split())
    if "deploy" in scopes and "ver" not in claims:
        scopes |= {"manage"}  # what `deploy` allowed when this token was made
    return Token(
        subject=subject,
        tenants=frozenset(tenants),
        scopes=scopes,
        expires=int(claims["exp"]),
        id=identifier,
        domains=None if domains is None else frozenset(domains),
        issued=float(claims.get("iat", 0)),
    )


def for_agent(secret: str, token: Token, tenant: str, ttl: float) -> tuple[str, Token]:
    """Return a token for an agent that works for whoever has `token`, and what it grants.

    It is for one tenant, has only an agent's scopes, and ends with `token` at the latest, also when that is
    revoked, since it has the same id. Its subject says that it is an agent. Raises `Forbidden` if no scope
    is left, `Unauthorized` if no time is.
    """
    scopes = [scope for scope in _OF_AGENTS if token.allows(scope)]
    if not scopes:
        raise Forbidden(f"an agent needs one of the scopes {' '.join(_OF_AGENTS)}")
    left = min(int(ttl), token.expires - int(time.time()))
    if left <= 0:
        raise Unauthorized("this token has expired; ask for a new one")
    subject = token.subject[: 200 - len(_AGENT)] + _AGENT
    raw = issuing.issue(secret, subject, [tenant], scopes, left, id=token.id)
    return raw, verify(secret, raw)


def identified(text: str) -> tuple[str, float | None]:
    """Return `jti` and `exp` of a token, its signature unchecked; `text` and None if it is not a token."""
    try:
        claims = jwt.decode(text, options={"verify_signature": False})
    except jwt.PyJWTError:
        return text, None
    expires = claims.get("exp")
    return str(claims.get("jti", text)), expires if isinstance(expires, int | float) else None


def token_id(text: str) -> str:
    """Return the `jti` of a token as `identified` does."""
    return identified(text)[0]


def load_secret(settings: Settings) -> str:
    """Return the secret that signs tokens; see `issuing.load_secret`."""
    configured = None if settings.secret is None else settings.secret.get_secret_value()
    return issuing.load_secret(configured, settings.state_dir)


# --- where a token comes from ------------------------------------------------------------------------


def raw_token(
    authorization: str | None, cookie: str | None, slot: str | None = None, *, secure: bool = False
) -> str | None:
    """Return the token of a request's `Authorization` and `Cookie` headers; the former wins.

    `slot` and `secure` are as for `cookie_token`.
    """
    return bearer_token(authorization) or cookie_token(cookie, slot, secure=secure)


def bearer_token(authorization: str | None) -> str | None:
    """Return the token of `Authorization: Bearer TOKEN`; None if there is none (RFC 6750 §2.1)."""
    scheme, _, value = (authorization or "").strip().partition(" ")
    return value.strip() or None if scheme.lower() == "bearer" else None


def cookie_name(slot: str | None = None, *, secure: bool = False) -> str:
    """Return the name of a slot's session cookie.

    With https it is one that no other host can set: `__Host-` (RFC 6265bis §4.1.3.2).
    """
    return (_HOST_ONLY if secure else "") + (COOKIE if slot is None else f"{COOKIE}_{slot}")


def cookie_token(cookie: str | None, slot: str | None = None, *, secure: bool = False) -> str | None:
    """Return the token of the session cookie of a slot, or of the one without a slot.

    Slots do not fall back to each other. With https, only the name that no other host can set is accepted;
    with http, where browsers keep that name for this machine only, it is preferred. Raises `Unauthorized`
    for two cookies of one name: another site has set one, and they cannot be told apart.
    """
    cookies = _cookies(cookie)
    for name in (cookie_name(slot, secure=True), *(() if secure else (cookie_name(slot),))):
        found = [value for given, value in cookies if given == name]
        if len(found) > 1:
            raise Unauthorized(
                f"the request has two cookies named {name}: another site of this domain has set one; delete "
                "this site's cookies in the browser, then sign in again"
            )
        if found:
            return found[0] or None
    return None


def slots(cookie: str | None) -> list[str]:
    """Return the names of the slots' cookies in the order received: browsers send older ones first."""
    found = dict.fromkeys(name for name, _ in _cookies(cookie))
    return [name for name in found if name.removeprefix(_HOST_ONLY).startswith(f"{COOKIE}_")]


def _cookies(cookie: str | None) -> list[tuple[str, str]]:
    parts = (part.strip().partition("=") for part in (cookie or "").split(";"))
    return [(name, value.strip().strip('"')) for name, _, value in parts]


# --- browsers ----------------------------------------------------------------------------------------


def origin_allowed(
    origin: str | None,
    host: str | None,
    scheme: str,
    allowed: Iterable[str] = (),
    forwarded_proto: str | None = None,
) -> bool:
    """Return whether a request with this `Origin` may be served: none, same-origin, or listed.

    `scheme` is the connection's (`http`, `https`, `ws` or `wss`) and `forwarded_proto` the proxy's
    `X-Forwarded-Proto`, which takes precedence. A page of another site cannot set that header, and
    clients other than browsers need no permission. `null` (sandboxed frames, files) is never allowed, and
    `*` has no special meaning.
    """
    if origin is None:
        return True
    asked = _origin(origin)
    if asked is None:
        return False
    if forwarded_proto:
        scheme = forwarded_proto.split(",")[0]
    scheme = {"ws": "http", "wss": "https"}.get(scheme.strip().lower(), scheme.strip().lower())
    return asked == _origin(f"{scheme}://{host}") or any(asked == _origin(entry) for entry in allowed)


def _origin(text: str) -> tuple[str, str, int] | None:
    """Return (scheme, host, port) of an origin, or None if `text` is not one (RFC 6454 §4)."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        return None
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc or text != text.strip():
        return None
    return parts.scheme, parts.hostname, _DEFAULT_PORTS[parts.scheme] if port is None else port
