"""Knows domains: which are valid, and which tenant's name each makes."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from gateway.errors import InvalidParams

_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MAX: Final = 253  # RFC 1035
_NAME_MAX: Final = 63


def normalized(text: str) -> str:
    """Return a domain in lower case and, where it is not ASCII, in IDNA. Raises `InvalidParams`."""
    domain = text.strip().lower().removesuffix(".")
    try:
        domain = domain.encode("ascii" if domain.isascii() else "idna").decode("ascii")
    except UnicodeError:
        domain = ""
    labels = domain.split(".")
    if len(domain) > _MAX or len(labels) < 2 or not all(_LABEL.fullmatch(label) for label in labels):
        raise InvalidParams(f"{text[:100]!r} is no domain such as shop.example.com", field="domain")
    if labels[-1].isdigit():
        raise InvalidParams(f"{text[:100]!r} is an address; a site needs a domain", field="domain")
    return domain


def tenant_name(domain: str) -> str:
    """Return the name of a domain's tenant: dots become dashes; what is too long is cut and hashed."""
    name = domain.replace(".", "-")
    if not name[0].isalpha():
        name = f"s-{name}"
    if len(name) <= _NAME_MAX:
        return name
    digest = hashlib.sha256(domain.encode()).hexdigest()[:10]
    return f"{name[: _NAME_MAX - 11].rstrip('-')}-{digest}"
