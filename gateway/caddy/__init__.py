"""The Caddy in front of all sites: the routes that it looks up, its configuration, its admin API.

Other packages use `Caddy`, `CaddyFailed`, and the names below.
"""

from gateway.caddy.caddy import Caddy, shipped, site_url, socket_of
from gateway.caddy.routes import CaddyFailed, asleep, elsewhere

__all__ = ["Caddy", "CaddyFailed", "asleep", "elsewhere", "shipped", "site_url", "socket_of"]
