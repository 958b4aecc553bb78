"""What Caddy refuses or cannot do."""

from __future__ import annotations

from gateway.errors import Unavailable


class CaddyFailed(Unavailable):
    """Caddy does not do its part.

    `facts["reason"]` is `caddy_down`, `caddy_denied`, `caddy_foreign` or `caddy_refused`.
    """
