"""What a tenant keeps of the sites that were live, as deployments see it."""

from __future__ import annotations

import logging
import secrets

from gateway.deployments.context import Context
from gateway.deployments.record import Record
from gateway.errors import GatewayError
from gateway.runtime import Tenant

log = logging.getLogger(__name__)


async def live_one(context: Context, tenant: Tenant) -> str:
    """Return the deployment of a tenant's live site; where nothing tells of it, an id that was never told."""
    noted, _ = await context.sites.former.live(tenant.name)
    return noted or await context.register.maker(tenant.name, tenant.instance) or f"d-{secrets.token_hex(8)}"


async def keep_former(context: Context, record: Record) -> None:
    """Keep the site whose place another took. Its deployment is a success whatever comes of this."""
    if record.former is None:
        return
    try:
        most = context.settings.rollbacks_kept
        await context.sites.former.put(record.tenant, record.former, record.id, most)
    except (GatewayError, TimeoutError, OSError) as error:
        log.warning("the former site of %s cannot be kept: %s", record.tenant, error)
