"""How the Caddys of a cluster's members connect to each other: by TLS, with one certificate for all of them.

Every gateway of the cluster derives the same certificate from their common secret. So no member needs to
learn another's, and none has to be told of a new one. It gives access to sites, which are public anyway.
"""

from __future__ import annotations

import datetime
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

NAME: Final = "sites.gateway.internal"
"""The name in the certificate. It is no host's."""

_FOLDER: Final = "peers"
_ADDRESS: Final = re.compile(r"(?P<host>[0-9A-Za-z.-]+|\[[0-9a-f:]+\]):(?P<port>[0-9]{1,5})")
_SINCE: Final = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_UNTIL: Final = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Peers:
    """Where this Caddy answers the other members', and the files of the common certificate."""

    host: str
    port: int
    certificate: Path
    key: Path


def peers(folder: Path) -> Peers | None:
    """Return what `lay_peers` laid into Caddy's folder; None if this is no member of a cluster."""
    try:
        match = _ADDRESS.fullmatch((folder / _FOLDER / "address").read_text().strip())
    except OSError:
        return None
    if match is None:
        return None
    certificate, key = folder / _FOLDER / "certificate.pem", folder / _FOLDER / "key.pem"
    return Peers(match["host"], int(match["port"]), certificate, key)


def is_address(text: str) -> bool:
    """Return whether a text is HOST:PORT as Caddy takes it from a route."""
    return _ADDRESS.fullmatch(text) is not None


def lay_peers(folder: Path, address: str, secret: str) -> None:
    """Have Caddy answer other members at HOST:PORT once its configuration is loaded. Raises `OSError`.

    Only the gateway and Caddy can read the key: it has the group of Caddy's `data`, if root lays it.
    """
    if not is_address(address):
        raise ValueError(f"{address!r} is not HOST:PORT")
    place = folder / _FOLDER
    place.mkdir(mode=0o755, parents=True, exist_ok=True)
    certificate, key = certified(secret)
    _put(place / "key.pem", key, 0o640, _group(folder))
    _put(place / "certificate.pem", certificate, 0o644)
    _put(place / "address", f"{address}\n".encode(), 0o644)


def remove_peers(folder: Path) -> None:
    """Have Caddy answer no other member. Idempotent. Raises `OSError`."""
    for name in ("address", "key.pem", "certificate.pem"):
        (folder / _FOLDER / name).unlink(missing_ok=True)


def certified(secret: str) -> tuple[bytes, bytes]:
    """Return certificate and key in PEM, always the same ones for a secret (Ed25519, RFC 8032)."""
    # brings OpenSSL, which a gateway without a cluster does without
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    seed = HKDF(hashes.SHA256(), 32, None, b"incus-gateway sites of peers").derive(secret.encode())
    key = Ed25519PrivateKey.from_private_bytes(seed)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, _SINCE, _UNTIL)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(usages, critical=False)
        .sign(key, None)
    )
    pem = serialization.Encoding.PEM
    hidden = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem), hidden


def _group(folder: Path) -> int:
    try:
        return (folder / "data").stat().st_gid
    except OSError:
        return -1


def _put(path: Path, content: bytes, mode: int, group: int = -1) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)
        if os.geteuid() == 0 and group != -1:
            os.fchown(file.fileno(), -1, group)
    new.replace(path)
