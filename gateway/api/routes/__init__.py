"""The application's routes: one module for each family, and all of them in `ROUTES`."""

from __future__ import annotations

from typing import Final

from starlette.routing import BaseRoute

from gateway.api import editor
from gateway.api.routes import deployments, events, gateway, session, tenants, websocket, workspace

ROUTES: Final[tuple[BaseRoute, ...]] = (
    *editor.ROUTES,
    *gateway.process,
    *gateway.reference,
    *session.routes,
    *tenants.tenants,
    *tenants.lifecycle,
    *workspace.tools,
    *workspace.files,
    *workspace.history,
    *deployments.routes,
    *events.routes,
    *gateway.operator,
    *websocket.ROUTES,
)
