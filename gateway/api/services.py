"""The services that the routes and websockets of a gateway use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from gateway.api.connection import Hub
from gateway.api.mcp_loading import McpEndpoint
from gateway.api.metrics import Metrics
from gateway.api.preview import Previews
from gateway.audit import Audit
from gateway.auth.grants import Revocations
from gateway.cluster.cluster import Cluster
from gateway.cluster.dead_peers import DeadPeers
from gateway.cluster.peers import MemberAway
from gateway.cluster.records import Records
from gateway.cluster.revoking import Revoking
from gateway.cluster.sharing import Sharing
from gateway.deployments import Deployments, Health
from gateway.deployments.publishing import Sources
from gateway.errors import Unavailable
from gateway.events import StoredJournal
from gateway.idempotency import Idempotency
from gateway.lifecycle.arrivals import Arrivals
from gateway.lifecycle.departures import Departures
from gateway.lifecycle.lifecycle import Lifecycle
from gateway.lifecycle.site_logs import SiteLogs
from gateway.lifecycle.standby import Standby
from gateway.limits.pressure import Pressure
from gateway.ownership.domains import Domains
from gateway.ownership.names import Names
from gateway.rootfs.workers import Workers
from gateway.runtime.sites import Sites
from gateway.transport.tunnel import Near


@dataclass(kw_only=True)
class Services(Hub):
    """Everything that lives as long as the gateway. Websockets see the part in `Hub`.

    `secret` signs tokens. `end_token` ends what is open under a token, by its id, and returns how many
    websockets that closed. `pressure` is None on the local runtime, `mcp` if that extra is not installed, and
    `revoking` and `cluster` are if there is no cluster. `shared`, `dead_peers` and `standby` are if there
    is none of Incus.
    """

    secret: str = field(repr=False)
    journal: StoredJournal
    idempotency: Idempotency
    revocations: Revocations
    end_token: Callable[[str], int]
    shared: Sharing | None
    revoking: Revoking | None
    names: Names
    records: Records
    audit: Audit
    workers: Workers
    domains: Domains
    lifecycle: Lifecycle
    site_logs: SiteLogs
    health: Health
    deployments: Deployments
    sources: Sources
    pressure: Pressure | None
    metrics: Metrics
    mcp: McpEndpoint | None
    leave_ready: Callable[[], None]  # leaves what is ready for new tenants to the next process
    sites: Sites
    previews: Previews
    cluster: Cluster | None
    dead_peers: DeadPeers | None
    departures: Departures | None  # to other members, and
    arrivals: Arrivals | None  # from them; None without a cluster of Incus
    standby: Standby | None  # copies on other members
    tunnels: set[Near]  # websockets of other members' tenants
    draining: bool = False

    def resumed(self, tenant: str, last_event_id: str | int | None) -> int | None:
        return self.names.position(tenant, last_event_id)

    def elsewhere(self, tenant: str) -> None:
        peer = None if self.cluster is None else self.cluster.homes.home(tenant)
        if peer is not None and not peer.alive:
            raise MemberAway(peer.name)
        if peer is not None:
            raise Unavailable(f"tenant {tenant} is on another member; connect again", reason="elsewhere")


def services(asked: HTTPConnection) -> Services:
    """Return the services of a request's or websocket's gateway."""
    found: Services = asked.app.state.services
    return found
