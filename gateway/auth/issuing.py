"""Issues tokens: the secret that signs them, and what a token may contain.

Needs only the standard library, since each command issues itself a token: importing PyJWT, which verifies
them, would take longer than most commands.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import os
import pwd
import re
import secrets
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.errors import InvalidParams, Unavailable

SCOPES: Final = frozenset({"files:read", "files:write", "exec", "deploy", "manage", "events", "admin"})
# the claim `ver` of tokens in which `deploy` does not include `manage`; earlier tokens have none
VERSION: Final = 2
EVERY_TENANT: Final = "*"
# RFC 7518 §3.2: a key of HS256 has at least as many bits as the hash, 256
MIN_SECRET: Final = 32
MAX_TTL: Final = 10 * 366 * 86400

# a tenant's name as in the contract: a label of RFC 1035 §2.3.1 in lower case
_TENANT = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
_TTL = re.compile(r"([0-9]{1,12})([smhdw]?)")
_TTL_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def issue(
    secret: str,
    subject: str,
    tenants: Iterable[str],
    scopes: Iterable[str],
    ttl: int,
    domains: Iterable[str] | None = None,
    id: str | None = None,
) -> str:
    """Return a signed token that is valid for `ttl` seconds, with its own `jti` unless `id` gives one.

    The tenants need not exist. Raises `InvalidParams` for an unknown scope, an invalid tenant name or domain,
    or an empty or impossible value: otherwise a useless token would be noticed only in use.
    """
    names, granted = sorted(set(tenants)), sorted(set(scopes))
    if not subject or len(subject) > 200:
        raise InvalidParams("the subject of a token must have 1 to 200 characters", field="subject")
    if not names:
        raise InvalidParams("a token must name at least one tenant, or *", field="tenants")
    for name in names:
        if name != EVERY_TENANT and not _TENANT.fullmatch(name):
            raise InvalidParams(f"{name[:80]!r} is not a tenant name", field="tenants")
    if not granted:
        raise InvalidParams("a token must have at least one scope", field="scopes")
    if unknown := [scope for scope in granted if scope not in SCOPES]:
        known = " ".join(sorted(SCOPES))
        raise InvalidParams(f"unknown scope {unknown[0][:80]!r}; known are {known}", field="scopes")
    if not 0 < ttl <= MAX_TTL:
        raise InvalidParams("a token must be valid for one second to ten years", field="ttl")
    now = int(time.time())
    claims: dict[str, Any] = {
        "sub": subject,
        "tenants": names,
        "scope": " ".join(granted),
        "ver": VERSION,
        "iat": round(time.time(), 3),
        "exp": now + ttl,
        "jti": secrets.token_hex(16) if id is None else id,
    }
    if domains is not None:
        from gateway.hostnames import pattern

        claims["domains"] = sorted({pattern(entry) for entry in domains})
    return _signed(claims, checked(secret))


def _signed(claims: dict[str, Any], secret: str) -> str:
    """Return a JWT with these claims, signed with HS256 (RFC 7515 §3.1)."""
    parts = (b'{"alg":"HS256","typ":"JWT"}', orjson.dumps(claims))
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    signature = base64.urlsafe_b64encode(hmac.digest(secret.encode(), text, "sha256")).rstrip(b"=")
    return (text + b"." + signature).decode()


def caller() -> str:
    """Return the name of the person who runs this process, even by sudo; `operator` if it is unknown."""
    for name in (os.environ.get("SUDO_USER"), os.environ.get("USER"), os.environ.get("LOGNAME")):
        if name:
            return name[:100]
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # such as in a container without that user
        return "operator"


def parse_ttl(text: str) -> int:
    """Return the seconds in `30d`, `12h`, `15m`, `90s`, `2w` or a bare number. Raises `InvalidParams`."""
    match = _TTL.fullmatch(text.strip())
    seconds = int(match[1]) * _TTL_UNITS[match[2]] if match else 0
    if not 0 < seconds <= MAX_TTL:
        raise InvalidParams(f"{text[:40]!r} is not a duration such as 15m, 12h or 30d (ten years at most)")
    return seconds


# --- the secret --------------------------------------------------------------------------------------


def load_secret(configured: str | None, state_dir: Path) -> str:
    """Return the secret that signs tokens: the configured one, or else that in the state dir.

    The latter is created on first use with 256 random bits and mode 0600. Two processes that start at once
    agree on it: each writes a file of its own and links it to the name, which only one can do. Raises
    `InvalidParams` for a secret that is too short or that others can read, and `Unavailable` if the state
    dir cannot be used.
    """
    if configured is not None:
        return checked(configured)
    path = state_dir / "secret"
    try:
        try:
            return _read_secret(path)
        except FileNotFoundError:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_secret(path, secrets.token_hex(MIN_SECRET))
            return _read_secret(path)
    except OSError as error:
        raise Unavailable(f"the secret in the state dir cannot be used: {error.strerror}") from error


def existing_secret(configured: str | None, state_dir: Path) -> str | None:
    """Return the secret as `load_secret` does, None if none was made yet."""
    if configured is not None:
        return checked(configured)
    try:
        return _read_secret(state_dir / "secret")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unavailable(f"the secret in the state dir cannot be used: {error.strerror}") from error


def keep_secret(secret: str, state_dir: Path) -> None:
    """Have `load_secret` return this secret from now on. Raises `InvalidParams` and `Unavailable`."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_secret(state_dir / "secret", checked(secret), replace=True)
    except OSError as error:
        raise Unavailable(f"the secret in the state dir cannot be written: {error.strerror}") from error


def _read_secret(path: Path) -> str:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), encoding="utf-8") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode) or mode & 0o077:
            raise InvalidParams(
                "other users may read the secret in the state dir: chmod 600 it, and check who has read it"
            )
        return checked(file.read(4096).strip())


def _write_secret(path: Path, secret: str, *, replace: bool = False) -> None:
    own = path.with_name(f".secret-{secrets.token_hex(8)}")
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if os.geteuid() == 0:
                # root may ask for a token before the gateway has ever run as its own user
                owner = path.parent.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(secret + "\n")
            file.flush()
            os.fsync(file.fileno())
        if replace:
            own.replace(path)
            return
        with contextlib.suppress(FileExistsError):  # another process was first, so its secret is used
            os.link(own, path)
    finally:
        own.unlink(missing_ok=True)


def checked(secret: str) -> str:
    """Return a secret if it is long enough. Raises `InvalidParams`."""
    if len(secret.encode()) < MIN_SECRET:
        raise InvalidParams(
            f"the secret must have at least {MIN_SECRET} bytes; `openssl rand -hex 32` makes one"
        )
    return secret
