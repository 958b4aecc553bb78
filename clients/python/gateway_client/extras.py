"""Explain what to install if the packages of an extra are missing."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires

# the client's distribution, or the gateway's: both have the same extras
_DISTRIBUTIONS = ("incus-gateway-client", "incus-gateway")


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
    """Add to a failed import of the extra's packages how to install them. Raises `ImportError`."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"gateway_client.{extra} needs more packages ({error}); install them with: "
            f"pip install {shlex.join(_packages(extra))}",
            name=error.name,
        ) from error


def _packages(extra: str) -> list[str]:
    """Return what the installed distribution says that the extra needs."""
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            lines = [line.replace('"', "'").partition("; ") for line in requires(name) or ()]
            if found := [line for line, _, marker in lines if f"extra == '{extra}'" in marker]:
                return found
    return [extra]
