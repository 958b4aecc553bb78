"""The error for what Caddy refuses or cannot do."""

from __future__ import annotations

from gateway.errors import Unavailable


class CaddyFailed(Unavailable):
    """Caddy is down, refuses, or is not ours.

    `facts["reason"]` is `caddy_down`, `caddy_denied`, `caddy_foreign` or `caddy_refused`.
    """
