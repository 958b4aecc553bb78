"""The certificate that identifies a gateway to its peers, and TLS that trusts no other.

Each gateway makes its own; its peers read it where only Incus's root may write. No authority signs anything:
a certificate is trusted because it is the very one that was published.

The secret that signs tokens, shared by all gateways of a cluster.

The first gateway puts a hash of its secret into a key of the cluster. Each later gateway fetches the secret
from another one, over their own channel, and checks it against the hash.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import logging
import os
import secrets
import shutil
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import orjson
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway.auth.issuing import existing_secret, keep_secret, load_secret
from gateway.errors import Unavailable
from gateway.ownership.reservations import SharedKeys

log = logging.getLogger(__name__)

_FILE: Final = "peer.pem"
_KNOWN: Final = "known-members"
_SLACK: Final = datetime.timedelta(days=7)  # that the clocks of two members may differ
_LIFE: Final = datetime.timedelta(days=36500)  # it is trusted by being published, and as long as it is


class Identity:
    """A gateway's own certificate: `certificate` as PEM, `fingerprint` as hexadecimal SHA-256.

    Making one blocks: do it in a thread.
    """

    def __init__(self, folder: Path) -> None:
        """Read it from a state dir, or make it there. Raises `OSError`."""
        self._file = folder / _FILE
        try:
            self.certificate = _certificate(self._file.read_text())
        except (FileNotFoundError, ValueError):
            _write(self._file, *_made())
            self.certificate = _certificate(self._file.read_text())
        self.fingerprint = fingerprint(self.certificate)
        self.known = KnownMembers(folder)

    def accepting(self) -> ssl.SSLContext:
        """Return a context for connections of peers, which must show a certificate.

        `trust` adds theirs. Which peer came must still be looked up, by its fingerprint.
        """
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def calling(self, certificate: str) -> ssl.SSLContext:
        """Return a context for connections to the peer that has this certificate. Raises `ValueError`."""
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        trust(context, certificate)
        return context

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # an address is no name: the certificate itself is compared
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self._file)
        return context


def trust(context: ssl.SSLContext, certificate: str) -> None:
    """Let a context accept one more certificate. Raises `ValueError` if it is not one."""
    try:
        context.load_verify_locations(cadata=certificate)
    except ssl.SSLError as error:
        raise ValueError(f"not a certificate: {error.reason}") from None


def fingerprint(certificate: str | bytes) -> str:
    """Return the hexadecimal SHA-256 of a certificate, PEM or DER. Raises `ValueError` for what is no PEM."""
    der = ssl.PEM_cert_to_DER_cert(certificate) if isinstance(certificate, str) else certificate
    return hashlib.sha256(der).hexdigest()


class KnownMembers:
    """The members whose certificates this gateway has ever trusted, kept in the state dir.

    By these a former member learns that it was removed, and the age of its copies is counted until it was
    last heard.
    The methods block for a small file.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _KNOWN
        self._entries: dict[str, Mapping[str, Any]] = {}  # by fingerprint
        with contextlib.suppress(OSError, ValueError):
            self._entries = dict(orjson.loads(self._file.read_bytes()))

    def name(self, shown: str) -> str | None:
        """Return the name of the member that had the certificate with this fingerprint."""
        entry = self._entries.get(shown)
        return None if entry is None else str(entry["name"])

    def certificates(self) -> Iterator[str]:
        return (str(entry["certificate"]) for entry in self._entries.values())

    def note(self, name: str, certificate: str, heard: float | None = None) -> None:
        """Record a member, and when it was last heard, in seconds since the epoch. Raises `OSError`."""
        shown = fingerprint(certificate)
        before = self._entries.get(shown, {})
        entry = {"name": name, "certificate": certificate, "heard": heard or before.get("heard")}
        if entry != before:
            self._entries[shown] = entry
            new = self._file.with_suffix(".new")
            new.write_bytes(orjson.dumps(self._entries))
            new.replace(self._file)

    def heard(self, name: str) -> float | None:
        """Return when a member that is silent was last heard, None if this gateway does not know."""
        found = [entry["heard"] for entry in self._entries.values() if entry["name"] == name]
        return max((float(at) for at in found if at is not None), default=None)


def _made() -> tuple[bytes, bytes]:
    """Return a new private key and its self-signed certificate, for both ends of a connection."""
    key = ec.generate_private_key(ec.SECP256R1())
    # of its own: where several in a store have one name, OpenSSL may compare with the wrong one
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"incus-gateway {secrets.token_hex(8)}")])
    now = datetime.datetime.now(datetime.UTC)
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(now + _LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usages, critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)


def _certificate(text: str) -> str:
    return text[text.index("-----BEGIN CERTIFICATE-----") :]


def _write(file: Path, *parts: bytes) -> None:
    """Put a file in place whole, for its owner alone."""
    made = file.with_suffix(".new")
    made.unlink(missing_ok=True)
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(b"".join(parts))
        stream.flush()
        os.fsync(stream.fileno())
    made.rename(file)


KEY: Final = "secret.sha256"
_TRIES: Final = 3

Fetch = Callable[[], Awaitable[str | None]]
"""Asks the other gateways for the secret; returns None where none of them gives it."""


async def common_secret(keys: SharedKeys, configured: str | None, state_dir: Path, fetch: Fetch) -> str:
    """Return the cluster's secret: this gateway's own if it is the first, or else the others'.

    Without a quorum it is this gateway's own, if it has one: that was the cluster's at its last start. Raises
    `Unavailable`, saying what to do, if this gateway has another secret than the cluster, or none and cannot
    get it.
    """
    known = await asyncio.to_thread(existing_secret, configured, state_dir)
    # of a gateway without a secret; not the secret before the cluster has its hash
    candidate = state_dir / "secret-candidate"
    for _ in range(_TRIES):
        try:
            wanted = await keys.get(KEY)
        except Unavailable:
            if known is None:
                raise
            log.warning("cannot compare this gateway's secret with the cluster's without a quorum")
            return known
        if wanted is not None:
            break
        own = await asyncio.to_thread(load_secret, None, candidate) if known is None else known
        await keys.swap(KEY, None, digest(own))
    else:
        raise Unavailable("the cluster's secret keeps being set and removed; restart the gateway")
    if known is not None:
        return _same(known, wanted, configured is not None)
    fetched = await asyncio.to_thread(existing_secret, None, candidate)
    if fetched is None or digest(fetched) != wanted:
        fetched = await fetch()
    if fetched is None or digest(fetched) != wanted:
        raise Unavailable(
            "cannot get the secret from any other gateway of the cluster; start one that has it, or set "
            "GATEWAY_SECRET",
            reason="secret_missing",
        )
    await asyncio.to_thread(keep_secret, fetched, state_dir)
    await asyncio.to_thread(shutil.rmtree, candidate, ignore_errors=True)
    return fetched


def digest(secret: str) -> str:
    """Return the hash by which gateways compare their secrets."""
    return hashlib.sha256(b"incus-gateway secret\0" + secret.encode()).hexdigest()


def _same(known: str, wanted: str, configured: bool) -> str:
    if digest(known) == wanted:
        return known
    cure = (
        "set GATEWAY_SECRET to that of the cluster's other gateways, or unset it"
        if configured
        else "move `secret` in the state dir away, and the gateway gets the cluster's at its next start; "
        "tokens that the old one signed are no longer valid then"
    )
    raise Unavailable(f"this gateway's secret is not its cluster's: {cure}", reason="secret_differs")
