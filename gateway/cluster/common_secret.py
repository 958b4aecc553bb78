"""The secret that signs tokens, shared by all gateways of a cluster.

The first gateway puts a hash of its secret into a key of the cluster. Each later gateway fetches the secret
from another one, over their own channel, and checks it against the hash.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from gateway.auth.issuing import keep_secret, known_secret, load_secret
from gateway.cluster.shared_keys import SharedKeys
from gateway.errors import Unavailable

log = logging.getLogger(__name__)

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
    known = await asyncio.to_thread(known_secret, configured, state_dir)
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
    fetched = await asyncio.to_thread(known_secret, None, candidate)
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
