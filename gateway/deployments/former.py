"""The former sites that a tenant keeps, as deployments see them."""

from __future__ import annotations

import logging
import secrets

from gateway.deployments.context import Context
from gateway.deployments.record import Record
from gateway.errors import GatewayError
from gateway.runtime import Tenant

log = logging.getLogger(__name__)


async def live_one(context: Context, tenant: Tenant) -> str:
    """Return the deployment of a tenant's live site; if it is unknown, an id that no client has seen."""
    noted, _ = await context.sites.former.live(tenant.name)
    return noted or await context.register.maker(tenant.name, tenant.instance) or f"d-{secrets.token_hex(8)}"


async def keep_former(context: Context, record: Record) -> None:
    """Keep the site that was replaced. If that fails, the deployment has succeeded all the same."""
    if record.former is None:
        return
    try:
        most = context.settings.rollbacks_kept
        await context.sites.former.put(record.tenant, record.former, record.id, most)
    except (GatewayError, TimeoutError, OSError) as error:
        log.warning("cannot keep the former site of %s: %s", record.tenant, error)
